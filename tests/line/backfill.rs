//! A repair: rows of a replica are read again beside its changes, and it is exact at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_lab::{Compared, Pipeline, compare};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::stage::{PATIENCE, Setting, Stage};

/// How many rows the table has.
pub(crate) const ROWS: u64 = 50_000;

/// A stage whose replica of `t` is whole, and a process that runs.
async fn whole(rows: u64) -> (Stage, Pipeline) {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, {rows}) i"
        ))
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    (stage, pipeline)
}

/// Waits until `t` takes part in the stream: its rows are equal a moment before.
pub(crate) async fn may_begin(stage: &Stage, pipeline: &Pipeline) {
    becomes(stage, pipeline, is("done")).await;
}

/// Makes the replica wrong behind the sink's back: rows that are outdated, missing, and too many.
pub(crate) async fn corrupt(stage: &Stage) {
    stage
        .target_sql(
            "UPDATE t SET v = 'wrong' WHERE id % 10 = 1;
             DELETE FROM t WHERE id % 10 = 2;
             INSERT INTO t (id, v) SELECT -i, 'extra' FROM generate_series(1, 1000) i",
        )
        .await;
    let compared = stage.compared().await.expect("compare");
    assert!(compared.different > 0 && compared.missing > 0 && compared.extra > 0);
}

pub(crate) async fn says(stage: &Stage, arguments: &[&str], code: i32, texts: &[&str]) {
    let arguments: Vec<&str> = ["backfill"].iter().chain(arguments).copied().collect();
    let run = stage.start_with(&arguments);
    stage.ends(run, code, texts).await;
}

/// The line of `backfill status` about `t` of a sink.
pub(crate) async fn line(stage: &Stage, sink: &str) -> Value {
    let arguments = ["backfill", "status", "t", "--sink", sink, "-o", "json"];
    let mut run = stage.start_with(&arguments);
    let code = run.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", run.logs());
    let json: Value = serde_json::from_str(&run.stdout()).expect("json");
    json["backfills"][0].clone()
}

/// Waits until the line is as wanted.
pub(crate) async fn becomes(
    stage: &Stage,
    pipeline: &Pipeline,
    wanted: impl Fn(&Value) -> bool,
) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = line(stage, "replica").await;
        if wanted(&line) {
            return line;
        }
        assert!(Instant::now() < deadline, "{line}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

pub(crate) fn is(state: &'static str) -> impl Fn(&Value) -> bool {
    move |line| line["state"] == state
}

pub(crate) fn rows(line: &Value) -> u64 {
    line["rows"].as_u64().unwrap_or(0)
}

/// Changes rows all over the table until told to stop.
pub(crate) async fn traffic(stage: &Stage) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let statement = |n| {
        let (row, other) = (n * 7919 % ROWS, n * 104_729 % ROWS);
        format!(
            "INSERT INTO t VALUES ({}, 'new') ON CONFLICT DO NOTHING;
                     UPDATE t SET v = 'changed {n}' WHERE id = {row};
                     DELETE FROM t WHERE id = {other};
                     UPDATE t SET id = id + 10000000 WHERE id = {}",
            ROWS + n,
            row + 1
        )
    };
    stage.traffic(Duration::from_millis(2), statement).await
}

