//! What cannot be proven any more is refused, and made good by beginning anew.

use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn a_publication_that_was_dropped_halts_capture_and_refuses_a_restart() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'a')").await;
    stage.equal(&pipeline).await;
    stage.sql("DROP PUBLICATION millrace_shop").await;
    Stage::readyz(&mut pipeline, 503, "E1106").await;
    assert!(pipeline.is_running());
    pipeline.kill9();

    stage.sql("INSERT INTO t VALUES (2, 'missed')").await;
    let again = stage.start();
    stage.ends(again, 4, &["E1106", "was dropped"]).await;

    // Made anew it is another one, and what was missed is still missing.
    stage
        .sql("CREATE PUBLICATION millrace_shop FOR TABLE t")
        .await;
    let again = stage.start();
    stage.ends(again, 4, &["E1106"]).await;
    let drop = stage.start_with(&["drop", "--yes"]);
    stage.ends(drop, 0, &[]).await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}

#[tokio::test]
async fn after_drop_every_table_is_copied_again_and_made_exact() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage
        .sql("INSERT INTO t SELECT i, 'old' FROM generate_series(1, 500) i")
        .await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
    let mut drop = stage.start_with(&["drop", "--yes"]);
    assert_eq!(
        drop.wait(PATIENCE).await.expect("ends"),
        0,
        "{}",
        drop.logs()
    );

    stage
        .sql("DELETE FROM t WHERE id <= 100; UPDATE t SET v = 'new' WHERE id > 400")
        .await;
    stage
        .sql("INSERT INTO t SELECT i, 'more' FROM generate_series(501, 600) i")
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 500);
    stage.sql("UPDATE t SET v = 'after' WHERE id = 600").await;
    stage.equal(&pipeline).await;
}
