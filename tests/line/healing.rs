//! Changes that do not bring all columns of their row, on a replica that does not have the rest: each row is read
//! again by its key, and nothing is invented meanwhile.

use std::sync::atomic::Ordering;
use std::time::Duration;

use millrace_lab::{NatsOptions, Pipeline};
use tokio_postgres::error::SqlState;

use crate::backfill::{becomes, is, may_begin, rows, says};
use crate::stage::{Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

/// A table whose rows have a value that is stored out of line, so that updates leave it out of the WAL.
const TOASTED: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, big text);
    ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL";

const OPEN: &str = "SELECT count(*)::text FROM millrace.dead_letter WHERE resolved_at IS NULL";
const HEALED: &str = "SELECT count(DISTINCT key)::text FROM millrace.dead_letter
    WHERE reason LIKE 'incomplete%' AND resolved_at IS NOT NULL";
/// The big value of a row follows from its key as it was first; a row that was moved keeps it.
const TORN: &str = "SELECT count(*)::text FROM t WHERE big = 'wrong' AND n > 0";

async fn filled(table: &'static str, rows: u32) -> Stage {
    let stage = Stage::set(Setting {
        schema: TOASTED,
        tables: &[("public.t", table)],
        ..Setting::default()
    })
    .await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 0, repeat(md5(i::text), 100) FROM generate_series(1, {rows}) i"
        ))
        .await;
    stage
}

async fn whole(table: &'static str, rows: u32) -> (Stage, Pipeline) {
    let stage = filled(table, rows).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    (stage, pipeline)
}

/// Every row is exact, and so many keys were healed.
async fn healed(stage: &Stage, pipeline: &Pipeline, keys: u32) {
    stage.equal(pipeline).await;
    stage.target_shows(pipeline, OPEN, "0").await;
    let found = stage.target_text(HEALED).await.parse::<u32>();
    assert!(found.expect("a number") >= keys);
}

#[tokio::test]
async fn rows_that_the_replica_has_lost_are_healed_by_changes_without_all_columns() {
    let (stage, pipeline) = whole("", 100).await;
    stage.target_sql("DELETE FROM t WHERE id <= 40").await;
    for sql in [
        "UPDATE t SET n = 1 WHERE id <= 10",
        // Moved: the old row is not there to take the value from.
        "UPDATE t SET id = id + 1000 WHERE id BETWEEN 11 AND 20",
        "BEGIN; UPDATE t SET n = 2 WHERE id BETWEEN 21 AND 25; UPDATE t SET id = id + 1000 WHERE id BETWEEN 21 AND 25;
         UPDATE t SET n = 3 WHERE id BETWEEN 1021 AND 1025; COMMIT",
        // Whole again by themselves: nothing is to be healed.
        "UPDATE t SET big = repeat('whole', 1000) WHERE id BETWEEN 26 AND 30",
        "DELETE FROM t WHERE id BETWEEN 31 AND 40",
    ] {
        stage.sql(sql).await;
    }
    healed(&stage, &pipeline, 25).await;
    // And again, for keys that were healed before.
    stage
        .target_sql("DELETE FROM t WHERE id IN (5, 6, 1011)")
        .await;
    stage
        .sql("UPDATE t SET n = 7 WHERE id IN (5, 6, 1011)")
        .await;
    healed(&stage, &pipeline, 25).await;
}

#[tokio::test]
async fn a_key_without_a_row_at_the_source_is_settled() {
    let stage = filled("", 50).await;
    let capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    stage.equal(&sink).await;
    sink.pause().expect("signal");
    stage.target_sql("DELETE FROM t WHERE id <= 20").await;
    // What ends these rows is never in the stream.
    for sql in [
        "UPDATE t SET n = 1 WHERE id <= 20",
        "ALTER PUBLICATION millrace_shop SET (publish = 'insert, update')",
        "DELETE FROM t WHERE id <= 10",
        "ALTER PUBLICATION millrace_shop SET (publish = 'insert, update, delete, truncate')",
    ] {
        stage.sql(sql).await;
    }
    sink.resume().expect("signal");
    healed(&stage, &sink, 20).await;
    // The key may be used again.
    stage
        .sql("INSERT INTO t VALUES (3, 3, repeat('again', 1000)); UPDATE t SET n = 4 WHERE id = 3")
        .await;
    healed(&stage, &capture, 20).await;
}

