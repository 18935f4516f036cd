//! Whatever is wrong with configuration, source, broker or target: one clear error with a code and a remedy,
//! or patience where it passes by itself.

use std::fs;
use std::time::Duration;

use async_nats::jetstream;
use millrace_lab::{ConfigFolder, NatsOptions, PostgresOptions};

use crate::stage::{PATIENCE, Setting, Stage};

/// Replaces a piece of the written configuration, which must be there.
pub(crate) fn edit(folder: &ConfigFolder, old: &str, new: &str) {
    let path = folder.path().join("millrace.toml");
    let text = fs::read_to_string(&path).expect("the configuration");
    assert!(text.contains(old), "no {old:?} in {text}");
    fs::write(path, text.replacen(old, new, 1)).expect("written");
}

async fn with_postgres(settings: &[(&str, &str)]) -> Stage {
    let settings = settings
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Stage::set(Setting {
        postgres: PostgresOptions {
            settings: settings.collect(),
            ..PostgresOptions::default()
        },
        ..Setting::default()
    })
    .await
}

#[tokio::test]
async fn every_mistake_in_the_configuration_is_shown_with_its_place() {
    let stage = Stage::set(Setting::default()).await;
    edit(
        &stage.folder,
        "heartbeat_interval = \"500ms\"",
        "heartbeat_intervall = \"1s\"",
    );
    edit(
        &stage.folder,
        "confirm = \"acked\"",
        "confirm = \"aked\"\nsync_interval = \"soon\"",
    );
    for verb in ["run", "validate"] {
        let run = stage.start_with(&[verb]);
        let logs = stage
            .ends(
                run,
                78,
                &[
                    "heartbeat_intervall",
                    "did you mean",
                    "heartbeat_interval",
                    "acked",
                    "soon",
                ],
            )
            .await;
        let place = logs.lines().find(|line| line.contains("millrace.toml:4:1"));
        assert!(place.is_some(), "{logs}");
    }
}

#[tokio::test]
async fn a_missing_folder_and_a_missing_file_are_named() {
    let stage = Stage::set(Setting::default()).await;
    let run = stage.start_with(&["run", "-c", "nowhere"]);
    stage.ends(run, 78, &["nowhere"]).await;
    fs::remove_file(stage.folder.path().join("millrace.toml")).expect("removed");
    let run = stage.start_with(&["run"]);
    stage.ends(run, 78, &["millrace.toml"]).await;
}

#[tokio::test]
async fn a_wal_level_that_is_not_logical_is_refused_with_its_remedy() {
    let stage = with_postgres(&[("wal_level", "replica")]).await;
    let run = stage.start();
    let remedy = "ALTER SYSTEM SET wal_level";
    stage.ends(run, 4, &["E1110", remedy]).await;
}

#[tokio::test]
async fn a_source_without_a_free_slot_is_refused_with_its_remedy() {
    let stage = with_postgres(&[("max_replication_slots", "1")]).await;
    stage
        .sql("SELECT pg_create_physical_replication_slot('taken')")
        .await;
    let run = stage.start();
    stage
        .ends(run, 4, &["E1111", "max_replication_slots"])
        .await;
}

#[tokio::test]
async fn a_wrong_password_at_start_ends_with_the_reason() {
    let stage = Stage::set(Setting::default()).await;
    let (source, target) = (stage.postgres.url("source"), stage.postgres.url("target"));
    let wrong = |url: &str| url.replace(stage.postgres.password(), "wrongwrongwrong");
    for (source, target, code) in [
        (wrong(&source), target.clone(), "E1112"),
        (source.clone(), wrong(&target), "E1303"),
    ] {
        let folder = stage.config(&source, &target, &stage.nats.url()).write();
        let folder = folder.expect("folder");
        let run = Stage::start_in(&folder, &["run"]);
        let logs = stage.ends(run, 4, &[code]).await;
        assert!(!logs.contains("wrongwrongwrong"), "{logs}");
    }
}

#[tokio::test]
async fn a_password_that_changes_later_is_read_again() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("CREATE ROLE capturer LOGIN SUPERUSER PASSWORD 'firstpassword'")
        .await;
    let url = |password: &str| {
        let port = stage.postgres.port();
        format!("postgres://capturer:{password}@127.0.0.1:{port}/source\n")
    };
    let secret = stage.folder.path().join("source_url");
    fs::write(&secret, url("firstpassword")).expect("written");
    let plain = format!("url = \"{}\"", stage.postgres.url("source"));
    edit(
        &stage.folder,
        &plain,
        &format!("url = {{ file = \"{}\" }}", secret.display()),
    );
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .sql("ALTER ROLE capturer PASSWORD 'secondpassword'")
        .await;
    stage
        .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'capturer'")
        .await;
    let body = Stage::readyz(&mut pipeline, 503, "password authentication failed").await;
    assert!(body.contains("retrying"), "{body}");
    stage.sql("INSERT INTO t VALUES (1, 'meanwhile')").await;
    fs::write(&secret, url("secondpassword")).expect("written");
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let logs = pipeline.logs();
    assert!(
        !logs.contains("firstpassword") && !logs.contains("secondpassword"),
        "{logs}"
    );
}

