//! A deferrable constraint of the target refuses a row when the transaction ends: it is set aside, whatever else
//! was wrong with the rows around it.

use millrace_lab::Pipeline;

use crate::stage::{Setting, Stage};

const SOURCE: &str = "CREATE TABLE t (id int PRIMARY KEY, email text, parent int)";
const TARGET: &str = "CREATE TABLE t (id int PRIMARY KEY, email text CHECK (email <> 'refused'),
    parent int REFERENCES t DEFERRABLE INITIALLY DEFERRED,
    _millrace_version uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    UNIQUE (email) DEFERRABLE INITIALLY DEFERRED)";

/// What the target has: rows, open letters.
const OUTCOME: &str = "SELECT format('%s rows, %s letters', (SELECT count(*) FROM t),
    (SELECT count(*) FROM millrace.dead_letter WHERE resolved_at IS NULL))";

async fn stage(sink: &str) -> (Stage, Pipeline) {
    let stage = Stage::set(Setting {
        schema: SOURCE,
        tables: &[("public.t", "adopt = true")],
        sink,
        ..Setting::default()
    })
    .await;
    stage.target_sql(TARGET).await;
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    (stage, pipeline)
}

/// Checks what the target has, and that the rest flows.
async fn set_aside(stage: &Stage, pipeline: &mut Pipeline, rows: u32, letters: u32) {
    let outcome = format!("{rows} rows, {letters} letters");
    stage.target_shows(pipeline, OUTCOME, &outcome).await;
    stage.sql("INSERT INTO t VALUES (100000, 'flows on')").await;
    let outcome = format!("{} rows, {letters} letters", rows + 1);
    stage.target_shows(pipeline, OUTCOME, &outcome).await;
    assert!(pipeline.is_running(), "{}", pipeline.logs());
}

#[tokio::test]
async fn a_key_that_the_target_has_already_does_not_hide_a_refusal_at_the_end() {
    let (stage, mut pipeline) = stage("").await;
    stage
        .target_sql("INSERT INTO t VALUES (150, 'older')")
        .await;
    // Enough new rows for a plain insert, which row 150 fails; 10 and 20 have one address.
    stage
        .sql(
            "INSERT INTO t SELECT i, 'a' || CASE i WHEN 20 THEN 10 ELSE i END \
             FROM generate_series(1, 300) i",
        )
        .await;
    set_aside(&stage, &mut pipeline, 299, 1).await;
    let adopted = "SELECT email FROM t WHERE id = 150";
    assert_eq!(stage.target_text(adopted).await, "a150");
    let twice = "SELECT count(*)::text FROM t WHERE id IN (10, 20)";
    assert_eq!(stage.target_text(twice).await, "1");
}

#[tokio::test]
async fn a_row_that_is_refused_at_once_does_not_hide_one_that_is_refused_at_the_end() {
    let (stage, mut pipeline) = stage("").await;
    stage
        .sql("INSERT INTO t VALUES (1, 'a'), (2, 'refused'), (3, 'b'), (4, 'a'), (5, 'c')")
        .await;
    set_aside(&stage, &mut pipeline, 3, 2).await;
}

#[tokio::test]
async fn the_end_of_a_large_transaction_is_set_aside_alone() {
    let (stage, mut pipeline) = stage("batch.max_rows = 50").await;
    // The last batch has a row like one of the first.
    stage
        .sql(
            "INSERT INTO t SELECT i, 'a' || CASE i WHEN 329 THEN 10 ELSE i END \
             FROM generate_series(1, 330) i",
        )
        .await;
    set_aside(&stage, &mut pipeline, 329, 1).await;
    // With a row that is refused at once beside it.
    stage
        .sql(
            "INSERT INTO t SELECT i, CASE i WHEN 1328 THEN 'refused' WHEN 1329 THEN 'a10' ELSE 'b' || i END \
             FROM generate_series(1001, 1330) i",
        )
        .await;
    let outcome = "658 rows, 3 letters";
    stage.target_shows(&pipeline, OUTCOME, outcome).await;
}

#[tokio::test]
async fn a_parent_in_a_later_batch_is_waited_for() {
    let (stage, mut pipeline) = stage("batch.max_rows = 50").await;
    // Row 25 is refused at once, with its batch's parents still to come.
    stage
        .sql(
            "INSERT INTO t SELECT i, CASE i WHEN 25 THEN 'refused' ELSE 'a' || i END, 330 \
             FROM generate_series(1, 330) i",
        )
        .await;
    set_aside(&stage, &mut pipeline, 329, 1).await;
}
