//! A broker that is far away: connecting to the stream takes longer than a sink waits before it looks about. And a
//! source that is: most of a chunk's time is spent on the way.

use std::time::Duration;

use millrace_lab::{ConfigFolder, Pipeline, Proxy};

use crate::backfill::may_begin;
use crate::stage::{PATIENCE, Setting, Stage};

/// What a byte takes in each direction: one answer takes longer than the tick of a sink that follows, the three
/// that a link takes about as long as one that copies waits.
const DELAY: Duration = Duration::from_millis(170);

/// A capture beside its broker, a sink on the other side of a proxy, and a hundred rows.
async fn apart() -> (Stage, Proxy, ConfigFolder, Pipeline) {
    let stage = Stage::set(Setting::default()).await;
    let proxy = Proxy::start(format!("127.0.0.1:{}", stage.nats.port()))
        .await
        .expect("proxy");
    let (source, target) = (stage.postgres.url("source"), stage.postgres.url("target"));
    let far = format!("nats://{}", proxy.address());
    let folder = stage.config(&source, &target, &far).write();
    stage
        .sql("INSERT INTO t SELECT i, 'copied' FROM generate_series(1, 100) i")
        .await;
    let capture = stage.start_with(&["run", "--only", "capture"]);
    (stage, proxy, folder.expect("folder"), capture)
}

fn start_sink(folder: &ConfigFolder) -> Pipeline {
    Stage::start_in(folder, &["run", "--only", "sink:replica"])
}

#[tokio::test]
async fn a_sink_far_from_its_broker_copies_its_tables() {
    let (stage, proxy, folder, _capture) = apart().await;
    proxy.delay(DELAY);
    stage.equal(&start_sink(&folder)).await;
}

#[tokio::test]
async fn a_sink_far_from_its_broker_follows() {
    let (stage, proxy, folder, _capture) = apart().await;
    let mut sink = start_sink(&folder);
    stage.equal(&sink).await;
    sink.terminate().expect("signal");
    sink.wait(PATIENCE).await.expect("ends in time");
    stage
        .sql("UPDATE t SET v = 'followed' WHERE id <= 50; DELETE FROM t WHERE id > 90")
        .await;
    proxy.delay(DELAY);
    stage.equal(&start_sink(&folder)).await;
}

#[tokio::test]
async fn a_replica_of_a_source_that_is_far_is_repaired_in_large_chunks() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 3000) i")
        .await;
    let near = format!("127.0.0.1:{}", stage.postgres.port());
    let proxy = Proxy::start(near.clone()).await.expect("proxy");
    let far = stage.postgres.url("source");
    let far = far.replace(&near, &proxy.address().to_string());
    let folder = stage.config(&far, &stage.target_url(), &stage.nats.url());
    let folder = folder.write().expect("folder");
    let pipeline = Stage::start_in(&folder, &["run"]);
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    proxy.delay(Duration::from_millis(100));
    stage.target_sql("UPDATE t SET v = 'wrong'").await;
    let started = ["backfill", "start", "t", "--wait"];
    stage
        .ends(stage.start_with(&started), 0, &["t at sink replica: done"])
        .await;
    stage.equal(&pipeline).await;
}
