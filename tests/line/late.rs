//! What a sink does beside its stream while changes come faster than its target takes them: copies have a share, until
//! the sink is far behind its source; then they wait.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_event::work::{COPIES, CopyRequest, CopyStatus};
use millrace_event::{TableName, subject};
use millrace_lab::Pipeline;
use millrace_sink::late::LAG_MAX_US;
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

/// Each statement of the sink takes as long as the table `pace` says, in seconds.
const SLOW: &str = "CREATE TABLE pace (seconds float8);
    INSERT INTO pace VALUES (0.15);
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(seconds) FROM public.pace; RETURN NULL; END';
    CREATE TRIGGER slow AFTER INSERT OR UPDATE ON t EXECUTE FUNCTION slow();
    CREATE TRIGGER slow AFTER INSERT OR UPDATE ON u EXECUTE FUNCTION slow();
    ALTER TABLE t ENABLE ALWAYS TRIGGER slow;
    ALTER TABLE u ENABLE ALWAYS TRIGGER slow";

/// How many transactions the sink has to catch up with: more than its target takes before it is late.
const BACKLOG: u64 = 5_000;

/// What a batch of the sink takes, and more.
const SLACK: Duration = Duration::from_millis(500);

/// What `backfill status` says of `u`.
async fn line(stage: &Stage) -> Value {
    let arguments = ["backfill", "status", "u", "-o", "json"];
    let mut run = stage.start_with(&arguments);
    let code = run.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", run.logs());
    let json: Value = serde_json::from_str(&run.stdout()).expect("json");
    json["backfills"][0].clone()
}

/// How many rows of `t` have come, and how many of `u` are still wrong, at one moment.
async fn stands(stage: &Stage) -> (u64, u64) {
    let sql = "SELECT (SELECT count(*) FROM t) || ' ' ||
               (SELECT count(*) FROM u WHERE v = 'wrong')";
    let text = stage.target_text(sql).await;
    let (came, wrong) = text.split_once(' ').expect("two numbers");
    let number = |text: &str| text.parse().expect("a number");
    (number(came), number(wrong))
}

/// Waits until capture has put all rows of `u` on the copy stream.
async fn all_read(stage: &Stage, pipeline: &Pipeline) {
    let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
    let copies = jetstream.get_key_value(subject::bucket_name("shop", COPIES));
    let copies = copies.await.expect("a bucket");
    let (deadline, u) = (Instant::now() + PATIENCE, TableName::new("public", "u"));
    loop {
        let request = copies.get("request.replica").await.expect("an answer");
        let status = copies.get("status.replica").await.expect("an answer");
        if let (Some(request), Some(status)) = (request, status) {
            let request: CopyRequest = serde_json::from_slice(&request).expect("a request");
            let status: CopyStatus = serde_json::from_slice(&status).expect("a status");
            if status.request == request.id && status.copied.contains(&u) {
                return;
            }
        }
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until so many rows are wrong at most.
async fn mended(stage: &Stage, pipeline: &Pipeline, wrong: u64) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = stands(stage).await;
        if now.1 <= wrong {
            return;
        }
        assert!(Instant::now() < deadline, "{now:?}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_backfill_has_a_share_beside_full_batches_until_the_sink_is_late() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
            CREATE TABLE u (id int PRIMARY KEY, v text);
            INSERT INTO u SELECT i, repeat('x', 25000) FROM generate_series(1, 800) i",
        tables: &[("public.t", ""), ("public.u", "")],
        sink: "batch = { max_rows = 10 }",
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.target_sql("UPDATE u SET v = 'wrong'").await;
    stage.target_sql(SLOW).await;
    let order = stage.start_with(&["backfill", "start", "u"]);
    stage.ends(order, 0, &["is queued"]).await;
    // Ten rows of it fill a message of the copy stream, and so a batch. A chunk is applied once the stream is, up to where it was read: all of them are read before the backlog.
    all_read(&stage, &pipeline).await;
    stage.sql("SET synchronous_commit = off").await;
    stage
        .sql(&format!(
            "DO $$ BEGIN FOR i IN 1..{BACKLOG} LOOP
                 INSERT INTO t VALUES (i, 'late'); COMMIT;
             END LOOP; END $$"
        ))
        .await;
    let written = Instant::now();
    let bound = Duration::from_micros(LAG_MAX_US.unsigned_abs());

    // Every batch is full, and the sink is not late yet.
    let (_, wrong) = stands(&stage).await;
    mended(&stage, &pipeline, wrong - 40).await;
    let (came, _) = stands(&stage).await;
    assert!(
        came > 0 && came < BACKLOG && written.elapsed() < bound,
        "{came}"
    );

    // A batch that was begun before has ended by then, too.
    tokio::time::sleep((bound + SLACK).saturating_sub(written.elapsed())).await;
    let before = stands(&stage).await;
    let said = line(&stage).await;
    // Twice as long as a share takes to come.
    tokio::time::sleep(Duration::from_millis(1_600)).await;
    let after = stands(&stage).await;
    assert!(
        before.0 < after.0 && after.0 < BACKLOG,
        "{before:?}, {after:?}"
    );
    assert!(before.1 > 0, "nothing was left to wait");
    assert_eq!(before.1, after.1, "{}", pipeline.logs());
    let reason = said["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("30 s behind the source"), "{said}");

    stage.target_sql("UPDATE pace SET seconds = 0").await;
    stage.equal(&pipeline).await;
}
