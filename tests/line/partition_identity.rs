//! Postgres writes to partitions under their own replica identities: one that does not log its table's key parks that
//! table alone, keeps the application from nothing, and is told by its name.

use std::time::Duration;

use millrace_lab::Pipeline;

use crate::lost_identity::{others_go_on, parked, taken};
use crate::stage::{PATIENCE, Setting, Stage};

const T: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); ";
/// Keyed by a primary key, which every partition has too.
const BY_PRIMARY: &str = "CREATE TABLE u (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE u_low PARTITION OF u FOR VALUES FROM (0) TO (300);
    CREATE TABLE u_high PARTITION OF u FOR VALUES FROM (300) TO (1000) PARTITION BY HASH (id);
    CREATE TABLE u_high_0 PARTITION OF u_high FOR VALUES WITH (MODULUS 1, REMAINDER 0);
    INSERT INTO u SELECT i, 'old' FROM generate_series(1, 500) i";
/// Keyed by a unique index, and each relation has an identity of its own.
const BY_UNIQUE: &str =
    "CREATE TABLE u (id int NOT NULL UNIQUE, v text, big text) PARTITION BY RANGE (id);
    ALTER TABLE u REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL;
    CREATE TABLE u_low PARTITION OF u FOR VALUES FROM (0) TO (300);
    INSERT INTO u SELECT i, 'old', repeat(md5(i::text), 300) FROM generate_series(1, 100) i";
const MISSED: &str = "UPDATE u SET v = 'missed' WHERE id <= 400; DELETE FROM u WHERE id > 450; \
    INSERT INTO u SELECT i, 'missed' FROM generate_series(501, 600) i";
const MEMBER: &str = "SELECT count(*)::text FROM pg_publication_tables WHERE tablename = 'u'";

async fn stage(schema: &str, u: &str) -> Stage {
    Stage::set(Setting {
        schema: &format!("{T}{schema}"),
        tables: &[("public.t", ""), ("public.u", u)],
        ..Setting::default()
    })
    .await
}

/// Waits until the replica has the rows of `u`, which has no primary key to compare by.
async fn same(stage: &Stage, pipeline: &Pipeline) {
    let rows = "SELECT count(*) || ' ' || md5(string_agg(concat_ws(' ', id, v, big), ',' ORDER BY id)) FROM u";
    let expected = stage.source_text(rows).await;
    stage.target_shows(pipeline, rows, &expected).await;
}

