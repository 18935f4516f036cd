//! Rows that the target refuses are set aside with their reason; rows of any size arrive.

use millrace_lab::Pipeline;

use crate::stage::{Setting, Stage};

const CHECKED: &str = "ALTER TABLE t ADD CONSTRAINT polite CHECK (v NOT LIKE 'rude%')";
const OPEN: &str = "SELECT string_agg(concat_ws(' ', sink, relation, key, op), '; ' ORDER BY id)
    FROM millrace.dead_letter WHERE resolved_at IS NULL";
const OPEN_COUNT: &str =
    "SELECT count(*)::text FROM millrace.dead_letter WHERE resolved_at IS NULL";

async fn row(stage: &Stage, pipeline: &Pipeline, id: i32, expected: &str) {
    let sql = format!("SELECT left(v, 20) FROM t WHERE id = {id}");
    stage.target_shows(pipeline, &sql, expected).await;
}

#[tokio::test]
async fn a_refused_row_is_set_aside_and_a_later_version_supersedes_it() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql(CHECKED).await;
    stage
        .sql(
            "BEGIN; INSERT INTO t SELECT i, CASE WHEN i % 100 = 0 THEN 'rude ' ELSE 'fine ' END || i
                 FROM generate_series(11, 500) i;
             UPDATE t SET v = 'rude two' WHERE id = 2; UPDATE t SET v = 'fine three' WHERE id = 3; COMMIT",
        )
        .await;
    row(&stage, &pipeline, 3, "fine three").await;
    stage.target_shows(&pipeline, OPEN_COUNT, "6").await;
    let reason = "SELECT concat_ws('; ', reason, sqlstate, event ->> 'v') FROM millrace.dead_letter
        WHERE key LIKE '%100%' AND resolved_at IS NULL";
    let reason = stage.target_text(reason).await;
    assert!(
        reason.contains("polite") && reason.contains("23514"),
        "{reason}"
    );
    // What the target had before stays visible; it is not up to date, and `status` says so.
    row(&stage, &pipeline, 2, "b").await;
    assert_eq!(
        stage.target_text("SELECT count(*)::text FROM t").await,
        "488"
    );

    stage
        .sql(
            "UPDATE t SET v = 'polite again' WHERE id IN (2, 100); DELETE FROM t WHERE id = 200;
             UPDATE t SET v = 'rude still' WHERE id = 300",
        )
        .await;
    row(&stage, &pipeline, 100, "polite again").await;
    row(&stage, &pipeline, 2, "polite again").await;
    let keys =
        "SELECT count(DISTINCT key)::text FROM millrace.dead_letter WHERE resolved_at IS NULL";
    stage.target_shows(&pipeline, keys, "3").await;
    // Nothing of this is forgotten by a restart, or made again.
    let open = stage.target_text(OPEN).await;
    pipeline.kill9();
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (501, 'after')").await;
    row(&stage, &pipeline, 501, "after").await;
    assert_eq!(stage.target_text(OPEN).await, open);
    // With the constraint gone, the next versions make the replica whole.
    stage
        .target_sql("ALTER TABLE t DROP CONSTRAINT polite")
        .await;
    stage.sql("UPDATE t SET v = v || '!'").await;
    stage.equal(&pipeline).await;
    stage.target_shows(&pipeline, OPEN_COUNT, "0").await;
}

#[tokio::test]
async fn rows_that_an_existing_copy_holds_are_set_aside_too() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .target_sql(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v text); {CHECKED}"
        ))
        .await;
    stage
        .sql("INSERT INTO t SELECT i, CASE WHEN i = 77 THEN 'rude' ELSE 'fine' END FROM generate_series(1, 200) i")
        .await;
    let pipeline = stage.start();
    stage.target_shows(&pipeline, OPEN_COUNT, "1").await;
    stage
        .target_shows(&pipeline, "SELECT count(*)::text FROM t", "199")
        .await;
    stage.sql("UPDATE t SET v = 'fine now' WHERE id = 77").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 200);
    stage.target_shows(&pipeline, OPEN_COUNT, "0").await;
}

/// Without its whole row a partial one cannot be completed: nothing is invented for it.
#[tokio::test]
async fn a_partial_version_of_a_refused_row_waits_for_a_whole_one() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text, big text);
                 ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES (1, 'a', repeat('one', 3000)), (2, 'b', repeat('two', 3000))")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql(CHECKED).await;
    stage
        .sql("UPDATE t SET v = 'rude', big = repeat('new', 3000) WHERE id = 1")
        .await;
    stage.target_shows(&pipeline, OPEN_COUNT, "1").await;
    // Only `v` travels; the target's `big` is not the source's.
    stage.sql("UPDATE t SET v = 'fine' WHERE id = 1").await;
    stage.sql("UPDATE t SET v = 'seen' WHERE id = 2").await;
    row(&stage, &pipeline, 2, "seen").await;
    let mixed = "SELECT count(*)::text FROM t WHERE v = 'fine' AND big LIKE 'one%'";
    assert_eq!(stage.target_text(mixed).await, "0");
    // A move out of such a row is incomplete as well.
    stage.sql("UPDATE t SET id = 11 WHERE id = 1").await;
    stage.sql("UPDATE t SET v = 'again' WHERE id = 2").await;
    row(&stage, &pipeline, 2, "again").await;
    let wrong = "SELECT count(*)::text FROM t WHERE id = 11 AND big NOT LIKE 'new%'";
    assert_eq!(stage.target_text(wrong).await, "0");
    let open = stage.target_text(OPEN).await;
    assert!(open.contains("11"), "{open}");

    stage
        .sql("UPDATE t SET v = 'whole', big = repeat('last', 3000) WHERE id = 11")
        .await;
    stage.equal(&pipeline).await;
    stage.target_shows(&pipeline, OPEN_COUNT, "0").await;
}

#[tokio::test]
async fn rows_larger_than_a_message_arrive() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text, b bytea);
                 ALTER TABLE t REPLICA IDENTITY FULL",
        ..Setting::default()
    })
    .await;
    let large = "(SELECT string_agg(md5(i::text), E'\\n') FROM generate_series(1, 93000) i)";
    stage
        .sql(&format!("INSERT INTO t VALUES (1, {large}, NULL)"))
        .await;
    assert_eq!(stage.once().await.rows, 1);
    let mut pipeline = stage.start();
    for sql in [
        format!(
            "INSERT INTO t VALUES (2, {large}, NULL), (3, 'small', decode(repeat('00ff', 800000), 'hex'))"
        ),
        "UPDATE t SET v = v || 'longer' WHERE id = 2".to_owned(),
        format!(
            "BEGIN; INSERT INTO t VALUES (4, 'before'); UPDATE t SET v = {large} WHERE id = 3;
                 INSERT INTO t VALUES (5, 'after'); COMMIT"
        ),
        "UPDATE t SET id = 20 WHERE id = 2".to_owned(),
        "DELETE FROM t WHERE id = 1".to_owned(),
        "UPDATE t SET v = 'small again', b = NULL".to_owned(),
    ] {
        stage.sql(&sql).await;
        stage.equal(&pipeline).await;
    }
    // A row whose parts are cut by a crash is sent again as a whole.
    for n in 0..3 {
        stage
            .sql(&format!(
                "INSERT INTO t VALUES ({}, {large}, NULL)",
                100 + n
            ))
            .await;
        pipeline.kill9();
        pipeline = stage.start();
    }
    assert_eq!(stage.equal(&pipeline).await.rows, 7);
}
