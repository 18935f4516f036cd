//! Changes whose key is not the one that the table has now, met again in old WAL: they stop nothing, and the replica
//! ends equal.

use crate::stage::{PATIENCE, Setting, Stage};

/// One table for each way in which its key can become another while nobody looks.
const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE renamed (id int PRIMARY KEY, v text);
    ALTER TABLE renamed REPLICA IDENTITY FULL;
    CREATE TABLE another (id int PRIMARY KEY, v text);
    ALTER TABLE another REPLICA IDENTITY FULL;
    CREATE TABLE indexed (id int NOT NULL, code int NOT NULL, v text, PRIMARY KEY (id));
    CREATE UNIQUE INDEX by_code ON indexed (code);
    CREATE TABLE keyless (id int PRIMARY KEY, v text)";
const TABLES: [(&str, &str); 5] = [
    ("public.t", ""),
    ("public.renamed", ""),
    ("public.another", ""),
    ("public.indexed", ""),
    ("public.keyless", ""),
];

const FILLED: &str = "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 20) i;
    INSERT INTO renamed SELECT i, 'v' FROM generate_series(1, 20) i;
    INSERT INTO another SELECT i, 'v' FROM generate_series(1, 20) i;
    INSERT INTO indexed SELECT i, i, 'v' FROM generate_series(1, 20) i;
    INSERT INTO keyless SELECT i, 'v' FROM generate_series(1, 20) i";

#[tokio::test]
async fn a_key_that_became_another_while_nobody_looked_stops_nothing() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &TABLES,
        ..Setting::default()
    })
    .await;
    stage.sql(FILLED).await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    pipeline.kill9();

    stage
        .sql(
            "UPDATE renamed SET v = 'old name' WHERE id = 1; DELETE FROM renamed WHERE id = 2;
             ALTER TABLE renamed RENAME COLUMN id TO pk;
             UPDATE renamed SET v = 'new name' WHERE pk = 3; DELETE FROM renamed WHERE pk = 4",
        )
        .await;
    stage
        .sql(
            "UPDATE another SET v = 'old key' WHERE id = 1; DELETE FROM another WHERE id = 2;
             ALTER TABLE another ADD COLUMN pk int; UPDATE another SET pk = id + 100;
             ALTER TABLE another DROP CONSTRAINT another_pkey, ADD PRIMARY KEY (pk);
             UPDATE another SET v = 'new key' WHERE pk = 103; DELETE FROM another WHERE pk = 104",
        )
        .await;
    stage
        .sql(
            "ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_code;
             UPDATE indexed SET v = 'by code' WHERE id = 1; DELETE FROM indexed WHERE id = 2;
             ALTER TABLE indexed REPLICA IDENTITY DEFAULT;
             UPDATE indexed SET v = 'by key' WHERE id = 3; DELETE FROM indexed WHERE id = 4",
        )
        .await;
    stage
        .sql(
            "ALTER TABLE keyless DROP CONSTRAINT keyless_pkey; INSERT INTO keyless VALUES (21, 'no key');
             TRUNCATE keyless; INSERT INTO keyless VALUES (22, 'no key');
             ALTER TABLE keyless ADD PRIMARY KEY (id); UPDATE keyless SET v = 'a key' WHERE id = 22",
        )
        .await;
    stage.sql("UPDATE t SET v = 'on' WHERE id = 7").await;
    let mut pipeline = stage.start();
    let others = "SELECT v FROM t WHERE id = 7";
    stage.target_shows(&pipeline, others, "on").await;
    // The key of this one is another column: an operator has to say how its target gets it.
    pipeline
        .wait_for_log("E1316", PATIENCE)
        .await
        .expect("told");
    stage
        .target_sql("TRUNCATE another; ALTER TABLE another DROP CONSTRAINT another_pkey, ADD PRIMARY KEY (pk)")
        .await;
    stage.equal(&pipeline).await;
    for told in ["indexed", "keyless"] {
        let told = format!("\"table\":\"public.{told}\"");
        let logs = pipeline.logs();
        let mut lines = logs
            .lines()
            .filter(|line| line.contains("they are left out"));
        assert!(lines.any(|line| line.contains(&told)), "{told}\n{logs}");
    }
    // A kill before the backfill was ordered forgets nothing, and nothing is read again without a cause.
    pipeline.kill9();
    let pipeline = stage.start();
    stage
        .sql("UPDATE indexed SET v = 'later' WHERE id = 5; DELETE FROM keyless")
        .await;
    stage.equal(&pipeline).await;
}
