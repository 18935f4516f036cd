//! What a target loses by somebody's hand comes again by itself, and only that table waits for it.

use std::time::Duration;

use millrace_lab::PostgresOptions;

use crate::backfill::may_begin;
use crate::stage::{PATIENCE, Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text, w text);
    INSERT INTO t SELECT i, 'v' || i, 'w' || i FROM generate_series(1, 300) i;
    CREATE TABLE u (id int PRIMARY KEY, v text)";

async fn stage(file: &str) -> Stage {
    Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", file), ("public.u", "")],
        ..Setting::default()
    })
    .await
}

#[tokio::test]
async fn a_table_or_a_column_that_was_dropped_comes_again() {
    let stage = stage("").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("ALTER TABLE t DROP COLUMN w").await;
    stage.sql("UPDATE t SET v = 'column' WHERE id = 1").await;
    pipeline
        .wait_for_log("E1317", PATIENCE)
        .await
        .expect("told");
    stage.equal(&pipeline).await;
    stage.target_sql("DROP TABLE t").await;
    stage.sql("UPDATE t SET v = 'table' WHERE id = 2").await;
    stage.equal(&pipeline).await;

    // The same while nobody looks, and in the middle of a backfill.
    pipeline.kill9();
    stage.target_sql("DROP TABLE t").await;
    stage.sql("UPDATE t SET v = 'down' WHERE id = 3").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    let slowly = ["backfill", "start", "t", "--rate", "20"];
    stage
        .ends(stage.start_with(&slowly), 0, &["is queued"])
        .await;
    pipeline
        .wait_for_log("copy requested", PATIENCE)
        .await
        .expect("told");
    tokio::time::sleep(Duration::from_secs(2)).await;
    pipeline.kill9();
    stage.target_sql("DROP TABLE t").await;
    let pipeline = stage.start();
    stage.sql("UPDATE t SET v = 'chunks' WHERE id = 4").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 300);
}

#[tokio::test]
async fn a_column_that_the_file_names_otherwise_is_filled_anew() {
    let stage = stage("").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
    let renamed = "columns = { rename = { w = \"other\" } }";
    let config = stage.same_config().table("public.t", renamed);
    config.write_to(stage.folder.path()).expect("written");
    stage.sql("UPDATE t SET v = 'once' WHERE id = 1").await;
    let pipeline = stage.start();
    let filled = "SELECT count(*)::text FROM t WHERE other = 'w' || id";
    stage.target_shows(&pipeline, filled, "300").await;
}

#[tokio::test]
async fn a_policy_that_alters_nothing_waits_for_the_statement_and_then_reads_the_rows_again() {
    let stage = stage("on_schema_change = \"park\"").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("ALTER TABLE t DROP COLUMN w").await;
    stage.sql("INSERT INTO t VALUES (301, 'v', 'w')").await;
    let remedy = "ALTER TABLE \"public\".\"t\" ADD COLUMN \"w\" text";
    let escaped = remedy.replace('"', "\\\"");
    pipeline
        .wait_for_log(&escaped, PATIENCE)
        .await
        .expect("told");
    stage.sql("INSERT INTO u VALUES (1, 'on')").await;
    stage.target_shows(&pipeline, "SELECT v FROM u", "on").await;
    stage.target_sql(remedy).await;
    assert_eq!(stage.equal(&pipeline).await.rows, 302);
}

#[tokio::test]
async fn a_new_table_that_the_target_refuses_holds_up_no_other() {
    let stage = stage("").await;
    stage
        .sql("CREATE TABLE n (id int PRIMARY KEY); INSERT INTO n VALUES (1)")
        .await;
    stage
        .target_sql("CREATE TABLE n (id int PRIMARY KEY); INSERT INTO n VALUES (7)")
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let config = stage.same_config().table("public.n", "");
    config.write_to(stage.folder.path()).expect("written");
    pipeline.hang_up().expect("signal");
    pipeline
        .wait_for_log("table parked", PATIENCE)
        .await
        .expect("told");
    stage.sql("INSERT INTO u VALUES (1, 'on')").await;
    stage.target_shows(&pipeline, "SELECT v FROM u", "on").await;
    pipeline.kill9();
    let pipeline = stage.start();
    stage.sql("INSERT INTO u VALUES (2, 'and on')").await;
    stage
        .target_shows(&pipeline, "SELECT v FROM u WHERE id = 2", "and on")
        .await;
    let rows = "SELECT string_agg(id::text, ' ') FROM n";
    assert_eq!(stage.target_text(rows).await, "7");
    stage.target_sql("TRUNCATE n").await;
    stage.target_shows(&pipeline, rows, "1").await;
}

#[tokio::test]
async fn a_change_of_the_target_does_not_queue_its_readers_behind_a_long_one() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", "")],
        target_postgres: Some(PostgresOptions::default()),
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("BEGIN; SELECT count(*) FROM t").await;
    stage
        .sql("ALTER TABLE t ADD COLUMN x int; INSERT INTO t VALUES (301, 'v', 'w', 1)")
        .await;
    let deadline = std::time::Instant::now() + PATIENCE;
    while !pipeline.logs().contains("lock timeout") {
        assert!(std::time::Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stage.target_sql("ROLLBACK").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 301);
}
