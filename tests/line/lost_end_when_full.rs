//! A full stream that lost its end: its sink has more than it holds, and waits for it to grow; it grows only when
//! something goes.

use std::time::{Duration, Instant};

use async_nats::jetstream::{self, stream::State};

use crate::bad_input::edit;
use crate::stage::{Setting, Stage};

/// How long a message stays for the confirm policy, and a while: 1 s, its margin, and the purge's own slack.
const KEPT: Duration = Duration::from_secs(61 + 40);

async fn state(stage: &Stage) -> State {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await.expect("a stream");
    stream.cached_info().state.clone()
}

#[tokio::test]
async fn a_full_stream_whose_end_was_lost_goes_on() {
    let mut stage = Stage::set(Setting {
        stream: "confirm = \"synced\"\nsync_interval = \"1s\"\nretention = { max_bytes = \"64MiB\" }",
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .sql(
            "DO $$ BEGIN FOR i IN 1..2000 LOOP
                 INSERT INTO t VALUES (i, repeat(md5(i::text), 32)); COMMIT;
             END LOOP; END $$",
        )
        .await;
    stage.equal(&pipeline).await;
    stage.nats.snapshot_store().await.expect("snapshot");
    let kept = state(&stage).await;
    stage
        .sql("INSERT INTO t SELECT i, 'lost' FROM generate_series(3001, 3030) i")
        .await;
    stage.equal(&pipeline).await;
    pipeline.kill9();
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    assert!(kept.bytes > 1024 * 1024, "{kept:?}");
    let limit = format!("\"{}KiB\"", kept.bytes * 102 / 100 / 1024);
    edit(&stage.folder, "\"64MiB\"", &limit);

    // It is full before it has any of what the sink has: nothing is read.
    let pipeline = stage.start();
    Stage::logs(&pipeline, "E1208").await;
    stage
        .sql("INSERT INTO t SELECT i, 'new' FROM generate_series(4001, 4030) i")
        .await;
    let deadline = Instant::now() + KEPT;
    while state(&stage).await.first_sequence <= kept.first_sequence {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    stage.equal(&pipeline).await;
}