#[tokio::test]
async fn a_table_without_a_key_is_refused_before_anything_is_touched() {
    let stage = Stage::set(Setting {
        schema: "CREATE TABLE t (id int, v text)",
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    stage
        .ends(run, 4, &["E1115", "public.t", "primary key"])
        .await;
    stage
        .sql("INSERT INTO t VALUES (1, 'one'); UPDATE t SET v = 'two'")
        .await;
    let slots = stage
        .ask("SELECT count(*)::text FROM pg_replication_slots")
        .await;
    assert_eq!(slots.as_deref(), Some("0"));
}

#[tokio::test]
async fn a_key_that_is_not_logged_is_refused_with_the_statement() {
    let stage = Stage::set(Setting {
        schema:
            "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY NOTHING;
             CREATE TABLE other (id int PRIMARY KEY, code int NOT NULL);
             CREATE UNIQUE INDEX \"by Code\" ON other (code)",
        tables: &[("public.t", ""), ("public.other", "key = [\"code\"]")],
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    let reason = "REPLICA IDENTITY NOTHING";
    let logs = stage.ends(run, 4, &["E1107", "public.t", reason]).await;
    let statements = [
        "ALTER TABLE \"public\".\"t\" REPLICA IDENTITY DEFAULT",
        "ALTER TABLE \"public\".\"other\" REPLICA IDENTITY USING INDEX \"by Code\"",
    ];
    let publications = "SELECT count(*)::text FROM pg_publication";
    assert_eq!(stage.source_text(publications).await, "0");
    for statement in statements {
        assert!(logs.contains(statement), "{logs}");
        stage.sql(statement).await;
    }
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.run_once().await;
    assert_eq!(stage.target_text("SELECT v FROM t").await, "one");
}

#[tokio::test]
async fn a_table_that_does_not_exist_is_named() {
    let stage = Stage::set(Setting {
        tables: &[("public.t", ""), ("public.orders", "")],
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    stage.ends(run, 4, &["E1114", "public.orders"]).await;
}

#[tokio::test]
async fn a_broker_without_jetstream_is_refused_with_its_remedy() {
    let stage = Stage::set(Setting {
        nats: NatsOptions {
            jetstream: false,
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let run = stage.start();
    stage.ends(run, 4, &["E1204", "enable JetStream"]).await;
}

#[tokio::test]
async fn a_stream_of_our_name_with_another_shape_is_left_alone() {
    let stage = Stage::set(Setting::default()).await;
    let jetstream = jetstream::new(stage.nats.client().await.expect("client"));
    let foreign = jetstream::stream::Config {
        name: "CDC_shop".to_owned(),
        subjects: vec!["cdc.shop.>".to_owned(), "theirs.>".to_owned()],
        ..jetstream::stream::Config::default()
    };
    jetstream.create_stream(foreign).await.expect("stream");
    let run = stage.start();
    stage.ends(run, 4, &["E1205", "CDC_shop", "theirs.>"]).await;
    let stream = jetstream.get_stream("CDC_shop").await.expect("still there");
    assert_eq!(stream.cached_info().config.subjects.len(), 2);
}

#[tokio::test]
async fn a_target_table_that_lacks_a_column_is_answered_with_the_statement() {
    let stage = Stage::set(Setting::default()).await;
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    stage
        .target
        .batch_execute("ALTER TABLE t DROP COLUMN v")
        .await
        .expect("dropped");
    edit(
        &stage.folder,
        "type = \"postgres\"",
        "type = \"postgres\"\ncreate = \"never\"",
    );
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    let mut pipeline = stage.start();
    let said = pipeline
        .wait_for_log("E1302", Duration::from_secs(20))
        .await;
    said.expect("the code");
    let statement = "ALTER TABLE public.t ADD COLUMN v text";
    let logs = pipeline.logs().replace("\\\"", "");
    assert!(logs.contains(statement), "{logs}");
    stage.keeps_the_password(&pipeline);
}

#[tokio::test]
async fn a_broker_that_is_not_there_at_start_is_tried_again_until_it_is() {
    let mut stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let address = format!("127.0.0.1:{}", stage.nats.port());
    stage.nats.stop().await.expect("stopped");
    let mut pipeline = stage.start();
    let body = Stage::readyz(&mut pipeline, 503, "retrying").await;
    assert!(body.contains(&address), "{body}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(pipeline.is_running(), "{}", pipeline.logs());
    stage.nats.start_again().await.expect("broker");
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
}
