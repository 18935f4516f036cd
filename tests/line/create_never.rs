//! With `create = "never"` at the source the product takes what is there, and makes nothing.

use async_nats::jetstream;

use crate::stage::{Setting, Stage};

const PUBLICATION: &str = "CREATE PUBLICATION \"millrace_shop\" FOR TABLE ONLY \"public\".\"t\" \
                           WITH (publish_via_partition_root = true)";
const SLOT: &str = "SELECT pg_create_logical_replication_slot('millrace_shop', 'pgoutput')";

async fn set() -> Stage {
    Stage::set(Setting {
        source: "heartbeat_interval = \"500ms\"\ncreate = \"never\"",
        ..Setting::default()
    })
    .await
}

/// Nothing was made at the source, and no stream begun.
async fn nothing_made(stage: &Stage, slots: &str, publications: &str) {
    let count = |from: &str| format!("SELECT count(*)::text FROM {from}");
    let found = stage.ask(&count("pg_replication_slots")).await;
    assert_eq!(found.as_deref(), Some(slots));
    let found = stage.ask(&count("pg_publication")).await;
    assert_eq!(found.as_deref(), Some(publications));
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await;
    assert!(stream.is_err(), "a stream was made");
}

#[tokio::test]
async fn what_is_missing_is_answered_with_the_statements_until_all_is_there() {
    let stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    // Both, in the order in which they must be run.
    let run = stage.start();
    let both = format!("remedy: {PUBLICATION}; then {SLOT}");
    let logs = stage.ends(run, 4, &["E1105", &both]).await;
    assert_eq!(logs.matches("remedy: ").count(), 1, "{logs}");
    nothing_made(&stage, "0", "0").await;

    stage.sql(PUBLICATION).await;
    let run = stage.start();
    let logs = stage
        .ends(run, 4, &["E1102", &format!("remedy: {SLOT}")])
        .await;
    assert_eq!(logs.matches("remedy: ").count(), 1, "{logs}");
    nothing_made(&stage, "0", "1").await;

    stage.sql(SLOT).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
}

#[tokio::test]
async fn a_slot_without_its_publication_is_not_taken() {
    let stage = set().await;
    stage.sql(SLOT).await;
    let run = stage.start();
    let remedy = format!("remedy: {PUBLICATION}");
    stage.ends(run, 4, &["E1105", &remedy]).await;
    nothing_made(&stage, "1", "0").await;
}

#[tokio::test]
async fn a_publication_that_lacks_a_table_is_not_changed() {
    let stage = set().await;
    stage
        .sql("CREATE TABLE other (id int PRIMARY KEY); CREATE PUBLICATION millrace_shop FOR TABLE other")
        .await;
    let run = stage.start();
    let add = "ALTER PUBLICATION \"millrace_shop\" ADD TABLE ONLY \"public\".\"t\"";
    stage.ends(run, 4, &["E1106", add, SLOT]).await;
    nothing_made(&stage, "0", "1").await;
    let tables = "SELECT string_agg(tablename, ',') FROM pg_publication_tables";
    assert_eq!(stage.ask(tables).await.as_deref(), Some("other"));
}

#[tokio::test]
async fn what_was_made_beforehand_is_used_from_the_first_start() {
    let stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'before')").await;
    stage.sql(PUBLICATION).await;
    stage.sql(SLOT).await;
    stage.sql("INSERT INTO t VALUES (2, 'between')").await;
    stage.once().await;
    stage.sql("UPDATE t SET v = 'after'").await;
    assert_eq!(stage.once().await.rows, 2);
    // A slot that goes missing later is a gap, not something to be made again.
    stage
        .sql("SELECT pg_drop_replication_slot('millrace_shop')")
        .await;
    let run = stage.start();
    stage.ends(run, 4, &["E1102", "millrace drop"]).await;
}
