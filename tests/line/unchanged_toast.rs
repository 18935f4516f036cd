//! Large values that an update does not touch are not in the WAL, and stay what they are.

use crate::stage::{Setting, Stage};

async fn stage(identity: &str) -> Stage {
    let schema = format!(
        "CREATE TABLE t (id int PRIMARY KEY, n int, big text, other bytea);
         ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL,
             ALTER COLUMN other SET STORAGE EXTERNAL;
         ALTER TABLE t REPLICA IDENTITY {identity}"
    );
    let stage = Stage::set(Setting {
        schema: &schema,
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t SELECT i, 0, repeat(md5(i::text), 300),
                 decode(repeat(md5((-i)::text), 300), 'hex') FROM generate_series(1, 20) i",
        )
        .await;
    stage
}

const UPDATES: &[&str] = &[
    "UPDATE t SET n = n + 1",
    "UPDATE t SET n = n + 1 WHERE id <= 10",
    "UPDATE t SET other = NULL WHERE id = 1",
    "UPDATE t SET n = 100 WHERE id = 1",
    "UPDATE t SET big = repeat('changed', 2000) WHERE id = 2",
    "UPDATE t SET n = 200 WHERE id = 2",
    "UPDATE t SET big = NULL, other = NULL WHERE id = 3",
    "UPDATE t SET n = 300 WHERE id = 3",
    "UPDATE t SET big = 'small', other = '\\x00ff' WHERE id = 4",
    "UPDATE t SET n = 400 WHERE id = 4",
    "UPDATE t SET big = repeat('large again', 2000) WHERE id = 4",
    "UPDATE t SET n = 401 WHERE id = 4",
    "INSERT INTO t VALUES (21, 0, repeat('fresh', 2000), NULL)",
    "UPDATE t SET n = 2100 WHERE id = 21",
    "BEGIN; UPDATE t SET n = 1 WHERE id = 5; UPDATE t SET big = repeat('x', 9000) WHERE id = 5;
     UPDATE t SET n = 2 WHERE id = 5; UPDATE t SET other = NULL WHERE id = 5;
     UPDATE t SET n = 3 WHERE id = 5; COMMIT",
    "BEGIN; DELETE FROM t WHERE id = 6; INSERT INTO t VALUES (6, 6, repeat('second', 2000), NULL);
     UPDATE t SET n = 66 WHERE id = 6; COMMIT",
    "UPDATE t SET n = n + 1",
];

async fn separate_updates(identity: &str) {
    let stage = stage(identity).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    for update in UPDATES {
        stage.sql(update).await;
        stage.equal(&pipeline).await;
    }
}

async fn updates_in_one_batch(identity: &str) {
    let stage = stage(identity).await;
    assert_eq!(stage.once().await.rows, 20);
    for update in UPDATES {
        stage.sql(update).await;
    }
    assert_eq!(stage.once().await.rows, 21);
    let letters = stage
        .target_text("SELECT count(*)::text FROM millrace.dead_letter")
        .await;
    assert_eq!(letters, "0");
}

#[tokio::test]
async fn separate_updates_keep_untouched_values_under_the_default_identity() {
    separate_updates("DEFAULT").await;
}

#[tokio::test]
async fn separate_updates_keep_untouched_values_under_full_identity() {
    separate_updates("FULL").await;
}

#[tokio::test]
async fn updates_of_one_batch_keep_untouched_values_under_the_default_identity() {
    updates_in_one_batch("DEFAULT").await;
}

#[tokio::test]
async fn updates_of_one_batch_keep_untouched_values_under_full_identity() {
    updates_in_one_batch("FULL").await;
}

/// A reader never meets a wrong or null value meanwhile.
#[tokio::test]
async fn a_reader_sees_the_untouched_value_all_the_time() {
    let stage = stage("DEFAULT").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    let wrong =
        "SELECT count(*)::text FROM t WHERE big IS DISTINCT FROM repeat(md5(id::text), 300)";
    for round in 0..40 {
        stage
            .sql(&format!(
                "UPDATE t SET n = {round} WHERE id % 4 = {round} % 4"
            ))
            .await;
        assert_eq!(stage.target_text(wrong).await, "0");
    }
    stage.equal(&pipeline).await;
    assert_eq!(stage.target_text(wrong).await, "0");
}
