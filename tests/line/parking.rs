//! A table that the target refuses waits, the others go on, and it comes back by itself.

use crate::stage::{Setting, Stage};

const TABLES: [(&str, &str); 2] = [("public.t", ""), ("public.u", "")];
const SCHEMA: &str = "CREATE TABLE t (id int PRIMARY KEY, v text);
    CREATE TABLE u (id int PRIMARY KEY, v text)";

#[tokio::test]
async fn a_table_that_lost_its_key_is_parked_and_rejoins() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &TABLES,
        ..Setting::default()
    })
    .await;
    let pipeline = stage.start();
    stage
        .sql("INSERT INTO t VALUES (1, 'a'); INSERT INTO u VALUES (1, 'a')")
        .await;
    stage.equal(&pipeline).await;

    stage
        .target
        .batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await
        .expect("dropped");
    stage
        .sql("INSERT INTO t VALUES (2, 'b'); DELETE FROM t WHERE id = 1")
        .await;
    stage.sql("INSERT INTO u VALUES (2, 'b')").await;
    stage
        .target_shows(&pipeline, "SELECT v FROM u WHERE id = 2", "b")
        .await;
    // A second change shows that the sink streams on with the table parked.
    stage
        .sql("INSERT INTO t VALUES (3, 'c'); INSERT INTO u VALUES (3, 'c')")
        .await;
    stage
        .target_shows(&pipeline, "SELECT v FROM u WHERE id = 3", "c")
        .await;
    assert!(
        pipeline.logs().contains("ALTER TABLE"),
        "{}",
        pipeline.logs()
    );

    stage
        .target
        .batch_execute("ALTER TABLE t ADD PRIMARY KEY (id)")
        .await
        .expect("added");
    stage
        .target_shows(&pipeline, "SELECT v FROM t WHERE id = 3", "c")
        .await;
    stage.sql("UPDATE t SET v = 'again' WHERE id = 3").await;
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_parked_table_survives_a_restart_and_once_says_so() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &TABLES,
        ..Setting::default()
    })
    .await;
    let mut pipeline = stage.start();
    stage
        .sql("INSERT INTO t VALUES (1, 'a'); INSERT INTO u VALUES (1, 'a')")
        .await;
    stage.equal(&pipeline).await;
    stage
        .target
        .batch_execute("ALTER TABLE t DROP CONSTRAINT t_pkey")
        .await
        .expect("dropped");
    stage
        .sql("INSERT INTO t VALUES (2, 'b'); INSERT INTO u VALUES (2, 'b')")
        .await;
    stage
        .target_shows(&pipeline, "SELECT v FROM u WHERE id = 2", "b")
        .await;
    pipeline.kill9();

    stage.sql("INSERT INTO t VALUES (3, 'c')").await;
    let mut once = stage.start_with(&["run", "--once"]);
    let code = once.wait(crate::stage::PATIENCE).await.expect("ends");
    assert_eq!(code, 3, "{}", once.logs());

    stage
        .target
        .batch_execute("ALTER TABLE t ADD PRIMARY KEY (id)")
        .await
        .expect("added");
    let mut once = stage.start_with(&["run", "--once"]);
    let code = once.wait(crate::stage::PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", once.logs());
    let comparison = stage.compared().await.expect("compared");
    assert_eq!(
        (comparison.missing, comparison.extra),
        (0, 0),
        "{comparison:?}"
    );
}
