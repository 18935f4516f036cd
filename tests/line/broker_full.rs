//! A broker without the room that the stream is to have: told with its code, and tried again.

use millrace_lab::NatsOptions;

use crate::bad_input::edit;
use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn a_stream_larger_than_the_broker_may_store_is_told_and_begins_once_it_is_smaller() {
    let stage = Stage::set(Setting {
        stream: "confirm = \"acked\"\nretention = { max_bytes = \"4GiB\" }",
        nats: NatsOptions {
            // Room for the stream of a copy too, which has 1 GiB.
            max_file_store: Some("2G".to_owned()),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut pipeline = stage.start();
    let told = Stage::readyz(&mut pipeline, 503, "E1210").await;
    assert!(told.contains("retrying"), "{told}");
    let (_, status) = pipeline.get("/status").await.expect("answers");
    for text in ["E1210", "max_file_store", "stream.retention.max_bytes"] {
        assert!(status.contains(text), "{text} is not in {status}");
    }
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    edit(&stage.folder, "4GiB", "256MiB");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}
