//! Tables whose shape changes at the source while they are written: each replica ends exactly equal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace_lab::Pipeline;

use crate::backfill::{becomes, is, may_begin, rows, says};
use crate::stage::{PATIENCE, Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, a int, v text);
    INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 50) i;
    CREATE TABLE u (id int PRIMARY KEY, v text)";
const POLICIES: [&str; 3] = [
    "",
    "on_schema_change = \"park\"",
    "on_schema_change = \"ignore\"",
];

/// The tables of [`SCHEMA`] under a policy, their replica, and a process that runs.
async fn whole(file: &str) -> (Stage, Pipeline) {
    whole_of(SCHEMA, file).await
}

async fn whole_of(schema: &str, file: &str) -> (Stage, Pipeline) {
    let stage = Stage::set(Setting {
        schema,
        tables: &[("public.t", file), ("public.u", "")],
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    (stage, pipeline)
}

/// Writes rows of `t` by their key alone, whatever its other columns are, until it is dropped.
struct Traffic {
    ends: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<u64>,
}

impl Traffic {
    async fn start(stage: &Stage) -> Self {
        let client = stage.postgres.connect("source").await.expect("connects");
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let task = tokio::spawn(async move {
            let mut id = 1000_u64;
            while !told.load(Ordering::Relaxed) {
                id += 1;
                let sql = format!(
                    "INSERT INTO t (id) VALUES ({id}); DELETE FROM t WHERE id = {}; \
                     UPDATE t SET id = id + 100000 WHERE id = {}",
                    id - 20,
                    id - 7
                );
                // A change of the table may get in between.
                let _ = client.batch_execute(&sql).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            id
        });
        Self { ends, task }
    }

    async fn end(self) {
        self.ends.store(true, Ordering::Relaxed);
        self.task.await.expect("writes");
    }
}

/// Runs statements while the table is written, and waits until the replica is equal.
async fn follows(stage: &Stage, pipeline: &Pipeline, statements: &[&str]) {
    let traffic = Traffic::start(stage).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    for sql in statements {
        stage.sql(sql).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    traffic.end().await;
    stage.equal(pipeline).await;
}

fn never_parked(pipeline: &Pipeline) {
    let logs = pipeline.logs();
    assert!(!logs.contains("table parked"), "{logs}");
}

#[tokio::test]
async fn columns_come_and_go_and_are_renamed() {
    let (stage, pipeline) = whole(POLICIES[0]).await;
    follows(
        &stage,
        &pipeline,
        &[
            "ALTER TABLE t ADD COLUMN plain int",
            "ALTER TABLE t ADD COLUMN b text NOT NULL DEFAULT 'it''s \\ b'",
            "ALTER TABLE t ADD COLUMN c int[] DEFAULT '{1,2}'; UPDATE t SET c = '{3}' WHERE id < 10",
            "ALTER TABLE t RENAME COLUMN v TO w; UPDATE t SET w = 'w' WHERE id < 5",
            "ALTER TABLE t RENAME COLUMN w TO x; UPDATE t SET x = 'x' WHERE id < 3",
            "ALTER TABLE t DROP COLUMN a; UPDATE t SET plain = 2 WHERE id < 9",
            "ALTER TABLE t ADD COLUMN d int NOT NULL DEFAULT 1",
            "ALTER TABLE t DROP COLUMN d",
            "BEGIN; UPDATE t SET x = 'before' WHERE id = 20; ALTER TABLE t RENAME COLUMN x TO y;
             ALTER TABLE t ADD COLUMN e int DEFAULT 7; UPDATE t SET y = 'after' WHERE id = 21; COMMIT",
        ],
    )
    .await;
    // What is gone at the source keeps its old values.
    let kept = stage
        .target_text("SELECT a::text FROM t WHERE id = 30")
        .await;
    assert_eq!(kept, "30");
    let gone = "SELECT count(*)::text FROM pg_attribute WHERE attrelid = 't'::regclass \
        AND attname IN ('v', 'w', 'x') AND NOT attisdropped";
    assert_eq!(stage.target_text(gone).await, "0");
    assert!(
        pipeline.logs().contains("DROP COLUMN \\\"a\\\""),
        "{}",
        pipeline.logs()
    );
    never_parked(&pipeline);
}

#[tokio::test]
async fn changes_while_the_product_is_down_are_followed() {
    let (stage, mut pipeline) = whole(POLICIES[0]).await;
    pipeline.kill9();
    stage
        .sql("INSERT INTO t VALUES (60, 6, 'of old'); UPDATE t SET v = 'old' WHERE id = 1")
        .await;
    stage
        .sql("ALTER TABLE t ADD COLUMN b int DEFAULT 5; INSERT INTO t (id) VALUES (61)")
        .await;
    stage
        .sql("ALTER TABLE t RENAME COLUMN v TO w; INSERT INTO t (id, w) VALUES (62, 'new')")
        .await;
    stage
        .sql("ALTER TABLE t DROP COLUMN a; INSERT INTO t (id, w) VALUES (63, 'newest')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_parked_table_waits_for_its_operator() {
    let (stage, pipeline) = whole(POLICIES[1]).await;
    for (change, remedy) in [
        (
            "ALTER TABLE t ADD COLUMN b int DEFAULT 5",
            "ALTER TABLE \"public\".\"t\" ADD COLUMN \"b\" integer DEFAULT '5';",
        ),
        (
            "ALTER TABLE t RENAME COLUMN v TO w",
            "ALTER TABLE \"public\".\"t\" RENAME COLUMN \"v\" TO \"w\";",
        ),
        (
            "ALTER TABLE t DROP COLUMN a",
            "ALTER TABLE \"public\".\"t\" DROP COLUMN \"a\";",
        ),
    ] {
        let id = stage
            .ask("SELECT (max(id) + 1)::text FROM t")
            .await
            .expect("rows");
        stage
            .sql(&format!("{change}; INSERT INTO t (id) VALUES ({id})"))
            .await;
        Stage::logs(&pipeline, &remedy.replace('"', "\\\"")).await;
        stage
            .sql("INSERT INTO u VALUES (1, 'on') ON CONFLICT (id) DO UPDATE SET v = u.v || 'on'")
            .await;
        let on = stage.ask("SELECT v FROM u").await.expect("a row");
        stage.target_shows(&pipeline, "SELECT v FROM u", &on).await;
        stage.target_sql(remedy).await;
        stage.equal(&pipeline).await;
    }
    assert!(pipeline.logs().contains("E1315"), "{}", pipeline.logs());
}

#[tokio::test]
async fn an_ignored_change_leaves_the_target_as_it_is() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL DEFAULT 1, v text);
        INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 50) i;
        CREATE TABLE u (id int PRIMARY KEY, v text)";
    let (stage, mut pipeline) = whole_of(schema, POLICIES[2]).await;
    stage
        .sql("ALTER TABLE t ADD COLUMN b int DEFAULT 5; INSERT INTO t VALUES (60, 6, 'b', 7)")
        .await;
    stage
        .sql("ALTER TABLE t RENAME COLUMN v TO w; INSERT INTO t VALUES (61, 6, 'w', 7)")
        .await;
    stage
        .sql("ALTER TABLE t DROP COLUMN a; INSERT INTO t VALUES (62, 'x', 7)")
        .await;
    stage
        .target_shows(&pipeline, "SELECT v FROM t WHERE id = 62", "x")
        .await;
    pipeline.terminate().expect("ends");
    pipeline.wait(PATIENCE).await.expect("ends");
    let pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (63, 'y', 7)").await;
    stage
        .target_shows(&pipeline, "SELECT v FROM t WHERE id = 63", "y")
        .await;
    let columns = "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute \
        WHERE attrelid = 't'::regclass AND attnum > 0 AND NOT attisdropped";
    assert_eq!(stage.target_text(columns).await, "id a v _millrace_version");
    let rows = "SELECT count(*)::text FROM t";
    assert_eq!(stage.target_text(rows).await, stage.source_text(rows).await);
}

#[tokio::test]
async fn rewritten_rows_are_read_again() {
    let (stage, pipeline) = whole(POLICIES[0]).await;
    follows(
        &stage,
        &pipeline,
        &[
            "ALTER TABLE t ADD COLUMN r float8 DEFAULT random()",
            "ALTER TABLE t ALTER COLUMN a TYPE bigint USING a * 3000000000",
            "ALTER TABLE t DROP COLUMN v; ALTER TABLE t ADD COLUMN v text DEFAULT 'anew'",
            "ALTER TABLE t ADD COLUMN n numeric(10,2) DEFAULT 1.55; UPDATE t SET n = 2.49 WHERE id < 9",
            "ALTER TABLE t ALTER COLUMN n TYPE numeric(10,1)",
        ],
    )
    .await;
    never_parked(&pipeline);
}

#[tokio::test]
async fn a_type_that_no_assignment_takes_is_altered_by_the_operator() {
    let (stage, pipeline) = whole(POLICIES[0]).await;
    let traffic = Traffic::start(&stage).await;
    stage
        .sql("ALTER TABLE t ALTER COLUMN a TYPE date USING '2000-01-01'::date + a")
        .await;
    stage
        .sql("INSERT INTO t (id, a) VALUES (60, '2026-11-21')")
        .await;
    let remedy = "ALTER TABLE \"public\".\"t\" ALTER COLUMN \"a\" TYPE date USING \"a\"::date;";
    Stage::logs(&pipeline, &remedy.replace('"', "\\\"")).await;
    // Its own operator knows the rule; the rows come again in any case.
    stage
        .target_sql("ALTER TABLE t ALTER COLUMN a TYPE date USING NULL")
        .await;
    traffic.end().await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn another_table_of_the_same_name_replaces_the_rows() {
    let (stage, mut pipeline) = whole(POLICIES[0]).await;
    follows(
        &stage,
        &pipeline,
        &[
            "BEGIN; DROP TABLE t; CREATE TABLE t (v text, id int PRIMARY KEY, a int, z int);
           INSERT INTO t SELECT 'new', i, i, i FROM generate_series(30, 70) i; COMMIT",
        ],
    )
    .await;
    stage
        .sql("UPDATE t SET z = 0, v = 'later' WHERE id = 40")
        .await;
    stage.equal(&pipeline).await;
    // The same while nobody looks.
    pipeline.kill9();
    stage
        .sql("DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (40, 'third')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE t SET v = 'last' WHERE id = 40; INSERT INTO t VALUES (41, 'more')")
        .await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn partitions_come_and_go() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, a int, v text) PARTITION BY RANGE (id);
        CREATE TABLE p0 PARTITION OF t FOR VALUES FROM (0) TO (500);
        CREATE TABLE p1 PARTITION OF t FOR VALUES FROM (1000) TO (2000000);
        INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 50) i;
        CREATE TABLE p2 (id int PRIMARY KEY, a int, v text);
        INSERT INTO p2 SELECT i, i, 'p2' FROM generate_series(500, 520) i;
        CREATE TABLE u (id int PRIMARY KEY, v text)";
    let (stage, pipeline) = whole_of(schema, POLICIES[0]).await;
    follows(
        &stage,
        &pipeline,
        &["ALTER TABLE t ATTACH PARTITION p2 FOR VALUES FROM (500) TO (1000)"],
    )
    .await;
    follows(&stage, &pipeline, &["ALTER TABLE t DETACH PARTITION p0"]).await;
    let rows = stage
        .target_text("SELECT count(*)::text FROM t WHERE id < 500")
        .await;
    assert_eq!(rows, "0");
}

#[tokio::test]
async fn another_key_and_another_identity() {
    let schema =
        "CREATE TABLE t (id int PRIMARY KEY, a int, v text, region text NOT NULL DEFAULT 'eu');
        INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(1, 50) i;
        CREATE TABLE u (id int PRIMARY KEY, v text)";
    let (stage, pipeline) = whole_of(schema, POLICIES[0]).await;
    follows(
        &stage,
        &pipeline,
        &[
            "ALTER TABLE t REPLICA IDENTITY FULL",
            "ALTER TABLE t REPLICA IDENTITY DEFAULT",
        ],
    )
    .await;
    never_parked(&pipeline);
    let traffic = Traffic::start(&stage).await;
    stage
        .sql(
            "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (region, id);
              INSERT INTO t (region, id) VALUES ('us', 1), ('us', 2); DELETE FROM t WHERE id = 3",
        )
        .await;
    let remedy = "ALTER TABLE \"public\".\"t\" DROP CONSTRAINT \"t_pkey\", ADD PRIMARY KEY (\"region\", \"id\")";
    Stage::logs(&pipeline, &remedy.replace('"', "\\\"")).await;
    stage.target_sql(remedy).await;
    traffic.end().await;
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE t SET v = 'x' WHERE id = 1; DELETE FROM t WHERE region = 'us' AND id = 2")
        .await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn an_old_event_finds_the_schema_that_it_was_written_under() {
    let (stage, pipeline) = whole(POLICIES[0]).await;
    stage.sql("UPDATE t SET v = 'of old' WHERE id = 1").await;
    stage.equal(&pipeline).await;
    stage
        .sql("ALTER TABLE t DROP COLUMN v; ALTER TABLE t RENAME COLUMN a TO b; UPDATE t SET b = 5")
        .await;
    stage.equal(&pipeline).await;

    let client = async_nats::connect(stage.nats.url())
        .await
        .expect("connects");
    let jetstream = async_nats::jetstream::new(client);
    let stream = jetstream.get_stream("CDC_shop").await.expect("the stream");
    let old = stream
        .get_first_raw_message_by_subject("cdc.shop.public.t.u", 1)
        .await
        .expect("the first update");
    let line: serde_json::Value = serde_json::from_slice(&old.payload).expect("an event");
    let version = line["source"]["table_version"].as_str().expect("a version");
    let schemas = jetstream
        .get_key_value("MILLRACE_shop_schemas")
        .await
        .expect("the bucket");
    let read = async |key: String| {
        let entry = schemas.get(key).await.expect("answers").expect("is there");
        serde_json::from_slice::<millrace_event::TableSchema>(&entry).expect("a schema")
    };
    let then = read(format!("public.t.{version}")).await;
    let names: Vec<_> = then
        .columns
        .iter()
        .map(|column| column.name.as_str())
        .collect();
    assert_eq!(names, ["id", "a", "v"]);
    let now = read("public.t".to_owned()).await;
    assert_eq!(now.columns[1].former, ["a"]);
    assert_eq!(
        now.column_of(then.oid, then.columns[1].number),
        Some(&now.columns[1])
    );
    assert_eq!(now.dropped, ["v"]);
}

/// A stage with its target apart whose replica of `t` is whole, and a backfill of `t` that has applied its first rows.
async fn backfilling() -> (Stage, Pipeline) {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::apart()
    })
    .await;
    stage
        .sql("INSERT INTO t SELECT i, i, 'v' || i FROM generate_series(2000, 6000) i")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    may_begin(&stage, &pipeline).await;
    let slow = ["start", "t", "--rate", "1000"];
    says(&stage, &slow, 0, &["is queued"]).await;
    becomes(&stage, &pipeline, |line| rows(line) > 0).await;
    (stage, pipeline)
}

