//! A reader whose place the broker has lost.

use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream;
use millrace_event::{Control, Position, decode_line, header};

use crate::bad_input::edit;
use crate::broker_loss::SYNCED;
use crate::stage::{PATIENCE, Setting, Stage};

#[tokio::test]
async fn a_stream_that_stays_shorter_holds_no_sink_up() {
    let mut stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.nats.snapshot_store().await.expect("snapshot");
    stage
        .sql("INSERT INTO t SELECT i, 'row' FROM generate_series(1, 3000) i")
        .await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    // What was lost takes 30 messages now.
    let packed = format!("{SYNCED}\nevents_per_message = 100");
    edit(&stage.folder, SYNCED, &packed);
    let mut pipeline = stage.start();
    stage.sql("UPDATE t SET v = 'changed' WHERE id <= 10").await;
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
}

/// A reader goes by that where a broker left a hole: behind it a publisher began again.
#[tokio::test]
async fn the_first_message_of_a_life_says_where_the_stream_ended_and_where_it_begins_itself() {
    let stage = Stage::set(Setting::default()).await;
    for life in 0..2 {
        let mut pipeline = stage.start();
        stage
            .sql(&format!("INSERT INTO t VALUES ({life}, 'row')"))
            .await;
        stage.equal(&pipeline).await;
        pipeline.terminate().expect("signal");
        assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    }
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await.expect("a stream");
    let (mut begins, mut lives, mut before) = (Vec::new(), 0, Position::ZERO);
    for stream_seq in 1..=stream.cached_info().state.last_sequence {
        let message = stream.get_raw_message(stream_seq).await.expect("a message");
        if let Some(last) = message.headers.get(NATS_EXPECTED_LAST_SEQUENCE) {
            assert_eq!(last.as_str(), (stream_seq - 1).to_string());
            begins.push(stream_seq);
        }
        let position = position(&message.payload);
        if let Some(after) = message.headers.get(header::AFTER) {
            // Of a life, not of a batch.
            assert_eq!(after.as_str(), before.to_string());
            assert!(begins.contains(&stream_seq) && position > before);
            lives += 1;
        }
        before = position;
    }
    assert_eq!(lives, 2);
    assert!(begins.len() >= 2, "{begins:?}");
}

/// The position of a message of one line.
fn position(payload: &[u8]) -> Position {
    match serde_json::from_slice::<Control>(payload) {
        Ok(control) => control.position,
        Err(_) => decode_line(payload)
            .expect("an event")
            .source
            .version
            .into(),
    }
}