#[tokio::test]
async fn a_corrupted_replica_becomes_exact_on_an_idle_source() {
    let (stage, pipeline) = whole(2_000).await;
    corrupt(&stage).await;
    // Wrong rows stay for as long as nobody changes them at the source.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!stage.compared().await.expect("compare").is_equal());
    let mut repair = stage.start_with(&["backfill", "start", "t", "--wait"]);
    // It is never emptied on the way.
    let right = "SELECT count(*)::text FROM t WHERE id > 0 AND id % 10 NOT IN (1, 2)";
    while repair.is_running() {
        assert_eq!(stage.target_text(right).await, "1600");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let said = ["is queued", "t at sink replica: done"];
    stage.ends(repair, 0, &said).await;
    let compared = stage.compared().await.expect("compare");
    assert!(
        compared.is_equal() && compared.rows == 2_000,
        "{compared:?}"
    );
    assert_eq!(line(&stage, "replica").await["state"], "done");
    // Changes go on to be applied, and a second repair may begin.
    stage.sql("UPDATE t SET v = 'later' WHERE id < 10").await;
    stage.equal(&pipeline).await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_corrupted_replica_becomes_exact_while_everybody_writes() {
    let (stage, pipeline) = whole(ROWS).await;
    corrupt(&stage).await;
    let (stop, traffic) = traffic(&stage).await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_part_is_repaired_and_nothing_is_removed() {
    let (stage, _pipeline) = whole(1_000).await;
    stage
        .target_sql(
            "UPDATE t SET v = 'wrong'; DELETE FROM t WHERE id IN (5, 505);
             INSERT INTO t (id, v) VALUES (-1, 'extra')",
        )
        .await;
    let start = ["start", "t", "--where", "id <= 100", "--wait"];
    says(&stage, &start, 0, &["done"]).await;
    let left = "SELECT count(*) FILTER (WHERE v = 'wrong') || ' ' || count(*) FILTER (WHERE id <= 100 \
        AND v = 'row ' || id) || ' ' || count(*) FILTER (WHERE id = -1) || ' ' || \
        count(*) FILTER (WHERE id = 505) FROM t";
    assert_eq!(stage.target_text(left).await, "899 100 1 0");
}

#[tokio::test]
async fn a_rate_is_kept_and_can_be_lifted() {
    let (stage, pipeline) = whole(ROWS).await;
    // Without statistics nobody knows how much is left.
    stage.sql("ANALYZE t").await;
    corrupt(&stage).await;
    let began = Instant::now();
    says(
        &stage,
        &["start", "t", "--rate", "2000"],
        0,
        &["at most 2000 rows/s"],
    )
    .await;
    let shown = becomes(&stage, &pipeline, |line| {
        rows(line) > 0 && line["eta_seconds"].is_u64()
    });
    let shown = shown.await;
    assert_eq!(
        (&shown["state"], &shown["rate"]),
        (&"chunks".into(), &2_000.into())
    );
    tokio::time::sleep(Duration::from_secs(4)).await;
    let come = rows(&line(&stage, "replica").await);
    let seconds = began.elapsed().as_secs_f64();
    // A chunk may be ahead of its time.
    assert!(
        come > 0 && (come as f64) < 2_000.0 * (seconds + 2.0) + 10_000.0,
        "{come} in {seconds} s"
    );
    let lifted = ["resume", "t", "--rate", "unlimited"];
    says(&stage, &lifted, 0, &["as fast as it goes"]).await;
    becomes(&stage, &pipeline, is("done")).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn what_is_paused_in_the_middle_goes_on_from_there() {
    let (stage, pipeline) = whole(ROWS).await;
    corrupt(&stage).await;
    says(&stage, &["start", "t", "--rate", "3000"], 0, &[]).await;
    becomes(&stage, &pipeline, |line| rows(line) > 0).await;
    says(&stage, &["pause", "t"], 0, &["paused"]).await;
    // What was on its way still comes. At its rate 6,000 more would, in two seconds.
    let deadline = Instant::now() + PATIENCE;
    let mut held = line(&stage, "replica").await;
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = line(&stage, "replica").await;
        if rows(&now) == rows(&held) {
            break;
        }
        held = now;
        assert!(Instant::now() < deadline, "{held}\n{}", pipeline.logs());
    }
    assert_eq!(held["state"], "paused");
    assert!(rows(&held) < ROWS, "{held}");
    // Changes flow on meanwhile.
    stage
        .sql("INSERT INTO t VALUES (777777, 'meanwhile')")
        .await;
    let changed = "SELECT v FROM t WHERE id = 777777";
    stage.target_shows(&pipeline, changed, "meanwhile").await;

    let lifted = ["resume", "t", "--rate", "unlimited"];
    says(&stage, &lifted, 0, &["resumed"]).await;
    becomes(&stage, &pipeline, is("done")).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn what_is_cancelled_leaves_the_rest_as_it_was() {
    let (stage, pipeline) = whole(ROWS).await;
    corrupt(&stage).await;
    says(&stage, &["start", "t", "--rate", "1000"], 0, &[]).await;
    becomes(&stage, &pipeline, |line| rows(line) > 0).await;
    says(&stage, &["cancel", "t"], 0, &["cancelled"]).await;
    becomes(&stage, &pipeline, is("done")).await;
    let compared = stage.compared().await.expect("compare");
    assert!(
        compared.extra == 1_000 && compared.missing > 0,
        "{compared:?}"
    );
    // The table takes part in the stream as before, and may be repaired anew.
    stage.sql("INSERT INTO t VALUES (777777, 'after')").await;
    let changed = "SELECT v FROM t WHERE id = 777777";
    stage.target_shows(&pipeline, changed, "after").await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_backfill_that_is_killed_goes_on_with_the_next_chunk() {
    let (stage, mut pipeline) = whole(ROWS).await;
    corrupt(&stage).await;
    let (stop, traffic) = traffic(&stage).await;
    says(&stage, &["start", "t", "--rate", "4000"], 0, &[]).await;
    let mut came = 0;
    for _ in 0..3 {
        let more = becomes(&stage, &pipeline, |line| {
            rows(line) > came || line["state"] == "done"
        });
        let line = more.await;
        assert_eq!(
            line["state"], "chunks",
            "it was over before the kill: {line}"
        );
        pipeline.kill9();
        let after = self::line(&stage, "replica").await;
        // What was committed stays, and nobody begins anew.
        assert!(rows(&after) >= rows(&line), "{after}");
        came = rows(&after);
        pipeline = stage.start();
    }
    let lifted = ["resume", "t", "--rate", "unlimited"];
    says(&stage, &lifted, 0, &[]).await;
    becomes(&stage, &pipeline, is("done")).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn one_sink_is_repaired_and_the_other_does_not_notice() {
    let (mut stage, mut pipeline) = whole(5_000).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    stage
        .postgres
        .create_database("second")
        .await
        .expect("database");
    let second_url = stage.postgres.url("second");
    stage.folder = stage
        .same_config()
        .sink("second", &second_url)
        .write()
        .expect("folder");
    let pipeline = stage.start();
    let second = stage.postgres.connect("second").await.expect("second");
    let source_url = stage.postgres.url("source");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let tables = [Compared::same("public.t")];
        let compared = compare(&source_url, &second_url, &tables).await;
        if compared.is_ok_and(|compared| compared.is_equal()) {
            break;
        }
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    corrupt(&stage).await;
    let wrong = "INSERT INTO t (id, v) VALUES (-5, 'of the second')";
    second.batch_execute(wrong).await.expect("inserted");

    let start = ["start", "t", "--sink", "replica", "--wait"];
    says(&stage, &start, 0, &["public.t at sink replica: done"]).await;
    stage.equal(&pipeline).await;
    assert_eq!(line(&stage, "second").await["state"], "done");
    let kept = second.query_one("SELECT count(*) FROM t WHERE id = -5", &[]);
    assert_eq!(kept.await.expect("counted").get::<_, i64>(0), 1);
    // Without --sink each of them gets one.
    let both = [
        "public.t at sink replica: done",
        "public.t at sink second: done",
    ];
    says(&stage, &["start", "t", "--wait"], 0, &both).await;
    let kept = second.query_one("SELECT count(*) FROM t WHERE id = -5", &[]);
    assert_eq!(kept.await.expect("counted").get::<_, i64>(0), 0);
}
