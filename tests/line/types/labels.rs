//! Labels that an enum gets later.

use millrace_lab::ConfigDir;

use super::matrix::Majors;
use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TYPE mood AS ENUM ('sad', 'ok');
    CREATE DOMAIN moods AS mood[];
    CREATE TABLE t (id int PRIMARY KEY, m mood, l mood[], d moods);
    CREATE TABLE k (m mood PRIMARY KEY, v text);
    ALTER TABLE k ALTER v SET STORAGE EXTERNAL;
    INSERT INTO t VALUES (1, 'sad', '{ok,NULL}', '{}');
    INSERT INTO k VALUES ('sad', repeat('x', 9000))";

const LABELS: &str = "SELECT string_agg(enumlabel, ' < ' ORDER BY enumsortorder) FROM pg_enum";

#[tokio::test]
async fn a_label_added_while_rows_stream_is_added_to_the_target() {
    let majors = Majors {
        source: 15,
        target: 18,
    };
    let stage = Stage::set(Setting {
        tables: &[("public.t", ""), ("public.k", "")],
        ..majors.setting(SCHEMA)
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;

    // In values, arrays and domains over arrays, and beside rows that were good before.
    stage.sql("ALTER TYPE mood ADD VALUE 'it''s new'").await;
    stage
        .sql(
            "INSERT INTO t SELECT i, 'ok' FROM generate_series(2, 50) i;
             INSERT INTO t VALUES (100, 'it''s new', NULL, NULL)",
        )
        .await;
    stage.equal(&pipeline).await;
    stage
        .sql(r#"ALTER TYPE mood ADD VALUE 'a"b,{c'; ALTER TYPE mood ADD VALUE 'e\f'"#)
        .await;
    stage
        .sql(r#"UPDATE t SET l = ARRAY['a"b,{c', 'ok', NULL]::mood[] WHERE id = 2; UPDATE t SET d = '{"e\\f"}' WHERE id = 3"#)
        .await;
    stage.equal(&pipeline).await;

    // As a key: of a new row, of a row that moves with a value that is not in the WAL, of a deleted one.
    stage.sql("ALTER TYPE mood ADD VALUE 'new key'").await;
    stage.sql("UPDATE k SET m = 'new key'").await;
    stage.equal(&pipeline).await;
    stage.sql("ALTER TYPE mood ADD VALUE 'gone'").await;
    stage
        .sql("INSERT INTO k VALUES ('gone', 'x'); DELETE FROM k WHERE m = 'gone'")
        .await;
    stage.sql("INSERT INTO k VALUES ('ok', 'y')").await;
    stage.equal(&pipeline).await;

    let letters = "SELECT count(*)::text FROM millrace.dead_letter";
    assert_eq!(stage.target_text(letters).await, "0");
    let labels = stage.target_text(LABELS).await;
    assert_eq!(
        labels,
        "sad < ok < it's new < a\"b,{c < e\\f < new key < gone"
    );
}

#[tokio::test]
async fn a_label_added_while_nothing_ran_gets_its_place() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.k", "")],
        ..Setting::default()
    })
    .await;
    stage.once().await;
    stage
        .sql("ALTER TYPE mood ADD VALUE 'worst' BEFORE 'sad'; ALTER TYPE mood ADD VALUE 'so-so' AFTER 'sad'")
        .await;
    stage
        .sql("INSERT INTO t VALUES (2, 'so-so', '{worst}', '{so-so}')")
        .await;
    stage.once().await;
    let labels = stage.target_text(LABELS).await;
    assert_eq!(labels, "worst < sad < so-so < ok");
}

#[tokio::test]
async fn labels_are_not_added_where_nothing_may_be_created() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.k", "")],
        ..Setting::default()
    })
    .await;
    stage.once().await;
    let (source, target) = (stage.postgres.url("source"), stage.target_url());
    let folder = ConfigDir::new("shop", &source, &stage.nats.url())
        .stream("confirm = \"acked\"")
        .sink_with("replica", &target, "create = \"never\"")
        .table("public.t", "")
        .table("public.k", "")
        .write()
        .expect("folder");
    stage.sql("ALTER TYPE mood ADD VALUE 'new'").await;
    stage
        .sql("INSERT INTO t VALUES (2, 'new', '{}', NULL), (3, 'ok', '{}', NULL)")
        .await;
    let pipeline = Stage::start_in(&folder, &["run"]);
    let rows = "SELECT string_agg(id::text, ' ' ORDER BY id) FROM t";
    stage.target_shows(&pipeline, rows, "1 3").await;
    let letters = "SELECT string_agg(key || ' ' || sqlstate, ',') FROM millrace.dead_letter";
    assert_eq!(stage.target_text(letters).await, "2 22P02");
    assert_eq!(stage.target_text(LABELS).await, "sad < ok");
}
