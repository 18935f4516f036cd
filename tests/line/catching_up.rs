//! A parked table that missed a large transaction catches up in parts, and nothing is torn at their limits.

use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text, big text);
    ALTER TABLE t ALTER COLUMN big SET STORAGE EXTERNAL;
    CREATE TABLE u (id int PRIMARY KEY, v text)";

#[tokio::test]
async fn a_parked_table_catches_up_with_deletes_and_moves_in_small_parts() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.t", ""), ("public.u", "")],
        sink: "batch = { max_rows = 7 }",
        ..Setting::default()
    })
    .await;
    stage
        .sql(
            "INSERT INTO t SELECT i, 'v', repeat(md5(i::text), 200) FROM generate_series(1, 600) i",
        )
        .await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;

    stage
        .target_sql("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await;
    stage
        .sql(
            "BEGIN; DELETE FROM t WHERE id <= 300;
             UPDATE t SET id = id + 10000 WHERE id <= 500;
             DELETE FROM t WHERE id BETWEEN 501 AND 550; COMMIT;
             UPDATE t SET id = id + 10000 WHERE id <= 600;
             INSERT INTO u VALUES (1, 'a')",
        )
        .await;
    stage
        .target_shows(&pipeline, "SELECT v FROM u WHERE id = 1", "a")
        .await;
    stage.target_sql("ALTER TABLE t ADD PRIMARY KEY (id)").await;
    // What the target lost with its column comes with the next full row of each key.
    stage
        .target_shows(&pipeline, "SELECT min(id)::text FROM t", "10301")
        .await;
    stage.sql("UPDATE t SET v = 'again'").await;
    assert_eq!(stage.equal(&pipeline).await.rows, 250 + 1);
}
