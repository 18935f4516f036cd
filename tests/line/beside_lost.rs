//! What a broker loses beside the stream while the stream's own end survives: a sink's report, an order, the memory of
//! what was left out. Each comes again. And who waits for what nobody makes does not wear the servers out.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, kv::Store};
use futures_util::TryStreamExt as _;
use millrace_event::work::{BackfillOrder, COPIES, SCHEMAS, SINKS, STATE, SinkReport};
use millrace_event::{Position, TableName, subject};
use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: &[&str] = &["run", "--only", "capture"];
const SINK: &[&str] = &["run", "--only", "sink:replica"];
/// The slot keeps the WAL of the whole scenario.
const SYNCED: &str = "confirm = \"synced\"\nsync_interval = \"1h\"";

async fn bucket(stage: &Stage, kind: &str) -> Store {
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let name = subject::bucket_name("shop", kind);
    jetstream.get_key_value(name).await.expect("bucket")
}

async fn text(store: &Store, key: &str) -> String {
    let value = store.get(key).await.expect("read").unwrap_or_default();
    String::from_utf8(value.to_vec()).expect("text")
}

async fn ends(pipeline: &mut Pipeline) {
    pipeline.terminate().expect("signal");
    let code = pipeline.wait(PATIENCE).await.expect("ends in time");
    assert_eq!(code, 0, "{}", pipeline.logs());
}

#[tokio::test]
async fn a_report_that_the_broker_lost_is_renewed_although_nothing_new_comes() {
    let stage = Stage::set(Setting::default()).await;
    let mut capture = stage.start_with(CAPTURE);
    let mut sink = stage.start_with(SINK);
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&sink).await;
    ends(&mut capture).await;
    Stage::readyz(&mut sink, 200, "streaming").await;
    let reports = bucket(&stage, SINKS).await;
    let report = async || {
        let text = text(&reports, "replica").await;
        serde_json::from_str::<SinkReport>(&text).expect("a report")
    };
    // The last report of what came.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let newest = report().await;
    let old = SinkReport {
        stream_seq: 1,
        position: Position::ZERO,
        ..newest.clone()
    };
    let value = serde_json::to_vec(&old).expect("plain JSON");
    reports.put("replica", value.into()).await.expect("put");
    let deadline = Instant::now() + Duration::from_secs(15);
    while report().await.position != newest.position {
        assert!(Instant::now() < deadline, "{}", sink.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_sink_that_waits_for_capture_slows_down_and_says_so() {
    let stage = Stage::set(Setting::apart()).await;
    let mut sink = stage.start_with(SINK);
    Stage::logs(&sink, "waiting for capture to create bucket").await;
    let told = Stage::readyz(&mut sink, 503, "waiting for capture to").await;
    assert!(told.contains("retrying"), "{told}");
    let sessions = async || {
        // Of the sink: a session is counted when it ends.
        let sql = "SELECT sessions::text FROM pg_stat_database WHERE datname = 'target'";
        let count = stage.target_text(sql).await;
        count.parse::<u64>().expect("a number")
    };
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = sessions().await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    let logins = sessions().await - before;
    assert!((1..=12).contains(&logins), "{logins} logins in 9 s");
    let mut capture = stage.start_with(CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&sink).await;
    Stage::readyz(&mut sink, 200, "streaming").await;
}

/// Makes changes of which the rows must be read again while only capture runs, has the broker forget that, and starts
/// everything. Then it starts again, and nothing is ordered a second time.
async fn forgotten(stage: &Stage, changes: &[&str], key: &str) {
    let mut pipeline = stage.start();
    // Nothing is copied after this.
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.equal(&pipeline).await;
    ends(&mut pipeline).await;
    let mut capture = stage.start_with(CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    for sql in changes {
        stage.sql(sql).await;
    }
    let (copies, state) = (bucket(stage, COPIES).await, bucket(stage, STATE).await);
    let deadline = Instant::now() + PATIENCE;
    while !text(&copies, "orders.replica").await.contains("owed") {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The stream's end lies behind the changes then.
    stage.sql("INSERT INTO t VALUES (1000, 'behind')").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    capture.kill9();
    for (bucket, key) in [(&copies, "orders.replica"), (&state, key)] {
        bucket.purge(key).await.expect("forgotten");
    }
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let ordered = "backfill ordered";
    assert!(pipeline.logs().contains(ordered), "{}", pipeline.logs());
    let deadline = Instant::now() + PATIENCE;
    while text(&copies, "orders.replica").await.contains("owed") {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for row in [1001, 1002] {
        ends(&mut pipeline).await;
        pipeline = stage.start();
        stage
            .sql(&format!("INSERT INTO t VALUES ({row}, 'again')"))
            .await;
        stage.equal(&pipeline).await;
        assert!(!pipeline.logs().contains(ordered), "{}", pipeline.logs());
    }
}

#[tokio::test]
async fn changes_that_were_left_out_are_told_again_where_the_broker_forgot_them() {
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::two_tables()
    })
    .await;
    let left_out =
        "BEGIN; ALTER TABLE u DROP CONSTRAINT u_pkey; INSERT INTO u VALUES (22, 'no key'); COMMIT;
        ALTER TABLE u ADD PRIMARY KEY (id)";
    forgotten(&stage, &[left_out], "left_out").await;
}

#[tokio::test]
async fn changes_under_another_name_are_told_again_where_the_broker_forgot_them() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);
            INSERT INTO u VALUES (1, 'old')",
        tables: &[("public.t", ""), ("public.u", "")],
        stream: SYNCED,
        ..Setting::default()
    })
    .await;
    let lent = "BEGIN; ALTER TABLE u RENAME TO x; UPDATE x SET v = 'lent'; ALTER TABLE x RENAME TO u; COMMIT";
    forgotten(&stage, &[lent], "named").await;
}

