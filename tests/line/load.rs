//! The initial load: tables read by ranges of blocks under one snapshot, and rows that reach the target by COPY.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_lab::{Compared, Proxy};

use crate::stage::{PATIENCE, Setting, Stage};

/// Rows of about 2 KiB that fill more than two ranges of blocks (64 MiB).
const WIDE_ROWS: u64 = 40_000;

#[tokio::test]
async fn rows_that_move_between_blocks_while_their_ranges_are_read_arrive_once() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL DEFAULT 0, v text);
                 ALTER TABLE t ALTER v SET STORAGE PLAIN",
        ..Setting::default()
    })
    .await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 0, repeat('x', 1900) || i FROM generate_series(1, {WIDE_ROWS}) i"
        ))
        .await;
    let client = stage.postgres.connect("source").await.expect("connects");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let traffic = tokio::spawn(async move {
        let mut n = 0_u64;
        while !stopped.load(Ordering::Relaxed) {
            n += 1;
            // The old versions' places are used again, by rows from all over the table.
            client
                .batch_execute(&format!(
                    "UPDATE t SET n = n + 1 WHERE id % 97 = {}; DELETE FROM t WHERE id = {};
                     INSERT INTO t VALUES ({}, 0, repeat('y', 1900)); VACUUM t",
                    n % 97,
                    n * 389 % WIDE_ROWS,
                    WIDE_ROWS + n
                ))
                .await
                .ok();
        }
        n
    });
    let pipeline = stage.start();
    Stage::logs(&pipeline, "table copied").await;
    stop.store(true, Ordering::Relaxed);
    assert!(traffic.await.expect("traffic") > 1);
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_partitioned_table_is_loaded_leaf_by_leaf_under_its_own_name() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
                 CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (1000);
                 CREATE TABLE t_high PARTITION OF t FOR VALUES FROM (1000) TO (5000) PARTITION BY HASH (id);
                 CREATE TABLE t_high_0 PARTITION OF t_high FOR VALUES WITH (MODULUS 2, REMAINDER 0);
                 CREATE TABLE t_high_1 (v text, gone int, id int NOT NULL);
                 ALTER TABLE t_high_1 DROP COLUMN gone;
                 ALTER TABLE t_high ATTACH PARTITION t_high_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 4999) i")
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 4_999);
    stage
        .sql("UPDATE t SET v = 'changed' WHERE id % 7 = 0; UPDATE t SET id = 0 WHERE id = 4000")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 4_999);
}

#[tokio::test]
async fn rows_of_a_child_that_is_no_partition_are_not_the_parents() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text);
                 CREATE TABLE child () INHERITS (t)",
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES (1, 'own'); INSERT INTO child VALUES (2, 'of the child')")
        .await;
    let pipeline = stage.start();
    Stage::logs(&pipeline, "table copied").await;
    assert!(
        pipeline.logs().contains("\"rows\":1"),
        "{}",
        pipeline.logs()
    );
}

#[tokio::test]
async fn a_rewrite_between_snapshot_and_lock_is_noticed() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE first (id int PRIMARY KEY, v text);
                 ALTER TABLE first ALTER v SET STORAGE PLAIN;
                 CREATE TABLE t (id int PRIMARY KEY, v text)",
        tables: &[("public.first", ""), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql(&format!(
            "INSERT INTO first SELECT i, repeat('x', 1900) FROM generate_series(1, {WIDE_ROWS}) i;
             INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 500) i"
        ))
        .await;
    let pipeline = stage.start();
    Stage::logs(&pipeline, "\"copying\"").await;
    // While the other table is read, this one is not locked yet. The snapshot sees none of its new rows.
    stage
        .sql("ALTER TABLE t ALTER v TYPE text USING upper(v)")
        .await;
    stage.equal(&pipeline).await;
    Stage::logs(&pipeline, "was rewritten").await;
}

#[tokio::test]
async fn rows_that_the_target_has_already_are_met_with_the_guard() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("INSERT INTO t SELECT i, 'right' FROM generate_series(1, 3000) i")
        .await;
    stage
        .target_sql(
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             INSERT INTO t SELECT i, 'outdated' FROM generate_series(2900, 3100) i",
        )
        .await;
    fs::write(
        stage.folder.path().join("tables/public.t.toml"),
        "adopt = true",
    )
    .expect("file");
    let pipeline = stage.start();
    let tables = [Compared::same("public.t")];
    assert_eq!(stage.equal_as(&pipeline, &tables).await.rows, 3_000);
}

