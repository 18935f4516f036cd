//! Sequences without messages at a stream's end or in its middle, as a broker may leave them that lost its machine: it
//! counts on where it was.

use std::time::Duration;

use async_nats::jetstream::{self, stream::Stream};
use millrace_cdc::stream as source;
use millrace_event::{Lsn, Position, subject};

use crate::broker_loss::SYNCED;
use crate::stage::{Setting, Stage};

async fn stream(stage: &Stage) -> Stream {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream(subject::stream_name("shop")).await;
    stream.expect("a stream")
}

async fn lose(stream: &Stream, first: u64, last: u64) {
    for stream_seq in first..=last {
        stream.delete_message(stream_seq).await.expect("deleted");
    }
}

#[tokio::test]
async fn a_capture_goes_on_behind_a_long_end_without_messages() {
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::two_tables()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.equal(&pipeline).await;
    stage.sql("INSERT INTO t VALUES (1, 'kept')").await;
    stage.equal(&pipeline).await;
    stage
        .sql("INSERT INTO u SELECT i, 'lost' FROM generate_series(1, 1200) i")
        .await;
    stage.equal(&pipeline).await;
    pipeline.kill9();
    let stream = stream(&stage).await;
    let kept = stream
        .get_last_raw_message_by_subject("cdc.shop.public.t.c")
        .await
        .expect("a message")
        .sequence;
    let last = stream.cached_info().state.last_sequence;
    assert!(last - kept > 1_100, "{kept} to {last}");
    for lost in ["cdc.shop.public.u.c", "cdc.shop._ctl.heartbeat"] {
        stream.purge().filter(lost).await.expect("purged");
    }
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let tail = source::tail(&jetstream, &subject::stream_name("shop")).await;
    let tail = tail.expect("answers").map(|tail| tail.stream_seq);
    assert_eq!(tail, Some(kept));

    stage
        .sql("UPDATE u SET v = 'changed' WHERE id <= 10; DELETE FROM u WHERE id > 1100")
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
}

#[tokio::test]
async fn a_sequence_without_a_message_is_as_old_as_the_message_behind_it() {
    let stage = Stage::set(Setting::default()).await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let config = jetstream::stream::Config {
        name: subject::stream_name("shop"),
        subjects: vec![subject::all("shop")],
        ..Default::default()
    };
    let stream = jetstream.create_stream(config).await.expect("made");
    let store = async |count: u32| {
        for _ in 0..count {
            let sent = jetstream.publish("cdc.shop.public.t.c", "{}".into()).await;
            sent.expect("sent").await.expect("stored");
        }
    };
    // 1 to 4 are old, and 5 to 20 are not.
    store(4).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    store(16).await;
    let fifth = stream.get_raw_message(5).await.expect("a message").time;
    let newest = async |first, last| {
        let before = fifth.into();
        let newest = source::newest_before(&jetstream, "shop", before, first, last).await;
        newest.expect("answers")
    };
    assert_eq!(newest(1, 19).await, Some(4));
    // In what is not old: the bisection begins there.
    lose(&stream, 8, 15).await;
    assert_eq!(newest(1, 19).await, Some(4));
    assert_eq!(newest(5, 19).await, None);
    assert_eq!(newest(1, 3).await, Some(3));
    assert_eq!(newest(2, 12).await, Some(4));
    // On both sides, and to the end of what may go.
    lose(&stream, 3, 7).await;
    assert_eq!(newest(1, 19).await, Some(2));
    lose(&stream, 16, 20).await;
    assert_eq!(newest(1, 19).await, Some(2));
}

/// What a publisher that was overtaken sent late lies behind the hole.
#[tokio::test]
async fn the_highest_message_is_found_before_a_long_hole() {
    let stage = Stage::set(Setting::default()).await;
    let client = stage.nats.client().await.expect("client");
    let jetstream = jetstream::new(client.clone());
    let name = subject::stream_name("shop");
    let config = jetstream::stream::Config {
        name: name.clone(),
        subjects: vec![subject::all("shop")],
        ..Default::default()
    };
    let stream = jetstream.create_stream(config).await.expect("made");
    let at = |n| Position::new(1, Lsn(n), u32::MAX);
    let heartbeat = async |n: u64| {
        let (position, end_lsn) = (at(n), n + 5);
        let payload = format!(
            r#"{{"kind":"heartbeat","position":"{position}","end_lsn":{end_lsn},"ts_us":1}}"#
        );
        let sent = jetstream.publish("cdc.shop._ctl.heartbeat", payload.into());
        sent.await.expect("sent").await.expect("stored").sequence
    };
    for n in [10, 20, 30] {
        heartbeat(n).await;
    }
    for _ in 0..5_000 {
        let sent = client.publish("cdc.shop.public.u.c", "{}".into()).await;
        sent.expect("sent");
    }
    client.flush().await.expect("flushed");
    assert_eq!(heartbeat(20).await, 5_004);
    let purged = stream.purge().filter("cdc.shop.public.u.c").await;
    assert_eq!(purged.expect("purged").purged, 5_000);

    let highest = source::highest(&jetstream, &name).await.expect("answers");
    assert_eq!(highest.map(|highest| highest.stream_seq), Some(3));
    let covered = source::is_covered(&jetstream, &name, at(20)).await;
    assert!(!covered.expect("answers"));
    for (confirmed, expected) in [(25, 5_004), (26, 3), (35, 3), (36, 5_004)] {
        let covering = source::tail_covering(&jetstream, &name, Lsn(confirmed)).await;
        let covering = covering.expect("answers").expect("a tail");
        assert_eq!(covering.stream_seq, expected, "{confirmed}");
    }
    // The hole has a message, and the stream begins in it.
    stream.purge().sequence(4).await.expect("purged");
    let highest = source::highest(&jetstream, &name).await.expect("answers");
    assert_eq!(highest.map(|highest| highest.stream_seq), Some(5_004));
}
