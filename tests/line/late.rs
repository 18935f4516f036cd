//! A sink that is far behind its source follows its stream before it does anything beside it.

use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_event::subject;
use millrace_sink::late::LAG_MAX_US;
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

/// How many transactions the sink has to catch up with.
const BACKLOG: u64 = 20_000;

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

#[tokio::test]
async fn a_backfill_waits_while_the_sink_is_late_and_goes_on_afterwards() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
            CREATE TABLE u (id int PRIMARY KEY, v text);
            INSERT INTO u SELECT i, 'row ' || i FROM generate_series(1, 100) i",
        tables: &[("public.t", ""), ("public.u", "")],
        // So small that the backlog takes a while.
        sink: "batch = { max_rows = 10 }",
        ..Setting::default()
    })
    .await;
    stage.once().await;
    let _capture = stage.start_with(&CAPTURE);
    stage.sql("SET synchronous_commit = off").await;
    stage
        .sql(&format!(
            "DO $$ BEGIN FOR i IN 1..{BACKLOG} LOOP
                 INSERT INTO t VALUES (i, 'late'); COMMIT;
             END LOOP; END $$"
        ))
        .await;
    let written = Instant::now();
    stage.target_sql("UPDATE u SET v = 'wrong'").await;
    let order = stage.start_with(&["backfill", "start", "u"]);
    stage.ends(order, 0, &["is queued"]).await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
    let stream = jetstream.get_stream(subject::stream_name("shop")).await;
    let stream = stream.expect("a stream");
    while stream.get_info().await.expect("info").state.messages < BACKLOG {
        assert!(written.elapsed() < PATIENCE, "the backlog is not published");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // All of it is old before any of it is applied.
    let late = Duration::from_micros(LAG_MAX_US.unsigned_abs()) + Duration::from_millis(200);
    tokio::time::sleep(late.saturating_sub(written.elapsed())).await;

    let sink = stage.start_with(&SINK);
    let (mut meanwhile, mut said) = (0, None);
    loop {
        let (came, wrong) = stands(&stage).await;
        if came == BACKLOG {
            break;
        }
        assert_eq!(wrong, 100, "after {came} rows\n{}", sink.logs());
        if came > 0 {
            meanwhile += 1;
            said.get_or_insert(line(&stage).await);
        }
        assert!(written.elapsed() < PATIENCE * 2, "{}", sink.logs());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        meanwhile > 1,
        "nothing was seen of the way\n{}",
        sink.logs()
    );
    let said = said.expect("it was asked");
    let reason = said["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("30 s behind the source"), "{said}");
    stage.equal(&sink).await;
}
