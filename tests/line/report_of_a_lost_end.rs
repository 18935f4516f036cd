//! What a sink reported of messages that the broker lost says nothing about those that took their sequences.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream::Stream;
use millrace_event::subject;
use millrace_event::work::{SINKS, SinkReport};

use crate::stage::{PATIENCE, Setting, Stage};

/// Longer than a full stream waits between two purges, which is 1 s.
const A_FEW_LOOKS: Duration = Duration::from_millis(2_500);

async fn first_sequence(stream: &Stream) -> u64 {
    let info = stream.get_info().await.expect("info");
    info.state.first_sequence
}

#[tokio::test]
async fn a_full_stream_keeps_what_a_required_sink_has_not_seen() {
    let stage = Stage::set(Setting {
        stream: "confirm = \"acked\"\nretention = { max_bytes = \"1MiB\" }",
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'followed')").await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends in time");

    let mut capture = stage.start_with(&["run", "--only", "capture"]);
    stage
        .sql(
            "DO $$ BEGIN FOR i IN 1001..2400 LOOP
                 INSERT INTO t VALUES (i, repeat(md5(i::text), 32)); COMMIT;
             END LOOP; END $$",
        )
        .await;
    capture.wait_for_log("E1208", PATIENCE).await.expect("full");

    let client = stage.nats.client().await.expect("client");
    let jetstream = async_nats::jetstream::new(client);
    let stream = jetstream.get_stream("CDC_shop").await.expect("stream");
    let deadline = Instant::now() + PATIENCE;
    let mut first = 0;
    // What the sink has applied goes first.
    while first != first_sequence(&stream).await {
        assert!(Instant::now() < deadline, "the stream does not stay full");
        first = first_sequence(&stream).await;
        tokio::time::sleep(A_FEW_LOOKS).await;
    }

    // Its broker kept the report, and lost the messages that it is about.
    let bucket = subject::bucket_name("shop", SINKS);
    let reports = jetstream.get_key_value(bucket).await.expect("bucket");
    let report = reports.get("replica").await.expect("read");
    let report: SinkReport =
        serde_json::from_slice(&report.expect("a report")).expect("is well formed");
    let last = stream.get_info().await.expect("info").state.last_sequence;
    assert!(report.stream_seq < last, "the sink has all");
    let old = SinkReport {
        stream_seq: last,
        ..report
    };
    let text = serde_json::to_vec(&old).expect("plain JSON");
    reports.put("replica", text.into()).await.expect("put");
    tokio::time::sleep(A_FEW_LOOKS).await;
    assert_eq!(first_sequence(&stream).await, first, "{}", capture.logs());

    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    stage.equal(&sink).await;
}
