//! TRUNCATE empties the replica at its place among the other changes, unless the table says otherwise.

use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text);
    CREATE TABLE child (id int PRIMARY KEY, t int REFERENCES t)";

async fn stage() -> Stage {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", ""), ("public.child", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t SELECT i, 'row' FROM generate_series(1, 50) i;
             INSERT INTO u SELECT i, 'row' FROM generate_series(1, 50) i;
             INSERT INTO child SELECT i, i FROM generate_series(1, 50) i",
        )
        .await;
    stage
}

const CHANGES: &[&str] = &[
    "UPDATE u SET v = 'before' WHERE id = 1; TRUNCATE u; INSERT INTO u VALUES (1, 'after')",
    "TRUNCATE u",
    "BEGIN; INSERT INTO u VALUES (2, 'gone'); TRUNCATE u; INSERT INTO u VALUES (2, 'kept'), (3, 'c');
     UPDATE u SET v = 'changed' WHERE id = 3; COMMIT",
    "BEGIN; TRUNCATE u; INSERT INTO u VALUES (4, 'gone'); TRUNCATE u; INSERT INTO u VALUES (5, 'e');
     DELETE FROM u WHERE id = 5; INSERT INTO u VALUES (5, 'again'); COMMIT",
    "TRUNCATE t, u CASCADE",
    "BEGIN; INSERT INTO t VALUES (1, 'gone'); INSERT INTO u VALUES (1, 'gone'); TRUNCATE u, t, child;
     INSERT INTO t VALUES (1, 'a'), (2, 'b'); INSERT INTO child VALUES (1, 2); COMMIT",
    "TRUNCATE child; DELETE FROM t WHERE id = 1; INSERT INTO u VALUES (9, 'i')",
    "BEGIN; TRUNCATE u RESTART IDENTITY; UPDATE t SET id = 3 WHERE id = 2; COMMIT",
];

#[tokio::test]
async fn truncates_between_other_changes_take_their_place() {
    let stage = stage().await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 150);
    for sql in CHANGES {
        stage.sql(sql).await;
        stage.equal(&pipeline).await;
    }
}

#[tokio::test]
async fn truncates_that_wait_in_the_stream_take_their_place() {
    let stage = stage().await;
    assert_eq!(stage.once().await.rows, 150);
    for sql in CHANGES {
        stage.sql(sql).await;
    }
    stage.once().await;
    stage.once().await;
}

const PARTITIONED: &str = "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE t_0 PARTITION OF t FOR VALUES FROM (0) TO (100);
    CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (100) TO (300) PARTITION BY RANGE (id);
    CREATE TABLE t_10 PARTITION OF t_1 FOR VALUES FROM (100) TO (200);
    CREATE TABLE t_11 PARTITION OF t_1 FOR VALUES FROM (200) TO (300);
    INSERT INTO t SELECT i, 'row' FROM generate_series(1, 299) i";

/// Postgres tells nobody of it who is told of the whole table.
#[tokio::test]
async fn a_truncate_of_a_partition_is_found() {
    let stage = Stage::set(Setting {
        schema: PARTITIONED,
        tables: &[("public.t", "")],
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 299);
    stage
        .sql("TRUNCATE t_0; INSERT INTO t VALUES (1, 'after'), (2, 'it'); UPDATE t SET v = 'u' WHERE id = 150")
        .await;
    assert_eq!(stage.equal(&pipeline).await.rows, 202);
    stage.sql("TRUNCATE t_1").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
    // One that nobody has looked at before it is empty again.
    stage.sql("INSERT INTO t VALUES (200, 'x')").await;
    stage.equal(&pipeline).await;
    stage
        .sql("CREATE TABLE t_3 PARTITION OF t FOR VALUES FROM (300) TO (400); INSERT INTO t VALUES (300, 'gone')")
        .await;
    stage.sql("TRUNCATE t_3").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 3);
    pipeline.kill9();
    stage
        .sql("TRUNCATE t_11; INSERT INTO t VALUES (300, 'kept')")
        .await;
    let pipeline = stage.start();
    assert_eq!(stage.equal(&pipeline).await.rows, 3);
}

#[tokio::test]
async fn a_table_may_ignore_truncates_and_deletes() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[
            ("public.t", "on_truncate = \"ignore\""),
            ("public.u", "on_delete = \"ignore\""),
        ],
        ..Setting::default()
    })
    .await;
    stage
        .sql("INSERT INTO t VALUES (1, 'a'), (2, 'b'); INSERT INTO u VALUES (1, 'a'), (2, 'b')")
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage
        .sql("TRUNCATE t, u CASCADE; INSERT INTO t VALUES (2, 'new'), (3, 'c'); INSERT INTO u VALUES (3, 'c')")
        .await;
    stage.sql("DELETE FROM t WHERE id = 3; DELETE FROM u").await;
    stage.sql("INSERT INTO u VALUES (4, 'd')").await;
    let rows = |table: &str| format!("SELECT string_agg(id || v, ' ' ORDER BY id) FROM {table}");
    stage.target_shows(&pipeline, &rows("u"), "3c 4d").await;
    stage.target_shows(&pipeline, &rows("t"), "1a 2new").await;
    // A row comes back after a delete that was ignored.
    stage.sql("INSERT INTO u VALUES (3, 'back')").await;
    stage.target_shows(&pipeline, &rows("u"), "3back 4d").await;
}

/// A key change deletes the old key and writes the new one: neither table may keep both by accident.
#[tokio::test]
async fn a_key_change_where_deletes_are_ignored_keeps_the_old_row() {
    let stage = Stage::set(Setting {
        tables: &[("public.t", "on_delete = \"ignore\"")],
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (1, 'a')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    stage.sql("UPDATE t SET id = 2 WHERE id = 1").await;
    let rows = "SELECT string_agg(id || v, ' ' ORDER BY id) FROM t";
    stage.target_shows(&pipeline, rows, "1a 2a").await;
}