/// While the target is held, a backfill goes on, and the table changes: once it is let go, rows of both shapes come
/// on both ways, and those that were laid out before are applied behind the change.
async fn interleave(change: &str) {
    let (stage, pipeline) = backfilling().await;
    stage
        .target_sql("BEGIN; LOCK TABLE millrace.position IN SHARE MODE")
        .await;
    stage.sql("INSERT INTO u VALUES (1, 'is held')").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    stage.sql(change).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    stage.target_sql("COMMIT").await;
    becomes(&stage, &pipeline, is("done")).await;
    stage.equal(&pipeline).await;
    let logs = pipeline.logs();
    assert!(!logs.contains("table parked"), "{logs}");
    // One for the load, one for the backfill.
    assert_eq!(logs.matches("copy requested").count(), 2, "{logs}");
}

#[tokio::test]
async fn a_backfill_goes_on_when_the_stream_brings_another_shape_first() {
    interleave(
        "ALTER TABLE t ADD COLUMN b int DEFAULT 5; ALTER TABLE t RENAME COLUMN v TO w;
         UPDATE t SET w = 'w', b = 6 WHERE id < 2100",
    )
    .await;
}

#[tokio::test]
async fn a_backfill_goes_on_when_it_brings_another_shape_itself() {
    interleave("ALTER TABLE t ADD COLUMN b int DEFAULT 5; ALTER TABLE t RENAME COLUMN v TO w")
        .await;
}

#[tokio::test]
async fn changes_have_the_column_that_a_backfill_has_found_in_the_target() {
    let (stage, pipeline) = whole(POLICIES[2]).await;
    stage
        .sql("ALTER TABLE t ADD COLUMN b int; INSERT INTO t VALUES (60, 6, 'b', 7)")
        .await;
    let left = "SELECT count(*)::text FROM t WHERE id = 60";
    stage.target_shows(&pipeline, left, "1").await;
    // From then on a backfill reads the column.
    Stage::logs(&pipeline, "was changed at the source").await;
    stage.target_sql("ALTER TABLE t ADD COLUMN b int").await;
    may_begin(&stage, &pipeline).await;
    says(&stage, &["start", "t", "--wait"], 0, &["done"]).await;
    stage.equal(&pipeline).await;
    stage
        .sql("INSERT INTO t VALUES (61, 6, 'b', 8); UPDATE t SET b = 9 WHERE id = 1")
        .await;
    stage.equal(&pipeline).await;
    // No row had to be read again for it.
    assert!(
        !pipeline.logs().contains("columns are missing"),
        "{}",
        pipeline.logs()
    );
}
