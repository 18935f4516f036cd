//! A copy that fails is tried again by itself, fills no stream, and holds nothing else up.

use std::time::{Duration, Instant};

use async_nats::jetstream::{self, stream};
use millrace_event::subject;
use millrace_event::work::{COPIES, CopyStatus};
use millrace_lab::Pipeline;
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];
/// What capture logs when a life of it ended.
const LIFE_ENDED: &str = "trying again";

/// How often a capture is killed in the middle of a copy.
const KILLS: u32 = 6;
/// The copy stream's limit where that matters: the first captures would fill it if each began to count anew.
const SMALL: u64 = 4 * 1024 * 1024;

/// A copy stream that somebody has made smaller than it would be.
pub(crate) async fn small_copy_stream(stage: &Stage) -> jetstream::Context {
    let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
    let config = stream::Config {
        name: subject::copy_stream_name("shop", "replica"),
        subjects: vec![subject::copy_all("shop", "replica")],
        max_bytes: i64::try_from(SMALL).expect("small"),
        discard: stream::DiscardPolicy::New,
        ..stream::Config::default()
    };
    // That of an earlier copy may be there.
    jetstream.delete_stream(&config.name).await.ok();
    jetstream.create_stream(config).await.expect("copy stream");
    jetstream
}

/// The copy stream's bytes.
pub(crate) async fn held(jetstream: &jetstream::Context) -> u64 {
    let name = subject::copy_stream_name("shop", "replica");
    let mut stream = jetstream.get_stream(name).await.expect("copy stream");
    stream.info().await.expect("info").state.bytes
}

