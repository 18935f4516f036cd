//! Against a real Postgres: `cargo test -p millrace-cdc -- --ignored` starts a throwaway server for them.

#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use millrace_connect::postgres::Dsn;
use millrace_event::Lsn;

use super::*;
use crate::pgoutput::{self, Message};

/// The server's `wal_sender_timeout`.
const SENDER_TIMEOUT: Duration = Duration::from_secs(2);

/// A server that is removed when the test is over.
struct Server {
    folder: PathBuf,
    port: u16,
}

impl Server {
    fn start(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("wal-{name}-{}", std::process::id()));
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        std::fs::create_dir_all(&folder).unwrap();
        let server = Self { folder, port };
        if nobody_may_be_root() {
            server.succeed(Command::new("chown").arg("postgres").arg(&server.folder));
        }
        let data = server.data();
        let mut initdb = server.tool("initdb");
        server.succeed(
            initdb
                .arg("-D")
                .arg(&data)
                .args(["-U", "postgres", "-A", "trust", "-N"]),
        );
        let settings = format!(
            "wal_level=logical\nport={port}\nlisten_addresses='127.0.0.1'\nfsync=off\n\
             unix_socket_directories=''\nwal_sender_timeout={}ms\n",
            SENDER_TIMEOUT.as_millis()
        );
        append(&data.join("postgresql.conf"), &settings);
        let mut start = server.tool("pg_ctl");
        let log = server.folder.join("log");
        server.succeed(
            start
                .arg("-D")
                .arg(&data)
                .arg("-l")
                .arg(log)
                .args(["-w", "start"]),
        );
        server
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// A program of Postgres's, which refuses to run as root.
    fn tool(&self, name: &str) -> Command {
        let bin = Command::new("pg_config").arg("--bindir").output().ok();
        let bin = bin.map(|out| String::from_utf8(out.stdout).unwrap().trim().to_owned());
        let program = Path::new(bin.as_deref().unwrap_or_default()).join(name);
        let mut command = if nobody_may_be_root() {
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
                .arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(&self.folder).stdout(Stdio::null());
        command
    }

    fn succeed(&self, command: &mut Command) {
        assert!(command.status().unwrap().success(), "{command:?}");
    }

    fn stop(&self) {
        let mut stop = self.tool("pg_ctl");
        self.succeed(
            stop.arg("-D")
                .arg(self.data())
                .args(["-m", "fast", "-w", "stop"]),
        );
    }

    fn dsn(&self, login: &str) -> Dsn {
        let port = self.port;
        Dsn::parse(&format!(
            "postgres://{login}@127.0.0.1:{port}/postgres?sslmode=disable"
        ))
        .unwrap()
    }

    async fn connect(&self) -> ReplicationConnection {
        ReplicationConnection::connect(&self.dsn("postgres"), "test")
            .await
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut stop = self.tool("pg_ctl");
        let _ = stop
            .arg("-D")
            .arg(self.data())
            .args(["-m", "immediate", "stop"])
            .status();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn nobody_may_be_root() -> bool {
    let id = Command::new("id").arg("-u").output().unwrap();
    id.stdout == b"0\n"
}

fn append(path: &Path, text: &str) {
    let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn options(slot: &str) -> StartOptions<'_> {
    StartOptions {
        slot,
        start: Lsn::ZERO,
        publications: &["p"],
        messages: true,
        origin_none: false,
    }
}

/// Reads until the commit of a transaction with `rows` inserts, or until they have all been seen.
async fn read_rows(reader: &mut WalReader, rows: usize) -> Lsn {
    let mut seen = 0;
    loop {
        let read = tokio::time::timeout(Duration::from_secs(60), reader.next()).await;
        let batch = read.expect("rows in time").unwrap().expect("a batch");
        for frame in &batch {
            let Frame::Data { payload, .. } = frame else {
                continue;
            };
            match pgoutput::parse(payload).unwrap() {
                Message::Insert(_) => seen += 1,
                Message::Commit(commit) if seen >= rows => return commit.end_lsn,
                _ => {}
            }
        }
    }
}

async fn scalar(sql: &mut ReplicationConnection, query: &str) -> String {
    sql.query(query)
        .await
        .unwrap()
        .remove(0)
        .remove(0)
        .unwrap_or_default()
}

#[tokio::test]
#[ignore = "starts a Postgres server"]
async fn commands_and_logins() {
    let server = Server::start("commands");
    let mut sql = server.connect().await;
    assert!(!sql.server_version().is_empty());
    let identity = sql.identify_system().await.unwrap();
    assert_eq!(
        (identity.timeline, identity.database.as_deref()),
        (1, Some("postgres"))
    );
    assert!(identity.flushed > Lsn::ZERO);
    assert_eq!(sql.timeline_history(1).await.unwrap(), []);
    let refused = sql.query("SELECT nonsense").await;
    assert!(matches!(refused, Err(WalError::Server(error)) if error.sqlstate == "42703"));
    assert_eq!(scalar(&mut sql, "SELECT '1 day'::interval").await, "1 day");
    let slot = sql
        .create_slot("s", SlotKind::Permanent, Snapshot::Export)
        .await
        .unwrap();
    assert!(slot.consistent_point > Lsn::ZERO && slot.snapshot_name.is_some());
    sql.drop_slot("s", true).await.unwrap();

    // A slot cannot be made while a transaction writes; who gives up leaves nothing behind.
    let mut writer = server.connect().await;
    writer.query("BEGIN").await.unwrap();
    writer.query("SELECT pg_current_xact_id()").await.unwrap();
    let mut waiting = server.connect().await;
    let create = waiting.create_slot("w", SlotKind::Permanent, Snapshot::None);
    assert!(
        tokio::time::timeout(Duration::from_millis(500), create)
            .await
            .is_err()
    );
    assert!(matches!(
        waiting.query("SELECT 1").await,
        Err(WalError::ThreadGone)
    ));
    waiting.terminate().await;
    let gone = "SELECT count(*) FROM pg_replication_slots";
    let deadline = Instant::now() + Duration::from_secs(5);
    while scalar(&mut sql, gone).await != "0" {
        assert!(
            Instant::now() < deadline,
            "the abandoned slot is still there"
        );
    }
    writer.query("COMMIT").await.unwrap();

    sql.query("CREATE USER scram REPLICATION PASSWORD 'p:w'")
        .await
        .unwrap();
    sql.query("SET password_encryption = 'md5'").await.unwrap();
    sql.query("CREATE USER md5 REPLICATION PASSWORD 'pw'")
        .await
        .unwrap();
    let rules = server.data().join("pg_hba.conf");
    let lines = "host all scram all scram-sha-256\nhost all md5 all md5\nhost all all all trust\n";
    std::fs::write(rules, lines).unwrap();
    sql.query("SELECT pg_reload_conf(), pg_sleep(0.5)")
        .await
        .unwrap();
    for (login, sqlstate) in [
        ("scram:p%3Aw", None),
        ("md5:pw", None),
        ("scram:x", Some("28P01")),
        ("md5:x", Some("28P01")),
    ] {
        let opened = ReplicationConnection::connect(&server.dsn(login), "test").await;
        match (opened, sqlstate) {
            (Ok(_), None) => {}
            (Err(WalError::Server(error)), Some(code)) => assert_eq!(error.sqlstate, code),
            (opened, _) => panic!("{login}: {opened:?}"),
        }
    }
    let missing = ReplicationConnection::connect(&server.dsn("scram"), "test").await;
    assert!(matches!(
        missing,
        Err(WalError::Auth(AuthError::PasswordMissing))
    ));
}

#[tokio::test]
#[ignore = "starts a Postgres server"]
async fn a_stream_lives_through_a_full_queue_and_reports_what_is_confirmed() {
    let server = Server::start("stream");
    let mut sql = server.connect().await;
    sql.query("CREATE TABLE public.t (id int PRIMARY KEY, x text)")
        .await
        .unwrap();
    sql.query("CREATE PUBLICATION p FOR TABLE public.t")
        .await
        .unwrap();
    sql.create_slot("s", SlotKind::Permanent, Snapshot::None)
        .await
        .unwrap();
    let missing = server.connect().await.start(&options("nope")).await;
    assert!(matches!(missing, Err(WalError::SlotMissing { .. })));

    let mut reader = server.connect().await.start(&options("s")).await.unwrap();
    let handle = reader.handle();
    let active = server.connect().await.start(&options("s")).await;
    assert!(
        matches!(active, Err(WalError::SlotActive { pid: Some(_), .. })),
        "{active:?}"
    );

    sql.query("INSERT INTO public.t VALUES (1, 'one')")
        .await
        .unwrap();
    let end = read_rows(&mut reader, 1).await;
    handle.confirm(end);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let confirmed = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 's'";
    assert_eq!(scalar(&mut sql, confirmed).await, end.to_string());

    // Forty megabytes do not fit the queue; the server must not lose patience while nobody takes any.
    let fill = "INSERT INTO public.t SELECT i, repeat('x', 1000) FROM generate_series(2, 40001) i";
    sql.query(fill).await.unwrap();
    tokio::time::sleep(SENDER_TIMEOUT * 3).await;
    let waiting = handle.stats().bytes();
    assert!(
        waiting < 12 << 20,
        "{waiting} bytes were read although nobody took them"
    );
    read_rows(&mut reader, 40_000).await;

    // One message larger than buffer and queue together.
    sql.query("INSERT INTO public.t VALUES (0, repeat('y', 40 << 20))")
        .await
        .unwrap();
    let end = read_rows(&mut reader, 1).await;
    handle.confirm(end);
    handle.stop(Duration::from_secs(5)).await.unwrap();
    assert_eq!(scalar(&mut sql, confirmed).await, end.to_string());
    let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 's'";
    assert_eq!(scalar(&mut sql, active).await, "f");
    while reader.next().await.unwrap().is_some() {}

    let mut reader = server.connect().await.start(&options("s")).await.unwrap();
    sql.terminate().await;
    std::thread::scope(|scope| {
        scope.spawn(|| server.stop());
    });
    let ended = loop {
        match reader.next().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(ended, Err(WalError::ServerShutdown)), "{ended:?}");
    assert!(reader.next().await.unwrap().is_none());
}
