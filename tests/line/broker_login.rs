//! The broker admits whoever proves an nkey or a credentials file; what proves it never appears anywhere.

use std::fs;
use std::path::{Path, PathBuf};

use millrace_lab::{NatsOptions, Operator, Pipeline, Place};
use nkeys::KeyPair;

use crate::stage::{BIN, PATIENCE, Setting, Stage};

/// A file with what logs in, outside the configuration's folder.
struct Login {
    place: Place,
}

impl Login {
    fn new(content: &str) -> Self {
        let login = Self {
            place: Place::new().expect("a folder"),
        };
        login.write(content);
        login
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("login")
    }

    fn write(&self, content: &str) {
        fs::write(self.path(), content).expect("written");
    }

    /// A stage whose broker has this configuration, and whose `[stream]` refers to the file by this key.
    async fn stage(&self, config: String, key: &str) -> Stage {
        let stream = format!(
            "confirm = \"acked\"\n{key} = {{ file = \"{}\" }}",
            self.path().display()
        );
        Stage::set(Setting {
            stream: &stream,
            nats: NatsOptions {
                config,
                ..NatsOptions::default()
            },
            ..Setting::default()
        })
        .await
    }
}

/// Starts the product with everything logged that it and its libraries have to say.
fn start_talkative(stage: &Stage) -> Pipeline {
    let arguments = ["RUST_LOG=trace", BIN, "run"];
    let pipeline = Pipeline::spawn(Path::new("env"), stage.folder.path(), &arguments);
    pipeline.expect("millrace starts")
}

/// The whole line works, and keeps these to itself.
async fn works(stage: &Stage, secrets: &[&str]) {
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut pipeline = start_talkative(stage);
    stage.equal(&pipeline).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    stage.equal(&pipeline).await;
    for verb in [&["status"][..], &["status", "-o", "json"]] {
        let run = stage.start_with(verb);
        let logs = stage.ends(run, 0, &["available"]).await;
        assert!(!secrets.iter().any(|secret| logs.contains(secret)));
    }
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    let logs = pipeline.logs();
    assert!(logs.contains("\"level\":\"TRACE\""), "{logs}");
    for secret in secrets {
        assert!(!logs.contains(secret), "what logs in is in the output");
    }
}

/// A start with this login is refused with the reason and the code, without repeating it.
async fn refused(stage: &Stage, why: &str, secrets: &[&str]) {
    let run = start_talkative(stage);
    let logs = stage
        .ends(run, 4, &["error: E1207", "refused the login", why])
        .await;
    for secret in secrets {
        assert!(!logs.contains(secret), "what logs in is in the output");
    }
}

#[tokio::test]
async fn an_nkey_logs_in_and_a_wrong_one_is_refused() {
    let (user, other) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}\n",
        user.public_key()
    );
    let (seed, other) = (user.seed().expect("seed"), other.seed().expect("seed"));
    let login = Login::new(&format!("{seed}\n"));
    let stage = login.stage(config, "nkey").await;
    works(&stage, &[&seed]).await;

    login.write(&other);
    refused(&stage, "authorization violation", &[&other]).await;
    // Not even a seed: one letter is wrong.
    let (start, end) = seed.split_at(20);
    let damaged = format!("{start}1{}", &end[1..]);
    login.write(&damaged);
    refused(&stage, "not the seed of an nkey", &[&damaged, end]).await;
}

#[tokio::test]
async fn a_credentials_file_logs_in_and_another_operators_is_refused() {
    let (operator, other) = (Operator::default(), Operator::default());
    let credentials = operator.credentials("millrace");
    let login = Login::new(&credentials);
    let stage = login.stage(operator.config(), "creds").await;
    let secrets = lines(&credentials);
    assert_eq!(secrets.len(), 2, "a token and a seed");
    works(&stage, &secrets).await;

    let foreign = other.credentials("millrace");
    login.write(&foreign);
    refused(&stage, "authorization violation", &lines(&foreign)).await;
    // A file of another kind.
    login.write(secrets[1]);
    refused(&stage, "not a NATS credentials file", &secrets).await;
}

#[tokio::test]
async fn a_process_that_ends_with_a_refused_login_takes_no_table_out_of_the_publication() {
    let (user, other) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {{ nkey: {} }} ] }}\n",
        user.public_key()
    );
    let (seed, other) = (user.seed().expect("seed"), other.seed().expect("seed"));
    let login = Login::new(&seed);
    let stage = login.stage(config, "nkey").await;
    works(&stage, &[&seed]).await;
    stage.sql("ALTER TABLE t REPLICA IDENTITY NOTHING").await;
    login.write(&other);
    // Nothing but capture, which would have the time.
    let run = stage.start_with(&["run", "--only", "capture"]);
    stage
        .ends(run, 4, &["E1207", "authorization violation"])
        .await;
    let members = "SELECT count(*)::text FROM pg_publication_tables WHERE tablename = 't'";
    assert_eq!(stage.source_text(members).await, "1");
}

/// The secret lines of a credentials file.
fn lines(credentials: &str) -> Vec<&str> {
    let lines = credentials.lines();
    lines
        .filter(|line| !line.is_empty() && !line.contains("---"))
        .collect()
}
