//! A broker that acknowledged what it then loses: the slot still has it, and gives it again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, stream::PersistenceMode};
use millrace_event::Lsn;
use millrace_lab::Pipeline;
use rand::rngs::StdRng;

use crate::bad_input::edit;
use crate::kill::{random_moment, seeded, shop_setting, traffic};
use crate::stage::{PATIENCE, Setting, Stage};
use crate::two_captures::{ordered, whole, write};

/// The broker syncs so seldom that nothing is confirmed in the scenario.
pub(crate) const SYNCED: &str = "confirm = \"synced\"\nsync_interval = \"1h\"";

async fn confirmed(stage: &Stage) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots \
               WHERE slot_name = 'millrace_shop'";
    let text = stage.ask(sql).await.expect("a slot");
    text.parse().expect("an LSN")
}

async fn wal_end(stage: &Stage) -> Lsn {
    let text = stage.ask("SELECT pg_current_wal_insert_lsn()::text").await;
    text.expect("a text").parse().expect("an LSN")
}

/// Loses what the broker stored after the snapshot.
async fn loses_its_tail(stage: &mut Stage, rng: &mut StdRng) {
    stage.nats.snapshot_store().await.expect("snapshot");
    random_moment(rng, 1500).await;
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
}

async fn still_runs(stage: &Stage, mut pipeline: Pipeline) {
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert!(!pipeline.logs().contains("E1206"), "{}", pipeline.logs());
}

#[tokio::test]
async fn a_tail_lost_while_everything_runs_is_published_again() {
    let mut rng = seeded();
    let mut stage = Stage::set(Setting {
        stream: SYNCED,
        ..shop_setting()
    })
    .await;
    let traffic = traffic(&stage, &mut rng, 150).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    for _ in 0..3 {
        random_moment(&mut rng, 500).await;
        loses_its_tail(&mut stage, &mut rng).await;
    }
    traffic.stop().await.expect("traffic");
    still_runs(&stage, pipeline).await;
}

