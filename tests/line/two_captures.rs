//! Two captures of one source: one works, the other stands by, and together they never leave a hole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_event::{Control, Position, decode_line};
use millrace_lab::{Pipeline, PostgresOptions};
use tokio::task::JoinHandle;

use crate::kill::{random_moment, seeded, shop_setting, traffic};
use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];
/// What a part logs when it begins to stream.
const STREAMING: &str = "\"to\":\"streaming\"";
const TAKE_OVER_MAX: Duration = Duration::from_secs(10);

#[tokio::test]
async fn the_second_stands_by_and_takes_over() {
    let mut rng = seeded();
    let stage = Stage::set(shop_setting()).await;
    let mut first = stage.start();
    Stage::readyz(&mut first, 200, "streaming").await;
    let traffic = traffic(&stage, &mut rng, 100).await;
    let mut second = stage.start();
    let body = Stage::readyz(&mut second, 200, "standby").await;
    assert!(body.contains("standby"), "{body}");
    // A third has the admin address of the first, and stands by all the same.
    let address = first.admin().await.expect("address");
    let folder = stage
        .same_config()
        .listen(&address)
        .write()
        .expect("folder");
    let mut third = Stage::start_in(&folder, &["run"]);
    third
        .wait_for_log("E1003", Duration::from_secs(10))
        .await
        .expect("a warning about the port");
    third
        .wait_for_log("\"to\":\"standby\"", Duration::from_secs(10))
        .await
        .expect("standby");
    third.kill9();

    random_moment(&mut rng, 500).await;
    first.kill9();
    let began = Instant::now();
    Stage::readyz(&mut second, 200, "streaming").await;
    assert!(began.elapsed() < TAKE_OVER_MAX, "{:?}", began.elapsed());
    traffic.stop().await.expect("traffic");
    stage.equal(&second).await;
}

#[tokio::test]
async fn two_that_start_at_the_same_moment_begin_one_stream() {
    for _ in 0..3 {
        let stage = Stage::set(Setting::default()).await;
        stage.sql("INSERT INTO t VALUES (1, 'one')").await;
        let mut both = [stage.start(), stage.start()];
        stage.equal(&both[0]).await;
        stage.sql("INSERT INTO t VALUES (2, 'two')").await;
        stage.equal(&both[1]).await;
        for pipeline in &mut both {
            assert!(pipeline.is_running(), "{}", pipeline.logs());
        }
    }
}

/// The tables of [`write`].
pub(crate) fn ordered() -> Setting<'static> {
    Setting {
        schema: "CREATE TABLE a (id int PRIMARY KEY, v text); \
                 CREATE TABLE b (k int PRIMARY KEY, n int NOT NULL); INSERT INTO b VALUES (1, 0)",
        tables: &[("public.a", ""), ("public.b", "")],
        ..Setting::default()
    }
}

/// One writer, so that the order of each table's changes is known: transaction `n` inserts row `n` into `a`
/// and changes the single row of `b`.
pub(crate) async fn write(stage: &Stage, stop: &Arc<AtomicBool>) -> JoinHandle<i32> {
    let client = stage.postgres.connect("source").await.expect("source");
    let stop = Arc::clone(stop);
    tokio::spawn(async move {
        let mut number = 0;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            let sql = format!(
                "BEGIN; INSERT INTO a VALUES ({number}, 'row'); UPDATE b SET n = {number}; COMMIT"
            );
            client.batch_execute(&sql).await.expect("written");
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        number
    })
}

