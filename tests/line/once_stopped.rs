//! `run --once` is stopped while it does not know its goal yet.

use std::time::{Duration, Instant};

use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

/// An address where nobody answers, soon enough to be tried again and again.
const AWAY: &str = "postgres://nobody@127.0.0.1:1/nowhere";

async fn stops(stage: &Stage, mut once: Pipeline, waiting: &str) {
    once.wait_for_log(waiting, PATIENCE)
        .await
        .expect("it waits");
    once.hang_up().expect("signal");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(once.is_running(), "a reload has nothing to stop");
    once.terminate().expect("signal");
    let began = Instant::now();
    let logs = stage.ends(once, 0, &[]).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{logs}");
    for done in ["everything up to", "did not reach its goal"] {
        assert!(!logs.contains(done), "{logs}");
    }
}

#[tokio::test]
async fn a_run_that_waits_for_its_goal_hears_a_signal() {
    let mut stage = Stage::set(Setting::default()).await;
    let away = stage.config(AWAY, &stage.target_url(), &stage.nats.url());
    let folder = away.write().expect("folder");
    let once = Stage::start_in(&folder, &["run", "--once", "--timeout", "5m"]);
    stops(&stage, once, "waiting for the source").await;

    // A sink alone takes its goal from the stream.
    stage.nats.stop().await.expect("stopped");
    let once = ["run", "--once", "--only", "sink:replica", "--timeout", "5m"];
    let once = stage.start_with(&once);
    stops(&stage, once, "waiting for NATS").await;
}