#[tokio::test]
async fn a_partition_without_identity_parks_its_table_and_the_application_goes_on() {
    let stage = stage(BY_PRIMARY, "").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // One more that is like the others is nothing new.
    stage
        .sql("CREATE TABLE u_more PARTITION OF u FOR VALUES FROM (1000) TO (1100); INSERT INTO u VALUES (1001, 'new')")
        .await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    stage.equal(&pipeline).await;
    let logs = pipeline.logs();
    assert!(!logs.contains("was changed at the source"), "{logs}");

    stage
        .sql("ALTER TABLE u_high_0 REPLICA IDENTITY NOTHING")
        .await;
    let refused = stage.source.batch_execute(MISSED).await;
    refused.expect_err("it is published");
    taken(&stage, &pipeline, MISSED).await;
    let mend = "ALTER TABLE \"public\".\"u_high_0\" REPLICA IDENTITY DEFAULT";
    parked(&mut pipeline, "E1107", mend).await;
    others_go_on(&stage, &pipeline, 1).await;
    pipeline.kill9();
    let mut pipeline = stage.start();
    parked(&mut pipeline, "E1107", mend).await;
    stage.sql("UPDATE u SET v = 'and on' WHERE id = 310").await;
    stage.sql(mend).await;
    stage.equal(&pipeline).await;
    assert_eq!(stage.source_text(MEMBER).await, "1");

    // Its index goes.
    stage
        .sql("CREATE UNIQUE INDEX own ON u_low (id); ALTER TABLE u_low REPLICA IDENTITY USING INDEX own")
        .await;
    stage
        .sql("UPDATE u SET id = 0 WHERE id = 205; DELETE FROM u WHERE id IN (1, 2)")
        .await;
    stage.equal(&pipeline).await;
    stage.sql("DROP INDEX own").await;
    taken(&stage, &pipeline, "DELETE FROM u WHERE id < 10").await;
    let mend = "ALTER TABLE \"public\".\"u_low\" REPLICA IDENTITY DEFAULT, or FULL";
    parked(&mut pipeline, "E1107", mend).await;
    stage.sql("ALTER TABLE u_low REPLICA IDENTITY FULL").await;
    stage.equal(&pipeline).await;
    stage
        .sql("UPDATE u SET id = 1 WHERE id = 206; UPDATE u SET v = 'full'; DELETE FROM u WHERE id > 580")
        .await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_partition_that_comes_with_another_identity_or_without_wal_parks_its_table() {
    let stage = stage(BY_PRIMARY, "").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // Postgres takes its changes, which do not have the key of old rows.
    stage
        .sql(
            "CREATE TABLE u_own (v text NOT NULL UNIQUE, id int NOT NULL);
             INSERT INTO u_own SELECT i::text, i FROM generate_series(1000, 1010) i;
             ALTER TABLE u_own REPLICA IDENTITY USING INDEX u_own_v_key;
             ALTER TABLE u ATTACH PARTITION u_own FOR VALUES FROM (1000) TO (1100)",
        )
        .await;
    let mend = "ALTER TABLE \"public\".\"u_own\" REPLICA IDENTITY DEFAULT";
    parked(&mut pipeline, "E1107", mend).await;
    stage
        .sql("UPDATE u SET id = 1050 WHERE id = 1000; DELETE FROM u WHERE id = 1001")
        .await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql(mend).await;
    stage.equal(&pipeline).await;

    stage
        .sql("CREATE UNLOGGED TABLE u_fast PARTITION OF u FOR VALUES FROM (2000) TO (3000); INSERT INTO u VALUES (2001, 'untold')")
        .await;
    let mend = "ALTER TABLE \"public\".\"u_fast\" SET LOGGED";
    parked(&mut pipeline, "E1114", mend).await;
    stage
        .sql("UPDATE u SET v = 'untold' WHERE id IN (5, 2001)")
        .await;
    others_go_on(&stage, &pipeline, 2).await;
    stage.sql(mend).await;
    stage.equal(&pipeline).await;
    stage.sql("UPDATE u SET id = 2002 WHERE id = 2001").await;
    stage.equal(&pipeline).await;

    // It may also go again.
    stage
        .sql("ALTER TABLE u_own REPLICA IDENTITY NOTHING")
        .await;
    parked(&mut pipeline, "E1107", "\"u_own\" REPLICA IDENTITY DEFAULT").await;
    stage.sql("ALTER TABLE u DETACH PARTITION u_own").await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_partition_without_a_primary_key_is_told_before_it_is_published() {
    let stage = stage(BY_UNIQUE, "key = [\"id\"]").await;
    let mend = "ALTER TABLE \"public\".\"u_low\" REPLICA IDENTITY USING INDEX \"u_low_id_key\"";
    let said = ["E1107", "partition public.u_low", mend];
    stage.ends(stage.start(), 4, &said).await;
    stage.sql("UPDATE u SET v = 'on' WHERE id = 1").await;
    stage.sql(mend).await;
    let mut pipeline = stage.start();
    same(&stage, &pipeline).await;
    // The table says that all of an old row is logged, and the partition logs less.
    stage
        .sql("UPDATE u SET id = 200 WHERE id = 1; UPDATE u SET v = 'on' WHERE id < 50; DELETE FROM u WHERE id = 60")
        .await;
    same(&stage, &pipeline).await;

    stage
        .sql("CREATE TABLE u_next PARTITION OF u FOR VALUES FROM (300) TO (400); INSERT INTO u VALUES (301, 'new')")
        .await;
    taken(
        &stage,
        &pipeline,
        "UPDATE u SET v = 'missed' WHERE id = 301",
    )
    .await;
    let mend = "ALTER TABLE \"public\".\"u_next\" REPLICA IDENTITY USING INDEX \"u_next_id_key\"";
    parked(&mut pipeline, "E1107", mend).await;
    others_go_on(&stage, &pipeline, 1).await;
    stage.sql("ALTER TABLE u_next REPLICA IDENTITY FULL").await;
    same(&stage, &pipeline).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");
}
