//! `millrace backfill`: what it refuses changes nothing, and what it takes is on the sink's list. Whether capture
//! serves the request is another matter: here the process is held, or asks without an answer.

use std::time::{Duration, Instant};

use async_nats::jetstream::{self, kv};
use millrace_event::subject;
use millrace_event::work::{BackfillOrder, COPIES, orders_key};
use millrace_lab::{Pipeline, PostgresOptions, Proxy};
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text);
    INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i";

/// A stage with replicas that are whole, and no process.
struct Whole {
    stage: Stage,
    orders: kv::Store,
}

impl Whole {
    async fn set(setting: Setting<'_>) -> Self {
        let stage = Stage::set(setting).await;
        stage.once().await;
        let orders = bucket(&stage).await;
        Self { stage, orders }
    }

    async fn usual() -> Self {
        Self::set(Setting {
            schema: SCHEMA,
            tables: &[("public.t", ""), ("public.u", "")],
            ..Setting::default()
        })
        .await
    }

    /// The list's revision, and the list.
    async fn listed(&self) -> (u64, Vec<BackfillOrder>) {
        let entry = self.orders.entry(orders_key("replica")).await;
        entry.expect("the list").map_or((0, Vec::new()), |entry| {
            let orders = serde_json::from_slice(&entry.value);
            (entry.revision, orders.expect("a list of orders"))
        })
    }

    /// Runs the command, which must end like that, and returns what it says.
    async fn says(&self, arguments: &[&str], code: i32, texts: &[&str]) -> String {
        says(&self.stage, arguments, code, texts).await
    }

    /// Runs the command, which must refuse and change nothing.
    async fn refuses(&self, arguments: &[&str], code: i32, texts: &[&str]) {
        let before = self.listed().await;
        self.says(arguments, code, texts).await;
        assert_eq!(self.listed().await, before, "{arguments:?}");
    }

    /// The line of `backfill status` about a table.
    async fn line(&self, table: &str) -> Value {
        let mut run = self
            .stage
            .start_with(&["backfill", "status", table, "-o", "json"]);
        let code = run.wait(PATIENCE).await.expect("ends");
        assert_eq!(code, 0, "{}", run.logs());
        let json: Value = serde_json::from_str(&run.stdout()).expect("json");
        assert_eq!(json["unreachable"], serde_json::json!([]));
        assert_eq!(json["backfills"].as_array().map(Vec::len), Some(1));
        json["backfills"][0].clone()
    }

