//! A table that loses what its rows are known by is parked alone, keeps the application from nothing, and is exact again
//! once it has a key.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use millrace_event::subject;
use millrace_event::work::STATE;
use millrace_lab::{ConfigDir, Pipeline};
use serde_json::Value;
use tokio_postgres::error::SqlState;

use crate::stage::{PATIENCE, Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text); \
    INSERT INTO u SELECT i, 'old' FROM generate_series(1, 500) i";
const TABLES: &[(&str, &str)] = &[("public.t", ""), ("public.u", "")];
const SOURCE: &str = "heartbeat_interval = \"500ms\"";
const NEVER: &str = "heartbeat_interval = \"500ms\"\ncreate = \"never\"";

const NOTHING: &str = "ALTER TABLE u REPLICA IDENTITY NOTHING";
/// The statement that the status tells.
const MEND: &str = "ALTER TABLE \"public\".\"u\" REPLICA IDENTITY DEFAULT";
/// Changes that nobody captures: every row of `u` is another, is new, or is gone.
const MISSED: &str = "UPDATE u SET v = 'missed' WHERE id <= 300; DELETE FROM u WHERE id > 400; \
    INSERT INTO u SELECT i, 'missed' FROM generate_series(501, 600) i";
const MEMBER: &str = "SELECT count(*)::text FROM pg_publication_tables WHERE tablename = 'u'";

