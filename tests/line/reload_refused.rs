//! What `millrace reload` does not do: stop what works for a configuration that cannot work, or reload another process.

use std::net::TcpListener;
use std::time::Duration;

use millrace_lab::{Compared, ConfigDir, Pipeline};

use crate::stage::{PATIENCE, Setting, Stage};

/// An address that nobody listens at.
fn free_address() -> String {
    let free = TcpListener::bind("127.0.0.1:0").expect("bound");
    free.local_addr().expect("bound").to_string()
}

async fn stage() -> Stage {
    Stage::set(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text); \
                 CREATE TABLE keyless (id int, v text); INSERT INTO t VALUES (1, 'one')",
        ..Setting::default()
    })
    .await
}

fn write(stage: &Stage, config: &ConfigDir) {
    config.write_to(stage.folder.path()).expect("written");
}

/// Runs `millrace reload` on the stage's folder.
async fn reload(stage: &Stage, code: i32, texts: &[&str]) -> String {
    stage.ends(stage.start_with(&["reload"]), code, texts).await
}

/// The process that holds the slot: another one after every begin of the capture.
async fn reader(stage: &Stage) -> String {
    let sql = "SELECT active_pid::text FROM pg_replication_slots WHERE slot_name = 'millrace_shop'";
    stage.source_text(sql).await
}

async fn follows(stage: &Stage, pipeline: &Pipeline, id: u32) {
    stage
        .sql(&format!("INSERT INTO t VALUES ({id}, 'on')"))
        .await;
    stage.equal(pipeline).await;
}

#[tokio::test]
async fn what_a_server_refuses_leaves_the_old_configuration_at_work() {
    let stage = stage().await;
    let address = free_address();
    let good = stage.same_config().listen(&address);
    write(&stage, &good);
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    let before = reader(&stage).await;
    let (typo, keyless) = ("table public.typo does not exist", "public.keyless");
    let stranger = stage
        .target_url()
        .replace(stage.postgres.password(), "wrong");
    let masked = "columns.exclude = [\"nosuch\"]";
    // A user who may read, and may not change the publication.
    stage
        .sql("CREATE ROLE reader LOGIN REPLICATION PASSWORD 'readerpassword'; GRANT SELECT ON t, u TO reader")
        .await;
    let owner = format!("postgres:{}@", stage.postgres.password());
    let url = stage.postgres.url("source");
    let reader_url = url.replace(&owner, "reader:readerpassword@");
    assert_ne!(url, reader_url, "the role was put into the address");
    let limited = stage.config(&reader_url, &stage.target_url(), &stage.nats.url());
    let limited = limited.listen(&address).table("public.u", "");
    let never = good.clone().source("create = \"never\"");
    for (config, texts) in [
        (good.clone().table("public.typo", ""), ["E1114", typo]),
        (good.clone().table("public.keyless", ""), ["E1115", keyless]),
        (never.table("public.u", ""), ["E1106", "ADD TABLE"]),
        (limited, ["E1116", "ADD TABLE"]),
        (good.clone().table("public.u", masked), ["E1130", "nosuch"]),
        (
            good.clone().sink("second", &stranger),
            ["E1303", "sink second"],
        ),
    ] {
        write(&stage, &config);
        let said = reload(&stage, 78, &texts).await;
        assert!(said.contains("remedy: "), "{said}");
        assert!(
            said.contains("goes on with its old configuration"),
            "{said}"
        );
        assert_eq!(reader(&stage).await, before, "the capture was not stopped");
    }
    // By the signal too.
    pipeline.hang_up().expect("signal");
    let refused = "configuration not reloaded; going on with the old one: sink second";
    pipeline
        .wait_for_log(refused, PATIENCE)
        .await
        .expect("told");
    follows(&stage, &pipeline, 2).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    assert_eq!(reader(&stage).await, before);

    // A target that is away is no reason: it is said, and the sink waits for it.
    let away = format!("postgres://nobody@{}/nowhere", free_address());
    write(&stage, &good.clone().sink("second", &away));
    let said = reload(
        &stage,
        0,
        &["sink second added", "without being checked", "E1301"],
    )
    .await;
    assert!(said.contains("concerned: capture, sink:second"), "{said}");
    follows(&stage, &pipeline, 3).await;
    write(&stage, &good);
    reload(&stage, 0, &["sink second removed"]).await;
    follows(&stage, &pipeline, 4).await;
}

