//! Rows of several MiB that travel in one message each, because the broker takes messages of that size.

use millrace_lab::NatsOptions;

use crate::stage::{Setting, Stage};

/// More than a reader otherwise asks for at a time, and less than one message of this broker.
const ROW_BYTES: usize = 5 * 1024 * 1024;

async fn set() -> Stage {
    Stage::set(Setting {
        nats: NatsOptions {
            config: "max_payload: 8MB".into(),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await
}

fn insert(id: u32) -> String {
    format!("INSERT INTO t VALUES ({id}, repeat('{id}', {ROW_BYTES}))")
}

#[tokio::test]
async fn a_row_larger_than_a_readers_usual_request_is_followed() {
    let stage = set().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql(&insert(1)).await;
    stage.sql("INSERT INTO t VALUES (2, 'behind it')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}

#[tokio::test]
async fn a_row_larger_than_a_readers_usual_request_is_copied() {
    let stage = set().await;
    stage.sql(&insert(1)).await;
    stage.sql("INSERT INTO t VALUES (2, 'behind it')").await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}
