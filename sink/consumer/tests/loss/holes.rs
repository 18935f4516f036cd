//! Sequences without messages in the middle of a stream, which a broker may leave that lost power.

use async_nats::HeaderMap;
use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream::Context;
use millrace_consumer::{ReadError, Reader, ReaderOptions, Start};
use millrace_event::{TableName, header, subject};
use millrace_lab::{Nats, NatsOptions};

use crate::decoded::{
    PATIENCE, connect, make, message, position, publish, reader, store, token, up_to,
};

const GAP: ReadError = ReadError::Gap {
    wanted: 13,
    found: 21,
};

/// What a publisher's first message says.
enum Says {
    /// Nothing: it is inside a batch.
    Nothing,
    /// Where the stream ended.
    End,
    /// That, and above which of the sequence it writes everything.
    After(u64),
}

/// A stream of 1 to 20 of which 13 to 20 are lost and not forgotten, and what a publisher writes then.
async fn stream_with_a_hole(nats: &Nats, source: &str, says: Says, again: &[u64]) -> Context {
    let jetstream = connect(nats.url()).await;
    make(&jetstream, source).await;
    let before: Vec<u64> = (1..=20).collect();
    store(&jetstream, source, "t", &before).await;
    let (first, rest) = again.split_first().expect("something");
    let mut headers = HeaderMap::new();
    if !matches!(says, Says::Nothing) {
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, "20");
    }
    if let Says::After(n) = says {
        headers.insert(header::AFTER, position(n).to_string());
    }
    let (subject, payload) = message(source, "t", *first);
    publish(&jetstream, subject, headers, payload).await;
    store(&jetstream, source, "t", rest).await;
    let stream = jetstream.get_stream(subject::stream_name(source)).await;
    let stream = stream.expect("a stream");
    for stream_seq in 13..=20 {
        stream.delete_message(stream_seq).await.expect("deleted");
    }
    jetstream
}

#[tokio::test]
async fn a_hole_is_a_gap_unless_what_it_held_is_written_again() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let again: Vec<u64> = (13..=30).collect();
    for own in [13, 17, 20] {
        let source = format!("s{own}");
        let jetstream = stream_with_a_hole(&nats, &source, Says::End, &again).await;
        let mut reader = reader(jetstream, &source, token(own, own));
        let expected: Vec<u64> = (own + 1..=30).collect();
        assert_eq!(up_to(&mut reader, 30).await, expected);
    }
    // It cannot know whether 13 is what follows 12.
    let jetstream = stream_with_a_hole(&nats, "next", Says::End, &again).await;
    let mut next = reader(jetstream, "next", token(12, 12));
    assert_eq!(next.next().await.err(), Some(GAP));
    // What an overtaken publisher sent late.
    let jetstream = stream_with_a_hole(&nats, "late", Says::Nothing, &[12, 21, 22]).await;
    let mut late = reader(jetstream, "late", token(12, 12));
    assert_eq!(late.next().await.err(), Some(GAP));
}

/// Of a publisher that says where it begins, also a reader goes on that has read no more than what was left, or less.
#[tokio::test]
async fn a_hole_is_no_gap_of_a_reader_at_its_edge_where_the_publisher_began_there() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let again: Vec<u64> = (13..=30).collect();
    let jetstream = stream_with_a_hole(&nats, "edge", Says::After(12), &again).await;
    let all: Vec<u64> = (1..=30).collect();
    let options = ReaderOptions::new(jetstream.clone(), "edge", Start::Beginning);
    let mut whole = Reader::open(options);
    assert_eq!(up_to(&mut whole, 30).await, all);
    for own in [5, 12, 17] {
        let mut reader = reader(jetstream.clone(), "edge", token(own, own));
        let position = usize::try_from(own).expect("small");
        assert_eq!(up_to(&mut reader, 30).await, all[position..], "{own}");
    }

    // It is also the stream's beginning, once what was left is purged.
    let stream = jetstream.get_stream(subject::stream_name("edge")).await;
    let purge = stream.expect("a stream").purge().sequence(21);
    purge.await.expect("purged");
    let mut purged = reader(jetstream.clone(), "edge", token(12, 12));
    assert_eq!(up_to(&mut purged, 30).await, all[12..]);
    let mut before = reader(jetstream, "edge", token(11, 11));
    let gap = ReadError::Gap {
        wanted: 12,
        found: 21,
    };
    assert_eq!(before.next().await.err(), Some(gap));

    // It had seen what was lost later.
    let jetstream = stream_with_a_hole(&nats, "seen", Says::After(20), &[21, 22]).await;
    let mut seen = reader(jetstream, "seen", token(12, 12));
    assert_eq!(seen.next().await.err(), Some(GAP));
}

/// A reader of `t`.
fn of_a_table(jetstream: Context, source: &str, start: Start) -> Reader {
    let mut options = ReaderOptions::new(jetstream, source, start);
    options.tables = Some(vec![TableName::new("public", "t")]);
    Reader::open(options)
}

