//! A running process takes over what has changed in its configuration.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use millrace_lab::{Compared, ConfigDir, Pipeline, compare};
use tokio_postgres::Client;

use crate::stage::{PATIENCE, Setting, Stage};

/// Two tables at the source, of which only `t` is configured. `u` has rows.
async fn stage() -> Stage {
    Stage::set(Setting {
        schema: "CREATE TABLE t (id bigserial PRIMARY KEY, v text); CREATE TABLE u (id bigserial PRIMARY KEY, v text); \
                 INSERT INTO t (v) SELECT 'old' FROM generate_series(1, 50) i; \
                 INSERT INTO u (v) SELECT 'old' FROM generate_series(1, 500) i",
        tables: &[("public.t", "")],
        ..Setting::default()
    })
    .await
}

/// The stage's configuration with these tables.
fn config(stage: &Stage, tables: &[&str]) -> ConfigDir {
    let dir = ConfigDir::new("shop", &stage.postgres.url("source"), &stage.nats.url())
        .source("heartbeat_interval = \"500ms\"")
        .stream("confirm = \"acked\"")
        .sink("replica", &stage.target_url());
    tables.iter().fold(dir, |dir, table| dir.table(table, ""))
}

fn both() -> [Compared; 2] {
    ["public.t", "public.u"].map(Compared::same)
}

/// Rewrites the folder and has the process read it; returns once it works by it.
async fn reload(stage: &Stage, pipeline: &mut Pipeline, config: &ConfigDir, says: &str) {
    config.write_to(stage.folder.path()).expect("written");
    pipeline.hang_up().expect("signal");
    let line = pipeline
        .wait_for_log("configuration reloaded", PATIENCE)
        .await;
    line.expect("reloaded");
    let line = pipeline.wait_for_log(says, PATIENCE).await.expect("told");
    assert!(line.contains("configuration reloaded"), "{line}");
}

/// Changes both tables until the time is over, all but row 500 of `u`.
async fn traffic(client: Client, lasts: Duration) {
    let until = Instant::now() + lasts;
    while Instant::now() < until {
        let sql = "BEGIN; INSERT INTO t (v) VALUES ('live'); INSERT INTO u (v) VALUES ('live'); COMMIT; \
                   UPDATE u SET v = v || '.' WHERE id = 1 + (random() * 498)::int; \
                   DELETE FROM u WHERE id = 1 + (random() * 498)::int";
        client.batch_execute(sql).await.expect("changed");
    }
}

#[tokio::test]
async fn a_table_that_is_added_under_traffic_becomes_equal() {
    let stage = stage().await;
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // It writes to a table that is not published yet, and commits when it is.
    let open = stage.postgres.connect("source").await.expect("connects");
    let sql = "BEGIN; INSERT INTO u (v) VALUES ('open'); UPDATE u SET v = 'open' WHERE id = 500";
    open.batch_execute(sql).await.expect("written");
    let client = stage.postgres.connect("source").await.expect("connects");
    let busy = tokio::spawn(traffic(client, Duration::from_secs(6)));
    let config = config(&stage, &["public.t", "public.u"]);
    reload(&stage, &mut pipeline, &config, "table public.u added").await;
    let member = "SELECT count(*)::text FROM pg_publication_tables WHERE tablename = 'u'";
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(member).await != "1" {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
    }
    stage.sql("INSERT INTO u (v) VALUES ('published')").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    open.batch_execute("COMMIT").await.expect("committed");
    busy.await.expect("changed");
    stage.equal_as(&pipeline, &both()).await;
    assert_eq!(
        stage
            .target_text("SELECT count(*)::text FROM u WHERE v LIKE 'open%'")
            .await,
        "2"
    );
    // One that comes later does too.
    stage.sql("INSERT INTO u (v) VALUES ('later')").await;
    stage.equal_as(&pipeline, &both()).await;
}

#[tokio::test]
async fn with_a_mistake_the_old_configuration_goes_on() {
    let stage = stage().await;
    let free = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = free.local_addr().expect("bound").to_string();
    drop(free);
    let good = config(&stage, &["public.t"]).listen(&address);
    good.write_to(stage.folder.path()).expect("written");
    stage
        .ends(stage.start_with(&["reload"]), 4, &["no process answers"])
        .await;

    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let bad = good
        .clone()
        .section("[defaults]\non_delte = \"ignore\"\nkey = 7");
    bad.write_to(stage.folder.path()).expect("written");
    pipeline.hang_up().expect("signal");
    for place in ["on_delte", "millrace.toml:", "key"] {
        pipeline.wait_for_log(place, PATIENCE).await.expect("told");
    }
    let kept = pipeline
        .wait_for_log("going on with the old one", PATIENCE)
        .await;
    kept.expect("told");
    stage
        .ends(stage.start_with(&["reload"]), 78, &["on_delte", "\"key\""])
        .await;
    stage.sql("INSERT INTO t (v) VALUES ('on')").await;
    stage.equal(&pipeline).await;

    // Corrected: what is asked for is answered, by the verb too.
    good.write_to(stage.folder.path()).expect("written");
    stage
        .ends(stage.start_with(&["reload"]), 0, &["nothing has changed"])
        .await;
    good.clone()
        .table("public.u", "")
        .write_to(stage.folder.path())
        .expect("written");
    stage
        .ends(stage.start_with(&["reload"]), 0, &["table public.u added"])
        .await;
    stage.equal_as(&pipeline, &both()).await;
    // Another pipeline's name is refused as a whole.
    let text = good.text().replace("name = \"shop\"", "name = \"store\"");
    std::fs::write(stage.folder.path().join("millrace.toml"), text).expect("written");
    stage
        .ends(
            stage.start_with(&["reload"]),
            4,
            &["source.name was changed", "nothing was reloaded"],
        )
        .await;
    pipeline.hang_up().expect("signal");
    let refused = "source.name was changed from \\\"shop";
    pipeline
        .wait_for_log(refused, PATIENCE)
        .await
        .expect("told");
    stage.sql("INSERT INTO u (v) VALUES ('on')").await;
    stage.equal_as(&pipeline, &both()).await;
}

