//! What `init-sql` prints is enough: roles, grants and NATS permissions, as printed, for one process and for
//! several.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use millrace_lab::{ConfigDir, ConfigFolder, NatsOptions, Pipeline, Postgres};

use crate::stage::{PATIENCE, Setting, Stage};

/// A password for every user of the broker, in the place of the variable that the configuration refers to.
const BROKER_PASSWORD: &str = "brokerpassword";
const ROLE_PASSWORD: &str = "rolepassword";

const SCHEMA: &str = "CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE SCHEMA \"Sales\"; \
    CREATE TABLE t (id int PRIMARY KEY, v text); \
    CREATE TABLE \"Sales\".\"order items\" (id int PRIMARY KEY, mood mood, big text); \
    INSERT INTO t VALUES (1, 'one'); INSERT INTO \"Sales\".\"order items\" VALUES (1, 'good', 'x')";
const TABLES: &[(&str, &str)] = &[("public.t", ""), ("Sales.order items", "")];

/// What the verb prints for one part.
async fn printed(folder: &ConfigFolder, part: &str) -> String {
    let mut run = Stage::start_in(folder, &["init-sql", part]);
    let code = run.wait(PATIENCE).await.expect("ends");
    assert_eq!(code, 0, "{}", run.logs());
    run.stdout()
}

