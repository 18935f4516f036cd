//! Rows that are there before the replica is are copied, whatever goes on meanwhile.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_lab::{Compared, Pipeline};
use tokio::task::JoinHandle;

use crate::stage::{PATIENCE, Setting, Stage};

const ROWS: u64 = 200_000;

/// How often the copy is killed in the middle.
const FAULTS: usize = 3;

async fn filled(setting: Setting<'_>) -> Stage {
    let stage = Stage::set(setting).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 'the row number ' || i FROM generate_series(1, {ROWS}) i"
        ))
        .await;
    stage
}

/// Changes rows all over the table until told to stop.
async fn traffic(stage: &Stage) -> (Arc<AtomicBool>, JoinHandle<()>) {
    let statement = |n| {
        let (row, other) = (n * 7919 % ROWS, n * 104_729 % ROWS);
        format!(
            "INSERT INTO t VALUES ({}, 'new');
                     UPDATE t SET v = 'changed {n}' WHERE id = {row};
                     DELETE FROM t WHERE id = {other};
                     BEGIN; UPDATE t SET id = -id WHERE id = {}; UPDATE t SET v = v || '!'
                     WHERE id = -{}; COMMIT",
            ROWS + n,
            row + 1,
            row + 1
        )
    };
    stage.traffic(Duration::from_millis(1), statement).await
}

/// Waits until the target shows a part of the table.
async fn in_the_middle(stage: &Stage, pipeline: &Pipeline, at_least: i64) -> i64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let rows = stage.target.query_one("SELECT count(*) FROM t", &[]).await;
        let rows = rows.map_or(0, |row| row.get::<_, i64>(0));
        if rows >= at_least {
            return rows;
        }
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn rows_are_copied_while_they_change() {
    let stage = filled(Setting::default()).await;
    let (stop, traffic) = traffic(&stage).await;
    let pipeline = stage.start();
    in_the_middle(&stage, &pipeline, 150_000).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.equal(&pipeline).await;
    stage
        .sql("DELETE FROM t WHERE id < 100; INSERT INTO t VALUES (1, 'back')")
        .await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_copy_that_is_killed_goes_on() {
    let stage = filled(Setting::default()).await;
    let (stop, traffic) = traffic(&stage).await;
    let mut seen = Vec::new();
    for _ in 0..FAULTS {
        let mut pipeline = stage.start();
        let at_least = seen.last().map_or(1, |rows| rows + 1).min(150_000);
        seen.push(in_the_middle(&stage, &pipeline, at_least).await);
        pipeline.kill9();
    }
    let pipeline = stage.start();
    in_the_middle(&stage, &pipeline, 150_000).await;
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.equal(&pipeline).await;
    assert!(seen[0] < 150_000, "it was never in the middle: {seen:?}");
}

#[tokio::test]
async fn a_table_that_is_added_later_is_copied_while_the_others_stream() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
                 CREATE TABLE later (id int PRIMARY KEY, v text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t VALUES (1, 'a');
             INSERT INTO later SELECT i, 'early ' || i FROM generate_series(1, 30000) i",
        )
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE later SET v = 'unseen' WHERE id < 10")
        .await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    stage.sql("INSERT INTO t VALUES (2, 'b')").await;
    fs::write(stage.folder.path().join("tables/public.later.toml"), "").expect("file");
    let pipeline = stage.start();
    for n in 0..50 {
        stage
            .sql(&format!(
                "BEGIN; INSERT INTO t VALUES ({}, 'streamed'); UPDATE later SET v = 'changed' WHERE id = {};
                 DELETE FROM later WHERE id = {}; COMMIT",
                n + 100,
                n * 10 + 1,
                n * 500 + 2
            ))
            .await;
    }
    let tables = [Compared::same("public.t"), Compared::same("public.later")];
    assert_eq!(stage.equal_as(&pipeline, &tables).await.rows, 52 + 29_950);
}

#[tokio::test]
async fn a_target_table_with_rows_of_its_own_is_refused_and_adopted_when_told() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'right' FROM generate_series(1, 100) i")
        .await;
    stage
        .target_sql(
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             INSERT INTO t SELECT i, 'outdated' FROM generate_series(50, 200) i",
        )
        .await;
    let mut pipeline = stage.start();
    let code = pipeline.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 4, "{}", pipeline.logs());
    assert!(pipeline.logs().contains("E1306"), "{}", pipeline.logs());
    let untouched = "SELECT count(*) || ' ' || count(DISTINCT v) || ' ' || min(id) FROM t";
    assert_eq!(stage.target_text(untouched).await, "151 1 50");

    fs::write(
        stage.folder.path().join("tables/public.t.toml"),
        "adopt = true",
    )
    .expect("file");
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 100);
    stage
        .sql("UPDATE t SET v = 'changed' WHERE id > 90; INSERT INTO t VALUES (150, 'new')")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 101);
}

#[tokio::test]
async fn an_empty_table_is_copied_too() {
    let stage = Stage::set(Setting::default()).await;
    assert_eq!(stage.once().await.rows, 0);
    stage.sql("INSERT INTO t VALUES (1, 'a')").await;
    assert_eq!(stage.once().await.rows, 1);
    stage.once().await;
}
