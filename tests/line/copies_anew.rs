//! A copy that is given up and begun again is whole at its end, whatever of the first one is still on its way; and what
//! a replica needs nobody can call off.

use std::time::{Duration, Instant};

use async_nats::jetstream::{self, kv};
use millrace_event::subject;
use millrace_event::work::{COPIES, CopyStatus};
use millrace_lab::Pipeline;

use crate::backfill::{becomes, corrupt, may_begin, says};
use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

const STATUS: &str = "status.replica";

/// Of the sink's place: a chunk is applied, and not the last one.
const CHUNK_CAME: &str = "copy @? '$.tables[*].after[*] ? (@ != null)'";

async fn bucket(stage: &Stage) -> kv::Store {
    let client = stage.nats.client().await.expect("nats");
    let name = subject::bucket_name("shop", COPIES);
    let bucket = jetstream::new(client).get_key_value(name).await;
    bucket.expect("bucket")
}

async fn status(bucket: &kv::Store) -> Option<CopyStatus> {
    let stored = bucket.get(STATUS).await.expect("the broker answers");
    stored.map(|stored| serde_json::from_slice(&stored).expect("a status"))
}

/// Waits until this SQL, of the sink's place in its target, says so.
async fn stands(stage: &Stage, pipeline: &Pipeline, condition: &str) {
    let sql = format!("SELECT ({condition})::text FROM millrace.position WHERE sink = 'replica'");
    stage.target_shows(pipeline, &sql, "true").await;
}

#[tokio::test]
async fn a_column_that_is_lost_in_the_middle_of_a_backfill_is_filled_from_the_first_row() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text, w text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t SELECT i, 'v' || i, 'w' || i FROM generate_series(1, 200000) i")
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    says(&stage, &["start", "t"], 0, &[]).await;
    stands(&stage, &pipeline, CHUNK_CAME).await;
    pipeline.kill9();
    stage.target_sql("ALTER TABLE t DROP COLUMN w").await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 200_000);
    assert!(pipeline.logs().contains("E1317"), "{}", pipeline.logs());
}

/// As after a broker whose host crashed: it had not written the newest values to its disk.
#[tokio::test]
async fn an_attempt_that_the_broker_has_forgotten_is_not_taken_for_the_next_one() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 20000) i")
        .await;
    stage.once().await;
    corrupt(&stage).await;
    let bucket = bucket(&stage).await;
    let mut capture = stage.start_with(&CAPTURE);
    let sink = stage.start_with(&SINK);
    says(&stage, &["start", "t", "--rate", "3000"], 0, &[]).await;
    stands(&stage, &sink, CHUNK_CAME).await;
    capture.kill9();
    let before = status(&bucket).await.expect("an attempt");
    capture = stage.start_with(&CAPTURE);
    let deadline = Instant::now() + PATIENCE;
    let second = loop {
        let second = status(&bucket).await.expect("an attempt").attempt;
        if second > before.attempt {
            break second;
        }
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let read = format!("copy @? '$.reading ? (@.attempt == {second} && @.number > 4)'");
    stands(&stage, &sink, &read).await;
    capture.kill9();
    let value = serde_json::to_vec(&before).expect("json");
    bucket.put(STATUS, value.into()).await.expect("put back");
    let capture = stage.start_with(&CAPTURE);
    becomes(&stage, &sink, |line| line["state"] == "done").await;
    assert_eq!(stage.equal(&capture).await.rows, 20_000);
}

#[tokio::test]
async fn a_request_that_the_broker_has_forgotten_is_made_again() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
        .await;
    stage.once().await;
    corrupt(&stage).await;
    let bucket = bucket(&stage).await;
    let mut sink = stage.start_with(&SINK);
    says(&stage, &["start", "t"], 0, &[]).await;
    sink.wait_for_log("copy requested", PATIENCE)
        .await
        .expect("a request");
    bucket.delete("request.replica").await.expect("deleted");
    let capture = stage.start_with(&CAPTURE);
    assert_eq!(stage.equal(&capture).await.rows, 100);
}

