//! A source that is another server, or the same one with another history, halts capture; nothing of it is applied.

use std::fs;
use std::time::Duration;

use millrace_lab::{Postgres, PostgresOptions};

use crate::bad_input::edit;
use crate::stage::{Setting, Stage};

const ROWS: &str = "SELECT string_agg(v, ',' ORDER BY id) FROM t";

/// A stage whose source's URL is in a file, which is read again at each connect.
async fn set() -> Stage {
    let stage = Stage::set(Setting::default()).await;
    let url = stage.postgres.url("source");
    point_to(&stage, &url);
    let secret = stage.folder.path().join("source_url");
    edit(
        &stage.folder,
        &format!("url = \"{url}\""),
        &format!("url = {{ file = \"{}\" }}", secret.display()),
    );
    stage
}

fn point_to(stage: &Stage, url: &str) {
    fs::write(stage.folder.path().join("source_url"), url).expect("written");
}

/// Another cluster with a table of the same name, and everything that a capture leaves at its source.
async fn another() -> Postgres {
    let other = Postgres::start(PostgresOptions {
        own_identity: true,
        ..PostgresOptions::default()
    });
    let other = other.await.expect("postgres starts");
    other.create_database("source").await.expect("database");
    let client = other.connect("source").await.expect("connects");
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text); \
                  CREATE PUBLICATION millrace_shop FOR TABLE t; \
                  INSERT INTO t VALUES (1, 'foreign'), (9, 'foreign')";
    client.batch_execute(schema).await.expect("schema");
    other
}

#[tokio::test]
async fn a_start_at_another_cluster_is_refused_as_such() {
    let stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;

    let other = another().await;
    point_to(&stage, &other.url("source"));
    // Without a slot there, and with one: what the server is comes before what it has.
    let client = other.connect("source").await.expect("connects");
    for slot in [
        "SELECT",
        "SELECT pg_create_logical_replication_slot('millrace_shop', 'pgoutput')",
    ] {
        client.batch_execute(slot).await.expect("slot");
        let run = stage.start();
        let logs = stage
            .ends(
                run,
                4,
                &["error: E1108", "system identifier", "millrace drop"],
            )
            .await;
        assert!(!logs.contains(other.password()));
    }
    assert_eq!(stage.target_text(ROWS).await, "one");

    // Back at the right one everything goes on.
    point_to(&stage, &stage.postgres.url("source"));
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    assert_eq!(stage.target_text(ROWS).await, "one,two");
}

#[tokio::test]
async fn an_address_that_leads_to_another_cluster_while_it_runs_halts() {
    let stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;

    let other = another().await;
    point_to(&stage, &other.url("source"));
    stage
        .sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE datname = 'source' AND application_name LIKE 'millrace%'",
        )
        .await;
    let body = Stage::readyz(&mut pipeline, 503, "halted").await;
    assert!(
        body.contains("E1108") && body.contains("system identifier"),
        "{body}"
    );
    let client = other.connect("source").await.expect("connects");
    client
        .batch_execute("INSERT INTO t VALUES (10, 'foreign')")
        .await
        .expect("inserted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.target_text(ROWS).await, "one");
    assert_eq!(pipeline.get("/livez").await.expect("livez").0, 200);
    Stage::stopped(pipeline).await;
}

/// A stage that has published more than a backup of its source holds, and that backup. The broker's store is
/// remembered as it was at the backup.
async fn ahead_of_a_backup() -> (Stage, Postgres) {
    let mut stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    stage.postgres.stop_fast().await.expect("stopped");
    let backup = stage.postgres.back_up().expect("copied");
    stage.nats.snapshot_store().await.expect("snapshot");
    stage.postgres.start_again().await.expect("postgres");
    stage.reconnect().await;
    let pipeline = stage.start();
    stage
        .sql("INSERT INTO t VALUES (2, 'after the backup')")
        .await;
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    (stage, backup)
}