/// Loses messages behind their readers' back.
async fn lose(jetstream: &Context, source: &str, lost: std::ops::RangeInclusive<u64>) {
    let stream = jetstream.get_stream(subject::stream_name(source)).await;
    let stream = stream.expect("a stream");
    for stream_seq in lost {
        stream.delete_message(stream_seq).await.expect("deleted");
    }
}

/// What a reader reads until it stops or has the 29th.
async fn until_it_stops(reader: &mut Reader) -> Result<Vec<u64>, ReadError> {
    let mut read = Vec::new();
    while read.last() != Some(&29) {
        let next = tokio::time::timeout(PATIENCE, reader.next()).await;
        let next = next.unwrap_or_else(|_| panic!("only {read:?}"));
        read.push(next?.position.commit_lsn().0);
    }
    Ok(read)
}

/// Its sequences have holes by nature, and this one hides changes of its table or does not.
#[tokio::test]
async fn a_reader_of_some_tables_judges_a_hole_that_it_does_not_see() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let again: Vec<u64> = (13..=30).collect();
    let changes = |from: u64| -> Vec<u64> { (from..30).filter(|n| n % 5 != 0).collect() };
    for (source, says, again) in [
        ("lost", Says::Nothing, &again[8..]),
        ("above", Says::After(20), &again[8..]),
        ("later", Says::After(13), &again[1..]),
    ] {
        let jetstream = stream_with_a_hole(&nats, source, says, again).await;
        let mut reader = of_a_table(jetstream, source, Start::Beginning);
        for _ in 0..2 {
            assert_eq!(until_it_stops(&mut reader).await, Err(GAP), "{source}");
        }
    }
    let jetstream = stream_with_a_hole(&nats, "again", Says::After(12), &again).await;
    let mut whole = of_a_table(jetstream.clone(), "again", Start::Beginning);
    assert_eq!(until_it_stops(&mut whole).await, Ok(changes(1)));
    // And one that is further, or has no message of its own since.
    for own in [8, 12, 17] {
        let start = Start::After(token(own, own));
        let mut reader = of_a_table(jetstream.clone(), "again", start);
        assert_eq!(until_it_stops(&mut reader).await, Ok(changes(own + 1)));
    }
    // Another hole comes while it reads, of which it has nothing yet.
    store(&jetstream, "again", "t", &[31, 32, 33, 34, 36]).await;
    lose(&jetstream, "again", 41..=42).await;
    let gap = ReadError::Gap {
        wanted: 41,
        found: 43,
    };
    for _ in 0..2 {
        let next = tokio::time::timeout(PATIENCE, whole.next()).await;
        assert_eq!(next.expect("an answer").err(), Some(gap.clone()));
    }
}

/// What other tables wrote before a hole shows as well that nothing is missing: the reader has no position as high.
#[tokio::test]
async fn a_reader_of_some_tables_goes_by_what_others_wrote_before_a_hole() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let jetstream = connect(nats.url()).await;
    let source = "others";
    make(&jetstream, source).await;
    store(&jetstream, source, "t", &[1, 2, 3]).await;
    store(&jetstream, source, "u", &[4, 6, 7]).await;
    // An unfinished row, which is written again, and the hole.
    let chunk = |place: &str, more: &[(&'static str, String)]| {
        let mut headers = HeaderMap::new();
        headers.insert(header::POSITION, position(8).to_string());
        headers.insert(header::CHUNK, place);
        for (name, value) in more {
            headers.insert(*name, value.as_str());
        }
        headers
    };
    let (subject, row) = message(source, "u", 8);
    let first = chunk("1/2/a", &[]);
    publish(&jetstream, subject.clone(), first, row[..9].to_owned()).await;
    store(&jetstream, source, "t", &[9, 11]).await;
    let begins = [
        ("Nats-Expected-Last-Sequence", "9".to_owned()),
        (header::AFTER, position(7).to_string()),
    ];
    let first = chunk("1/2/b", &begins);
    publish(&jetstream, subject.clone(), first, row[..9].to_owned()).await;
    let last = chunk("2/2/b", &[]);
    publish(&jetstream, subject, last, row[9..].to_owned()).await;
    let again: Vec<u64> = (9..30).collect();
    store(&jetstream, source, "t", &again).await;
    lose(&jetstream, source, 8..=9).await;

    let mut reader = of_a_table(jetstream.clone(), source, Start::After(token(3, 3)));
    let expected: Vec<u64> = (9..30).filter(|n| n % 5 != 0).collect();
    assert_eq!(until_it_stops(&mut reader).await, Ok(expected.clone()));

    // Whoever begins with the oldest begins behind the hole, where no whole message stands before it.
    let stream = jetstream.get_stream(subject::stream_name(source)).await;
    let stream = stream.expect("a stream");
    stream.purge().sequence(7).await.expect("purged");
    let mut fresh = of_a_table(jetstream, source, Start::Beginning);
    assert_eq!(until_it_stops(&mut fresh).await, Ok(expected));
}
