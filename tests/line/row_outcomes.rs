//! The metrics tell what became of each row that was handed to the target.

use std::time::{Duration, Instant};

use millrace_lab::Pipeline;

use crate::stage::{PATIENCE, Setting, Stage};

/// The rows of this table, kind and outcome; none where nothing was counted.
fn counted(metrics: &str, op: &str, outcome: &str) -> Option<u64> {
    let labels = [
        "sink=\"replica\"".to_owned(),
        "table=\"public.t\"".to_owned(),
        format!("op=\"{op}\""),
        format!("outcome=\"{outcome}\""),
    ];
    let line = metrics.lines().find(|line| {
        line.starts_with("millrace_sink_rows_total{")
            && labels.iter().all(|label| line.contains(label))
    });
    line?.rsplit(' ').next()?.parse().ok()
}

/// Waits until so many rows of a kind became this.
async fn become_(pipeline: &mut Pipeline, op: &str, outcome: &str, rows: u64) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, metrics) = pipeline.get("/metrics").await.expect("metrics");
        if counted(&metrics, op, outcome) == Some(rows) {
            return metrics;
        }
        assert!(
            Instant::now() < deadline,
            "no {rows} of {op}, {outcome}:\n{metrics}\n{}",
            pipeline.logs()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn applied_stale_and_refused_rows_are_counted_apart() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); \
                 INSERT INTO t SELECT i, 'copied' FROM generate_series(1, 5) i",
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    become_(&mut pipeline, "upsert", "applied", 5).await;

    // Two rows of the target are newer than anything that the source sends next.
    let newest = "ffffffff-ffff-ffff-ffff-ffffffffffff";
    stage
        .target_sql(&format!(
            "UPDATE t SET _millrace_version = '{newest}' WHERE id IN (1, 2)"
        ))
        .await;
    stage
        .sql("UPDATE t SET v = 'changed' WHERE id IN (1, 3); DELETE FROM t WHERE id IN (2, 4)")
        .await;
    become_(&mut pipeline, "upsert", "stale", 1).await;
    become_(&mut pipeline, "delete", "stale", 1).await;
    let metrics = become_(&mut pipeline, "delete", "applied", 1).await;
    assert_eq!(counted(&metrics, "upsert", "applied"), Some(6), "{metrics}");
    assert_eq!(
        counted(&metrics, "upsert", "dead_letter"),
        None,
        "{metrics}"
    );

    // A key change is one row; a row that the target refuses is neither.
    stage
        .target_sql("ALTER TABLE t ADD CONSTRAINT c CHECK (v <> 'refused')")
        .await;
    stage
        .sql(
            "UPDATE t SET id = 30 WHERE id = 3; INSERT INTO t VALUES (31, 'refused'), (32, 'fine')",
        )
        .await;
    let metrics = become_(&mut pipeline, "upsert", "dead_letter", 1).await;
    assert_eq!(counted(&metrics, "upsert", "stale"), Some(1), "{metrics}");
    let total = counted(&metrics, "upsert", "applied");
    assert!(matches!(total, Some(7..=8)), "{metrics}");
}