    async fn becomes(&self, pipeline: &Pipeline, table: &str, state: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.line(table).await;
            if line["state"] == state {
                return line;
            }
            assert!(Instant::now() < deadline, "{line}\n{}", pipeline.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn bucket(stage: &Stage) -> kv::Store {
    let client = stage.nats.client().await.expect("nats");
    let name = subject::bucket_name("shop", COPIES);
    let bucket = jetstream::new(client).get_key_value(name).await;
    bucket.expect("bucket")
}

async fn says(stage: &Stage, arguments: &[&str], code: i32, texts: &[&str]) -> String {
    let arguments: Vec<&str> = ["backfill"].iter().chain(arguments).copied().collect();
    let run = stage.start_with(&arguments);
    stage.ends(run, code, texts).await
}

#[tokio::test]
async fn what_is_wrong_with_the_command_line_is_said_and_changes_nothing() {
    let whole = Whole::usual().await;
    for (arguments, texts) in [
        (
            &["start", "public.tt"][..],
            &[
                "there is no table \"public.tt\"",
                "did you mean \"public.t\"",
            ][..],
        ),
        (&["start"], &["name a table", "--all", "public.t, public.u"]),
        (
            &["start", "t", "--sink", "replika"],
            &["there is no sink \"replika\"", "did you mean \"replica\"?"],
        ),
        (&["start", "t", "--rate", "0"], &["--rate"]),
        (
            &["start", "--all", "--where", "true"],
            &["cannot be used with"],
        ),
        (
            &["status", "elsewhere"],
            &["there is no table \"elsewhere\"", "public.t, public.u"],
        ),
        (&["pause"], &["name a table"]),
        (&["cancel", "v.t"], &["there is no table \"v.t\""]),
    ] {
        whole.refuses(arguments, 2, texts).await;
    }
    assert_eq!(whole.listed().await, (0, Vec::new()));
}

#[tokio::test]
async fn a_condition_that_is_none_changes_nothing() {
    let whole = Whole::usual().await;
    let before = "SELECT count(*)::text FROM t";
    for (condition, said) in [
        ("nosuch = 1", "column \"nosuch\" does not exist"),
        ("id", "must be type boolean"),
        ("id >", "syntax error"),
        ("", "--where is empty"),
        ("id = 1; DELETE FROM t", "syntax error"),
        ("id = 1); DELETE FROM t WHERE (true", "E1140"),
        ("true) OR (true", "is not one expression"),
        ("SELECT true", "is not one expression"),
        ("true) LIMIT 1 OFFSET (0", "is not one expression"),
        ("id = 1 -- or not", "begins a comment"),
        ("id = 1 /*", "begins a comment"),
        ("count(*) > 1", "aggregate"),
        ("id = $1", "parameters"),
        ("id = 'x'", "invalid input syntax"),
        ("1 / 0 = id", "division by zero"),
    ] {
        whole
            .refuses(
                &["start", "t", "--where", condition],
                2,
                &["E1140", said, "do: correct what follows --where"],
            )
            .await;
    }
    assert_eq!(whole.stage.source_text(before).await, "100");
    assert_eq!(whole.listed().await, (0, Vec::new()));

    let condition = "v LIKE '%; (' OR id IN (SELECT id FROM public.u) AND (v) <> E'\\''";
    let arguments = ["start", "t", "--where", condition];
    whole.says(&arguments, 0, &["is queued"]).await;
    let (_, orders) = whole.listed().await;
    assert_eq!(orders[0].filter.as_deref(), Some(condition));
}

#[tokio::test]
async fn what_the_source_or_the_replica_lacks_is_said_and_changes_nothing() {
    let whole = Whole::usual().await;
    let stage = &whole.stage;
    stage.sql("ALTER TABLE t DROP CONSTRAINT t_pkey").await;
    whole
        .refuses(&["start", "t"], 4, &["E1115", "public.t"])
        .await;
    stage.sql("DROP TABLE t").await;
    whole.refuses(&["start", "t"], 4, &["E1114"]).await;
    whole.refuses(&["start", "--all"], 4, &["E1114"]).await;
    for verb in ["pause", "resume", "cancel"] {
        let said = ["E1322", "public.u of sink replica has no backfill"];
        whole.refuses(&[verb, "u"], 4, &said).await;
        let all = [verb, "--all"];
        whole.refuses(&all, 0, &["no backfill is under way"]).await;
    }
    whole.stage.target_sql("DROP SCHEMA millrace CASCADE").await;
    let said = ["E1321", "the sink has never run"];
    whole.refuses(&["start", "u"], 4, &said).await;
    assert_eq!(whole.line("u").await["state"], "new");
}

#[tokio::test]
async fn before_the_first_run_there_is_nothing_to_order() {
    let stage = Stage::set(Setting::default()).await;
    says(
        &stage,
        &["start", "t"],
        4,
        &["E1321", "capture has never run"],
    )
    .await;
    says(&stage, &["cancel", "t"], 4, &["E1321"]).await;
    says(&stage, &["status"], 0, &["public.t", "new"]).await;
    let client = stage.nats.client().await.expect("nats");
    let name = subject::bucket_name("shop", COPIES);
    let bucket = jetstream::new(client).get_key_value(name).await;
    assert!(bucket.is_err(), "the command made the bucket");
}

#[tokio::test]
async fn an_order_is_listed_once_and_changed_by_its_verbs() {
    let whole = Whole::usual().await;
    let said = [
        "public.t at sink replica: backfill",
        "is queued",
        "no process runs sink replica",
    ];
    whole.says(&["start", "t", "--rate", "50"], 0, &said).await;
    let (_, orders) = whole.listed().await;
    assert_eq!(orders.len(), 1);
    let id = orders[0].id.clone();
    assert_eq!(orders[0].rows_per_second, Some(50));
    let line = whole.line("t").await;
    assert_eq!(
        (&line["state"], &line["order"]),
        (&"queued".into(), &id.clone().into())
    );
    assert_eq!(line["rate"], 50);

    whole.refuses(&["start", "t"], 4, &["E1320", &id]).await;
    // One of several is refused, and none of them begins.
    whole.refuses(&["start", "--all"], 4, &["E1320", &id]).await;

    let order = || async { whole.listed().await.1.remove(0) };
    whole.says(&["pause", "t"], 0, &[": paused"]).await;
    assert!(order().await.paused);
    assert_eq!(whole.line("t").await["state"], "paused");
    let again = ["is paused already"];
    whole.refuses(&["pause", "public.t"], 0, &again).await;
    let pace = ["resume", "t", "--rate", "unlimited"];
    whole.says(&pace, 0, &["resumed, as fast as it goes"]).await;
    let resumed = order().await;
    assert!(!resumed.paused && resumed.rows_per_second.is_none());
    whole.refuses(&["resume", "t"], 0, &["is not paused"]).await;
    whole.says(&["cancel", "--all"], 0, &[": cancelled"]).await;
    let cancelled = order().await;
    assert!(cancelled.cancelled && cancelled.id == id);
    assert_eq!(whole.line("t").await["state"], "done");
    let again = ["is cancelled already"];
    whole.refuses(&["cancel", "t"], 0, &again).await;
    whole.refuses(&["pause", "t"], 4, &["E1322"]).await;

    // The next one waits behind it, and the sink strikes what was cancelled.
    let slow = ["start", "t", "--rate", "1"];
    whole.says(&slow, 0, &["is queued"]).await;
    assert_eq!(whole.listed().await.1.len(), 2);
    let pipeline = whole.stage.start();
    let line = whole.becomes(&pipeline, "t", "chunks").await;
    assert_ne!(line["order"], id);
    let deadline = Instant::now() + PATIENCE;
    while whole.listed().await.1.iter().any(|order| order.id == id) {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    whole.refuses(&["start", "t"], 4, &["E1320"]).await;
    whole.stage.keeps_the_password(&pipeline);
}

#[tokio::test]
async fn a_backfill_that_is_cancelled_ends_its_wait() {
    let whole = Whole::usual().await;
    let mut waiting = whole
        .stage
        .start_with(&["backfill", "start", "t", "--wait"]);
    waiting
        .wait_for_log("public.t at sink replica: queued", PATIENCE)
        .await
        .expect("it waits");
    whole.says(&["pause", "t"], 0, &["paused"]).await;
    let pipeline = whole.stage.start();
    whole.becomes(&pipeline, "t", "paused").await;
    assert!(waiting.is_running(), "{}", waiting.logs());
    whole.says(&["cancel", "t"], 0, &["cancelled"]).await;
    whole.stage.ends(waiting, 3, &["was cancelled"]).await;
    whole.becomes(&pipeline, "t", "done").await;
    whole.stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_first_load_is_neither_paused_nor_cancelled_nor_doubled() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", "")],
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start_with(&["run", "--only", "capture"]);
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    // Nobody else may read it, so the load does not come to its first row.
    stage.sql("BEGIN; LOCK TABLE t").await;
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    let whole = Whole {
        orders: bucket(&stage).await,
        stage,
    };
    whole.becomes(&sink, "t", "queued").await;
    let said = ["E1323", "is in its first load"];
    for verb in ["pause", "resume", "cancel"] {
        whole.refuses(&[verb, "t"], 4, &said).await;
    }
    whole.stage.sql("ROLLBACK").await;
    whole.stage.equal(&sink).await;
    whole.becomes(&sink, "t", "done").await;
}

#[tokio::test]
async fn a_slot_that_may_be_lost_meanwhile_is_warned_of() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
            ALTER TABLE t ALTER COLUMN v SET STORAGE EXTERNAL;
            INSERT INTO t SELECT i, repeat('x', 1000000) FROM generate_series(1, 80) i",
        postgres: PostgresOptions {
            settings: vec![("max_slot_wal_keep_size".to_owned(), "48MB".to_owned())],
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await;
    // A load is warned of before its snapshot is taken.
    let once = stage.start_with(&["run", "--once"]);
    let said = ["E1141", "table public.t has", "48MB", "\"copying\""];
    let logs = stage.ends(once, 0, &said).await;
    assert!(logs.find("E1141") < logs.find("\"copying\""), "{logs}");
    assert!(stage.compared().await.expect("compare").is_equal());
    let orders = bucket(&stage).await;
    let whole = Whole { stage, orders };
    let said = ["warning: E1141", "public.t has", "48MB", "is queued"];
    whole.says(&["start", "t"], 0, &said).await;
    whole.says(&["cancel", "t"], 0, &["cancelled"]).await;
    let reset = "ALTER SYSTEM SET max_slot_wal_keep_size = -1";
    whole.stage.sql(reset).await;
    whole.stage.sql("SELECT pg_reload_conf()").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let logs = whole.says(&["start", "t"], 0, &["is queued"]).await;
    assert!(!logs.contains("E1141"), "{logs}");
}

#[tokio::test]
async fn of_two_commands_at_the_same_moment_one_is_taken() {
    let whole = Whole::usual().await;
    // Both have read the list before either writes it: an answer of the broker takes longer than they are apart.
    let proxy = Proxy::start(format!("127.0.0.1:{}", whole.stage.nats.port()));
    let proxy = proxy.await.expect("proxy");
    let stage = &whole.stage;
    let (source, target) = (stage.postgres.url("source"), stage.postgres.url("target"));
    let far = stage.config(&source, &target, &format!("nats://{}", proxy.address()));
    let folder = far.write().expect("folder");
    proxy.delay(Duration::from_millis(150));
    let written = async || {
        let info = whole.orders.stream.get_info().await;
        info.expect("the bucket").state.last_sequence
    };
    let before = written().await;
    // Neither goes on before both have come so far.
    stage
        .target_sql("BEGIN; LOCK TABLE millrace.position")
        .await;
    let mut commands = [(); 2].map(|()| Stage::start_in(&folder, &["backfill", "start", "t"]));
    let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(waiting).await != "2" {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            commands.map(|run| run.logs())
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stage.target_sql("COMMIT").await;
    let mut codes = Vec::new();
    for command in &mut commands {
        codes.push(command.wait(PATIENCE).await.expect("ends"));
    }
    let [first, second] = commands.map(|run| run.logs());
    let (taken, refused) = match codes[..] {
        [0, 4] => (first, second),
        [4, 0] => (second, first),
        _ => panic!("{codes:?}\n{first}\n{second}"),
    };
    let (revision, orders) = whole.listed().await;
    assert_eq!(orders.len(), 1, "{orders:?}");
    let id = &orders[0].id;
    assert!(
        taken.contains(id.as_str()) && taken.contains("is queued"),
        "{taken}"
    );
    assert!(
        refused.contains("E1320") && refused.contains(id.as_str()),
        "{refused}"
    );
    assert!(!refused.contains("is queued"), "{refused}");
    // Nothing but that was written.
    assert_eq!((written().await, revision), (before + 1, before + 1));
}

#[tokio::test]
async fn what_does_not_answer_is_said_and_the_rest_is_shown() {
    let whole = Whole::usual().await;
    whole.says(&["start", "t"], 0, &["is queued"]).await;
    let stage = &whole.stage;
    let nowhere = "postgres://nobody@127.0.0.1:1/none";
    let folder = stage
        .config(nowhere, &stage.postgres.url("target"), &stage.nats.url())
        .write()
        .expect("folder");
    let status = Stage::start_in(&folder, &["backfill", "status"]);
    let said = ["queued", "source does not answer: E1101"];
    stage.ends(status, 0, &said).await;
    let start = Stage::start_in(&folder, &["backfill", "start", "u"]);
    stage.ends(start, 4, &["E1101"]).await;

    let folder = stage
        .config(&stage.postgres.url("source"), nowhere, &stage.nats.url())
        .write()
        .expect("folder");
    let status = Stage::start_in(&folder, &["backfill", "status"]);
    let said = ["unreachable", "sink replica does not answer: E1301"];
    stage.ends(status, 0, &said).await;
    let start = Stage::start_in(&folder, &["backfill", "start", "u"]);
    stage.ends(start, 4, &["E1301"]).await;
    // What is listed can be held without the target.
    let pause = Stage::start_in(&folder, &["backfill", "pause", "t"]);
    stage.ends(pause, 0, &[": paused"]).await;

    let target = stage.postgres.url("target");
    let folder = stage.config(&stage.postgres.url("source"), &target, "nats://127.0.0.1:1");
    let folder = folder.write().expect("folder");
    let status = Stage::start_in(&folder, &["backfill", "status"]);
    let said = ["done", "stream does not answer: E1201"];
    stage.ends(status, 0, &said).await;
    for verb in ["start", "pause"] {
        let run = Stage::start_in(&folder, &["backfill", verb, "t"]);
        stage.ends(run, 4, &["E1201"]).await;
    }
}