#[tokio::test]
async fn a_source_that_was_restored_from_a_backup_is_refused() {
    let (stage, mut backup) = ahead_of_a_backup().await;
    backup.start_again().await.expect("the backup starts");
    point_to(&stage, &backup.url("source"));
    let run = stage.start();
    stage.ends(run, 4, &["error: E1109", "millrace drop"]).await;
    assert_eq!(stage.target_text(ROWS).await, "one,after the backup");
}

#[tokio::test]
async fn a_promoted_standby_that_lost_published_commits_is_refused() {
    let (stage, mut backup) = ahead_of_a_backup().await;
    // What it had received when it was promoted is what the backup holds.
    fs::write(backup.data_dir().join("standby.signal"), "").expect("written");
    backup.start_again().await.expect("the standby starts");
    let client = backup.connect("source").await.expect("connects");
    client
        .batch_execute("SELECT pg_promote()")
        .await
        .expect("promoted");
    // It goes on beyond what was published, so its WAL's end alone tells nothing.
    client
        .batch_execute(
            "INSERT INTO t VALUES (3, 'another history'); \
             SELECT pg_switch_wal(); CREATE TABLE filler AS SELECT generate_series(1, 10000); \
             SELECT pg_switch_wal(); CHECKPOINT",
        )
        .await
        .expect("written");
    point_to(&stage, &backup.url("source"));
    let run = stage.start();
    stage
        .ends(run, 4, &["error: E1108", "promoted (timeline 2, was 1)"])
        .await;
    assert_eq!(stage.target_text(ROWS).await, "one,after the backup");
}

/// The stream alone shows nothing of it: the broker lost what a sink has applied.
#[tokio::test]
async fn a_promoted_standby_that_lost_commits_which_a_sink_has_is_refused() {
    let (mut stage, mut backup) = ahead_of_a_backup().await;
    stage.nats.roll_back_store().expect("rolled back");
    stage.nats.start_again().await.expect("broker");
    let mut sink = stage.start_with(&["run", "--only", "sink:replica"]);
    Stage::readyz(&mut sink, 200, "streaming").await;
    Stage::stopped(sink).await;
    fs::write(backup.data_dir().join("standby.signal"), "").expect("written");
    backup.start_again().await.expect("the standby starts");
    let client = backup.connect("source").await.expect("connects");
    for sql in [
        "SELECT pg_promote()",
        "INSERT INTO t VALUES (3, 'another history')",
        "SELECT pg_switch_wal()",
    ] {
        client.batch_execute(sql).await.expect("promoted");
    }
    point_to(&stage, &backup.url("source"));
    stage
        .ends(
            stage.start(),
            4,
            &["error: E1108", "promoted (timeline 2, was 1)"],
        )
        .await;
    assert_eq!(stage.target_text(ROWS).await, "one,after the backup");
}

#[tokio::test]
async fn a_promoted_standby_that_has_all_that_was_published_is_gone_on_with() {
    let mut stage = set().await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let pipeline = stage.start();
    stage.equal(&pipeline).await;
    Stage::stopped(pipeline).await;
    stage.postgres.stop_fast().await.expect("stopped");
    let mut standby = stage.postgres.back_up().expect("copied");
    fs::write(standby.data_dir().join("standby.signal"), "").expect("written");
    standby.start_again().await.expect("the standby starts");
    let client = standby.connect("source").await.expect("connects");
    for sql in [
        "SELECT pg_promote()",
        "INSERT INTO t VALUES (2, 'on the new timeline')",
    ] {
        client.batch_execute(sql).await.expect("promoted");
    }
    stage
        .postgres
        .start_again()
        .await
        .expect("the target's cluster");
    stage.reconnect().await;
    point_to(&stage, &standby.url("source"));
    let pipeline = stage.start();
    let rows = "one,on the new timeline";
    stage.target_shows(&pipeline, ROWS, rows).await;
    Stage::stopped(pipeline).await;
}
