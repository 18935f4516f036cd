//! Secrets that are missing, and secrets that change while the product runs: they are read again at each connect.

use std::fs;
use std::path::PathBuf;

use millrace_lab::{NatsOptions, Pipeline};

use crate::bad_input::edit;
use crate::stage::{Setting, Stage};

/// A secret in a file of the configuration's folder.
struct Kept {
    path: PathBuf,
}

impl Kept {
    fn new(stage: &Stage, name: &str, secret: &str) -> Self {
        let kept = Self {
            path: stage.folder.path().join(name),
        };
        kept.write(secret);
        kept
    }

    fn write(&self, secret: &str) {
        fs::write(&self.path, format!("{secret}\n")).expect("written");
    }

    fn remove(&self) {
        fs::remove_file(&self.path).expect("removed");
    }

    /// The reference to it, as the configuration has it.
    fn reference(&self) -> String {
        format!("{{ file = \"{}\" }}", self.path.display())
    }
}

/// Keeps a URL of the configuration in a file.
fn kept_url(stage: &Stage, name: &str, url: &str) -> Kept {
    let kept = Kept::new(stage, name, url);
    let plain = format!("url = \"{url}\"");
    edit(
        &stage.folder,
        &plain,
        &format!("url = {}", kept.reference()),
    );
    kept
}

/// Ends all sessions of a user, so that the product must connect again.
async fn disconnect(stage: &Stage, user: &str) {
    let sql =
        format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{user}'");
    stage.sql(&sql).await;
}

#[tokio::test]
async fn a_secret_that_cannot_be_read_at_start_is_named() {
    let stage = Stage::set(Setting::default()).await;
    for (name, url) in [
        ("source_url", stage.postgres.url("source")),
        ("target_url", stage.target_url()),
    ] {
        let kept = kept_url(&stage, name, &url);
        kept.remove();
        let run = stage.start();
        let logs = stage.ends(run, 4, &["error: E1002", "remedy: "]).await;
        assert!(logs.contains(name), "{logs}");
        kept.write(&url);
    }
    let source = stage.folder.path().join("source_url");
    fs::remove_file(&source).expect("removed");
    let run = stage.start_with(&["run", "--once"]);
    stage.ends(run, 4, &["error: E1002", "source_url"]).await;

    fs::write(&source, stage.postgres.url("source")).expect("written");
    let stream = "confirm = \"acked\"";
    let missing = format!("{stream}\ntoken = {{ file = \"nowhere\" }}");
    edit(&stage.folder, stream, &missing);
    let once = ["run", "--once", "--only", "sink:replica"];
    for arguments in [&once[..], &["run"]] {
        let run = stage.start_with(arguments);
        stage.ends(run, 4, &["error: E1002", "nowhere"]).await;
    }
}

#[tokio::test]
async fn a_secret_that_goes_missing_later_is_waited_for() {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql("CREATE ROLE capturer LOGIN SUPERUSER PASSWORD 'capturerpassword'")
        .await;
    let port = stage.postgres.port();
    let url = format!("postgres://capturer:capturerpassword@127.0.0.1:{port}/source");
    let kept = kept_url(&stage, "source_url", &stage.postgres.url("source"));
    kept.write(&url);
    let mut pipeline = stage.start();
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    kept.remove();
    disconnect(&stage, "capturer").await;
    let body = Stage::readyz(&mut pipeline, 503, "E1002").await;
    assert!(body.contains("retrying"), "{body}");
    stage.sql("INSERT INTO t VALUES (1, 'meanwhile')").await;
    kept.write(&url);
    stage.equal(&pipeline).await;
    let logs = pipeline.logs();
    assert!(!logs.contains("capturerpassword"), "{logs}");
}