/// What a reader of the stream sees of each table, and how many messages it drops.
async fn seen(stage: &Stage) -> (BTreeMap<String, Vec<String>>, u64) {
    let client = stage.nats.client().await.expect("client");
    let jetstream = async_nats::jetstream::new(client);
    let mut stream = jetstream.get_stream("CDC_shop").await.expect("stream");
    let last = stream.info().await.expect("info").state.last_sequence;
    let (mut highest, mut dropped) = (Position::ZERO, 0);
    let mut tables = BTreeMap::<_, Vec<_>>::new();
    for seq in 1..=last {
        let message = stream.get_raw_message(seq).await.expect("message");
        if let Ok(control) = serde_json::from_slice::<Control>(&message.payload) {
            highest = highest.max(control.position);
            continue;
        }
        for line in message.payload.split(|byte| *byte == b'\n') {
            let event = decode_line(line).expect("event");
            let position = Position(event.source.version);
            if position <= highest {
                dropped += 1;
                continue;
            }
            highest = position;
            let after = event.after.as_ref().expect("a new row");
            let number = after.get("id").or_else(|| after.get("n"));
            let number = number.and_then(|value| value.as_text()).map(str::to_owned);
            let table = event.source.table.to_string();
            tables
                .entry(table)
                .or_default()
                .push(number.expect("a number"));
        }
    }
    (tables, dropped)
}

/// Waits until one capture works and the other stands by: a zombie's late messages may make them change places.
async fn one_works(captures: &mut [Pipeline; 2]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let [first, second] = captures.each_mut();
        let first = first.get("/readyz").await.expect("health").1;
        let second = second.get("/readyz").await.expect("health").1;
        let works = |body: &str| body.contains("\"streaming\"");
        let waits = |body: &str| body.contains("\"standby\"");
        if works(&first) && waits(&second) || works(&second) && waits(&first) {
            return;
        }
        assert!(Instant::now() < deadline, "{first} {second}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Checks that the readers of the stream see every change of each table once and in its order.
pub(crate) async fn whole(stage: &Stage, count: i32) {
    let (tables, dropped) = seen(stage).await;
    println!("{count} transactions, {dropped} changes dropped by readers");
    let expected: Vec<String> = (1..=count).map(|number| number.to_string()).collect();
    for table in ["a", "b"] {
        let found = &tables[table];
        assert!(*found == expected, "table {table}: {found:?}");
    }
}

#[tokio::test]
async fn a_killed_capture_leaves_no_hole_and_reorders_nothing() {
    let mut rng = seeded();
    let stage = Stage::set(ordered()).await;
    let mut sink = stage.start_with(&SINK);
    let mut capture = stage.start_with(&CAPTURE);
    sink.wait_for_log(STREAMING, PATIENCE)
        .await
        .expect("copied");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(&stage, &stop).await;
    for _ in 0..6 {
        random_moment(&mut rng, 900).await;
        capture.kill9();
        capture = stage.start_with(&CAPTURE);
    }
    stop.store(true, Ordering::Relaxed);
    let count = writer.await.expect("writer");
    stage.equal(&sink).await;
    whole(&stage, count).await;
}

#[tokio::test]
async fn a_zombie_leaves_no_hole_and_reorders_nothing() {
    let settings = vec![("wal_sender_timeout".to_owned(), "2s".to_owned())];
    let stage = Stage::set(Setting {
        postgres: PostgresOptions {
            settings,
            ..PostgresOptions::default()
        },
        ..ordered()
    })
    .await;
    let mut sink = stage.start_with(&SINK);
    let mut captures = [stage.start_with(&CAPTURE), stage.start_with(&CAPTURE)];
    sink.wait_for_log(STREAMING, PATIENCE)
        .await
        .expect("copied");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(&stage, &stop).await;
    let mut rng = seeded();
    for _ in 0..2 {
        random_moment(&mut rng, 800).await;
        let working = match captures[0].get("/readyz").await.expect("health").1 {
            body if body.contains("streaming") => 0,
            _ => 1,
        };
        captures[working].pause().expect("stop");
        Stage::readyz(&mut captures[1 - working], 200, "streaming").await;
        random_moment(&mut rng, 300).await;
        captures[working].resume().expect("continue");
        one_works(&mut captures).await;
    }
    stop.store(true, Ordering::Relaxed);
    let count = writer.await.expect("writer");
    stage.equal(&sink).await;
    assert!(count > 500, "{count}");
    whole(&stage, count).await;
}
