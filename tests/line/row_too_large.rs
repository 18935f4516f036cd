//! A change that is larger than what travels: capture halts with the row's size, and loses nothing before it.

use crate::stage::{Setting, Stage};

#[tokio::test]
async fn a_row_above_the_limit_halts_capture_with_its_code() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    // One letter more than 64 MiB.
    stage
        .sql("INSERT INTO t VALUES (2, repeat('x', 64 * 1024 * 1024 + 1))")
        .await;
    let body = Stage::readyz(&mut pipeline, 503, "E1209").await;
    assert!(body.contains("halted"), "{body}");
    assert!(body.contains("millrace drop"), "{body}");
    assert!(body.contains("67108864"), "{body}");
    assert!(body.contains("public.t with the key id = 2"), "{body}");
    assert!(pipeline.is_running(), "{}", pipeline.logs());
    let rows = stage.target_text("SELECT count(*)::text FROM t").await;
    assert_eq!(rows, "1");
}
