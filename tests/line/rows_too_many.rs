//! Rows that are not the source's any more go at the end of a copy, also those that a change wrote after the sink had
//! taken the copy's order.

use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

const HEARTBEATS: &str = "heartbeat_interval = \"500ms\"";
const WIDE: &str = "where = \"status <> 'draft'\"";
const NARROW: &str = "where = \"status = 'open'\"";
const ROWS: &str = "SELECT concat_ws(' ', count(*), min(v), max(v), min(status)) FROM t";

/// Transactions of a hundred rows each: a sink takes longer over them than it needs to hear of an order.
const BACKLOG: u32 = 600;

async fn part(stage: &Stage, pipeline: &Pipeline, condition: &str) {
    let expected = stage
        .source_text(&format!("{ROWS} WHERE {condition}"))
        .await;
    stage.target_shows(pipeline, ROWS, &expected).await;
}

async fn narrowed_while_the_sink_is_behind(left: &str) {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, status text NOT NULL, v text);
            ALTER TABLE t REPLICA IDENTITY FULL;
            INSERT INTO t SELECT i, CASE i % 3 WHEN 0 THEN 'open' WHEN 1 THEN 'draft' ELSE 'sent' END, 'v'
            FROM generate_series(1, 300) i",
        tables: &[("public.t", WIDE)],
        ..Setting::apart()
    })
    .await;
    stage
        .sql(&format!("UPDATE t SET status = 'draft' WHERE NOT ({left})"))
        .await;
    let capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    part(&stage, &sink, "status <> 'draft'").await;
    sink.wait_for_log("table is up to date", PATIENCE)
        .await
        .expect("follows");
    sink.pause().expect("signal");
    stage
        .sql(&format!(
            "DO $$ BEGIN FOR n IN 1..{BACKLOG} LOOP
                 UPDATE t SET v = 'w' || n WHERE status <> 'draft' AND id <= 150; COMMIT; END LOOP; END $$"
        ))
        .await;
    // The last of the old filter: no chunk brings these rows, and no change takes them away.
    stage
        .sql("UPDATE t SET v = 'late' WHERE status = 'sent'")
        .await;
    Stage::stopped(capture).await;
    stage.rewrite(HEARTBEATS, NARROW);
    let mut capture = stage.start_with(&CAPTURE);
    capture
        .wait_for_log("backfill ordered", PATIENCE)
        .await
        .expect("orders");
    sink.resume().expect("signal");
    part(&stage, &sink, "status = 'open'").await;
}

#[tokio::test]
async fn what_a_narrower_filter_leaves_out_goes_however_late_it_was_changed() {
    narrowed_while_the_sink_is_behind("true").await;
}

#[tokio::test]
async fn a_part_that_has_become_empty_is_empty() {
    narrowed_while_the_sink_is_behind("status = 'sent'").await;
}
