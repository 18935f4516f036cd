use std::time::SystemTime;

use async_nats::HeaderMap;
use bytes::Bytes;
use millrace_event::Lsn;

use super::*;

const ROW: u64 = 50;

fn at(n: u64) -> Position {
    Position::new(1, Lsn(n), 1)
}

/// A message at a sequence with these headers.
fn stored(stream_seq: u64, headers: &[(&str, String)], payload: String) -> StoredMessage {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.insert(*name, value.as_str());
    }
    StoredMessage {
        stream_seq,
        subject: "cdc.s._ctl.heartbeat".to_owned(),
        headers: map,
        payload: Bytes::from(payload),
        stored_at: SystemTime::UNIX_EPOCH,
    }
}

fn whole(stream_seq: u64, n: u64) -> StoredMessage {
    let position = at(n);
    let payload =
        format!(r#"{{"kind":"heartbeat","position":"{position}","end_lsn":{n},"ts_us":1}}"#);
    stored(stream_seq, &[], payload)
}

fn chunk(stream_seq: u64, n: u64, place: &str, more: &[(&str, String)]) -> StoredMessage {
    let mut headers = vec![
        (header::POSITION, at(n).to_string()),
        (header::CHUNK, place.to_owned()),
    ];
    headers.extend_from_slice(more);
    stored(stream_seq, &headers, String::new())
}

fn opens(stream_seq: u64) -> (&'static str, String) {
    let expected: &str = NATS_EXPECTED_LAST_SEQUENCE.as_ref();
    assert_eq!(expected, "Nats-Expected-Last-Sequence");
    ("Nats-Expected-Last-Sequence", (stream_seq - 1).to_string())
}

fn after(n: u64) -> (&'static str, String) {
    (header::AFTER, at(n).to_string())
}

/// What a stream of these messages, the oldest first, says.
fn found(messages: &[StoredMessage]) -> Position {
    let mut whole = Whole::below(at(ROW));
    for message in messages.iter().rev() {
        if let Search::Found(found) = whole.on_message(message) {
            return found;
        }
    }
    match whole.end() {
        Search::Found(found) => found,
        Search::Older => unreachable!("an end is found"),
    }
}

#[test]
fn it_is_the_message_before_the_set() {
    let stream = [
        whole(1, 30),
        whole(2, 40),
        chunk(3, ROW, "1/4/a", &[]),
        chunk(4, ROW, "2/4/a", &[]),
    ];
    assert_eq!(found(&stream), at(40));
}

#[test]
fn a_row_that_is_whole_counts_with_its_last_chunk_and_one_that_is_not_counts_for_nothing() {
    let stream = [
        whole(1, 30),
        chunk(2, 40, "1/2/a", &[]),
        chunk(3, 40, "2/2/a", &[]),
        chunk(4, 45, "1/2/b", &[]),
        chunk(5, ROW, "1/4/a", &[]),
    ];
    assert_eq!(found(&stream), at(40));
}

/// The nearest message below the row is lower than what nobody writes again.
#[test]
fn what_came_late_hides_nothing() {
    let stream = [
        whole(1, 40),
        whole(2, 30),
        chunk(3, ROW, "1/4/a", &[]),
        whole(4, 31),
        whole(5, 60),
        chunk(6, ROW, "2/4/a", &[]),
    ];
    assert_eq!(found(&stream), at(40));
}

#[test]
fn who_began_with_the_row_has_named_it() {
    let lost_twice = [
        whole(1, 40),
        chunk(2, ROW, "1/4/a", &[]),
        chunk(9, ROW, "1/4/b", &[opens(9), after(40)]),
        chunk(10, ROW, "2/4/b", &[]),
    ];
    assert_eq!(found(&lost_twice), at(40));
    // Who was overtaken and began above the row says nothing of it.
    let late = [
        whole(1, 40),
        chunk(2, ROW, "1/4/b", &[opens(2), after(60)]),
        chunk(3, ROW, "2/4/a", &[]),
    ];
    assert_eq!(found(&late), at(40));
}

#[test]
fn behind_a_hole_only_what_began_there_counts() {
    let begun = |headers: &[(&str, String)]| {
        let mut first = whole(9, 40);
        for (name, value) in headers {
            first.headers.insert(*name, value.as_str());
        }
        [whole(1, 45), first, chunk(10, ROW, "1/4/a", &[])]
    };
    assert_eq!(found(&begun(&[opens(9), after(30)])), at(40));
    assert_eq!(found(&begun(&[])), at(ROW).just_below());
    let alone = [whole(1, 45), chunk(9, ROW, "1/4/a", &[])];
    assert_eq!(found(&alone), at(ROW).just_below());
}

#[test]
fn without_anything_below_it_only_the_row_is_written_again() {
    let purged = [chunk(7, ROW, "1/4/a", &[]), chunk(8, ROW, "2/4/a", &[])];
    assert_eq!(found(&purged), at(ROW).just_below());
}

#[test]
fn the_search_ends() {
    let mut whole_below = Whole::below(at(ROW));
    let mut seen = 0;
    for stream_seq in (1..100_000).rev() {
        seen += 1;
        if let Search::Found(found) = whole_below.on_message(&whole(stream_seq, 20)) {
            assert_eq!((found, seen), (at(20), STRAGGLERS_MAX));
            return;
        }
    }
    panic!("it does not end");
}

/// Megabytes are asked for one by one, so their number alone bounds nothing.
#[test]
fn the_search_ends_behind_what_overtaken_publishers_may_have_sent_late() {
    const SIZE: usize = 1024 * 1024;
    // Two windows of it, a message more of each, and the one that is none of theirs.
    let late_max = 2 * (PUBLISH_WINDOW_BYTES_MAX / SIZE + 1);
    let large = |stream_seq, n| {
        let headers = [
            (header::POSITION, at(n).to_string()),
            (header::CHUNK, "2/2/l".to_owned()),
        ];
        stored(stream_seq, &headers, "x".repeat(SIZE))
    };
    let mut below = Whole::below(at(ROW));
    let mut seen = 0;
    for stream_seq in (1..100_u64).rev() {
        seen += 1;
        // The predecessor stands behind as many late ones as there may be.
        let n = if seen <= late_max { 20 } else { 40 };
        if let Search::Found(found) = below.on_message(&large(stream_seq, n)) {
            assert_eq!((found, seen), (at(40), late_max + 1));
            break;
        }
    }
    assert_eq!(seen, late_max + 1);

    // Nothing below the row yet: it goes on.
    let mut below = Whole::below(at(ROW));
    for stream_seq in (50..200_u64).rev() {
        assert_eq!(below.on_message(&large(stream_seq, 60)), Search::Older);
    }
    assert_eq!(below.on_message(&large(49, 40)), Search::Found(at(40)));
}
