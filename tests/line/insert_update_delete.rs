//! Rows that are there, and rows that come, change and go, are in the replica.

use crate::stage::{Setting, Stage};

#[tokio::test]
async fn existing_rows_and_changes_arrive() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i")
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 100);
    stage
        .sql("INSERT INTO t VALUES (101, 'new'); UPDATE t SET v = 'changed' WHERE id <= 10")
        .await;
    stage.sql("DELETE FROM t WHERE id BETWEEN 50 AND 59").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 91);
}

#[tokio::test]
async fn a_graceful_stop_ends_with_zero_and_loses_nothing() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'a')").await;
    stage.equal(&pipeline).await;
    stage
        .sql("INSERT INTO t SELECT i, 'row' FROM generate_series(2, 5000) i")
        .await;
    pipeline.terminate().expect("signal");
    let code = pipeline
        .wait(std::time::Duration::from_secs(20))
        .await
        .expect("ends in time");
    assert_eq!(code, 0, "{}", pipeline.logs());
    stage
        .sql("INSERT INTO t VALUES (5001, 'while it was down')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}
