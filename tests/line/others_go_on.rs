//! What one table lacks keeps no other from its rows.

use std::time::{Duration, Instant};

use millrace_lab::{ConfigDir, Pipeline};

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

const BOTH: [(&str, &str); 2] = [("public.t", ""), ("public.u", "")];
const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text)";

/// Waits until both tables take part in the stream.
async fn both_follow(pipeline: &Pipeline) {
    let deadline = Instant::now() + PATIENCE;
    while pipeline.logs().matches("table is up to date").count() < BOTH.len() {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_table_that_capture_does_not_know_yet() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &BOTH,
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO u SELECT i, 'row' FROM generate_series(1, 100) i; INSERT INTO t VALUES (1, 'row')")
        .await;
    // The sink is told of both, capture of the one behind the other.
    let known = ConfigDir::new("shop", &stage.postgres.url("source"), &stage.nats.url())
        .source("heartbeat_interval = \"500ms\"")
        .stream("confirm = \"acked\"")
        .sink("replica", &stage.target_url())
        .table("public.u", "")
        .write()
        .expect("written");
    let capture = Stage::start_in(&known, &CAPTURE);
    let sink = stage.start_with(&SINK);
    let count = "SELECT count(*)::text FROM u";
    stage.target_shows(&sink, count, "100").await;
    stage.sql("INSERT INTO u VALUES (101, 'streamed')").await;
    stage.target_shows(&sink, count, "101").await;
    // Its copy goes on as well when it is asked for in chunks.
    stage.target_sql("DELETE FROM u WHERE id <= 50").await;
    let repair = stage.start_with(&["backfill", "start", "u", "--wait"]);
    stage.ends(repair, 0, &["done"]).await;
    assert_eq!(stage.target_text(count).await, "101");

    Stage::stopped(capture).await;
    let _capture = stage.start_with(&CAPTURE);
    stage.equal(&sink).await;
}

/// Columns that are not in the WAL where they did not change.
const TOASTED: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, big text);
    ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL;
    CREATE TABLE u (LIKE t INCLUDING ALL);
    INSERT INTO t SELECT i, 0, repeat(md5(i::text), 100) FROM generate_series(1, 20) i;
    INSERT INTO u SELECT * FROM t";

#[tokio::test]
async fn a_table_whose_rows_cannot_be_read_again() {
    let stage = Stage::set(Setting {
        schema: TOASTED,
        tables: &BOTH,
        ..Setting::default()
    })
    .await;
    let mut printed = stage.start_with(&["init-sql", "source"]);
    assert_eq!(printed.wait(PATIENCE).await.expect("ends"), 0);
    stage.sql(&printed.stdout()).await;
    stage
        .sql("ALTER ROLE millrace_capture PASSWORD 'capture'")
        .await;
    let url = stage.postgres.url("source");
    let (_, address) = url.split_once('@').expect("a user");
    let capture = format!("postgres://millrace_capture:capture@{address}");
    let config = stage.config(&capture, &stage.target_url(), &stage.nats.url());
    config.write_to(stage.folder.path()).expect("written");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    both_follow(&pipeline).await;
    stage.sql("REVOKE SELECT ON t FROM millrace_capture").await;
    stage
        .target_sql("DELETE FROM t WHERE id <= 5; DELETE FROM u WHERE id <= 5")
        .await;
    let healed = "SELECT count(*)::text FROM u WHERE n = 1 AND big = repeat(md5(id::text), 100)";
    for id in 1..=5 {
        stage
            .sql(&format!(
                "UPDATE t SET n = 1 WHERE id = {id}; UPDATE u SET n = 1 WHERE id = {id}"
            ))
            .await;
        stage.target_shows(&pipeline, healed, &id.to_string()).await;
    }
    let lacking = "SELECT count(*)::text FROM t WHERE id <= 5";
    assert_eq!(stage.target_text(lacking).await, "0");
    stage.sql("GRANT SELECT ON t TO millrace_capture").await;
    stage.equal(&pipeline).await;
    let open = "SELECT count(*)::text FROM millrace.dead_letter WHERE resolved_at IS NULL";
    stage.target_shows(&pipeline, open, "0").await;
}

/// A target that takes a row of `t` at a time, and some milliseconds for each.
const SLOW: &str = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_sleep(0.004); RETURN NEW; END';
    CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION slow()";
const CHANGES: u32 = 5_000;

#[tokio::test]
async fn a_table_is_taken_back_while_changes_of_another_never_pause() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &BOTH,
        sink: "batch.max_rows = 1",
        ..Setting::apart()
    })
    .await;
    let mut pipeline = stage.start();
    stage
        .sql("INSERT INTO t VALUES (0, 'a'); INSERT INTO u VALUES (0, 'a')")
        .await;
    stage.equal(&pipeline).await;
    both_follow(&pipeline).await;
    stage.target_sql(SLOW).await;
    stage
        .target_sql("ALTER TABLE u DROP CONSTRAINT u_pkey")
        .await;
    stage.sql("INSERT INTO u VALUES (1, 'b')").await;
    let parked = pipeline.wait_for_log("table parked", PATIENCE).await;
    parked.expect("told");
    stage
        .sql(&format!(
            "DO $$ BEGIN FOR n IN 1..{CHANGES} LOOP INSERT INTO t VALUES (n, 'n'); COMMIT; END LOOP; END $$"
        ))
        .await;
    stage.target_sql("ALTER TABLE u ADD PRIMARY KEY (id)").await;
    let back = "SELECT v FROM u WHERE id = 1";
    stage.target_shows(&pipeline, back, "b").await;
    let applied = stage.target_text("SELECT count(*)::text FROM t").await;
    let applied: u32 = applied.parse().expect("a number");
    assert!(applied < CHANGES, "it was taken back when all was done");
    stage.equal(&pipeline).await;
}
