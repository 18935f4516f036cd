//! What a running process tells, and how it ends.

use std::time::{Duration, Instant};

use millrace_lab::Pipeline;
use serde_json::Value;

use crate::kill::{seeded, shop_setting, traffic};
use crate::stage::{PATIENCE, Setting, Stage};

/// The value of a series whose line begins so.
fn metric(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in:\n{text}"));
    let value = line.rsplit(' ').next().expect("a value");
    value.parse().unwrap_or_else(|_| panic!("{line}"))
}

/// The sum over all series of that name with that label.
fn sum(text: &str, series: &str, label: &str) -> f64 {
    let lines = text
        .lines()
        .filter(|line| line.starts_with(series) && line.contains(label));
    lines
        .map(|line| line.rsplit(' ').next().expect("value"))
        .map(|value| value.parse::<f64>().expect("number"))
        .sum()
}

async fn metrics_until(pipeline: &mut Pipeline, good: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (status, text) = pipeline.get("/metrics").await.expect("metrics");
        assert_eq!(status, 200);
        if good(&text) {
            return text;
        }
        assert!(Instant::now() < deadline, "{text}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn health_and_metrics_tell_what_happens() {
    let stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'copied')").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row' FROM generate_series(2, 101) i")
        .await;
    stage.sql("UPDATE t SET v = 'changed' WHERE id <= 10").await;
    stage.sql("DELETE FROM t WHERE id > 96").await;
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert_eq!(pipeline.get("/livez").await.expect("livez").0, 200);
    // A scrape may come a moment after the row: counters are handed over by the batch.
    let text = metrics_until(&mut pipeline, |text| {
        text.contains("millrace_replication_lag_seconds{sink=\"replica\"}")
            && text.contains("millrace_slot_lag_bytes")
            && sum(text, "millrace_source_changes_total{", "op=\"d\"") >= 5.0
            && sum(text, "millrace_sink_rows_total{", "op=\"delete\"") >= 5.0
    })
    .await;
    assert!(metric(&text, "millrace_replication_lag_seconds{sink=\"replica\"}") < 5.0);
    assert!(metric(&text, "millrace_slot_lag_bytes") < 64e6, "{text}");
    assert!(metric(&text, "millrace_pipeline_state{state=\"streaming\"}") == 1.0);
    for (op, count) in [("c", 100.0), ("u", 10.0), ("d", 5.0)] {
        let label = format!("op=\"{op}\"");
        assert_eq!(
            sum(&text, "millrace_source_changes_total{", &label),
            count,
            "{op}: {text}"
        );
        assert!(text.contains("table=\"public.t\""), "{text}");
    }
    assert!(
        sum(&text, "millrace_sink_rows_total{", "sink=\"replica\"") >= 100.0,
        "{text}"
    );
    assert!(text.contains("outcome=\""), "{text}");
    // The lag stays small while nothing is written: heartbeats pass through the whole path.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (_, text) = pipeline.get("/metrics").await.expect("metrics");
    assert!(
        metric(&text, "millrace_replication_lag_seconds{sink=\"replica\"}") < 2.5,
        "{text}"
    );
}

async fn status(stage: &Stage, folder: Option<&millrace_lab::ConfigFolder>) -> Value {
    let folder = folder.unwrap_or(&stage.folder);
    let mut run = Stage::start_in(folder, &["status", "-o", "json"]);
    let code = run.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", run.logs());
    stage.keeps_the_password(&run);
    serde_json::from_str(&run.stdout()).unwrap_or_else(|_| panic!("{}", run.logs()))
}

#[tokio::test]
async fn status_works_with_and_without_a_process() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    let body = Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert!(body.contains("\"state\":\"streaming\""), "{body}");
    // Where status finds the running process.
    let address = pipeline.admin().await.expect("address");
    let folder = stage
        .same_config()
        .listen(&address)
        .write()
        .expect("folder");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let report = status(&stage, Some(&folder)).await;
    assert_eq!(report["running"], true, "{report:#}");
    assert_eq!(report["state"], "streaming", "{report:#}");
    assert_eq!(report["sinks"][0]["name"], "replica");
    assert_eq!(report["sinks"][0]["state"], "streaming", "{report:#}");
    let lag = report["sinks"][0]["lag_seconds"].as_f64();
    assert!(lag.is_some_and(|lag| lag < 5.0), "{report:#}");
    assert!(report["sinks"][0]["position"].is_string(), "{report:#}");
    assert_eq!(report["tables"][0]["name"], "public.t", "{report:#}");

    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    let report = status(&stage, Some(&folder)).await;
    assert_eq!(report["running"], false, "{report:#}");
    assert!(
        report["source"]["slot"]["confirmed_lsn"].is_string(),
        "{report:#}"
    );
    assert!(report["sinks"][0]["position"].is_string(), "{report:#}");
}

#[tokio::test]
async fn a_stop_under_load_drains_and_ends_with_zero() {
    let mut rng = seeded();
    let stage = Stage::set(shop_setting()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let traffic = traffic(&stage, &mut rng, 400).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    pipeline.terminate().expect("signal");
    let code = pipeline.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", pipeline.logs());
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    traffic.stop().await.expect("traffic");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_second_signal_ends_a_stuck_drain_at_once() {
    let mut rng = seeded();
    let mut stage = Stage::set(shop_setting()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let traffic = traffic(&stage, &mut rng, 200).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A broker that answers nothing holds the drain up.
    stage.nats.pause().expect("paused");
    tokio::time::sleep(Duration::from_millis(300)).await;
    pipeline.terminate().expect("signal");
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(pipeline.is_running(), "nothing held the drain up");
    let began = Instant::now();
    pipeline.terminate().expect("signal");
    let code = pipeline.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 143, "{}", pipeline.logs());
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    stage.nats.resume().expect("resumed");
    traffic.stop().await.expect("traffic");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}
