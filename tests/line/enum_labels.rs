//! Labels that an enum gets at the source after the target's enum was made, in rows that no stream tells of first:
//! those of a load, and those of chunks.

use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TABLE first (id int PRIMARY KEY, m mood, ms mood[]);
    INSERT INTO first SELECT i, 'good', '{bad}' FROM generate_series(1, 100) i;
    CREATE TABLE t (id int PRIMARY KEY, m mood, ms mood[]);
    INSERT INTO t SELECT i, 'good', '{bad}' FROM generate_series(1, 5000) i";
const TABLES: &[(&str, &str)] = &[("public.first", ""), ("public.t", "")];
const LABELS: &str = "SELECT array_agg(enumlabel ORDER BY enumsortorder)::text FROM pg_enum";

#[tokio::test]
async fn a_load_brings_rows_with_a_label_that_is_newer_than_the_targets_enum() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: TABLES,
        ..Setting::default()
    })
    .await;
    let mut capture = stage.start_with(&["run", "--only", "capture"]);
    Stage::readyz(&mut capture, 200, "streaming").await;
    // No snapshot is taken before this transaction ends, and the sink makes its tables meanwhile.
    let open = stage.postgres.connect("source").await.expect("connects");
    let begin = "BEGIN; SELECT pg_current_xact_id()";
    open.batch_execute(begin).await.expect("begins");
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    let made =
        "SELECT count(*)::text FROM pg_class WHERE relname IN ('first', 't') AND relkind = 'r'";
    stage.target_shows(&sink, made, "2").await;
    stage
        .sql("ALTER TYPE mood ADD VALUE 'so-so' AFTER 'good'")
        .await;
    stage
        .sql("ALTER TYPE mood ADD VALUE 'it''s \\ best' BEFORE 'good'")
        .await;
    stage
        .sql(
            "UPDATE t SET m = 'so-so', ms = '{\"it''s \\\\ best\", good}' WHERE id % 2 = 0;
             UPDATE first SET ms = '{so-so}' WHERE id = 7",
        )
        .await;
    open.batch_execute("COMMIT").await.expect("ends");
    assert_eq!(stage.equal(&sink).await.rows, 5_100);
    // None of the rows was set aside, or came in another way.
    let logs = sink.logs();
    assert!(
        !logs.contains("dead letter") && !logs.contains("come in chunks"),
        "{logs}"
    );
}

#[tokio::test]
async fn chunks_bring_rows_with_a_label_that_the_stream_has_not_brought() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: TABLES,
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    // Changes that nobody captures: the table is not published then, and read again once it is.
    stage.sql("ALTER TYPE mood ADD VALUE 'missed'").await;
    stage
        .sql(
            "ALTER PUBLICATION millrace_shop DROP TABLE t;
             UPDATE t SET m = 'missed', ms = '{missed, NULL}' WHERE id % 2 = 0;
             ALTER PUBLICATION millrace_shop ADD TABLE t",
        )
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 5_100);
    assert_eq!(stage.target_text(LABELS).await, "{good,bad,missed}");
    let logs = pipeline.logs();
    assert!(logs.contains("table backfilled"), "{logs}");
}
