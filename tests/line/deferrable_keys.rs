//! A key that is unique only at a transaction's end is refused before its table is published.

use std::fs;

use crate::stage::{Setting, Stage};

const PUBLISHED: &str =
    "SELECT coalesce(string_agg(tablename, ' ' ORDER BY tablename), '') FROM pg_publication_tables";

const ROWS: &str = "SELECT string_agg(concat_ws(':', id, code), ' ' ORDER BY code) FROM t";

#[tokio::test]
async fn a_deferrable_primary_key_is_refused_and_the_application_goes_on() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE other (id int PRIMARY KEY, v text);
             CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v text)",
        tables: &[("public.other", "")],
        ..Setting::default()
    })
    .await;
    stage.run_once().await;
    assert_eq!(stage.source_text(PUBLISHED).await, "other");

    fs::write(stage.folder.path().join("tables/public.t.toml"), "").expect("written");
    let statement =
        "ALTER TABLE \"public\".\"t\" DROP CONSTRAINT \"t_pkey\", ADD PRIMARY KEY (\"id\")";
    let run = stage.start();
    stage
        .ends(run, 4, &["E1115", "public.t", "DEFERRABLE", statement])
        .await;
    assert_eq!(stage.source_text(PUBLISHED).await, "other");
    stage
        .sql("INSERT INTO t VALUES (1, 'one'), (2, 'two'), (3, 'three')")
        .await;
    stage
        .sql("UPDATE t SET id = 3 - id WHERE id < 3; DELETE FROM t WHERE id = 3")
        .await;

    stage.sql(statement).await;
    stage.run_once().await;
    assert_eq!(stage.source_text(PUBLISHED).await, "other t");
    let rows = "SELECT string_agg(id || v, ' ' ORDER BY id) FROM t";
    assert_eq!(stage.target_text(rows).await, "1two 2one");
}

/// Postgres publishes such a table, and logs whole old rows. The changes of rows that swap their keys are
/// still in an order in which two rows have one key.
#[tokio::test]
async fn whole_old_rows_make_no_key_of_a_deferrable_one() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v text);
             ALTER TABLE t REPLICA IDENTITY FULL;
             CREATE TABLE named (id int PRIMARY KEY, code int NOT NULL,
                 CONSTRAINT own UNIQUE (code) DEFERRABLE INITIALLY DEFERRED);
             ALTER TABLE named REPLICA IDENTITY FULL",
        tables: &[("public.t", ""), ("public.named", "key = [\"code\"]")],
        ..Setting::default()
    })
    .await;
    let statements = [
        "ALTER TABLE \"public\".\"t\" DROP CONSTRAINT \"t_pkey\", ADD PRIMARY KEY (\"id\")",
        "ALTER TABLE \"public\".\"named\" DROP CONSTRAINT \"own\", ADD UNIQUE (\"code\")",
    ];
    let run = stage.start();
    let said = ["E1115", "DEFERRABLE", statements[0], statements[1]];
    stage.ends(run, 4, &said).await;
    assert_eq!(stage.source_text(PUBLISHED).await, "");

    for statement in statements {
        stage.sql(statement).await;
    }
    stage.run_once().await;
    assert_eq!(stage.source_text(PUBLISHED).await, "named t");
}

#[tokio::test]
async fn a_table_with_a_deferrable_primary_key_may_be_known_by_another_one() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, code text NOT NULL);
             CREATE UNIQUE INDEX by_code ON t (code);
             INSERT INTO t VALUES (1, 'a'), (2, 'b')",
        tables: &[("public.t", "key = [\"code\"]")],
        ..Setting::default()
    })
    .await;
    let statement = "ALTER TABLE \"public\".\"t\" REPLICA IDENTITY USING INDEX \"by_code\"";
    let run = stage.start();
    stage
        .ends(run, 4, &["E1107", "public.t", "DEFERRABLE", statement])
        .await;
    assert_eq!(stage.source_text(PUBLISHED).await, "");
    stage.sql("UPDATE t SET id = 3 - id").await;

    stage.sql(statement).await;
    let pipeline = stage.start();
    stage.target_shows(&pipeline, ROWS, "2:a 1:b").await;
    stage.sql("UPDATE t SET id = 3 - id").await;
    stage.target_shows(&pipeline, ROWS, "1:a 2:b").await;
}