/// Runs a script as it is printed, by psql, as the superuser.
fn psql(postgres: &Postgres, database: &str, script: &str) {
    use std::io::Write;
    let mut child = Command::new(postgres.bin("psql"))
        .args(["-X", "-v", "ON_ERROR_STOP=1", "-q"])
        .arg(postgres.url(database))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("psql");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(script.as_bytes()).expect("written");
    drop(input);
    let output = child.wait_with_output().expect("ends");
    assert!(
        output.status.success(),
        "{}\n{script}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A configuration as printed from: only its names matter.
fn names() -> ConfigFolder {
    let dir =
        ConfigDir::new("shop", "postgres://h/d", "nats://h").sink("replica", "postgres://h/d");
    let tables = TABLES.iter();
    let dir = tables.fold(dir, |dir, (name, text)| dir.table(name, text));
    dir.write().expect("folder")
}

/// Servers that admit nobody but the printed users, and these made.
async fn set() -> Stage {
    let names = names();
    let permissions = printed(&names, "nats").await;
    assert!(permissions.contains("$MILLRACE_NATS_PASSWORD"));
    let stage = Stage::set(Setting {
        schema: SCHEMA,
        tables: TABLES,
        nats: NatsOptions {
            config: permissions.replace("$MILLRACE_NATS_PASSWORD", BROKER_PASSWORD),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    // As from Postgres 15 on: nobody may create in public unless it was granted.
    for database in ["source", "target"] {
        psql(
            &stage.postgres,
            database,
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        );
        let revoke = format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC");
        psql(&stage.postgres, database, &revoke);
    }
    psql(&stage.postgres, "source", &printed(&names, "source").await);
    psql(&stage.postgres, "target", &printed(&names, "target").await);
    for role in ["millrace_capture", "millrace_sink_replica"] {
        stage
            .sql(&format!("ALTER ROLE {role} PASSWORD '{ROLE_PASSWORD}'"))
            .await;
    }
    stage
}

/// This stage's configuration with the printed roles, and this user at the broker.
fn folder(stage: &Stage, user: &str) -> ConfigFolder {
    let url = |role: &str, database: &str| {
        let port = stage.postgres.port();
        format!("postgres://{role}:{ROLE_PASSWORD}@127.0.0.1:{port}/{database}")
    };
    let nats = stage
        .nats
        .url()
        .replace("nats://", &format!("nats://{user}:{BROKER_PASSWORD}@"));
    let config = stage.config(
        &url("millrace_capture", "source"),
        &url("millrace_sink_replica", "target"),
        &nats,
    );
    config.write().expect("folder")
}

/// Every kind of change, in every table.
async fn change(stage: &Stage, id: u32) {
    stage
        .sql(&format!(
            "INSERT INTO t VALUES ({id}, 'new'), ({id} + 1, 'gone'); UPDATE t SET v = 'changed' WHERE id = {id}; \
             UPDATE t SET id = {id} + 2 WHERE id = {id}; DELETE FROM t WHERE id = {id} + 1; \
             TRUNCATE \"Sales\".\"order items\"; \
             INSERT INTO \"Sales\".\"order items\" VALUES ({id}, 'bad', repeat('x', 3000000))"
        ))
        .await;
}

/// Nobody refused anything on the way.
fn not_refused(stage: &Stage, pipeline: &Pipeline) {
    for text in [pipeline.logs(), stage.nats.log_tail()] {
        let text = text.to_lowercase();
        for word in ["violation", "permission", "denied", "e1116", "e1207"] {
            assert!(!text.contains(word), "{word}: {text}");
        }
    }
}

#[tokio::test]
async fn one_process_runs_with_the_printed_privileges() {
    let stage = set().await;
    let folder = folder(&stage, "millrace_shop");
    let pipeline = Stage::start_in(&folder, &["run"]);
    stage.equal(&pipeline).await;
    change(&stage, 10).await;
    stage.equal(&pipeline).await;
    // Retention reads the reports and purges; both happen within seconds.
    tokio::time::sleep(Duration::from_secs(3)).await;
    not_refused(&stage, &pipeline);
    Stage::stopped(pipeline).await;

    change(&stage, 20).await;
    let once = Stage::start_in(&folder, &["run", "--once"]);
    stage.ends(once, 0, &["applied everything up to"]).await;
    assert!(stage.compared().await.expect("compare").is_equal());
    let status = Stage::start_in(&folder, &["status"]);
    let logs = stage.ends(status, 0, &["available", "public.t"]).await;
    assert!(!logs.contains("unreachable"), "{logs}");

    for (arguments, said) in [
        (&["start", "t", "--where", "id > 0"][..], "is queued"),
        (&["pause", "t"], "paused"),
        (&["status"], "where id > 0"),
        (&["cancel", "t"], "cancelled"),
    ] {
        let arguments: Vec<&str> = ["backfill"].iter().chain(arguments).copied().collect();
        let backfill = Stage::start_in(&folder, &arguments);
        let logs = stage.ends(backfill, 0, &[said]).await;
        assert!(!logs.contains("does not answer"), "{logs}");
    }

    // All but the publication, which its owner drops.
    let drop = Stage::start_in(&folder, &["drop", "--yes"]);
    let remedy = "as its owner: DROP PUBLICATION IF EXISTS \"millrace_shop\"";
    let logs = stage
        .ends(drop, 4, &["removed stream CDC_shop", "E1116", remedy])
        .await;
    assert_eq!(logs.matches("error: ").count(), 1, "{logs}");
    let slots = "SELECT count(*)::text FROM pg_replication_slots";
    assert_eq!(stage.ask(slots).await.as_deref(), Some("0"));
}

#[tokio::test]
async fn separate_processes_run_with_the_printed_privileges() {
    let stage = set().await;
    let capture = folder(&stage, "millrace_shop_capture");
    let sink = folder(&stage, "millrace_shop_sink_replica");
    let mut capturing = Stage::start_in(&capture, &["run", "--only", "capture"]);
    Stage::readyz(&mut capturing, 200, "streaming").await;
    let sinking = Stage::start_in(&sink, &["run", "--only", "sink:replica"]);
    stage.equal(&sinking).await;
    change(&stage, 10).await;
    stage.equal(&sinking).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    not_refused(&stage, &capturing);
    not_refused(&stage, &sinking);
    Stage::stopped(sinking).await;
    Stage::stopped(capturing).await;

    change(&stage, 20).await;
    let once = Stage::start_in(&capture, &["run", "--only", "capture", "--once"]);
    stage.ends(once, 0, &["published everything up to"]).await;
    let once = Stage::start_in(&sink, &["run", "--only", "sink:replica", "--once"]);
    stage.ends(once, 0, &["applied everything up to"]).await;
    assert!(stage.compared().await.expect("compare").is_equal());

    // A sink may not forge changes.
    let url = stage.nats.url();
    let client = async_nats::ConnectOptions::with_user_and_password(
        "millrace_shop_sink_replica".to_owned(),
        BROKER_PASSWORD.to_owned(),
    );
    let client = client.connect(url).await.expect("client");
    let forged = client.publish("cdc.shop.public.t.c", "{}".into()).await;
    forged.expect("sent");
    client.flush().await.expect("flushed");
    let refused = || stage.nats.log_tail().contains("Publish Violation");
    let deadline = std::time::Instant::now() + PATIENCE;
    while !refused() && std::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(refused(), "{}", stage.nats.log_tail());
}

#[tokio::test]
async fn rows_that_a_policy_hides_from_capture_are_not_left_out_silently() {
    let stage = set().await;
    let policy = "INSERT INTO t SELECT i, 'row' FROM generate_series(2, 50) i; \
                  ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON t USING (id <= 10)";
    stage.sql(policy).await;
    let folder = folder(&stage, "millrace_shop");
    let mut pipeline = Stage::start_in(&folder, &["run"]);
    let said = pipeline.wait_for_log("BYPASSRLS", PATIENCE).await;
    assert!(said.expect("told").contains("E1116"), "{}", pipeline.logs());
    stage.sql("ALTER ROLE millrace_capture BYPASSRLS").await;
    stage
        .target_shows(&pipeline, "SELECT count(*)::text FROM t", "50")
        .await;
    let caught_up = "\"table is up to date\",\"sink\":\"replica\",\"table\":\"public.t\"";
    let whole = pipeline.wait_for_log(caught_up, PATIENCE).await;
    whole.expect("told");
    // Read again in chunks, the same holds.
    stage.sql("ALTER ROLE millrace_capture NOBYPASSRLS").await;
    let before = pipeline.logs().len();
    let start = Stage::start_in(&folder, &["backfill", "start", "t"]);
    stage.ends(start, 0, &["is queued"]).await;
    let deadline = Instant::now() + PATIENCE;
    while !pipeline.logs()[before..].contains("BYPASSRLS") {
        assert!(Instant::now() < deadline, "{}", pipeline.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let rows = "SELECT count(*)::text FROM t";
    assert_eq!(stage.target_text(rows).await, "50");
}
