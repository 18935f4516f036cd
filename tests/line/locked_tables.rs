//! A table that somebody has locked, as VACUUM FULL and a rewriting ALTER TABLE do, holds no other table up: neither
//! while capture runs nor when it begins again.

use std::time::Duration;

use millrace_lab::{Pipeline, PostgresOptions};
use tokio_postgres::Client;

use crate::stage::{Setting, Stage};

/// Longer than the pause between two looks at the tables.
const LOOKED: Duration = Duration::from_secs(7);

/// Locks tables at the source, against everybody, until it is dropped.
struct Held(Client);

impl Held {
    async fn of(stage: &Stage, tables: &str) -> Self {
        let client = stage.postgres.connect("source").await.expect("connects");
        let sql = format!("BEGIN; LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE");
        client.batch_execute(&sql).await.expect("locked");
        Self(client)
    }

    async fn let_go(self) {
        self.0.batch_execute("COMMIT").await.expect("unlocked");
    }
}

/// Whether changes of `u` still come through.
async fn flows(stage: &Stage, pipeline: &Pipeline, id: u32) {
    stage
        .sql(&format!("INSERT INTO u (id) VALUES ({id})"))
        .await;
    let sql = format!("SELECT id::text FROM u WHERE id = {id}");
    stage.target_shows(pipeline, &sql, &id.to_string()).await;
}

#[tokio::test]
async fn what_is_in_the_wal_of_a_locked_table_is_captured() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);
                 CREATE TABLE m (id int PRIMARY KEY, v text)",
        tables: &[
            ("public.t", ""),
            ("public.u", ""),
            ("public.m", "columns = { mask = { v = \"redact\" } }"),
        ],
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    flows(&stage, &pipeline, 1).await;
    pipeline.kill9();
    stage
        .sql("INSERT INTO t VALUES (1, 'a'); INSERT INTO m VALUES (1, 'secret')")
        .await;
    let held = Held::of(&stage, "t, m").await;
    let pipeline = stage.start();
    flows(&stage, &pipeline, 2).await;
    for table in ["t", "m"] {
        let count = format!("SELECT count(*)::text FROM {table}");
        stage.target_shows(&pipeline, &count, "1").await;
    }
    assert_ne!(stage.target_text("SELECT v FROM m").await, "secret");
    held.let_go().await;
}

async fn others_flow_on(major: Option<u32>) {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
                 CREATE TABLE p_0 PARTITION OF p FOR VALUES FROM (0) TO (100) PARTITION BY RANGE (id);
                 CREATE TABLE p_00 PARTITION OF p_0 FOR VALUES FROM (0) TO (100);
                 CREATE TABLE u (id int PRIMARY KEY, v text); CREATE TABLE t (id int PRIMARY KEY, v text);
                 CREATE TABLE f (id int, s text COLLATE \"C\", v text, PRIMARY KEY (id, s));
                 INSERT INTO p SELECT i, 'p' FROM generate_series(1, 50) i; INSERT INTO t VALUES (1, 't');
                 INSERT INTO f VALUES (1, 'open', 'f'), (2, 'shut', 'f')",
        tables: &[
            ("public.p", ""),
            ("public.t", ""),
            ("public.u", ""),
            ("public.f", "where = \"f.s <> 'shut' AND id < 99\""),
        ],
        postgres: PostgresOptions {
            major,
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage
        .target_shows(&pipeline, "SELECT count(*)::text FROM p", "50")
        .await;
    stage
        .target_shows(&pipeline, "SELECT count(*)::text FROM f", "1")
        .await;
    flows(&stage, &pipeline, 1).await;

    let held = Held::of(&stage, "p_00, f, t").await;
    tokio::time::sleep(LOOKED).await;
    flows(&stage, &pipeline, 2).await;
    // Another shape, which is described and begins another life.
    stage.sql("ALTER TABLE u ADD COLUMN w int").await;
    flows(&stage, &pipeline, 3).await;
    Stage::logs(&pipeline, "was changed at the source").await;
    flows(&stage, &pipeline, 4).await;
    pipeline.kill9();
    let pipeline = stage.start();
    flows(&stage, &pipeline, 5).await;
    tokio::time::sleep(LOOKED).await;
    flows(&stage, &pipeline, 6).await;
    held.let_go().await;

    stage
        .sql("INSERT INTO f VALUES (3, 'open', 'f'), (4, 'shut', 'f'); UPDATE p SET v = 'later' WHERE id = 7")
        .await;
    let rows = "SELECT string_agg(id || s || v, ' ' ORDER BY id) FROM f";
    stage.target_shows(&pipeline, rows, "1openf 3openf").await;
    stage
        .target_shows(&pipeline, "SELECT v FROM p WHERE id = 7", "later")
        .await;
    // What was locked was neither parked nor read again.
    let logs = pipeline.logs();
    assert!(
        !logs.contains("read again") && !logs.contains("parked"),
        "{logs}"
    );
}

#[tokio::test]
async fn other_tables_flow_on_while_some_are_locked() {
    others_flow_on(None).await;
}

#[tokio::test]
async fn other_tables_flow_on_while_some_are_locked_on_18() {
    others_flow_on(Some(18)).await;
}

#[tokio::test]
async fn a_partition_that_is_locked_when_it_comes_is_read_later() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
                 CREATE TABLE t_0 PARTITION OF t FOR VALUES FROM (0) TO (100);
                 CREATE TABLE t_1 (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text);
                 INSERT INTO t VALUES (1, 'a'); INSERT INTO t_1 VALUES (101, 'b')",
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    let client = stage.postgres.connect("source").await.expect("connects");
    // Nobody sees one without the other.
    client
        .batch_execute("BEGIN; LOCK TABLE t_1 IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("locked");
    let attach = "ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES FROM (100) TO (200)";
    client
        .batch_execute(&format!(
            "{attach}; COMMIT; BEGIN; LOCK TABLE t_1 IN ACCESS EXCLUSIVE MODE"
        ))
        .await
        .expect("attached");
    tokio::time::sleep(LOOKED).await;
    flows(&stage, &pipeline, 1).await;
    let said = "a partition came or went";
    assert!(!pipeline.logs().contains(said), "{}", pipeline.logs());
    client.batch_execute("COMMIT").await.expect("unlocked");
    stage.equal(&pipeline).await;
    assert!(pipeline.logs().contains(said), "{}", pipeline.logs());
}