/// Writes while the broker suffers `times` of something; then the stream must be the sequence that was written.
async fn is_whole_after(times: u32, suffers: impl AsyncFn(&mut Stage, &mut StdRng)) {
    let mut rng = seeded();
    let mut stage = Stage::set(Setting {
        stream: SYNCED,
        ..ordered()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert_eq!(persist_mode(&stage).await, PersistenceMode::Async);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(&stage, &stop).await;
    for _ in 0..times {
        suffers(&mut stage, &mut rng).await;
    }
    stop.store(true, Ordering::Relaxed);
    let count = writer.await.expect("writer");
    stage.equal(&pipeline).await;
    whole(&stage, count).await;
    assert!(!pipeline.logs().contains("E1206"), "{}", pipeline.logs());
}

#[tokio::test]
async fn after_a_lost_tail_the_stream_has_no_hole_and_nothing_is_reordered() {
    is_whole_after(2, async |stage, rng| {
        random_moment(rng, 500).await;
        loses_its_tail(stage, rng).await;
    })
    .await;
}

/// A broker that writes behind its acknowledgements loses the newest of them with its process.
#[tokio::test]
async fn what_a_killed_broker_had_not_written_is_published_again() {
    is_whole_after(4, async |stage, rng| {
        random_moment(rng, 1000).await;
        stage.nats.kill9();
        stage.nats.start_again().await.expect("broker");
    })
    .await;
}

async fn persist_mode(stage: &Stage) -> PersistenceMode {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await.expect("a stream");
    stream.cached_info().config.persist_mode.unwrap_or_default()
}

#[tokio::test]
async fn only_a_stream_whose_changes_the_slot_keeps_is_written_behind() {
    for (how, mode) in [
        (SYNCED, PersistenceMode::Async),
        ("confirm = \"acked\"", PersistenceMode::Default),
        ("sync_interval = \"always\"", PersistenceMode::Default),
    ] {
        let stage = Stage::set(Setting {
            stream: how,
            ..Setting::default()
        })
        .await;
        let mut pipeline = stage.start();
        Stage::readyz(&mut pipeline, 200, "streaming").await;
        assert_eq!(persist_mode(&stage).await, mode, "{how}");
        pipeline.terminate().expect("signal");
        assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
        if mode == PersistenceMode::Async {
            edit(&stage.folder, "\"synced\"", "\"acked\"");
            let expected = ["E1205", "persist_mode: async", "millrace drop"];
            stage.ends(stage.start(), 4, &expected).await;
        }
    }
}

#[tokio::test]
async fn a_tail_lost_without_further_traffic_is_published_again() {
    let mut stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.nats.snapshot_store().await.expect("snapshot");
    stage
        .sql("INSERT INTO t SELECT i, 'row' FROM generate_series(1, 300) i")
        .await;
    stage.equal(&pipeline).await;
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    stage
        .sql("UPDATE t SET v = 'changed' WHERE id <= 10; DELETE FROM t WHERE id > 290")
        .await;
    still_runs(&stage, pipeline).await;
}

#[tokio::test]
async fn a_tail_lost_while_nothing_runs_is_published_again() {
    let mut rng = seeded();
    let mut stage = Stage::set(Setting {
        stream: SYNCED,
        ..shop_setting()
    })
    .await;
    let traffic = traffic(&stage, &mut rng, 150).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.nats.snapshot_store().await.expect("snapshot");
    random_moment(&mut rng, 1500).await;
    pipeline.terminate().expect("signal");
    let code = pipeline.wait(PATIENCE).await.expect("ends in time");
    assert_eq!(code, 0, "{}", pipeline.logs());
    random_moment(&mut rng, 300).await;
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    let pipeline = stage.start();
    traffic.stop().await.expect("traffic");
    still_runs(&stage, pipeline).await;
}

/// With `acked` a lost tail cannot be repaired: the slot has let go of it. That must be seen and said.
#[tokio::test]
async fn a_lost_tail_that_was_confirmed_is_a_gap() {
    let mut stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.nats.snapshot_store().await.expect("snapshot");
    stage
        .sql("INSERT INTO t SELECT i, 'row' FROM generate_series(1, 300) i")
        .await;
    let written = wal_end(&stage).await;
    stage.equal(&pipeline).await;
    let deadline = Instant::now() + PATIENCE;
    while confirmed(&stage).await < written {
        assert!(Instant::now() < deadline, "nothing is confirmed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    let body = Stage::readyz(&mut pipeline, 503, "halted").await;
    assert!(body.contains("E1103") || body.contains("E1206"), "{body}");
}

#[tokio::test]
async fn what_is_acknowledged_is_confirmed_promptly_even_at_an_idle_source() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    for _ in 0..2 {
        let written = wal_end(&stage).await;
        let deadline = Instant::now() + Duration::from_secs(8);
        while confirmed(&stage).await < written {
            assert!(Instant::now() < deadline, "nothing is confirmed");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test]
async fn what_the_broker_may_lose_is_not_confirmed_before_its_time() {
    let stage = Stage::set(Setting {
        stream: "confirm = \"synced\"\nsync_interval = \"1s\"",
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let before = confirmed(&stage).await;
    let began = Instant::now();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let written = wal_end(&stage).await;
    stage.equal(&pipeline).await;
    // The margin is 30 s.
    while began.elapsed() < Duration::from_secs(30) {
        let now = confirmed(&stage).await;
        assert!(now < written, "confirmed after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    while confirmed(&stage).await < written {
        assert!(began.elapsed() < PATIENCE, "still at {before}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Somebody runs it from cron: no run lasts as long as a message must age.
#[tokio::test]
async fn a_short_run_confirms_what_the_stream_has_held_long_enough() {
    let stage = Stage::set(Setting {
        stream: "sync_interval = \"1s\"",
        ..Setting::default()
    })
    .await;
    let run_once = || Stage::start_in(&stage.folder, &["run", "--once"]);
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.ends(run_once(), 0, &[]).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    let written = wal_end(&stage).await;
    stage.ends(run_once(), 0, &[]).await;
    assert!(confirmed(&stage).await < written);
    // The margin is 30 s.
    tokio::time::sleep(Duration::from_secs(32)).await;
    let began = Instant::now();
    stage.ends(run_once(), 0, &[]).await;
    assert!(confirmed(&stage).await >= written);
    assert!(began.elapsed() < Duration::from_secs(20), "no short run");
}
