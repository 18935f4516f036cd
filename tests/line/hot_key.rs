//! One row that is updated all the time ends with its last version.

use millrace_event::Version;

use crate::stage::{Setting, Stage};

async fn stage() -> Stage {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, n int, v text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES (1, 0, 'hot'), (2, 0, 'cold')")
        .await;
    stage
}

async fn version(stage: &Stage) -> Version {
    let text = stage
        .target_text("SELECT _millrace_version::text FROM t WHERE id = 1")
        .await;
    text.replace('-', "").parse().expect("a version")
}

async fn insert_position(stage: &Stage) -> millrace_event::Lsn {
    let text = stage
        .source_text("SELECT pg_current_wal_insert_lsn()::text")
        .await;
    text.parse().expect("an LSN")
}

#[tokio::test]
async fn ten_thousand_updates_in_one_transaction_end_with_the_last() {
    let stage = stage().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("DO $$ BEGIN FOR i IN 1..10000 LOOP UPDATE t SET n = i WHERE id = 1; END LOOP; END $$")
        .await;
    stage.equal(&pipeline).await;
    assert_eq!(version(&stage).await.seq, 10_000);
    assert_eq!(
        stage
            .target_text("SELECT n::text FROM t WHERE id = 1")
            .await,
        "10000"
    );
}

#[tokio::test]
async fn ten_thousand_transactions_end_with_the_last() {
    let stage = stage().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql(
            "DO $$ BEGIN FOR i IN 1..9999 LOOP UPDATE t SET n = i WHERE id = 1; COMMIT; END LOOP; END $$",
        )
        .await;
    let before = insert_position(&stage).await;
    stage.sql("UPDATE t SET n = 10000 WHERE id = 1").await;
    let after = insert_position(&stage).await;
    stage.equal(&pipeline).await;
    let version = version(&stage).await;
    assert_eq!(version.seq, 1);
    assert!(
        before <= version.commit_lsn && version.commit_lsn < after,
        "{before} <= {version} < {after}"
    );
}
