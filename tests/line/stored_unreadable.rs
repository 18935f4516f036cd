//! A value beside the stream that is not understood is never taken for none: it is told, and stays as it is.

use std::time::Duration;

use async_nats::jetstream::{self, kv};
use millrace_cdc::stream::{self, BucketError};
use millrace_event::work::{BackfillOrder, COPIES, SINKS, orders_key};
use millrace_event::{TableName, subject};
use serde_json::Value;

use millrace_lab::{Nats, NatsOptions, Pipeline};

use crate::stage::{PATIENCE, Setting, Stage};

/// What an older or a newer release may have written.
const GARBAGE: &[u8] = b"{\"orders\": []}";

async fn stage() -> Stage {
    Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text); \
                 INSERT INTO u SELECT i, 'old' FROM generate_series(1, 100) i",
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await
}

async fn bucket(stage: &Stage, kind: &str) -> kv::Store {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let bucket = subject::bucket_name("shop", kind);
    jetstream.get_key_value(bucket).await.expect("bucket")
}

async fn stopped(mut pipeline: Pipeline) {
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
}

#[tokio::test]
async fn a_list_of_orders_that_is_not_understood_is_kept_and_told() {
    let stage = stage().await;
    stage.once().await;
    let (copies, key) = (bucket(&stage, COPIES).await, orders_key("replica"));
    let revision = copies.put(&key, GARBAGE.into()).await.expect("put");
    // Capture has to order a backfill.
    stage
        .sql("ALTER PUBLICATION millrace_shop DROP TABLE u")
        .await;
    stage
        .sql("UPDATE u SET v = 'missed' WHERE id <= 50; DELETE FROM u WHERE id > 90")
        .await;
    stage
        .sql("ALTER PUBLICATION millrace_shop ADD TABLE u")
        .await;

    let told = ["E1211", "key orders.replica of bucket MILLRACE_shop_copies"];
    let start = ["backfill", "start", "public.u"];
    stage.ends(stage.start_with(&start), 4, &told).await;
    let remedy =
        "nats kv del MILLRACE_shop_copies orders.replica`, then run `millrace backfill start --all";
    stage
        .ends(stage.start(), 4, &[told[0], told[1], remedy])
        .await;
    let mut status = stage.start_with(&["status", "-o", "json"]);
    status.wait(PATIENCE).await.expect("ends");
    let json: Value = serde_json::from_str(&status.stdout()).expect("json");
    assert_eq!(json["stream"]["code"], "E1211", "{json:#}");
    let tables = json["tables"].as_array().expect("tables");
    assert!(
        tables.iter().all(|table| table["complete"] == false),
        "{json:#}"
    );
    let entry = copies.entry(&key).await.expect("read").expect("kept");
    assert_eq!((entry.revision, &entry.value[..]), (revision, GARBAGE));

    // The operator gives it up.
    copies.delete(&key).await.expect("deleted");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stopped(pipeline).await;

    // One that is understood is added to.
    let paused = BackfillOrder {
        paused: true,
        ..BackfillOrder::new("19ab-0".to_owned(), TableName::new("public", "t"))
    };
    let list = serde_json::to_vec(&[paused]).expect("json");
    copies.put(&key, list.into()).await.expect("put");
    stage.ends(stage.start_with(&start), 0, &[]).await;
    let list = copies.get(&key).await.expect("read").expect("there");
    let list: Vec<BackfillOrder> = serde_json::from_slice(&list).expect("a list");
    assert_eq!(list.len(), 2);
}