#[tokio::test]
async fn rows_that_the_replica_keeps_outlive_a_backfill() {
    for (file, gone) in [
        ("on_delete = \"ignore\"", "DELETE FROM t WHERE id <= 40"),
        (
            "on_truncate = \"ignore\"",
            "TRUNCATE t; INSERT INTO t SELECT i, 'again' FROM generate_series(41, 100) i",
        ),
    ] {
        let stage = Stage::set(Setting {
            tables: &[("public.t", file)],
            ..Setting::default()
        })
        .await;
        stage
            .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
            .await;
        let pipeline = stage.start();
        stage.equal(&pipeline).await;
        may_begin(&stage, &pipeline).await;
        stage.sql(gone).await;
        stage
            .target_sql("UPDATE t SET v = 'wrong' WHERE id > 40")
            .await;
        says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
        let wrong = "SELECT count(*)::text FROM t WHERE v = 'wrong'";
        stage.target_shows(&pipeline, wrong, "0").await;
        let kept = stage.target_text("SELECT count(*)::text FROM t").await;
        assert_eq!(kept, "100", "{file}");
    }
}

#[tokio::test]
async fn a_backfill_that_the_replica_needs_cannot_be_cancelled() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text, secret text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i, 'secret ' || i FROM generate_series(1, 100) i")
        .await;
    stage.once().await;
    let masked = "columns = { mask = { secret = \"redact\" } }";
    let config = stage.same_config().table("public.t", masked);
    config.write_to(stage.folder.path()).expect("written");
    let capture = stage.start_with(&CAPTURE);
    let orders = bucket(&stage).await;
    let deadline = Instant::now() + PATIENCE;
    while orders
        .get("orders.replica")
        .await
        .expect("the broker answers")
        .is_none_or(|orders| !orders.windows(9).any(|text| text == b"selection"))
    {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    says(&stage, &["cancel", "t"], 4, &["E1323"]).await;
    says(&stage, &["pause", "t"], 0, &["paused"]).await;
    says(&stage, &["resume", "t"], 0, &["resumed"]).await;
    let sink = stage.start_with(&SINK);
    let told = "SELECT count(*)::text FROM t WHERE secret LIKE 'secret%'";
    stage.target_shows(&sink, told, "0").await;
}

#[tokio::test]
async fn a_column_that_came_while_a_load_waited_is_in_its_rows() {
    let stage = Stage::set(Setting::apart()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
        .await;
    let mut capture = stage.start_with(&CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    // A load's slot waits for whoever writes.
    let writer = stage.postgres.connect("source").await.expect("connects");
    writer
        .batch_execute("BEGIN; SELECT pg_current_xact_id()")
        .await
        .expect("begins");
    let mut sink = stage.start_with(&SINK);
    sink.wait_for_log("table created", PATIENCE)
        .await
        .expect("told");
    stage
        .sql("ALTER TABLE t ADD COLUMN b int DEFAULT 5; UPDATE t SET b = id WHERE id > 50")
        .await;
    capture
        .wait_for_log("was changed at the source", PATIENCE)
        .await
        .expect("it looks at the table anew");
    writer.batch_execute("COMMIT").await.expect("ends");
    assert_eq!(stage.equal(&sink).await.rows, 100);
    let filled = "SELECT count(*)::text FROM t WHERE b = CASE WHEN id > 50 THEN id ELSE 5 END";
    assert_eq!(stage.target_text(filled).await, "100");
    assert!(!sink.logs().contains("parked"), "{}", sink.logs());
}

#[tokio::test]
async fn a_column_that_came_just_before_a_load_is_in_its_rows() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
        .await;
    let mut capture = stage.start_with(&CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    stage
        .sql("ALTER TABLE t ADD COLUMN b int; UPDATE t SET b = id")
        .await;
    let sink = stage.start_with(&SINK);
    assert_eq!(stage.equal(&sink).await.rows, 100);
    let filled = "SELECT count(*)::text FROM t WHERE b = id";
    assert_eq!(stage.target_text(filled).await, "100");
}
