//! Heartbeats are rare and nothing happens at the source: a sink that has everything is not late.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

/// The table's backfill, as `backfill status` tells it.
async fn told(stage: &Stage) -> Value {
    let mut run = stage.start_with(&["backfill", "status", "t", "-o", "json"]);
    assert_eq!(run.wait(PATIENCE).await.ok(), Some(0), "{}", run.logs());
    let json: Value = serde_json::from_str(&run.stdout()).expect("json");
    json["backfills"][0].clone()
}

/// Why it waits.
async fn reason(stage: &Stage) -> Value {
    told(stage).await["reason"].clone()
}

#[tokio::test]
async fn a_sink_that_has_everything_is_held_by_nothing() {
    let stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.once().await;
    // Without a capture no heartbeat comes, and nobody serves the backfill.
    let mut sink = stage.start_with(&["run", "--only", "sink:replica"]);
    Stage::readyz(&mut sink, 200, "streaming").await;
    let start = stage.start_with(&["backfill", "start", "t"]);
    stage.ends(start, 0, &["is queued"]).await;
    // Taking it up, the sink writes its own position once more.
    let deadline = Instant::now() + PATIENCE;
    while told(&stage).await["state"] != "chunks" {
        assert!(Instant::now() < deadline, "{}", sink.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(reason(&stage).await, Value::Null);
    // As it is after ten minutes without a heartbeat.
    let old = "UPDATE millrace.position SET source_ts = source_ts - interval '10 minutes'";
    stage.target_sql(old).await;
    assert_eq!(reason(&stage).await, Value::Null);
    // As it is where the stream has something that the sink does not.
    let behind = "UPDATE millrace.position SET stream_seq = stream_seq - 1";
    stage.target_sql(behind).await;
    let held = reason(&stage).await;
    assert!(
        held.as_str()
            .is_some_and(|held| held.contains("30 s behind")),
        "{held}"
    );
}
