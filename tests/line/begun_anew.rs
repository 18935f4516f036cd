//! A stream that is deleted and made anew while a sink runs: what came between the two is copied. One that only lacks
//! what the sink needs halts it.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_event::subject;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

/// A stage whose replica is whole.
async fn whole() -> Stage {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
        .await;
    stage.once().await;
    stage
}

#[tokio::test]
async fn a_stream_that_is_made_anew_under_a_running_sink_has_every_table_copied_again() {
    let stage = whole().await;
    let capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    stage.sql("UPDATE t SET v = 'seen' WHERE id > 50").await;
    stage.equal(&sink).await;
    Stage::stopped(capture).await;

    let drop = stage.start_with(&["drop", "--yes"]);
    stage.ends(drop, 0, &["CDC_shop"]).await;
    // No stream ever tells of this.
    stage
        .sql(
            "DELETE FROM t WHERE id <= 10; UPDATE t SET v = 'unseen' WHERE id > 90;
             INSERT INTO t VALUES (1000, 'unseen')",
        )
        .await;
    let capture = stage.start_with(&CAPTURE);
    assert_eq!(stage.equal(&sink).await.rows, 91);
    stage.sql("INSERT INTO t VALUES (1001, 'later')").await;
    stage.equal(&sink).await;
    Stage::readyz(&mut sink, 200, "streaming").await;
    let logs = sink.logs();
    assert!(logs.contains("begun anew"), "{logs}");
    assert!(!logs.contains("E1312"), "{logs}");
    stage.keeps_the_password(&capture);
}

#[tokio::test]
async fn a_stream_that_was_emptied_behind_a_sink_halts_it() {
    let stage = whole().await;
    let capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    Stage::readyz(&mut sink, 200, "streaming").await;
    sink.pause().expect("signal");
    stage
        .sql("INSERT INTO t SELECT i, 'unseen' FROM generate_series(1001, 21000) i")
        .await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
    let stream = jetstream.get_stream(subject::stream_name("shop")).await;
    let stream = stream.expect("a stream");
    // More than a sink has asked for beforehand.
    let deadline = Instant::now() + PATIENCE;
    while stream.get_info().await.expect("info").state.messages < 20_000 {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stream.purge().await.expect("purged");
    sink.resume().expect("signal");
    Stage::readyz(&mut sink, 503, "E1312").await;
}
