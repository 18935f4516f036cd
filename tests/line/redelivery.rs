//! Events that come again, and events that are older than what is there, change nothing.

use millrace_event::decode_line;

use crate::stage::{PATIENCE, Setting, Stage};

const ROWS: &str = "SELECT string_agg(id || ' ' || v || ' ' || xmin, ', ' ORDER BY id) FROM t";

async fn stop(stage: &Stage, mut pipeline: millrace_lab::Pipeline) {
    pipeline.terminate().expect("signal");
    let code = pipeline.wait(PATIENCE).await.expect("ends in time");
    assert_eq!(code, 0, "{}", pipeline.logs());
    stage.keeps_the_password(&pipeline);
}

async fn rows(stage: &Stage) -> Option<String> {
    stage
        .target
        .query_one(ROWS, &[])
        .await
        .expect("rows")
        .get(0)
}

#[tokio::test]
async fn what_is_delivered_again_changes_no_row() {
    let stage = Stage::set(Setting::default()).await;
    let pipeline = stage.start();
    stage
        .sql("INSERT INTO t SELECT i, 'first' FROM generate_series(1, 50) i")
        .await;
    stage.equal(&pipeline).await;
    stop(&stage, pipeline).await;
    let save = "CREATE TABLE saved AS SELECT * FROM millrace.position";
    stage.target.batch_execute(save).await.expect("saved");
    let pipeline = stage.start();
    stage
        .sql("UPDATE t SET v = 'second' WHERE id <= 20; DELETE FROM t WHERE id BETWEEN 15 AND 30")
        .await;
    stage
        .sql("INSERT INTO t VALUES (15, 'again'); UPDATE t SET id = 99 WHERE id = 50")
        .await;
    stage.equal(&pipeline).await;
    stop(&stage, pipeline).await;
    let before = rows(&stage).await;
    let rewind = "UPDATE millrace.position p SET stream_seq = s.stream_seq, position = s.position \
                  FROM saved s WHERE p.sink = s.sink";
    stage.target.batch_execute(rewind).await.expect("rewound");

    let pipeline = stage.start();
    stage
        .target_shows(
            &pipeline,
            "SELECT (p.position > s.position)::text FROM millrace.position p, saved s",
            "true",
        )
        .await;
    stage.equal(&pipeline).await;
    stop(&stage, pipeline).await;
    assert_eq!(rows(&stage).await, before);
}

#[tokio::test]
async fn an_old_event_that_is_published_again_is_ignored() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .sql("INSERT INTO t VALUES (1, 'old'), (2, 'gone')")
        .await;
    stage
        .sql("UPDATE t SET v = 'new' WHERE id = 1; DELETE FROM t WHERE id = 2")
        .await;
    stage.equal(&pipeline).await;
    let client = stage.nats.client().await.expect("client");
    let jetstream = async_nats::jetstream::new(client);
    let mut stream = jetstream.get_stream("CDC_shop").await.expect("stream");
    let last = stream.info().await.expect("info").state.last_sequence;
    let mut published = 0;
    for seq in 1..=last {
        let message = stream.get_raw_message(seq).await.expect("message");
        if decode_line(&message.payload).is_ok() {
            let sent = jetstream.publish(message.subject, message.payload).await;
            sent.expect("published").await.expect("stored");
            published += 1;
        }
    }
    assert!(published >= 4, "{published} events");
    let before = rows(&stage).await;
    stage.sql("INSERT INTO t VALUES (3, 'after')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
    let after = rows(&stage).await.expect("rows");
    assert!(after.starts_with(&before.expect("rows")), "{after}");
    assert!(pipeline.is_running());
}
