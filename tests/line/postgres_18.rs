//! The ordinary line on the newest Postgres that is supported, and on the oldest.

use millrace_lab::{PostgresOptions, shop};

use crate::kill::{SHOP, random_moment, seeded, traffic};
use crate::stage::{Setting, Stage};

fn of(major: u32) -> PostgresOptions {
    PostgresOptions {
        major: Some(major),
        ..PostgresOptions::default()
    }
}

async fn stage(major: u32, schema: &str) -> Stage {
    Stage::set(Setting {
        schema,
        postgres: of(major),
        ..Setting::default()
    })
    .await
}

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text, n numeric DEFAULT 7, big text);
    ALTER TABLE t ALTER big SET STORAGE EXTERNAL;
    INSERT INTO t SELECT i, 'copied ' || i, i, repeat(md5(i::text), 300) FROM generate_series(1, 200) i";

const CHANGES: &[&str] = &[
    "INSERT INTO t VALUES (1000, 'new', NULL, repeat('big', 3000)), (1001, NULL, NULL, NULL)",
    // The large values of these rows are not in the WAL.
    "UPDATE t SET v = v || ' updated', n = n + 1 WHERE id % 2 = 0",
    "DELETE FROM t WHERE id % 5 = 0",
    "UPDATE t SET id = id + 10000 WHERE id % 7 = 0",
    "UPDATE t SET id = -id, big = NULL WHERE id < 10",
    "BEGIN; INSERT INTO t VALUES (5, 'once', 1, 'x'); DELETE FROM t WHERE id = 5; SAVEPOINT s;
     INSERT INTO t VALUES (6, 'never'); ROLLBACK TO s; INSERT INTO t VALUES (5, 'twice', 2, NULL); COMMIT",
    "ALTER TABLE t REPLICA IDENTITY FULL",
    "UPDATE t SET n = 0 WHERE id > 10000",
    "TRUNCATE t",
    "INSERT INTO t VALUES (1, 'after', 1, repeat('again', 2000))",
];

async fn every_change_arrives(major: u32) {
    let stage = stage(major, SCHEMA).await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 200);
    for change in CHANGES {
        stage.sql(change).await;
        stage.equal(&pipeline).await;
    }
}

#[tokio::test]
async fn every_change_arrives_on_18() {
    every_change_arrives(18).await;
}

/// The oldest: its publications have neither column lists nor row filters.
#[tokio::test]
async fn every_change_arrives_on_14() {
    every_change_arrives(14).await;
}

#[tokio::test]
async fn kills_of_the_sink_lose_nothing_on_18() {
    let mut rng = seeded();
    let stage = Stage::set(Setting {
        schema: shop::SCHEMA,
        tables: &SHOP,
        postgres: of(18),
        ..Setting::default()
    })
    .await;
    let traffic = traffic(&stage, &mut rng, 100).await;
    let capture = stage.start_with(&["run", "--only", "capture"]);
    let mut sink = stage.start_with(&["run", "--only", "sink:replica"]);
    for _ in 0..3 {
        random_moment(&mut rng, 1200).await;
        sink.kill9();
        sink = stage.start_with(&["run", "--only", "sink:replica"]);
    }
    let report = traffic.stop().await.expect("traffic");
    assert!(report.changes > 50, "{report:?}");
    stage.equal(&capture).await;
    stage.keeps_the_password(&sink);
}

const GENERATED: &str = "CREATE TABLE t (id int PRIMARY KEY, v text,
        kept text GENERATED ALWAYS AS (v || '!') STORED, seen text GENERATED ALWAYS AS (v || '?') VIRTUAL);
    INSERT INTO t VALUES (1, 'copied')";

const COLUMNS: &str = "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute
    WHERE attrelid = 'public.t'::regclass AND attnum > 0 AND attname NOT LIKE '\\_millrace\\_%'";

/// Copies and streams rows of [`GENERATED`]; the replica has none of the generated columns.
async fn are_left_out(stage: &Stage) {
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("INSERT INTO t VALUES (2, 'new'); UPDATE t SET v = 'other' WHERE id = 1")
        .await;
    stage.equal(&pipeline).await;
    assert_eq!(stage.target_text(COLUMNS).await, "id v");
}

/// Stored ones could be published since 18, virtual ones never.
#[tokio::test]
async fn generated_columns_are_left_out() {
    let stage = stage(18, GENERATED).await;
    are_left_out(&stage).await;
    let published = "SELECT pubgencols::text FROM pg_publication WHERE pubname = 'millrace_shop'";
    assert_eq!(stage.source_text(published).await, "n");
}

