//! The replication connection against a real server: commands, logins, and a stream that nobody empties.

use std::time::{Duration, Instant};

use millrace_cdc::pgoutput::{self, Message};
use millrace_cdc::replication::{
    AuthError, Frame, ReplicationConnection, SlotKind, Snapshot, StartOptions, WalError, WalReader,
};
use millrace_connect::postgres::Dsn;
use millrace_event::Lsn;
use millrace_lab::{Postgres, PostgresOptions};

/// The server's `wal_sender_timeout`.
const SENDER_TIMEOUT: Duration = Duration::from_secs(2);

async fn server() -> Postgres {
    let settings = vec![(
        "wal_sender_timeout".to_owned(),
        format!("{}ms", SENDER_TIMEOUT.as_millis()),
    )];
    let options = PostgresOptions {
        settings,
        ..PostgresOptions::default()
    };
    Postgres::start(options).await.expect("postgres starts")
}

fn dsn(server: &Postgres, login: &str) -> Dsn {
    let port = server.port();
    let url = format!("postgres://{login}@127.0.0.1:{port}/postgres?sslmode=disable");
    Dsn::parse(&url).expect("a URL")
}

async fn connect(server: &Postgres) -> ReplicationConnection {
    let login = format!("postgres:{}", server.password());
    let opened = ReplicationConnection::connect(&dsn(server, &login), "test").await;
    opened.expect("connected")
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

/// Reads until the commit of a transaction by which `rows` inserts have been seen.
async fn read_rows(reader: &mut WalReader, rows: usize) -> Lsn {
    let mut seen = 0;
    loop {
        let read = tokio::time::timeout(Duration::from_secs(60), reader.next()).await;
        let batch = read.expect("rows in time").expect("read").expect("a batch");
        for frame in &batch {
            let Frame::Data { payload, .. } = frame else {
                continue;
            };
            match pgoutput::parse(payload).expect("pgoutput") {
                Message::Insert(_) => seen += 1,
                Message::Commit(commit) if seen >= rows => return commit.end_lsn,
                _ => {}
            }
        }
    }
}

async fn run(sql: &mut ReplicationConnection, query: &str) -> Vec<Vec<Option<String>>> {
    let answered = sql.query(query).await;
    answered.unwrap_or_else(|error| panic!("{query}: {error:?}"))
}

async fn scalar(sql: &mut ReplicationConnection, query: &str) -> String {
    let mut rows = run(sql, query).await;
    rows.remove(0).remove(0).unwrap_or_default()
}

#[tokio::test]
async fn commands_answer_and_errors_keep_their_sqlstate() {
    let server = server().await;
    let mut sql = connect(&server).await;
    assert!(!sql.server_version().is_empty());
    let identity = sql.identify_system().await.expect("identity");
    assert_eq!(
        (identity.timeline, identity.database.as_deref()),
        (1, Some("postgres"))
    );
    assert!(identity.flushed > Lsn::ZERO);
    assert_eq!(sql.timeline_history(1).await.expect("history"), []);
    let refused = sql.query("SELECT nonsense").await;
    assert!(matches!(refused, Err(WalError::Server(error)) if error.sqlstate == "42703"));
    assert_eq!(scalar(&mut sql, "SELECT '1 day'::interval").await, "1 day");
    let slot = sql
        .create_slot("s", SlotKind::Permanent, Snapshot::Export)
        .await;
    let slot = slot.expect("a slot");
    assert!(slot.consistent_point > Lsn::ZERO && slot.snapshot_name.is_some());
    sql.drop_slot("s", true).await.expect("dropped");
}

/// A slot cannot be made while a transaction writes; who gives up leaves nothing behind.
#[tokio::test]
async fn an_abandoned_slot_creation_leaves_no_slot() {
    let server = server().await;
    let mut sql = connect(&server).await;
    let mut writer = connect(&server).await;
    run(&mut writer, "BEGIN").await;
    run(&mut writer, "SELECT pg_current_xact_id()").await;
    let mut waiting = connect(&server).await;
    let create = waiting.create_slot("w", SlotKind::Permanent, Snapshot::None);
    let created = tokio::time::timeout(Duration::from_millis(500), create).await;
    assert!(created.is_err());
    let gone = waiting.query("SELECT 1").await;
    assert!(matches!(gone, Err(WalError::ThreadGone)));
    waiting.terminate().await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while scalar(&mut sql, "SELECT count(*) FROM pg_replication_slots").await != "0" {
        assert!(
            Instant::now() < deadline,
            "the abandoned slot is still there"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    run(&mut writer, "COMMIT").await;
}

#[tokio::test]
async fn logins_by_scram_and_md5_are_admitted_or_refused() {
    let server = server().await;
    let mut sql = connect(&server).await;
    run(&mut sql, "CREATE USER scram REPLICATION PASSWORD 'p:w'").await;
    run(&mut sql, "SET password_encryption = 'md5'").await;
    run(&mut sql, "CREATE USER md5 REPLICATION PASSWORD 'pw'").await;
    let rules = server.data_dir().join("pg_hba.conf");
    let lines = "host all scram all scram-sha-256\nhost all md5 all md5\nhost all all all trust\n";
    std::fs::write(rules, lines).expect("rules");
    run(&mut sql, "SELECT pg_reload_conf(), pg_sleep(0.5)").await;
    for (login, sqlstate) in [
        ("scram:p%3Aw", None),
        ("md5:pw", None),
        ("scram:x", Some("28P01")),
        ("md5:x", Some("28P01")),
    ] {
        let opened = ReplicationConnection::connect(&dsn(&server, login), "test").await;
        match (opened, sqlstate) {
            (Ok(_), None) => {}
            (Err(WalError::Server(error)), Some(code)) => assert_eq!(error.sqlstate, code),
            (opened, _) => panic!("{login}: {opened:?}"),
        }
    }
    let missing = ReplicationConnection::connect(&dsn(&server, "scram"), "test").await;
    assert!(matches!(
        missing,
        Err(WalError::Auth(AuthError::PasswordMissing))
    ));
}

#[tokio::test]
async fn a_stream_lives_through_a_full_queue_and_reports_what_is_confirmed() {
    let mut server = server().await;
    let mut sql = connect(&server).await;
    run(
        &mut sql,
        "CREATE TABLE public.t (id int PRIMARY KEY, x text)",
    )
    .await;
    run(&mut sql, "CREATE PUBLICATION p FOR TABLE public.t").await;
    let created = sql.create_slot("s", SlotKind::Permanent, Snapshot::None);
    created.await.expect("a slot");
    let missing = connect(&server).await.start(&options("nope")).await;
    assert!(matches!(missing, Err(WalError::SlotMissing { .. })));

    let started = connect(&server).await.start(&options("s")).await;
    let mut reader = started.expect("started");
    let handle = reader.handle();
    let active = connect(&server).await.start(&options("s")).await;
    assert!(
        matches!(active, Err(WalError::SlotActive { pid: Some(_), .. })),
        "{active:?}"
    );

    run(&mut sql, "INSERT INTO public.t VALUES (1, 'one')").await;
    let end = read_rows(&mut reader, 1).await;
    handle.confirm(end);
    let confirmed = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 's'";
    let deadline = Instant::now() + Duration::from_secs(5);
    while scalar(&mut sql, confirmed).await != end.to_string() {
        assert!(
            Instant::now() < deadline,
            "what is confirmed is not reported"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Forty megabytes do not fit the queue; the server must not lose patience while nobody takes any.
    let fill = "INSERT INTO public.t SELECT i, repeat('x', 1000) FROM generate_series(2, 40001) i";
    run(&mut sql, fill).await;
    tokio::time::sleep(SENDER_TIMEOUT * 3).await;
    let waiting = handle.stats().bytes();
    assert!(
        waiting < 12 << 20,
        "{waiting} bytes were read although nobody took them"
    );
    read_rows(&mut reader, 40_000).await;

    // One message larger than buffer and queue together.
    let large = "INSERT INTO public.t VALUES (0, repeat('y', 40 << 20))";
    run(&mut sql, large).await;
    let end = read_rows(&mut reader, 1).await;
    handle.confirm(end);
    handle.stop(Duration::from_secs(5)).await.expect("stopped");
    assert_eq!(scalar(&mut sql, confirmed).await, end.to_string());
    let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 's'";
    assert_eq!(scalar(&mut sql, active).await, "f");
    while reader.next().await.expect("read").is_some() {}

    let started = connect(&server).await.start(&options("s")).await;
    let mut reader = started.expect("started");
    sql.terminate().await;
    let stopping = tokio::spawn(async move { server.stop_fast().await });
    let ended = loop {
        match reader.next().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(ended, Err(WalError::ServerShutdown)), "{ended:?}");
    assert!(reader.next().await.expect("read").is_none());
    stopping.await.expect("joined").expect("a fast shutdown");
}