/// Forgets what a bucket holds of a key, as if it had never been put.
async fn lost(store: &Store, key: &str) {
    let purged = store
        .stream
        .purge()
        .filter(format!("{}{key}", store.prefix));
    assert_eq!(purged.await.expect("answers").purged, 1, "{key}");
    assert!(store.entry(key).await.expect("read").is_none());
}

async fn versions(schemas: &Store) -> BTreeSet<String> {
    let keys = schemas.keys().await.expect("keys");
    let keys: Vec<String> = keys.try_collect().await.expect("keys");
    keys.into_iter().collect()
}

/// Has only capture see a table in three shapes, ends it, and has the broker lose the second one. Says its key.
async fn older_schema_lost(stage: &Stage, schemas: &Store) -> String {
    let mut capture = stage.start_with(CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    let first = versions(schemas).await;
    let added = async |sql: &str, known: &BTreeSet<String>| {
        stage.sql(sql).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = versions(schemas).await;
            if now != *known {
                break now;
            }
            assert!(Instant::now() < deadline, "{}", capture.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let second = added(
        "ALTER TABLE t ADD COLUMN w int; INSERT INTO t VALUES (2, 'two', 2)",
        &first,
    )
    .await;
    let third = added(
        "ALTER TABLE t ADD COLUMN x int; INSERT INTO t VALUES (3, 'three', 3, 3)",
        &second,
    )
    .await;
    assert_eq!(third.len(), second.len() + 1, "{third:?}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    capture.kill9();
    let superseded = second.difference(&first).next().expect("another one");
    lost(schemas, superseded).await;
    superseded.clone()
}

/// What capture says of a schema that the broker lost.
const NOT_KEPT: &str = "a table's schema that the stream names is not kept";

#[tokio::test]
async fn an_older_schema_that_the_broker_lost_is_described_again_though_the_stream_has_its_changes()
{
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    let schemas = bucket(&stage, SCHEMAS).await;
    let superseded = older_schema_lost(&stage, &schemas).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    assert!(pipeline.logs().contains(NOT_KEPT), "{}", pipeline.logs());
    assert!(versions(&schemas).await.contains(&superseded));
    Stage::stopped(pipeline).await;
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (4, 'four', 4, 4)").await;
    stage.equal(&pipeline).await;
    assert!(!pipeline.logs().contains(NOT_KEPT), "{}", pipeline.logs());
}

#[tokio::test]
async fn an_older_schema_that_cannot_be_described_while_its_table_is_locked_holds_no_table_up() {
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::two_tables()
    })
    .await;
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    let schemas = bucket(&stage, SCHEMAS).await;
    let superseded = older_schema_lost(&stage, &schemas).await;
    let lock = stage.postgres.connect("source").await.expect("connects");
    let locked = "BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE";
    lock.batch_execute(locked).await.expect("locked");
    let capture = stage.start_with(CAPTURE);
    Stage::logs(&capture, "an older schema cannot be described yet").await;
    stage.sql("INSERT INTO u VALUES (1, 'on')").await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let stream = jetstream.get_stream("CDC_shop").await.expect("a stream");
    let deadline = Instant::now() + Duration::from_secs(8);
    let inserts = "cdc.shop.public.u.c";
    while stream
        .get_last_raw_message_by_subject(inserts)
        .await
        .is_err()
    {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!versions(&schemas).await.contains(&superseded));
    drop(lock);
    let deadline = Instant::now() + PATIENCE;
    while !versions(&schemas).await.contains(&superseded) {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let again = "trying again";
    assert!(!capture.logs().contains(again), "{}", capture.logs());
    Stage::stopped(capture).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

/// What became of the list by the time that capture looks.
#[derive(Clone, Copy, PartialEq)]
enum List {
    /// It is gone.
    Lost,
    /// An operator has begun it anew.
    WrittenAgain,
}

#[tokio::test]
async fn an_order_that_the_broker_lost_is_given_again_though_it_is_remembered_as_given() {
    is_given_again(List::Lost).await;
}

#[tokio::test]
async fn an_order_is_given_again_though_its_lost_list_was_written_anew_before_the_look() {
    is_given_again(List::WrittenAgain).await;
}

async fn is_given_again(list: List) {
    let stage = Stage::set(Setting {
        stream: SYNCED,
        ..Setting::two_tables()
    })
    .await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.equal(&pipeline).await;
    ends(&mut pipeline).await;
    let mut capture = stage.start_with(CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    stage
        .sql(
            "BEGIN; ALTER TABLE u DROP CONSTRAINT u_pkey; INSERT INTO u VALUES (22, 'no key'); COMMIT;
             ALTER TABLE u ADD PRIMARY KEY (id)",
        )
        .await;
    let (copies, state) = (bucket(&stage, COPIES).await, bucket(&stage, STATE).await);
    let has = async |store: &Store, key: &str, part: &str, capture: &Pipeline| {
        let deadline = Instant::now() + PATIENCE;
        while !text(store, key).await.contains(part) {
            assert!(Instant::now() < deadline, "{}", capture.logs());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    has(&copies, "orders.replica", "left-out-", &capture).await;
    has(&state, "left_out", "ordered", &capture).await;
    let said = "the broker lost a backfill order";
    assert!(!capture.logs().contains(said), "{}", capture.logs());
    capture.kill9();
    lost(&copies, "orders.replica").await;
    lost(&copies, "witnesses").await;
    if list == List::WrittenAgain {
        let own = BackfillOrder::new("19ab-0".to_owned(), TableName::new("public", "t"));
        let value = serde_json::to_vec(&[own]).expect("JSON");
        let written = copies.put("orders.replica", value.into()).await;
        written.expect("written");
    }
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    assert!(pipeline.logs().contains(said), "{}", pipeline.logs());
    // Carried out: it is not given again, nor looked for.
    has(&state, "ordered", "[]", &pipeline).await;
    assert!(!text(&copies, "orders.replica").await.contains("owed"));
    ends(&mut pipeline).await;
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'again')").await;
    stage.equal(&pipeline).await;
    for again in [said, "backfill ordered"] {
        assert!(!pipeline.logs().contains(again), "{}", pipeline.logs());
    }
}
