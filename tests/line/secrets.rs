//! Passwords never appear in any output, and secured connections carry the whole line.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use millrace_lab::{NatsOptions, Pipeline, Place, Postgres};

use crate::bad_input::edit;
use crate::stage::{BIN, PATIENCE, Setting, Stage};

/// A private authority, and a server's certificate for 127.0.0.1.
struct Certificates {
    place: Place,
}

impl Certificates {
    fn make() -> Self {
        let place = Place::new().expect("a folder");
        let made = Self { place };
        let openssl = |args: &[&str]| {
            let mut command = Command::new("openssl");
            let output = command.args(args).current_dir(made.place.path()).output();
            let output = output.expect("openssl runs");
            assert!(output.status.success(), "{output:?}");
        };
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=lab authority",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
        ]);
        openssl(&[
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=lab server",
            "-keyout",
            "server.key",
            "-out",
            "server.csr",
        ]);
        let extensions = "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n";
        fs::write(made.path("extensions"), extensions).expect("written");
        openssl(&[
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "extensions",
            "-out",
            "server.crt",
        ]);
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Gives a running cluster the certificate and refuses everything that is not encrypted.
    async fn secure(&self, postgres: &Postgres) {
        let data = postgres.data_dir();
        let owner = fs::metadata(&data).expect("the data folder");
        for name in ["server.crt", "server.key"] {
            let to = data.join(name);
            fs::copy(self.path(name), &to).expect("copied");
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).expect("mode");
            chown(&to, Some(owner.uid()), Some(owner.gid())).expect("owner");
        }
        postgres.set("ssl", "on").await.expect("set");
    }
}

/// Only encrypted connections by SCRAM are admitted from now on.
fn require_tls(data: &Path) {
    let rules = "hostssl all all all scram-sha-256\nhostssl replication all all scram-sha-256\n";
    fs::write(data.join("pg_hba.conf"), rules).expect("rules");
}

#[tokio::test]
async fn source_and_target_are_reached_over_tls_with_a_private_authority() {
    let certificates = Certificates::make();
    let stage = Stage::set(Setting::default()).await;
    certificates.secure(&stage.postgres).await;
    require_tls(&stage.postgres.data_dir());
    stage.sql("SELECT pg_reload_conf(), pg_sleep(0.3)").await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let (source, target) = (stage.postgres.url("source"), stage.postgres.url("target"));
    let ca = certificates.path("ca.crt");
    let verify = format!("sslmode=verify-full&sslrootcert={}", ca.display());
    let bound = format!("{verify}&channel_binding=require");
    let mut rows = 1;
    for options in ["sslmode=require", verify.as_str(), bound.as_str()] {
        let secured = |url: &str| format!("{url}?{options}");
        let folder = stage.config(&secured(&source), &secured(&target), &stage.nats.url());
        let folder = folder.write().expect("folder");
        let mut pipeline = Stage::start_in(&folder, &["run"]);
        rows += 1;
        stage
            .sql(&format!("INSERT INTO t VALUES ({rows}, 'more')"))
            .await;
        let shown = "SELECT count(*)::text FROM t";
        stage
            .target_shows(&pipeline, shown, &rows.to_string())
            .await;
        let plain = "SELECT count(*)::text FROM pg_stat_activity a JOIN pg_stat_ssl s USING (pid) \
                     WHERE a.application_name LIKE 'millrace%' AND NOT s.ssl";
        assert_eq!(stage.ask(plain).await.as_deref(), Some("0"));
        pipeline.terminate().expect("signal");
        let code = pipeline.wait(PATIENCE).await.expect("ends");
        assert_eq!(code, 0, "{}", pipeline.logs());
        stage.keeps_the_password(&pipeline);
    }
    // Another authority does not vouch for this server.
    let other = Certificates::make();
    let other = format!(
        "sslmode=verify-full&sslrootcert={}",
        other.path("ca.crt").display()
    );
    let folder = stage.config(&format!("{source}?{other}"), &target, &stage.nats.url());
    let folder = folder.write().expect("folder");
    let mut pipeline = Stage::start_in(&folder, &["run", "--only", "capture"]);
    let body = Stage::readyz(&mut pipeline, 503, "retrying").await;
    assert!(body.to_lowercase().contains("certificate"), "{body}");
}

#[tokio::test]
async fn the_broker_is_reached_over_tls_with_a_token_from_a_file() {
    let certificates = Certificates::make();
    let path = |name: &str| certificates.path(name).display().to_string();
    let config = format!(
        "tls {{ cert_file: \"{}\", key_file: \"{}\" }}\nauthorization {{ token: \"tokentokentoken\" }}\n",
        path("server.crt"),
        path("server.key")
    );
    fs::write(certificates.path("token"), "tokentokentoken").expect("written");
    let stream = format!(
        "confirm = \"acked\"\ntls_ca = \"{}\"\ntoken = {{ file = \"{}\" }}",
        path("ca.crt"),
        path("token")
    );
    let stage = Stage::set(Setting {
        stream: &stream,
        nats: NatsOptions {
            config,
            ..NatsOptions::default()
        },
        ..Setting::default()
    })
    .await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    let mut pipeline = stage.start_with(&["run", "--log-level", "trace"]);
    stage.equal(&pipeline).await;
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    stage.equal(&pipeline).await;
    pipeline.terminate().expect("signal");
    assert_eq!(pipeline.wait(PATIENCE).await.expect("ends"), 0);
    assert!(
        !pipeline.logs().contains("tokentokentoken"),
        "the token is in the output"
    );

    fs::write(certificates.path("token"), "wrongwrongwrong").expect("written");
    let run = stage.start();
    let logs = stage.ends(run, 4, &["E1207"]).await;
    assert!(!logs.contains("wrongwrongwrong"), "{logs}");
}

#[tokio::test]
async fn no_output_holds_a_password_whatever_goes_wrong() {
    let mut stage = Stage::set(Setting::default()).await;
    let url = stage.nats.url();
    let with_login = url.replace("nats://", "nats://user:brokerpassword@");
    edit(&stage.folder, &url, &with_login);
    let quiet = |stage: &Stage, run: &Pipeline| {
        stage.keeps_the_password(run);
        assert!(!run.logs().contains("brokerpassword"), "{}", run.logs());
    };
    // The libraries' own traces too.
    let arguments = ["RUST_LOG=trace", BIN, "run"];
    let pipeline = Pipeline::spawn(Path::new("env"), stage.folder.path(), &arguments);
    let mut pipeline = pipeline.expect("millrace starts");
    Stage::readyz(&mut pipeline, 200, "streaming").await;
    stage.nats.kill9();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.postgres.stop_fast().await.expect("stopped");
    Stage::readyz(&mut pipeline, 503, "retrying").await;
    for verb in [
        &["status"][..],
        &["status", "-o", "json"],
        &["validate"],
        &["init-sql"],
    ] {
        let mut run = stage.start_with(verb);
        run.wait(PATIENCE).await.expect("ends");
        quiet(&stage, &run);
    }
    assert!(
        pipeline.logs().contains("\"level\":\"TRACE\""),
        "{}",
        pipeline.logs()
    );
    quiet(&stage, &pipeline);
    stage.nats.start_again().await.expect("broker");
    stage.postgres.start_again().await.expect("postgres");
    stage.reconnect().await;
    stage.equal(&pipeline).await;
    let (_, body) = pipeline.get("/status").await.expect("status");
    assert!(!body.contains(stage.postgres.password()) && !body.contains("brokerpassword"));
    quiet(&stage, &pipeline);
}
