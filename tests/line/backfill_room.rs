//! Backfills of tables that each fit into the WAL that the source may keep, and together do not.

use millrace_lab::PostgresOptions;

use crate::stage::{Setting, Stage};

const SCHEMA: &str = "CREATE TABLE a (id int PRIMARY KEY, v text);
    ALTER TABLE a ALTER COLUMN v SET STORAGE EXTERNAL;
    INSERT INTO a SELECT i, repeat('x', 1000000) FROM generate_series(1, 30) i;
    CREATE TABLE b (LIKE a INCLUDING ALL); INSERT INTO b TABLE a;
    CREATE TABLE c (LIKE a INCLUDING ALL); INSERT INTO c TABLE a";

#[tokio::test]
async fn tables_that_are_ordered_together_are_counted_together() {
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: &[("public.a", ""), ("public.b", ""), ("public.c", "")],
        postgres: PostgresOptions {
            settings: vec![("max_slot_wal_keep_size".to_owned(), "48MB".to_owned())],
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await;
    stage.once().await;
    let one = stage.start_with(&["backfill", "start", "a"]);
    let logs = stage.ends(one, 0, &["is queued"]).await;
    assert!(!logs.contains("E1141"), "{logs}");
    let none = stage.start_with(&["backfill", "cancel", "a"]);
    stage.ends(none, 0, &["cancelled"]).await;

    let all = stage.start_with(&["backfill", "start", "--all"]);
    let said = ["warning: E1141", "3 tables have", "48MB", "is queued"];
    let logs = stage.ends(all, 0, &said).await;
    assert_eq!(logs.matches("E1141").count(), 1, "{logs}");
}