#[tokio::test]
async fn only_the_process_of_this_pipeline_is_reloaded() {
    let stage = stage().await;
    let address = free_address();
    let config = stage.same_config().listen(&address);
    write(&stage, &config);
    // A run that ends by itself reads nothing again.
    let away = format!("postgres://nobody@{}/nowhere", free_address());
    let waits = stage.config(&stage.postgres.url("source"), &away, &stage.nats.url());
    write(&stage, &waits.listen(&address));
    let mut once = stage.start_with(&["run", "--once"]);
    let retrying = once.wait_for_log("\"to\":\"retrying", PATIENCE).await;
    retrying.expect("the target is away");
    reload(&stage, 78, &["run --once"]).await;
    once.kill9();

    // One of several processes does not have every part.
    write(&stage, &config);
    let capture = stage.start_with(&["run", "--only", "capture"]);
    let sink = stage.same_config().write().expect("folder");
    let sink = Stage::start_in(&sink, &["run", "--only", "sink:replica"]);
    stage.equal(&sink).await;
    write(&stage, &config.clone().table("public.u", ""));
    let warning = "this process does not run sink:replica";
    reload(&stage, 0, &["public.u added (concerned: capture)", warning]).await;

    // Another pipeline has the same address.
    let other = stage.same_config().listen(&address);
    let other = other.text().replace("name = \"shop\"", "name = \"store\"");
    std::fs::write(stage.folder.path().join("millrace.toml"), other).expect("written");
    let said = "works for source \"shop\", not for \"store\": nothing was reloaded";
    reload(&stage, 4, &[said]).await;
    let logs = capture.logs();
    let read = logs.lines().filter(|line| line.contains("configuration"));
    assert_eq!(read.count(), 1, "{logs}");
}

#[tokio::test]
async fn a_capture_that_is_halted_begins_again() {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, email text); INSERT INTO t VALUES (1, 'a@example.org')";
    let stage = Stage::set(Setting {
        schema,
        tables: &[("public.t", "columns.exclude = [\"email\"]")],
        ..Setting::default()
    })
    .await;
    let count = "SELECT count(*)::text FROM t";
    let good = stage.same_config().listen(&free_address());
    write(&stage, &good);
    let mut pipeline = stage.start();
    stage.target_shows(&pipeline, count, "1").await;
    let rename =
        "ALTER TABLE t RENAME COLUMN email TO mail; INSERT INTO t VALUES (2, 'b@example.org')";
    stage.sql(rename).await;
    Stage::readyz(&mut pipeline, 503, "E1130").await;
    // Nobody has mended it: it begins, and halts again.
    reload(&stage, 0, &["nothing has changed (concerned: capture)"]).await;
    let again = Stage::readyz(&mut pipeline, 503, "E1130").await;
    assert!(again.contains("was renamed to"), "{again}");
    assert!(pipeline.is_running());
    let mended = ConfigDir::new("shop", &stage.postgres.url("source"), &stage.nats.url())
        .source("heartbeat_interval = \"500ms\"")
        .stream("confirm = \"acked\"")
        .sink("replica", &stage.target_url())
        .table("public.t", "columns.exclude = [\"mail\"]")
        .listen(&pipeline.admin().await.expect("address"));
    write(&stage, &mended);
    reload(&stage, 0, &["table public.t changed", "capture"]).await;
    stage.target_shows(&pipeline, count, "2").await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
}

#[tokio::test]
async fn a_standby_takes_over_by_the_configuration_that_it_was_given() {
    let stage = stage().await;
    let mut first = stage.start();
    stage.equal(&first).await;
    let config = stage.same_config().listen(&free_address());
    let folder = config.write().expect("folder");
    let mut second = Stage::start_in(&folder, &["run"]);
    Stage::readyz(&mut second, 200, "standby").await;
    let with = config.table("public.u", "");
    with.write_to(folder.path()).expect("written");
    let run = Stage::start_in(&folder, &["reload"]);
    stage.ends(run, 0, &["table public.u added"]).await;
    Stage::readyz(&mut second, 200, "standby").await;
    follows(&stage, &first, 2).await;
    first.kill9();
    stage.sql("INSERT INTO u VALUES (1, 'taken over')").await;
    let both = ["public.t", "public.u"].map(Compared::same);
    stage.equal_as(&second, &both).await;
    Stage::readyz(&mut second, 200, "streaming").await;
}

#[tokio::test]
async fn a_reload_is_answered_whatever_the_process_is_doing() {
    let mut stage = stage().await;
    let config = stage.same_config().listen(&free_address());
    write(&stage, &config);
    let mut pipeline = stage.start();
    stage.equal(&pipeline).await;
    // It tries again and again, and two ask at once.
    stage.nats.stop().await.expect("stopped");
    Stage::readyz(&mut pipeline, 503, "retrying").await;
    write(&stage, &config.table("public.u", ""));
    let mut both = [stage.start_with(&["reload"]), stage.start_with(&["reload"])];
    let mut said = String::new();
    for run in &mut both {
        let code = run.wait(PATIENCE).await.expect("ends");
        assert_eq!(code, 0, "{}\n{}", run.logs(), pipeline.logs());
        said += &run.logs();
    }
    for text in ["table public.u added", "nothing has changed", "E1201"] {
        assert!(said.contains(text), "{said}");
    }
    stage.nats.start_again().await.expect("started");
    stage.sql("INSERT INTO u VALUES (1, 'on')").await;
    let both = ["public.t", "public.u"].map(Compared::same);
    stage.equal_as(&pipeline, &both).await;
    // It ends, and a broker that answers nothing holds that up.
    stage.nats.pause().expect("paused");
    stage.sql("INSERT INTO t VALUES (9, 'under way')").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    pipeline.terminate().expect("signal");
    tokio::time::sleep(Duration::from_millis(500)).await;
    reload(&stage, 4, &["the process ends"]).await;
    stage.nats.resume().expect("resumed");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
}