/// Waits until the copy is at an attempt behind `last`; returns that.
async fn attempt(jetstream: &jetstream::Context, last: u64, capture: &Pipeline) -> u64 {
    let bucket = subject::bucket_name("shop", COPIES);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(store) = jetstream.get_key_value(&bucket).await
            && let Ok(Some(entry)) = store.get("status.replica").await
        {
            let status: CopyStatus = serde_json::from_slice(&entry).expect("a status");
            if status.attempt > last {
                return status.attempt;
            }
        }
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A table of more than the copy stream can hold then.
async fn filled() -> Stage {
    let stage = Stage::set(Setting::apart()).await;
    stage
        .sql(
            "INSERT INTO t SELECT i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 256) j)
             FROM generate_series(1, 1500) i",
        )
        .await;
    stage
}

#[tokio::test]
async fn a_load_that_is_killed_before_a_sink_that_does_not_read_goes_on_in_chunks() {
    let stage = filled().await;
    let jetstream = small_copy_stream(&stage).await;
    let mut capture = stage.start_with(&CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    let mut sink = stage.start_with(&SINK);
    // From here on nobody reads what capture writes.
    sink.wait_for_log("copy requested", PATIENCE)
        .await
        .expect("a request");
    sink.pause().expect("signal");
    attempt(&jetstream, 0, &capture).await;
    let deadline = Instant::now() + PATIENCE;
    while held(&jetstream).await < SMALL / 8 {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    capture.kill9();
    let held = held(&jetstream).await;
    assert!(held < SMALL / 2, "the load left {held} bytes");
    capture = stage.start_with(&CAPTURE);
    capture
        .wait_for_log("a load was cut off", PATIENCE)
        .await
        .expect("it is not loaded again");
    sink.resume().expect("signal");
    assert_eq!(stage.equal(&capture).await.rows, 1500);
    assert!(!capture.logs().contains("E1121"), "{}", capture.logs());
}

#[tokio::test]
async fn chunks_that_are_killed_do_not_fill_the_copy_stream() {
    let stage = filled().await;
    stage.once().await;
    let jetstream = small_copy_stream(&stage).await;
    let mut sink = stage.start_with(&SINK);
    sink.wait_for_log("\"to\":\"streaming\"", PATIENCE)
        .await
        .expect("streams");
    let start = stage.start_with(&["backfill", "start", "t"]);
    stage.ends(start, 0, &["is queued"]).await;
    // From here on nobody reads what capture writes.
    sink.wait_for_log("copy requested", PATIENCE)
        .await
        .expect("a request");
    sink.pause().expect("signal");
    let mut capture = stage.start_with(&CAPTURE);
    let mut last = 0;
    for number in 1..=KILLS {
        last = attempt(&jetstream, last, &capture).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        capture.kill9();
        let held = held(&jetstream).await;
        assert!(held < SMALL / 2, "attempt {number} left {held} bytes");
        capture = stage.start_with(&CAPTURE);
    }
    let held = held(&jetstream).await;
    assert!(held > SMALL / 8, "no attempt left anything: {held} bytes");
    sink.resume().expect("signal");
    capture
        .wait_for_log("table backfilled", PATIENCE)
        .await
        .expect("the rest comes");
    assert_eq!(stage.equal(&capture).await.rows, 1500);
    assert!(!capture.logs().contains("E1121"), "{}", capture.logs());
}

#[tokio::test]
async fn a_stream_that_earlier_attempts_filled_is_drained() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, repeat(md5(i::text), 256) FROM generate_series(1, 1500) i")
        .await;
    let jetstream = small_copy_stream(&stage).await;
    let subject = format!(
        "{}.public.t",
        subject::copy_all("shop", "replica").trim_end_matches(".>")
    );
    // Parts of rows that never became whole, by a capture that was killed within each.
    let part = bytes::Bytes::from(vec![b'x'; 256 * 1024]);
    let mut parts = 0;
    loop {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Millrace-Copy", format!("earlier/{parts}"));
        headers.insert("Millrace-Copy-Number", "1");
        headers.insert("Millrace-Chunk", format!("1/2/earlier/{parts}"));
        let sent = jetstream
            .publish_with_headers(subject.clone(), headers, part.clone())
            .await
            .expect("sent");
        if sent.await.is_err() {
            break;
        }
        parts += 1;
    }
    assert!(parts > 10, "{parts}");
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 1500);
}

/// What the process tells of its capture.
async fn told(pipeline: &mut Pipeline) -> Value {
    let (_, body) = pipeline.get("/status").await.expect("status");
    serde_json::from_str(&body).expect("json")
}

/// Waits until `/status` says this code at this place.
async fn shows(pipeline: &mut Pipeline, place: &str, code: &Value) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = told(pipeline).await;
        if status.pointer(place).unwrap_or(&Value::Null) == code {
            return status;
        }
        assert!(
            Instant::now() < deadline,
            "no {code} at {place}: {status}\n{}",
            pipeline.logs()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_table_that_may_not_be_read_holds_nothing_else_up_and_is_copied_once_it_may() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE closed (id int PRIMARY KEY, v text);
                 CREATE TABLE t (id int PRIMARY KEY, v text);
                 INSERT INTO closed SELECT i, 'closed ' || i FROM generate_series(1, 1000) i;
                 INSERT INTO t SELECT i, 'open ' || i FROM generate_series(1, 1000) i;
                 CREATE PUBLICATION millrace_shop FOR TABLE closed, t WITH (publish_via_partition_root = true);
                 CREATE ROLE capturer LOGIN REPLICATION PASSWORD 'capturing';
                 GRANT SELECT ON closed, t TO capturer",
        tables: &[("public.closed", "sinks = [\"replica\"]"), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    stage
        .postgres
        .create_database("second")
        .await
        .expect("database");
    let source = format!(
        "postgres://capturer:capturing@127.0.0.1:{}/source",
        stage.postgres.port()
    );
    let folder = stage
        .config(&source, &stage.postgres.url("target"), &stage.nats.url())
        .sink("second", &stage.postgres.url("second"))
        .write()
        .expect("folder");
    let mut capture = Stage::start_in(&folder, &CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    stage.sql("REVOKE SELECT ON closed FROM capturer").await;

    let sink = Stage::start_in(&folder, &SINK);
    let status = shows(&mut capture, "/source/capture/code", &"E1116".into()).await;
    let part = &status["source"]["capture"];
    assert_eq!(part["state"], "streaming", "{status}");
    let remedy = part["remedy"].as_str().unwrap_or_default();
    assert!(
        remedy.contains("GRANT SELECT ON \"public\".\"closed\""),
        "{status}"
    );
    // The same sink's other table.
    let rows = "SELECT count(*)::text FROM t";
    stage.target_shows(&sink, rows, "1000").await;
    // Another sink's copy, and the streaming to it.
    let second = Stage::start_in(&folder, &["run", "--only", "sink:second"]);
    let replica = stage.postgres.connect("second").await.expect("connects");
    stage
        .sql("INSERT INTO t SELECT i, 'new' FROM generate_series(1001, 1100) i")
        .await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let row = replica.query_one(rows, &[]).await;
        if row.is_ok_and(|row| row.get::<_, &str>(0) == "1100") {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{}\n{}",
            capture.logs(),
            second.logs()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stage
        .sql("UPDATE t SET v = 'streamed' WHERE id > 1050")
        .await;
    let streamed = "SELECT count(*)::text FROM t WHERE v = 'streamed'";
    loop {
        let row = replica.query_one(streamed, &[]).await.expect("counted");
        if row.get::<_, &str>(0) == "50" {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{}\n{}",
            capture.logs(),
            second.logs()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    shows(&mut capture, "/source/capture/code", &"E1116".into()).await;

    stage.sql("GRANT SELECT ON closed TO capturer").await;
    assert_eq!(stage.equal(&sink).await.rows, 2100);
    shows(&mut capture, "/source/capture/code", &Value::Null).await;
    assert!(!capture.logs().contains(LIFE_ENDED), "{}", capture.logs());
}

#[tokio::test]
async fn a_copy_whose_connection_ends_is_made_again_beside_the_streaming() {
    let stage = Stage::set(Setting::apart()).await;
    stage
        .sql("INSERT INTO t SELECT i, repeat(md5(i::text), 32) FROM generate_series(1, 30000) i")
        .await;
    small_copy_stream(&stage).await;
    let mut capture = stage.start_with(&CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    let mut sink = stage.start_with(&SINK);
    sink.wait_for_log("copy requested", PATIENCE)
        .await
        .expect("a request");
    // The copy stands still before a sink that does not read, so it is there to be ended.
    sink.pause().expect("signal");
    end(&stage, &capture, "query LIKE 'COPY%'").await;
    sink.resume().expect("signal");
    let status = shows(&mut capture, "/source/capture/code", &"E1121".into()).await;
    assert_eq!(status["source"]["capture"]["state"], "streaming");
    assert_eq!(stage.equal(&sink).await.rows, 30_000);
    shows(&mut capture, "/source/capture/code", &Value::Null).await;
    assert!(!capture.logs().contains(LIFE_ENDED), "{}", capture.logs());
}

#[tokio::test]
async fn a_table_whose_copy_cannot_begin_is_shown_as_retrying() {
    let stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut capture = stage.start_with(&CAPTURE);
    Stage::readyz(&mut capture, 200, "streaming").await;
    capture.terminate().expect("signal");
    assert_eq!(capture.wait(PATIENCE).await.expect("ends"), 0);
    // The copy's slot waits for this transaction.
    let open = stage.postgres.connect("source").await.expect("connects");
    open.batch_execute("BEGIN; INSERT INTO t VALUES (2, 'two')")
        .await
        .expect("open");
    let mut pipeline = stage.start();
    end(&stage, &pipeline, "wait_event_type = 'Lock'").await;
    let status = shows(&mut pipeline, "/tables/0/code", &"E1121".into()).await;
    assert_eq!(status["tables"][0]["state"], "retrying", "{status}");
    let part = &status["source"]["capture"];
    assert_eq!(part["state"], "streaming", "{status}");
    open.batch_execute("COMMIT").await.expect("committed");
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
    shows(&mut pipeline, "/source/capture/code", &Value::Null).await;
    assert!(!pipeline.logs().contains(LIFE_ENDED), "{}", pipeline.logs());
}

/// Ends the copy's connections that are in this state, as soon as there is one.
async fn end(stage: &Stage, capture: &Pipeline, state: &str) {
    let one = format!("FROM pg_stat_activity WHERE application_name = 'millrace copy' AND {state}");
    let deadline = Instant::now() + PATIENCE;
    while stage
        .ask(&format!("SELECT pid::text {one} LIMIT 1"))
        .await
        .is_none()
    {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stage
        .sql(&format!("SELECT pg_terminate_backend(pid) {one}"))
        .await;
}
