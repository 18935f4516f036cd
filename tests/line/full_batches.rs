//! Batches that are full end the target's transaction where they end one of the source's.

use millrace_lab::Pipeline;

use crate::stage::{Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];
const SINK: [&str; 3] = ["run", "--only", "sink:replica"];

async fn caught_up(stage: &Stage, sink: &Pipeline, id: u32) {
    let sql = format!("SELECT v FROM t WHERE id = {id}");
    stage.target_shows(sink, &sql, "last").await;
}

#[tokio::test]
async fn a_full_batch_of_one_whole_transaction_is_committed_before_more_is_collected() {
    let stage = Stage::set(Setting {
        stream: "confirm = \"acked\"\nevents_per_message = 1",
        sink: "batch = { max_rows = 10, max_bytes = \"1MiB\" }",
        ..Setting::default()
    })
    .await;
    // Which transaction of the target a row came with.
    stage
        .target_sql(
            "CREATE TABLE t (id int PRIMARY KEY, v text, came_with xid8 DEFAULT pg_current_xact_id())",
        )
        .await;
    stage.sql("INSERT INTO t VALUES (0, 'last')").await;
    let _capture = stage.start_with(&CAPTURE);
    let mut sink = stage.start_with(&SINK);
    caught_up(&stage, &sink, 0).await;
    sink.pause().expect("signal");
    for transaction in 1..=40 {
        let (first, last) = (transaction * 10 - 9, transaction * 10);
        let sql = format!(
            "INSERT INTO t SELECT i, CASE i WHEN {last} THEN 'last' END FROM generate_series({first}, {last}) i"
        );
        stage.sql(&sql).await;
    }
    sink.resume().expect("signal");
    caught_up(&stage, &sink, 400).await;
    let split = "SELECT count(*)::text FROM (SELECT 1 FROM t WHERE id > 0 GROUP BY came_with HAVING count(*) > 10) g";
    assert_eq!(stage.target_text(split).await, "0");
    stage.equal(&sink).await;
}