#[tokio::test]
async fn a_report_that_is_not_understood_is_told_and_stops_nothing() {
    let stage = stage().await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stopped(pipeline).await;
    let reports = bucket(&stage, SINKS).await;
    reports.put("replica", GARBAGE.into()).await.expect("put");
    let capture = stage.start_with(&["run", "--only", "capture"]);
    Stage::logs(&capture, "key replica of bucket MILLRACE_shop_sinks").await;
    stopped(capture).await;
    let pipeline = stage.start();
    stage.sql("DELETE FROM u").await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn only_a_bucket_that_is_not_there_is_made() {
    let mut nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let mut jetstream = jetstream::new(nats.client().await.expect("client"));
    // Something of that name which is no bucket.
    let taken = jetstream::stream::Config {
        name: "KV_MILLRACE_shop_copies".to_owned(),
        subjects: vec!["taken".to_owned()],
        ..Default::default()
    };
    jetstream.create_stream(taken).await.expect("created");
    let found = stream::bucket(&jetstream, "shop", COPIES, 1).await;
    assert!(matches!(found, Err(BucketError::Open { .. })), "{found:?}");
    // A broker that says nothing.
    jetstream.set_timeout(Duration::from_millis(500));
    nats.pause().expect("paused");
    let found = stream::bucket(&jetstream, "shop", SINKS, 1).await;
    assert!(matches!(found, Err(BucketError::Open { .. })), "{found:?}");
    nats.resume().expect("resumed");
    jetstream.set_timeout(Duration::from_secs(5));
    for _ in 0..2 {
        let bucket = stream::bucket(&jetstream, "shop", SINKS, 1).await;
        assert_eq!(
            bucket.expect("made, then found").name,
            "MILLRACE_shop_sinks"
        );
    }
}

#[tokio::test]
async fn a_sink_leaves_what_it_does_not_understand_and_says_so_once() {
    let stage = stage().await;
    let capture = stage.start_with(&["run", "--only", "capture"]);
    Stage::logs(&capture, "stream begun").await;
    stopped(capture).await;
    let copies = bucket(&stage, COPIES).await;
    let keys = ["request.replica", "status.replica", "orders.replica"];
    for key in keys {
        copies.put(key, GARBAGE.into()).await.expect("put");
    }
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    for key in keys {
        let said = format!("key {key} of bucket MILLRACE_shop_copies is not understood");
        Stage::logs(&sink, &said).await;
    }
    // It looks every second.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let logs = sink.logs();
    assert_eq!(logs.matches("E1211").count(), keys.len(), "{logs}");
    assert!(!logs.contains("copy requested"), "{logs}");
    for key in keys {
        let value = copies.get(key).await.expect("read").expect("kept");
        assert_eq!(&value[..], GARBAGE, "{key}");
    }
    copies.delete(keys[0]).await.expect("deleted");
    Stage::logs(&sink, "copy requested").await;
    stopped(sink).await;

    // With the request that the sink has made, and nothing else of theirs.
    copies.delete(keys[1]).await.expect("deleted");
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    let list = copies.get(keys[2]).await.expect("read").expect("kept");
    assert_eq!(&list[..], GARBAGE);
    // A list that is understood again is carried out.
    stage.target_sql("UPDATE u SET v = 'by hand'").await;
    let order = BackfillOrder::new("19ab-0".to_owned(), TableName::new("public", "u"));
    let list = serde_json::to_vec(&[order]).expect("json");
    copies.put(keys[2], list.into()).await.expect("put");
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn reports_that_are_not_understood_are_told_once_each() {
    let stage = stage().await;
    let folder = stage
        .same_config()
        .sink("other", &stage.target_url())
        .write();
    let folder = folder.expect("folder");
    let capture = Stage::start_in(&folder, &["run", "--only", "capture"]);
    Stage::logs(&capture, "stream begun").await;
    stopped(capture).await;
    let reports = bucket(&stage, SINKS).await;
    for sink in ["replica", "other"] {
        reports.put(sink, GARBAGE.into()).await.expect("put");
    }
    let capture = Stage::start_in(&folder, &["run", "--only", "capture"]);
    // They are read every ten seconds.
    tokio::time::sleep(Duration::from_secs(23)).await;
    for sink in ["replica", "other"] {
        let said = format!("key {sink} of bucket MILLRACE_shop_sinks");
        let logs = capture.logs();
        assert_eq!(logs.matches(&said).count(), 1, "{logs}");
    }
}
