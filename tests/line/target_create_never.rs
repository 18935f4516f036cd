//! With `create = "never"` at a sink nothing is made in the target: what is missing is answered with the statements.

use std::fs;

use serde_json::Value;

use crate::bad_input::edit;
use crate::stage::{PATIENCE, Setting, Stage};

async fn set() -> Stage {
    Stage::set(Setting {
        sink: "create = \"never\"",
        ..Setting::default()
    })
    .await
}

/// A start is refused for what is missing; returns what it says to run.
async fn remedy(stage: &Stage, what: &str) -> String {
    let run = stage.start();
    let logs = stage.ends(run, 4, &["error: E1304", what]).await;
    let (_, remedy) = logs.split_once("\nremedy: ").expect("a remedy");
    // Behind it is the log, in JSON.
    let lines = remedy.lines().take_while(|line| !line.starts_with("{\""));
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test]
async fn what_the_remedies_say_is_all_that_is_needed() {
    let stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let schema = remedy(&stage, "no schema millrace").await;
    let made = "SELECT count(*)::text FROM pg_namespace WHERE nspname = 'millrace'";
    assert_eq!(stage.target_text(made).await, "0");
    stage.target_sql(&schema).await;

    let table = remedy(&stage, "target table public.t does not exist").await;
    assert!(table.contains("CREATE TABLE"), "{table}");
    let made = "SELECT count(*)::text FROM pg_class WHERE relname = 't'";
    assert_eq!(stage.target_text(made).await, "0");
    stage.target_sql(&table).await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
}

#[tokio::test]
async fn a_table_that_is_configured_later_needs_its_target_too() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (LIKE t INCLUDING ALL)",
        ..Setting::default()
    })
    .await;
    stage.once().await;
    edit(
        &stage.folder,
        "type = \"postgres\"",
        "type = \"postgres\"\ncreate = \"never\"",
    );
    let table = stage.folder.path().join("tables/public.u.toml");
    fs::write(table, "").expect("written");
    stage.sql("INSERT INTO u VALUES (1, 'one')").await;
    let mut pipeline = stage.start();
    let said = pipeline.wait_for_log("E1304", PATIENCE).await;
    let said: Value = serde_json::from_str(&said.expect("the code")).expect("a line of JSON");
    let statement = said["remedy"].as_str().expect("a remedy");
    assert!(statement.contains("CREATE TABLE"), "{statement}");
    // The others go on, and so does this one once it can.
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    stage.target_sql(statement).await;
    let shown = "SELECT v FROM u";
    stage.target_shows(&pipeline, shown, "one").await;
}
