//! `run --once` waits for a server that is away: it says so once, and its time limit holds.

use std::time::{Duration, Instant};

use crate::stage::{PATIENCE, Setting, Stage};

/// An address where nobody answers, soon enough to be tried again and again.
const AWAY: &str = "postgres://nobody@127.0.0.1:1/nowhere";

#[tokio::test]
async fn a_source_that_is_away_is_told_once_and_the_time_limit_holds() {
    let stage = Stage::set(Setting::default()).await;
    let away = stage.config(AWAY, &stage.target_url(), &stage.nats.url());
    let folder = away.write().expect("folder");
    let began = Instant::now();
    let once = Stage::start_in(&folder, &["run", "--once", "--timeout", "5s"]);
    let logs = stage.ends(once, 4, &["within --timeout"]).await;
    let took = began.elapsed();
    let limit = Duration::from_secs(5);
    assert!(took >= limit && took < limit * 3, "{took:?}: {logs}");
    assert_eq!(logs.matches("waiting for the source").count(), 1, "{logs}");
}

#[tokio::test]
async fn a_stream_that_nobody_has_begun_is_told_with_its_name() {
    let stage = Stage::set(Setting::default()).await;
    let once = ["run", "--once", "--only", "sink:replica", "--timeout", "3s"];
    let once = stage.start_with(&once);
    let logs = stage.ends(once, 4, &["within --timeout", "CDC_shop"]).await;
    assert_eq!(logs.matches("waiting for NATS").count(), 1, "{logs}");
}

#[tokio::test]
async fn a_source_that_comes_back_is_drained() {
    let mut stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.postgres.stop_fast().await.expect("stopped");
    let mut once = stage.start_with(&["run", "--once"]);
    let waits = once.wait_for_log("waiting for the source", PATIENCE).await;
    waits.expect("it waits");
    stage.postgres.start_again().await.expect("postgres");
    stage.reconnect().await;
    stage.ends(once, 0, &["applied everything up to"]).await;
    assert_eq!(stage.target_text("SELECT v FROM t").await, "one");
}