#[tokio::test]
async fn values_without_a_known_binary_form_are_loaded_too() {
    let stage = Stage::set(Setting {
        schema: "CREATE TYPE mood AS ENUM ('good', 'bad');
                 CREATE TABLE t (id int PRIMARY KEY, d date, n numeric, m mood, a text[], v text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t SELECT i, CASE WHEN i % 3 = 0 THEN 'infinity' ELSE '2026-01-01'::date + i END,
             CASE WHEN i % 5 = 0 THEN 'NaN' ELSE (i - 700)::numeric / 7 END,
             CASE WHEN i % 2 = 0 THEN 'bad' ELSE 'good' END::mood, ARRAY['a', NULL, E'\\\\\\t\"'],
             CASE WHEN i % 4 = 0 THEN NULL ELSE E'tab\\tnewline\\nbackslash\\\\N\\r' || i END
             FROM generate_series(1, 1000) i",
        )
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 1_000);
}

#[tokio::test]
async fn an_infinite_date_among_binary_forms_is_loaded_as_text() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, d date, n numeric, v text)",
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t SELECT i, CASE WHEN i = 999 THEN 'infinity' ELSE '2026-01-01'::date + i END,
             (i - 700)::numeric / 7, 'row ' || i FROM generate_series(1, 1000) i",
        )
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 1_000);
}

const PARTITIONS: &str = "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE t_0 PARTITION OF t FOR VALUES FROM (0) TO (1000);
    CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (1000) TO (2000);
    CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (2000) TO (3000);
    CREATE TABLE t_3 PARTITION OF t FOR VALUES FROM (3000) TO (4000)";
const FILL: &str = "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 3999) i";

/// While one connection of a load holds its lock and the next is still on its way, a partition is taken out: that waits
/// for the first, and the second would wait behind it.
async fn goes_while_it_is_read(change: &'static str) {
    let stage = Stage::set(Setting {
        schema: PARTITIONS,
        ..Setting::default()
    })
    .await;
    stage.sql(FILL).await;
    let near = format!("127.0.0.1:{}", stage.postgres.port());
    let proxy = Proxy::start(near.clone()).await.expect("proxy");
    let far = stage.postgres.url("source");
    let far = far.replace(&near, &proxy.address().to_string());
    let folder = stage.config(&far, &stage.target_url(), &stage.nats.url());
    let folder = folder.write().expect("folder");
    let mut capture = Stage::start_in(&folder, &["run", "--only", "capture"]);
    Stage::readyz(&mut capture, 200, "streaming").await;
    proxy.delay(Duration::from_millis(100));
    let sink = Stage::start_in(&folder, &["run", "--only", "sink:replica"]);
    let held = "SELECT count(*)::text FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
        WHERE l.relation = 't_3'::regclass AND l.mode = 'AccessShareLock' AND a.application_name LIKE 'millrace%'";
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(held).await == "0" {
        assert!(Instant::now() < deadline, "{}", capture.logs());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let began = Instant::now();
    stage.sql(change).await;
    proxy.delay(Duration::ZERO);
    // The load's end, and no time limit, let it in.
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    stage.sql("UPDATE t SET v = 'later' WHERE id % 7 = 0").await;
    let rows = stage.equal(&sink).await.rows;
    assert_eq!(rows, 2_999, "{}", capture.logs());
    Stage::logs(&capture, "table copied").await;
    assert!(!capture.logs().contains("cut off"), "{}", capture.logs());
}

#[tokio::test]
async fn a_partition_that_is_dropped_while_a_load_reads_it_waits_for_the_load_alone() {
    goes_while_it_is_read("DROP TABLE t_3").await;
}

#[tokio::test]
async fn a_partition_that_is_detached_while_a_load_reads_it_waits_for_the_load_alone() {
    goes_while_it_is_read("ALTER TABLE t DETACH PARTITION t_3").await;
}

#[tokio::test]
async fn a_partition_that_goes_between_snapshot_and_lock_is_not_loaded() {
    let stage = Stage::set(Setting {
        schema: &format!(
            "{PARTITIONS}; CREATE TABLE first (id int PRIMARY KEY, v text);
             ALTER TABLE first ALTER v SET STORAGE PLAIN;
             INSERT INTO first SELECT i, repeat('x', 1900) FROM generate_series(1, {WIDE_ROWS}) i"
        ),
        tables: &[("public.first", ""), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    stage.sql(FILL).await;
    let pipeline = stage.start();
    Stage::logs(&pipeline, "\"copying\"").await;
    // While the other table is read, this one is not locked yet. To the snapshot they are partitions still.
    stage.sql("DROP TABLE t_1").await;
    stage.sql("ALTER TABLE t DETACH PARTITION t_3").await;
    let whole = WIDE_ROWS + 999 + 1_000;
    assert_eq!(stage.equal(&pipeline).await.rows, whole);
    Stage::logs(&pipeline, "its partitions changed").await;
}