/// A target may compute them itself.
#[tokio::test]
async fn generated_columns_of_the_target_are_its_own() {
    let stage = stage(18, GENERATED).await;
    stage
        .target_sql(
            "CREATE TABLE t (id int PRIMARY KEY, v text, kept text GENERATED ALWAYS AS (v || '!') STORED,
                 seen text GENERATED ALWAYS AS (v || ' here') VIRTUAL)",
        )
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("UPDATE t SET v = 'other' WHERE id = 1").await;
    let row = "SELECT concat_ws(' ', v, kept, seen) FROM t";
    stage
        .target_shows(&pipeline, row, "other other! other here")
        .await;
}

#[tokio::test]
async fn generated_columns_that_a_publication_of_an_operator_has_are_left_out() {
    let stage = stage(18, GENERATED).await;
    stage
        .sql(
            "CREATE PUBLICATION millrace_shop FOR TABLE t
                 WITH (publish_via_partition_root = true, publish_generated_columns = stored)",
        )
        .await;
    are_left_out(&stage).await;
}

/// Since 18 a NOT NULL is a constraint with a name, which old rows need not meet.
#[tokio::test]
async fn a_not_null_that_old_rows_break_is_not_carried() {
    let stage = stage(
        18,
        "CREATE TABLE t (id int PRIMARY KEY, v text, n int CONSTRAINT named NOT NULL);
         INSERT INTO t VALUES (1, NULL, 1);
         ALTER TABLE t ADD CONSTRAINT late NOT NULL v NOT VALID",
    )
    .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE t SET n = 2, v = 'now'; INSERT INTO t VALUES (2, 'x', 1)")
        .await;
    stage.equal(&pipeline).await;
    let not_null = "SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute
        WHERE attrelid = 'public.t'::regclass AND attnum > 0 AND attnotnull AND attname NOT LIKE '\\_millrace\\_%'";
    assert_eq!(stage.target_text(not_null).await, "id n");
}

#[tokio::test]
async fn a_key_that_may_be_null_in_old_rows_is_refused() {
    let stage = stage(
        18,
        "CREATE TABLE t (id int, v text); CREATE UNIQUE INDEX t_id ON t (id);
         INSERT INTO t VALUES (NULL, 'old');
         ALTER TABLE t ADD CONSTRAINT late NOT NULL id NOT VALID",
    )
    .await;
    stage
        .sql("ALTER TABLE t REPLICA IDENTITY USING INDEX t_id")
        .await;
    stage
        .ends(
            stage.start(),
            4,
            &["E1115", "may be NULL in old rows", "VALIDATE CONSTRAINT"],
        )
        .await;
    stage
        .sql("DELETE FROM t; ALTER TABLE t VALIDATE CONSTRAINT late; INSERT INTO t VALUES (1, 'new')")
        .await;
    stage.run_once().await;
    assert_eq!(stage.target_text("SELECT id || v FROM t").await, "1new");
}

/// No publication of ours has one, so nobody could tell rows apart by it.
#[tokio::test]
async fn a_generated_key_is_refused() {
    let schema = "CREATE TABLE t (id int, k int GENERATED ALWAYS AS (id + 1) STORED PRIMARY KEY);
        INSERT INTO t VALUES (1)";
    for major in [15, 18] {
        let stage = stage(major, schema).await;
        stage
            .ends(stage.start(), 4, &["E1115", "\"k\" is generated"])
            .await;
        stage.sql("UPDATE t SET id = 2").await;
    }
}

/// Postgres 18 itself would refuse the application's updates if such a table were published.
#[tokio::test]
async fn whole_old_rows_with_generated_columns_are_refused_on_18() {
    for kind in ["STORED", "VIRTUAL"] {
        let schema = format!(
            "CREATE TABLE t (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id + 1) {kind});
             ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a')"
        );
        let stage = stage(18, &schema).await;
        stage
            .ends(
                stage.start(),
                4,
                &["E1107", "generated columns (g)", "REPLICA IDENTITY DEFAULT"],
            )
            .await;
        stage.sql("UPDATE t SET v = 'still possible'").await;
        stage.sql("ALTER TABLE t REPLICA IDENTITY DEFAULT").await;
        stage.once().await;
        stage
            .sql("UPDATE t SET v = 'replicated'; INSERT INTO t VALUES (2, 'b')")
            .await;
        stage.once().await;
    }
}