#[tokio::test]
async fn a_table_that_was_removed_and_returns_is_exact_again() {
    let stage = stage().await;
    let with = config(&stage, &["public.t", "public.u"]);
    let without = config(&stage, &["public.t"]);
    with.write_to(stage.folder.path()).expect("written");
    let mut pipeline = stage.start();
    stage.equal_as(&pipeline, &both()).await;

    reload(&stage, &mut pipeline, &without, "table public.u removed").await;
    let member = "SELECT count(*)::text FROM pg_publication_tables WHERE tablename = 'u'";
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(member).await != "0" {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
    }
    let missed = "UPDATE u SET v = 'missed' WHERE id <= 300; DELETE FROM u WHERE id > 400; \
                  INSERT INTO u (v) SELECT 'missed' FROM generate_series(1, 100) i";
    stage.sql(missed).await;
    stage.sql("INSERT INTO t (v) VALUES ('others go on')").await;
    stage.equal(&pipeline).await;
    assert_eq!(
        stage
            .target_text("SELECT count(*)::text FROM u WHERE v = 'old'")
            .await,
        "500"
    );
    let (_, status) = pipeline.get("/status").await.expect("answers");
    assert!(!status.contains("public.u"), "{status}");

    reload(&stage, &mut pipeline, &with, "table public.u added").await;
    stage.sql("UPDATE u SET v = 'live' WHERE id = 350").await;
    assert_eq!(stage.equal_as(&pipeline, &both()).await.rows, 551);
    for code in ["E1", "E2", "E3", "E4"] {
        let found = pipeline
            .logs()
            .lines()
            .any(|line| line.contains(&format!("\"code\":\"{code}")));
        assert!(!found, "{}", pipeline.logs());
    }
}

#[tokio::test]
async fn a_sink_that_did_not_run_meanwhile_reads_a_table_that_returns_again() {
    let stage = stage().await;
    let with = config(&stage, &["public.t", "public.u"]);
    with.write_to(stage.folder.path()).expect("written");
    let mut pipeline = stage.start();
    stage.equal_as(&pipeline, &both()).await;
    pipeline.terminate().expect("signal");
    pipeline.wait(PATIENCE).await.expect("ends");

    let without = config(&stage, &["public.t"]);
    without.write_to(stage.folder.path()).expect("written");
    let capture = ["run", "--once", "--only", "capture"];
    stage.ends(stage.start_with(&capture), 0, &[]).await;
    stage
        .sql("UPDATE u SET v = 'missed' WHERE id <= 300; DELETE FROM u WHERE id > 400")
        .await;
    with.write_to(stage.folder.path()).expect("written");
    let pipeline = stage.start();
    assert_eq!(stage.equal_as(&pipeline, &both()).await.rows, 450);
}

#[tokio::test]
async fn a_sink_that_is_added_is_loaded_alone() {
    let stage = stage().await;
    stage
        .postgres
        .create_database("second")
        .await
        .expect("database");
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // Its rows are there before it has said so.
    let joined = "\"from\":\"snapshotting\",\"to\":\"streaming\"";
    let said = pipeline.wait_for_log(joined, PATIENCE).await;
    said.expect("told");
    let client = stage.postgres.connect("source").await.expect("connects");
    let busy = tokio::spawn(traffic(client, Duration::from_secs(5)));
    let url = stage.postgres.url("second");
    let config = config(&stage, &["public.t"]).sink("second", &url);
    let before = pipeline.logs().len();
    reload(&stage, &mut pipeline, &config, "sink second added").await;
    let mut positions = Vec::new();
    while !busy.is_finished() {
        let at = "SELECT position::text FROM millrace.position";
        positions.push(stage.target_text(at).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    busy.await.expect("changed");
    positions.dedup();
    assert!(
        positions.len() > 5,
        "the first replica stood still: {positions:?}"
    );
    stage.equal(&pipeline).await;
    let deadline = Instant::now() + PATIENCE;
    let (source, table) = (stage.postgres.url("source"), [Compared::same("public.t")]);
    loop {
        match compare(&source, &url, &table).await {
            Ok(compared) if compared.is_equal() => break,
            compared => assert!(
                Instant::now() < deadline,
                "{compared:?}\n{}",
                pipeline.logs()
            ),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The first one neither began anew nor asked for anything.
    let logs = pipeline.logs();
    let mut since = logs[before..].lines();
    assert!(
        !since.any(|line| line.contains("\"sink\":\"replica\"")),
        "{logs}"
    );
}
