//! How a capture begins: what a crash left is made good, what somebody removed is a gap and is said to be one.

use std::time::Duration;

use async_nats::jetstream::{self, stream::Config};
use millrace_lab::PostgresOptions;

use crate::kill::{random_moment, seeded};
use crate::stage::{Setting, Stage};

const SLOT: &str = "millrace_shop";

async fn jetstream(stage: &Stage) -> jetstream::Context {
    jetstream::new(stage.nats.client().await.expect("client"))
}

/// A stage that has worked and is stopped.
async fn worked(postgres: PostgresOptions) -> Stage {
    let stage = Stage::set(Setting {
        postgres,
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    stage
}

/// Leaves an empty stream as the product makes it, as a crash right after its creation does.
async fn crashed_after_the_stream() -> Stage {
    let stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut capture = stage.start_with(&["run", "--only", "capture"]);
    Stage::readyz(&mut capture, 200, "streaming").await;
    Stage::stopped(capture).await;
    let jetstream = jetstream(&stage).await;
    let mut stream = jetstream.get_stream("CDC_shop").await.expect("stream");
    let config: Config = stream.info().await.expect("info").config.clone();
    let dropped = stage.start_with(&["drop", "--yes"]);
    stage.ends(dropped, 0, &[]).await;
    jetstream.create_stream(config).await.expect("stream");
    stage
}

async fn works(stage: &Stage) {
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}

#[tokio::test]
async fn a_crash_between_stream_and_slot_is_made_good() {
    let stage = crashed_after_the_stream().await;
    works(&stage).await;
}

#[tokio::test]
async fn a_crash_between_slot_and_start_marker_is_made_good() {
    let stage = crashed_after_the_stream().await;
    stage
        .sql(&format!(
            "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"
        ))
        .await;
    works(&stage).await;
}

#[tokio::test]
async fn a_start_that_is_killed_at_any_moment_can_be_repeated() {
    let mut rng = seeded();
    for _ in 0..2 {
        let stage = Stage::set(Setting::default()).await;
        stage.sql("INSERT INTO t VALUES (1, 'one')").await;
        for _ in 0..6 {
            let mut pipeline = stage.start();
            random_moment(&mut rng, 250).await;
            pipeline.kill9();
        }
        works(&stage).await;
    }
}

#[tokio::test]
async fn a_slot_that_is_missing_at_start_is_a_gap() {
    let stage = worked(PostgresOptions::default()).await;
    stage
        .sql(&format!("SELECT pg_drop_replication_slot('{SLOT}')"))
        .await;
    let pipeline = stage.start();
    stage.ends(pipeline, 4, &["E1102", "millrace drop"]).await;
}

#[tokio::test]
async fn a_slot_that_is_dropped_while_it_is_read_halts_and_says_so() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .sql(&format!(
            "DO $$ BEGIN LOOP \
               PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots \
                 WHERE slot_name = '{SLOT}' AND active_pid IS NOT NULL; \
               BEGIN PERFORM pg_drop_replication_slot('{SLOT}'); EXIT; \
               EXCEPTION WHEN object_in_use THEN NULL; END; \
             END LOOP; END $$"
        ))
        .await;
    let body = Stage::readyz(&mut pipeline, 503, "halted").await;
    assert!(
        body.contains("E1102") && body.contains("millrace drop"),
        "{body}"
    );
    let (livez, _) = pipeline.get("/livez").await.expect("livez");
    assert_eq!(livez, 200);
    Stage::stopped(pipeline).await;
}

#[tokio::test]
async fn a_stream_that_was_deleted_is_a_gap() {
    let stage = worked(PostgresOptions::default()).await;
    let jetstream = jetstream(&stage).await;
    jetstream.delete_stream("CDC_shop").await.expect("deleted");
    let pipeline = stage.start();
    stage.ends(pipeline, 4, &["E1202", "millrace drop"]).await;
}

#[tokio::test]
async fn a_stream_that_is_deleted_while_it_is_fed_halts_and_says_so() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let jetstream = jetstream(&stage).await;
    jetstream.delete_stream("CDC_shop").await.expect("deleted");
    let body = Stage::readyz(&mut pipeline, 503, "halted").await;
    assert!(body.contains("E1202"), "{body}");
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(pipeline.is_running());
}

#[tokio::test]
async fn a_slot_that_was_advanced_by_hand_is_a_gap() {
    let stage = worked(PostgresOptions::default()).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    stage
        .sql(&format!(
            "SELECT pg_replication_slot_advance('{SLOT}', pg_current_wal_lsn())"
        ))
        .await;
    let pipeline = stage.start();
    stage.ends(pipeline, 4, &["E1103", "millrace drop"]).await;
}

#[tokio::test]
async fn a_slot_that_the_source_invalidated_is_a_gap() {
    let settings = vec![("max_slot_wal_keep_size".to_owned(), "1MB".to_owned())];
    let options = PostgresOptions {
        settings,
        ..PostgresOptions::default()
    };
    let stage = worked(options).await;
    for number in 2..6 {
        stage
            .sql(&format!(
                "INSERT INTO t VALUES ({number}, 'while it was down'); SELECT pg_switch_wal()"
            ))
            .await;
    }
    stage.sql("CHECKPOINT").await;
    let pipeline = stage.start();
    stage
        .ends(pipeline, 4, &["E1104", "max_slot_wal_keep_size"])
        .await;
}