#[tokio::test]
async fn a_replica_that_keeps_deleted_rows_heals_the_others() {
    let stage = filled("on_delete = \"ignore\"", 50).await;
    let _capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    stage.equal(&sink).await;
    sink.pause().expect("signal");
    stage.target_sql("DELETE FROM t WHERE id <= 20").await;
    stage
        .sql("UPDATE t SET n = 1 WHERE id <= 20; DELETE FROM t WHERE id IN (7, 30)")
        .await;
    sink.resume().expect("signal");
    let exact = "SELECT count(*)::text FROM t WHERE id <= 20 AND n = 1 AND big = repeat(md5(id::text), 100)";
    stage.target_shows(&sink, exact, "19").await;
    // Nobody knows the large value of the one that is gone; the other stays.
    stage.target_shows(&sink, OPEN, "1").await;
    let kept =
        "SELECT count(*) FILTER (WHERE id = 7) || ' ' || count(*) FILTER (WHERE id = 30) FROM t";
    assert_eq!(stage.target_text(kept).await, "0 1");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let asked = sink.logs().matches("copy requested").count();
    assert!(asked <= 4, "{asked} requests: {}", sink.logs());
}

#[tokio::test]
async fn keys_of_many_columns_and_any_text_are_healed() {
    let stage = Stage::set(Setting {
        schema: "CREATE TYPE size AS ENUM ('small', 'large', 'huge');
                 CREATE TABLE k (n int NOT NULL DEFAULT 0, s size, name text COLLATE \"C\", at numeric(8, 2), c char(3),
                                 b bytea, big text, PRIMARY KEY (s, name, at, c, b));
                 ALTER TABLE k ALTER COLUMN big SET STORAGE EXTERNAL",
        tables: &[("public.k", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO k SELECT 0, (ARRAY['huge', 'small', 'large'])[i % 3 + 1]::size,
             (ARRAY['', 'it''s', 'back\\slash', 'tab' || chr(9), 'Ä \"q\"', 'NULL', '\\N', '[1,null]', E'two\\nlines'])[i % 9 + 1],
             i / 100.0, 'x', decode(md5(i::text), 'hex'), repeat(md5(i::text), 100) FROM generate_series(1, 300) i",
        )
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("DELETE FROM k WHERE at <= 1").await;
    stage.sql("UPDATE k SET n = 1 WHERE at <= 1").await;
    healed(&stage, &pipeline, 100).await;
    stage.target_sql("DELETE FROM k WHERE at <= 0.5").await;
    stage
        .sql("UPDATE k SET name = name || E'\\\\\\t', c = 'y' WHERE at <= 0.5")
        .await;
    healed(&stage, &pipeline, 150).await;
}

#[tokio::test]
async fn more_rows_than_are_asked_for_at_once_are_healed() {
    let (stage, pipeline) = whole("", 1_500).await;
    stage.target_sql("DELETE FROM t").await;
    stage.sql("UPDATE t SET n = 1 WHERE id <= 1300").await;
    stage
        .sql("UPDATE t SET big = repeat(md5(id::text), 101) WHERE id > 1300")
        .await;
    healed(&stage, &pipeline, 1300).await;
}

#[tokio::test]
async fn a_change_without_all_columns_over_an_outdated_row_completes_nothing_wrong() {
    let (stage, pipeline) = whole("", 3_000).await;
    stage
        .target_sql(
            "UPDATE t SET big = 'wrong' WHERE id % 2 = 0; DELETE FROM t WHERE id % 10 = 1;
             INSERT INTO t (id, n, big) SELECT -i, 0, 'extra' FROM generate_series(1, 100) i",
        )
        .await;
    says(&stage, &["start", "t", "--rate", "1000"], 0, &[]).await;
    becomes(&stage, &pipeline, |line| rows(line) > 0).await;
    let client = stage.postgres.connect("source").await.expect("connects");
    let traffic = tokio::spawn(async move {
        for n in 1..=60 {
            client
                .batch_execute(&format!(
                    "UPDATE t SET n = {n} WHERE id % 60 = {n} % 60;
                     UPDATE t SET id = id + 100000 WHERE id % 600 = {n} AND id < 100000"
                ))
                .await
                .expect("traffic");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    // An outdated row that moves to where the chunks have been: none of them will bring it.
    stage
        .sql("UPDATE t SET id = -id WHERE id IN (2990, 2992, 2994)")
        .await;
    while !traffic.is_finished() {
        assert_eq!(stage.target_text(TORN).await, "0");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    traffic.await.expect("traffic");
    becomes(&stage, &pipeline, is("done")).await;
    stage.equal(&pipeline).await;
    stage.target_shows(&pipeline, OPEN, "0").await;
    assert_ne!(stage.target_text(HEALED).await, "0");
}

#[tokio::test]
async fn rows_are_healed_while_everybody_writes_and_capture_is_killed() {
    let stage = filled("", 500).await;
    let mut capture = stage.start_with(&CAPTURE);
    let sink = stage.start_with(&SINK);
    stage.equal(&sink).await;
    let client = stage.postgres.connect("source").await.expect("connects");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = std::sync::Arc::clone(&stop);
    let traffic = tokio::spawn(async move {
        let mut n = 0_u32;
        while !stopped.load(Ordering::Relaxed) {
            n += 1;
            let sql = format!(
                "UPDATE t SET n = n + 1 WHERE id % 50 = {}; UPDATE t SET id = -id WHERE id = {} OR id = -{};
                 DELETE FROM t WHERE id = {}",
                n % 50,
                n * 31 % 500,
                n * 37 % 500,
                n * 41 % 5_000
            );
            client.batch_execute(&sql).await.expect("traffic");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    for round in 0..4 {
        // Rows vanish behind the sink's back.
        let vanish = format!("DELETE FROM t WHERE abs(id) % 20 = {round}");
        // The sink writes the same rows in an order of its own.
        while let Err(error) = stage.target.batch_execute(&vanish).await {
            assert_eq!(
                error.code(),
                Some(&SqlState::T_R_DEADLOCK_DETECTED),
                "{error}"
            );
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
        capture.kill9();
        capture = stage.start_with(&CAPTURE);
    }
    stop.store(true, Ordering::Relaxed);
    traffic.await.expect("traffic");
    stage.sql("UPDATE t SET n = n + 1").await;
    stage.equal(&sink).await;
    stage.target_shows(&sink, OPEN, "0").await;
    assert_ne!(stage.target_text(HEALED).await, "0");
}

#[tokio::test]
async fn rows_of_long_keys_are_healed_through_a_broker_of_small_messages() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id text PRIMARY KEY, n int NOT NULL DEFAULT 0, big text);
                 ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL",
        nats: NatsOptions {
            config: "max_payload: 65536".into(),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    // Quotes are twice as long in a request.
    stage
        .sql(
            "INSERT INTO t SELECT repeat('\"', 400) || i, 0, repeat(md5(i::text), 100) FROM generate_series(1, 200) i",
        )
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("DELETE FROM t").await;
    stage.sql("UPDATE t SET n = 1").await;
    healed(&stage, &pipeline, 200).await;
}

#[tokio::test]
async fn a_key_that_no_request_holds_is_told_until_its_row_comes_whole() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id text PRIMARY KEY, n int NOT NULL DEFAULT 0, big text);
                 ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL",
        nats: NatsOptions {
            config: "max_payload: 65536".into(),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    // More than a third of a message. Compressed, it fits an index.
    stage
        .sql(
            "INSERT INTO t SELECT repeat('x', 30000) || i, 0, repeat(md5(i::text), 100) FROM generate_series(1, 2) i;
             INSERT INTO t VALUES ('short', 0, repeat('short', 1000))",
        )
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("DELETE FROM t").await;
    stage.sql("UPDATE t SET n = 1").await;
    // What can be read again is, and does not wait for the others.
    let short = "SELECT n::text FROM t WHERE id = 'short'";
    stage.target_shows(&pipeline, short, "1").await;
    stage.target_shows(&pipeline, OPEN, "2").await;
    let told = shown(&mut pipeline, true).await;
    for text in [
        "E1318",
        "2 incomplete rows of table public.t",
        "octet_length(key) >= 3000",
    ] {
        assert!(told.contains(text), "{text} is not in {told}");
    }
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    // The remedy, on one and then on both.
    let found = "SELECT count(*)::text FROM millrace.dead_letter WHERE relation = 'public.t'
        AND resolved_at IS NULL AND octet_length(key) >= 30000";
    assert_eq!(stage.target_text(found).await, "2");
    stage
        .sql("UPDATE \"public\".\"t\" SET big = big || '' WHERE n = 1")
        .await;
    stage.equal(&pipeline).await;
    stage.target_shows(&pipeline, OPEN, "0").await;
    shown(&mut pipeline, false).await;
    let warned = pipeline.logs().matches("cannot be read again").count();
    assert_eq!(warned, 1, "{}", pipeline.logs());
}

/// Waits until `/status` tells of keys that are too long, or no longer does.
async fn shown(pipeline: &mut Pipeline, told: bool) -> String {
    let deadline = std::time::Instant::now() + crate::stage::PATIENCE;
    loop {
        let (_, status) = pipeline.get("/status").await.expect("answers");
        if status.contains("E1318") == told {
            return status;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "{status}\n{}",
            pipeline.logs()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
