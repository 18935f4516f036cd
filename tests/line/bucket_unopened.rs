//! A sink waits for a bucket that capture has not made yet. Any other reason why it cannot be opened is told.

use millrace_lab::NatsOptions;

use crate::stage::{Setting, Stage};

const SINK: &[&str] = &["run", "--only", "sink:replica"];

#[tokio::test]
async fn only_a_bucket_that_is_not_there_is_waited_for() {
    let stage = Stage::set(Setting::default()).await;
    let sink = stage.start_with(SINK);
    Stage::logs(&sink, "waiting for capture to create bucket").await;
    assert!(!sink.logs().contains("cannot be opened"), "{}", sink.logs());

    let stage = Stage::set(Setting {
        nats: NatsOptions {
            jetstream: false,
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let sink = stage.start_with(SINK);
    Stage::logs(&sink, "bucket MILLRACE_shop_copies cannot be opened").await;
    assert!(
        !sink.logs().contains("waiting for capture"),
        "{}",
        sink.logs()
    );
}