#[tokio::test]
async fn a_password_of_the_target_that_changes_is_read_again() {
    let stage = Stage::set(Setting::apart()).await;
    stage
        .target_sql("CREATE ROLE writer LOGIN SUPERUSER PASSWORD 'firstpassword'")
        .await;
    let owner = stage.target_url();
    let (_, address) = owner.split_once('@').expect("a user");
    let url = |password: &str| format!("postgres://writer:{password}@{address}");
    let kept = kept_url(&stage, "target_url", &owner);
    kept.write(&url("firstpassword"));
    let mut pipeline = stage.start();
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&pipeline).await;
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage
        .target_sql("ALTER ROLE writer PASSWORD 'secondpassword'")
        .await;
    stage
        .target_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'writer'",
        )
        .await;
    let body = Stage::readyz(&mut pipeline, 503, "E1303").await;
    assert!(body.contains("retrying"), "{body}");
    stage.sql("INSERT INTO t VALUES (2, 'meanwhile')").await;
    kept.write(&url("secondpassword"));
    assert_eq!(stage.equal(&pipeline).await.rows, 2);
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    let logs = pipeline.logs();
    for password in ["firstpassword", "secondpassword"] {
        assert!(!logs.contains(password), "{logs}");
    }
}

fn token(token: &str) -> String {
    format!("authorization {{ token: \"{token}\" }}\n")
}

/// A broker that asks for a token, and where the product reads it.
async fn with_token() -> (Stage, Kept) {
    let stage = Stage::set(Setting {
        nats: NatsOptions {
            config: token("firsttoken"),
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    let kept = Kept::new(&stage, "token", "firsttoken");
    let stream = "confirm = \"acked\"";
    let with_token = format!("{stream}\ntoken = {}", kept.reference());
    edit(&stage.folder, stream, &with_token);
    (stage, kept)
}

/// The broker comes back with another token.
async fn changes_token(stage: &mut Stage) {
    stage.nats.stop().await.expect("stopped");
    stage
        .nats
        .configure(&token("secondtoken"))
        .expect("written");
    stage.nats.start_again().await.expect("broker");
}

fn shows_no_token(pipeline: &Pipeline) {
    let logs = pipeline.logs();
    for token in ["firsttoken", "secondtoken"] {
        assert!(!logs.contains(token), "{logs}");
    }
}

#[tokio::test]
async fn a_token_of_the_broker_that_changes_is_read_again_by_capture() {
    let (mut stage, kept) = with_token().await;
    let mut capture = stage.start_with(&["run", "--only", "capture"]);
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    Stage::readyz(&mut capture, 200, "streaming").await;
    changes_token(&mut stage).await;
    let body = Stage::readyz(&mut capture, 503, "\"code\":\"E1207\"").await;
    assert!(body.contains("retrying"), "{body}");
    stage.sql("INSERT INTO t VALUES (2, 'meanwhile')").await;
    kept.write("secondtoken");
    Stage::readyz(&mut capture, 200, "streaming").await;
    let sink = stage.start_with(&["run", "--only", "sink:replica"]);
    assert_eq!(stage.equal(&sink).await.rows, 2);
    shows_no_token(&capture);
}

#[tokio::test]
async fn a_token_of_the_broker_that_changes_is_read_again_by_a_sink() {
    let (mut stage, kept) = with_token().await;
    let capture = stage.start_with(&["run", "--only", "capture"]);
    let mut sink = stage.start_with(&["run", "--only", "sink:replica"]);
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.equal(&sink).await;
    Stage::readyz(&mut sink, 200, "streaming").await;
    changes_token(&mut stage).await;
    let body = Stage::readyz(&mut sink, 503, "\"code\":\"E1207\"").await;
    assert!(body.contains("retrying"), "{body}");
    stage.sql("INSERT INTO t VALUES (2, 'meanwhile')").await;
    kept.write("secondtoken");
    assert_eq!(stage.equal(&sink).await.rows, 2);
    Stage::readyz(&mut sink, 200, "streaming").await;
    shows_no_token(&sink);
    drop(capture);
}