async fn stage(schema: &str, source: &str, tables: &[(&'static str, &str)]) -> Stage {
    Stage::set(Setting {
        schema,
        source,
        tables,
        ..Setting::default()
    })
    .await
}

async fn usual() -> Stage {
    stage(SCHEMA, SOURCE, TABLES).await
}

/// Waits until the process streams and tells of `public.u`, and of no other table, that it is parked with this code
/// and a remedy that says this.
pub(crate) async fn parked(pipeline: &mut Pipeline, code: &str, remedy: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, status) = pipeline.get("/status").await.expect("answers");
        let status: Value = serde_json::from_str(&status).expect("json");
        let tables = status["tables"].as_array().expect("tables").iter();
        let parked: Vec<_> = tables.filter(|table| table["state"] == "parked").collect();
        if let [table] = parked.as_slice()
            && table["name"] == "public.u"
            && table["code"] == code
            && table["remedy"]
                .as_str()
                .is_some_and(|said| said.contains(remedy))
            && status["state"] == "streaming"
        {
            return;
        }
        assert!(Instant::now() < deadline, "{status}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs SQL of the application until Postgres takes it.
pub(crate) async fn taken(stage: &Stage, pipeline: &Pipeline, sql: &str) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = stage.source.batch_execute(sql).await {
        assert!(Instant::now() < deadline, "{error:?}\n{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What `millrace status` says of `public.u`: its state, its code, and whether it is complete.
async fn told(stage: &Stage) -> (String, String, bool) {
    let mut status = stage.start_with(&["status", "-o", "json"]);
    status.wait(PATIENCE).await.expect("ends");
    let json: Value = serde_json::from_str(&status.stdout()).expect("json");
    let mut tables = json["tables"].as_array().expect("tables").iter();
    let u = tables.find(|table| table["name"] == "public.u");
    let u = u.unwrap_or_else(|| panic!("{json}"));
    let text = |key: &str| u[key].as_str().unwrap_or_default().to_owned();
    (
        text("state"),
        text("code"),
        u["complete"].as_bool().unwrap_or(true),
    )
}

pub(crate) async fn others_go_on(stage: &Stage, pipeline: &Pipeline, id: u32) {
    stage
        .sql(&format!("INSERT INTO t VALUES ({id}, 'on')"))
        .await;
    let sql = format!("SELECT v FROM t WHERE id = {id}");
    stage.target_shows(pipeline, &sql, "on").await;
}

#[tokio::test]
async fn a_table_without_identity_is_parked_alone_and_its_application_goes_on() {
    let stage = usual().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql(NOTHING).await;
    // Postgres refuses it as long as the table is published.
    let refused = stage.source.batch_execute(MISSED).await;
    let refused = refused.expect_err("it is published");
    let expected = SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE;
    assert_eq!(refused.code(), Some(&expected), "{refused:?}");
    taken(&stage, &pipeline, MISSED).await;
    parked(&mut pipeline, "E1107", MEND).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    others_go_on(&stage, &pipeline, 1).await;
    let old = "SELECT count(*)::text FROM u WHERE v = 'old'";
    assert_eq!(stage.target_text(old).await, "500");

    // Neither a crash nor a start puts it back.
    pipeline.kill9();
    let unverified = ("parked".to_owned(), "E1107".to_owned(), false);
    assert_eq!(told(&stage).await, unverified, "nobody runs");
    let once = stage.start_with(&["run", "--once"]);
    stage.ends(once, 3, &["E1107", "is parked"]).await;
    let mut pipeline = stage.start();
    parked(&mut pipeline, "E1107", MEND).await;
    others_go_on(&stage, &pipeline, 2).await;
    stage.sql("UPDATE u SET v = 'and on' WHERE id = 7").await;

    // Back, whoever notices it.
    stage.sql("ALTER TABLE u REPLICA IDENTITY DEFAULT").await;
    stage.equal(&pipeline).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");
    stage.sql("DELETE FROM u WHERE id < 10").await;
    stage.equal(&pipeline).await;
    let deadline = Instant::now() + PATIENCE;
    while told(&stage).await != ("streaming".to_owned(), String::new(), true) {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
    }
}

#[tokio::test]
async fn a_table_without_identity_does_not_stay_published_while_the_broker_is_away() {
    let mut stage = usual().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.nats.stop().await.expect("stopped");
    stage.sql(NOTHING).await;
    taken(&stage, &pipeline, MISSED).await;
    assert_eq!(stage.source_text(MEMBER).await, "0");
    assert!(pipeline.logs().contains("E1107"), "{}", pipeline.logs());
    stage.nats.start_again().await.expect("broker");
    parked(&mut pipeline, "E1107", MEND).await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql(MEND).await;
    stage.equal(&pipeline).await;

    // It may be mended before the broker is back.
    stage.nats.stop().await.expect("stopped");
    stage.sql(NOTHING).await;
    taken(&stage, &pipeline, "UPDATE u SET v = 'again' WHERE id <= 50").await;
    stage.sql(MEND).await;
    stage.sql("DELETE FROM u WHERE id > 550").await;
    stage.nats.start_again().await.expect("broker");
    stage.equal(&pipeline).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");

    // What was taken out is not taken for complete by another process.
    stage.nats.stop().await.expect("stopped");
    stage.sql(NOTHING).await;
    taken(
        &stage,
        &pipeline,
        "UPDATE u SET v = 'once more' WHERE id <= 50",
    )
    .await;
    pipeline.kill9();
    stage.nats.start_again().await.expect("broker");
    let mut pipeline = stage.start();
    parked(&mut pipeline, "E1107", MEND).await;
    stage.sql(MEND).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_process_that_starts_while_the_broker_is_away_frees_the_application_too() {
    let mut stage = usual().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    pipeline.kill9();
    stage.nats.stop().await.expect("stopped");
    stage.sql(NOTHING).await;
    let mut pipeline = stage.start();
    taken(&stage, &pipeline, MISSED).await;
    assert_eq!(stage.source_text(MEMBER).await, "0");
    assert!(pipeline.logs().contains("E1107"), "{}", pipeline.logs());
    stage.nats.start_again().await.expect("broker");
    parked(&mut pipeline, "E1107", MEND).await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql(MEND).await;
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;

    // Mended before the broker is back.
    stage.nats.stop().await.expect("stopped");
    stage.sql(NOTHING).await;
    let pipeline = stage.start();
    taken(&stage, &pipeline, "UPDATE u SET v = 'again' WHERE id <= 50").await;
    stage.sql(MEND).await;
    stage.sql("DELETE FROM u WHERE id > 550").await;
    stage.nats.start_again().await.expect("broker");
    stage.equal(&pipeline).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");
    Stage::stopped(pipeline).await;

    // Nothing is taken out for a capture that has not begun.
    stage.nats.stop().await.expect("stopped");
    stage
        .sql("SELECT pg_drop_replication_slot('millrace_shop')")
        .await;
    stage.sql(NOTHING).await;
    let pipeline = stage.start();
    Stage::logs(&pipeline, "trying again").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");
}

#[tokio::test]
async fn a_table_that_loses_its_key_before_the_stream_begins_is_marked() {
    let stage = usual().await;
    let blocker = stage.postgres.connect("source").await.expect("connects");
    let block = "BEGIN; SELECT pg_current_xact_id()";
    blocker.batch_execute(block).await.expect("blocks");
    // It waits for its slot, with the publication made and remembered.
    let mut pipeline = stage.start();
    let state = subject::bucket_name("shop", STATE);
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = jetstream.get_key_value(&state).await;
        let remembered = match state {
            Ok(state) => state.get("published").await.ok().flatten(),
            Err(_) => None,
        };
        if remembered.is_some() {
            break;
        }
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    pipeline.kill9();
    blocker.batch_execute("ROLLBACK").await.expect("ends");
    stage.sql(NOTHING).await;
    blocker.batch_execute(block).await.expect("blocks");
    let mut pipeline = stage.start();
    taken(&stage, &pipeline, MISSED).await;
    blocker.batch_execute("ROLLBACK").await.expect("ends");
    Stage::logs(&pipeline, "parked: table public.u").await;
    pipeline.kill9();
    stage.sql(MEND).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_key_that_is_dropped_while_nothing_runs_or_while_rows_come_in_parks_its_table() {
    let stage = usual().await;
    stage.once().await;
    stage.sql("ALTER TABLE u DROP CONSTRAINT u_pkey").await;
    stage
        .sql("INSERT INTO t VALUES (1, 'on'); INSERT INTO u VALUES (1, 'again')")
        .await;
    let once = stage.start_with(&["run", "--once"]);
    stage
        .ends(once, 3, &["E1115", "has no primary key", "is parked"])
        .await;
    assert_eq!(stage.target_text("SELECT v FROM t").await, "on");
    stage
        .sql("DELETE FROM u WHERE v = 'again'; UPDATE u SET v = 'new'")
        .await;
    stage.sql("ALTER TABLE u ADD PRIMARY KEY (id)").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;

    // The changes that are left out tell of it first, and the table is not read before it can be.
    stage
        .sql("ALTER TABLE u DROP CONSTRAINT u_pkey; INSERT INTO u VALUES (1000, 'new')")
        .await;
    parked(&mut pipeline, "E1115", "ADD PRIMARY KEY").await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
    let once = stage.start_with(&["run", "--once"]);
    stage.ends(once, 3, &["E1115", "is parked"]).await;
    stage.sql("ALTER TABLE u ADD PRIMARY KEY (id)").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_table_that_cannot_be_taken_out_yet_is_taken_out_later() {
    let stage = usual().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let lock = stage.postgres.connect("source").await.expect("connects");
    // As an index that is built: who has it for himself may change the identity, and keeps it.
    let sql =
        format!("BEGIN; {NOTHING}; COMMIT; BEGIN; LOCK TABLE u IN SHARE UPDATE EXCLUSIVE MODE");
    lock.batch_execute(&sql).await.expect("locked");
    parked(
        &mut pipeline,
        "E1107",
        "for the application, at once: ALTER PUBLICATION",
    )
    .await;
    others_go_on(&stage, &pipeline, 1).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");
    drop(lock);
    taken(&stage, &pipeline, MISSED).await;
    stage.sql(&MEND.replace("DEFAULT", "FULL")).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn where_the_publication_is_not_ours_its_owner_is_told() {
    let stage = stage(SCHEMA, NEVER, TABLES).await;
    stage
        .sql("CREATE PUBLICATION millrace_shop FOR TABLE t, u WITH (publish_via_partition_root = true)")
        .await;
    stage
        .sql("SELECT pg_create_logical_replication_slot('millrace_shop', 'pgoutput')")
        .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql(NOTHING).await;
    let out = "ALTER PUBLICATION \"millrace_shop\" DROP TABLE ONLY \"public\".\"u\"";
    parked(
        &mut pipeline,
        "E1107",
        &format!("at once: {out}; then {MEND}"),
    )
    .await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql(out).await;
    stage.sql(MISSED).await;
    stage.sql(MEND).await;
    let back = "ALTER PUBLICATION \"millrace_shop\" ADD TABLE ONLY \"public\".\"u\"";
    parked(&mut pipeline, "E1106", back).await;
    others_go_on(&stage, &pipeline, 2).await;
    stage.sql(back).await;
    stage.equal(&pipeline).await;

    // It may also stay in the publication all the time.
    stage.sql(NOTHING).await;
    parked(&mut pipeline, "E1107", MEND).await;
    stage.sql("INSERT INTO u VALUES (700, 'missed')").await;
    stage.sql(MEND).await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn an_identity_that_does_not_fit_the_selected_columns_parks_its_table() {
    let mut stage = stage(
        "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text, card text); \
         INSERT INTO u SELECT i, 'old', 'x' FROM generate_series(1, 500) i",
        SOURCE,
        &[("public.t", ""), ("public.u", "columns.exclude = [\"card\"]")],
    )
    .await;
    let mut pipeline = stage.start();
    let shown = "SELECT count(*) || ' ' || count(*) FILTER (WHERE v = 'missed') FROM u";
    stage.target_shows(&pipeline, shown, "500 0").await;
    stage.sql("ALTER TABLE u REPLICA IDENTITY FULL").await;
    taken(
        &stage,
        &pipeline,
        "UPDATE u SET v = 'missed' WHERE id <= 300; DELETE FROM u WHERE id > 400",
    )
    .await;
    parked(&mut pipeline, "E1131", "REPLICA IDENTITY DEFAULT").await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql("ALTER TABLE u REPLICA IDENTITY DEFAULT").await;
    stage.target_shows(&pipeline, shown, "400 300").await;
    let list = "SELECT attnames::text FROM pg_publication_tables WHERE tablename = 'u'";
    assert_eq!(stage.source_text(list).await, "{id,v}");

    // A process that took it out and ends before the broker is back has stored nothing of it: the next one parks it.
    pipeline.kill9();
    stage.nats.stop().await.expect("stopped");
    stage.sql("ALTER TABLE u REPLICA IDENTITY FULL").await;
    let mut pipeline = stage.start();
    taken(&stage, &pipeline, "DELETE FROM u WHERE id <= 100").await;
    assert_eq!(stage.source_text(MEMBER).await, "0");
    pipeline.kill9();
    stage.nats.start_again().await.expect("broker");
    let mut pipeline = stage.start();
    parked(&mut pipeline, "E1131", "REPLICA IDENTITY DEFAULT").await;
    others_go_on(&stage, &pipeline, 2).await;
    stage.sql("ALTER TABLE u REPLICA IDENTITY DEFAULT").await;
    stage.target_shows(&pipeline, shown, "300 200").await;
    assert_eq!(stage.source_text(list).await, "{id,v}");
}

#[tokio::test]
async fn a_table_that_is_gone_or_is_another_without_a_key_parks_alone() {
    let stage = usual().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("DROP TABLE u").await;
    parked(&mut pipeline, "E1114", "create it").await;
    others_go_on(&stage, &pipeline, 1).await;
    stage
        .sql("CREATE TABLE u (id int, v text); INSERT INTO u VALUES (1, 'another')")
        .await;
    parked(&mut pipeline, "E1115", "ADD PRIMARY KEY").await;
    pipeline.kill9();
    let mut pipeline = stage.start();
    parked(&mut pipeline, "E1115", "ADD PRIMARY KEY").await;
    others_go_on(&stage, &pipeline, 2).await;
    stage.sql("ALTER TABLE u ADD PRIMARY KEY (id)").await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_reload_goes_on_without_a_parked_table_and_refuses_what_it_would_park() {
    let stage = usual().await;
    let free = TcpListener::bind("127.0.0.1:0").expect("bound");
    let listen = free.local_addr().expect("bound").to_string();
    drop(free);
    let config = |u: &str, w: bool| {
        let (source, nats) = (stage.postgres.url("source"), stage.nats.url());
        let config = ConfigDir::new("shop", &source, &nats)
            .source(SOURCE)
            .stream("confirm = \"acked\"")
            .sink("replica", &stage.target_url())
            .listen(&listen)
            .table("public.t", "")
            .table("public.u", u);
        let config = if w {
            config.table("public.w", "")
        } else {
            config
        };
        config.write_to(stage.folder.path()).expect("written");
    };
    config("", false);
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // A key that the table does not have is a mistake of the file.
    config("key = [\"v\"]", false);
    let said = ["E1115", "goes on with its old configuration"];
    stage.ends(stage.start_with(&["reload"]), 78, &said).await;
    others_go_on(&stage, &pipeline, 1).await;

    stage.sql(NOTHING).await;
    parked(&mut pipeline, "E1107", MEND).await;
    stage
        .sql("CREATE TABLE w (id int PRIMARY KEY, v text); INSERT INTO w VALUES (1, 'new')")
        .await;
    config("", true);
    stage
        .ends(stage.start_with(&["reload"]), 0, &["table public.w added"])
        .await;
    stage
        .target_shows(&pipeline, "SELECT v FROM w", "new")
        .await;
    parked(&mut pipeline, "E1107", MEND).await;
    stage.sql(MISSED).await;
    // One that never had a key is an error.
    stage.sql("CREATE TABLE x (id int)").await;
    let without = stage.folder.path().join("tables/public.x.toml");
    std::fs::write(&without, "").expect("written");
    stage
        .ends(stage.start_with(&["reload"]), 78, &["E1115", "public.x"])
        .await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
    stage.ends(stage.start(), 4, &["E1115", "public.x"]).await;
    std::fs::remove_file(&without).expect("removed");
    let pipeline = stage.start();
    stage.sql(MEND).await;
    stage.equal(&pipeline).await;
}
