//! Capture's side of a backfill: which rows come in chunks, with which versions, whatever happens at the source.
//! The requests are written here, and the copy stream is read here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, kv};
use millrace_event::work::{
    COPIES, Copied, CopyApplied, CopyRequest, CopyStatus, Part, TableRequest, Wanted,
};
use millrace_event::{Lsn, TableName, header, subject};
use millrace_lab::Pipeline;
use serde_json::Value;

use crate::copy_faults::{held, small_copy_stream};
use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];

/// A stage whose capture runs alone, and what its sink would say to it.
struct Line {
    stage: Stage,
    capture: Pipeline,
    jetstream: jetstream::Context,
    copies: kv::Store,
}

/// A message of the copy stream.
#[derive(Debug)]
enum Message {
    /// An attempt begins.
    Mark,
    Rows {
        table: String,
        attempt: String,
        reach: Option<Lsn>,
        rows: Vec<Value>,
    },
    Whole(Copied),
}

impl Line {
    async fn start(setting: Setting<'_>) -> Self {
        Self::on(Stage::set(setting).await).await
    }

    async fn on(stage: Stage) -> Self {
        let mut capture = stage.start_with(&CAPTURE);
        Stage::readyz(&mut capture, 200, "streaming").await;
        let jetstream = jetstream::new(stage.nats.client().await.expect("nats"));
        let bucket = subject::bucket_name("shop", COPIES);
        let copies = jetstream.get_key_value(bucket).await.expect("bucket");
        Self {
            stage,
            capture,
            jetstream,
            copies,
        }
    }

    async fn ask(&self, id: &str, tables: &[(&str, Wanted)]) {
        let tables = tables.iter().map(|(table, rows)| TableRequest {
            table: TableName::new("public", *table),
            rows: rows.clone(),
        });
        let request = CopyRequest {
            id: id.to_owned(),
            tables: tables.collect(),
        };
        let value = serde_json::to_vec(&request).expect("json");
        let put = self.copies.put("request.replica", value.into());
        put.await.expect("request");
    }

    async fn applied(&self, id: &str, after: &[(&str, &[String])]) {
        let after = after
            .iter()
            .map(|(table, key)| (TableName::new("public", *table), key.to_vec()));
        let applied = CopyApplied {
            request: id.to_owned(),
            stream_seq: 0,
            after: after.collect(),
        };
        let value = serde_json::to_vec(&applied).expect("json");
        let put = self.copies.put("applied.replica", value.into());
        put.await.expect("applied");
    }

    /// Waits until the status of this request is as wanted.
    async fn told(&self, id: &str, wanted: impl Fn(&CopyStatus) -> bool) -> CopyStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let entry = self.copies.get("status.replica").await.expect("status");
            let status = entry.map(|entry| serde_json::from_slice::<CopyStatus>(&entry));
            let status = status.map(|status| status.expect("a status"));
            if let Some(status) = &status
                && status.request == id
                && wanted(status)
            {
                return status.clone();
            }
            assert!(
                Instant::now() < deadline,
                "{status:?}\n{}",
                self.capture.logs()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn copied(&self, id: &str, tables: usize) -> CopyStatus {
        self.told(id, |status| status.copied.len() == tables).await
    }

    async fn raw(&self, name: String) -> Vec<jetstream::message::StreamMessage> {
        let Ok(mut stream) = self.jetstream.get_stream(name).await else {
            return Vec::new();
        };
        let state = stream.info().await.expect("info").state.clone();
        if state.messages == 0 {
            return Vec::new();
        }
        let mut messages = Vec::new();
        for seq in state.first_sequence..=state.last_sequence {
            messages.push(stream.get_raw_message(seq).await.expect("message"));
        }
        messages
    }

    /// What lies on the copy stream.
    async fn copy_stream(&self) -> Vec<Message> {
        let name = subject::copy_stream_name("shop", "replica");
        let messages = self.raw(name).await;
        messages
            .iter()
            .map(|message| {
                let text = |name: &str| message.headers.get(name).map(ToString::to_string);
                if text(header::COPY_NUMBER).is_none() {
                    return Message::Mark;
                }
                if *message.subject == *subject::copied("shop", "replica") {
                    assert_eq!(text(header::COPY_REACH), None);
                    return Message::Whole(serde_json::from_slice(&message.payload).expect("json"));
                }
                Message::Rows {
                    table: message
                        .subject
                        .rsplit('.')
                        .next()
                        .expect("a table")
                        .to_owned(),
                    attempt: text(header::COPY).expect("an attempt"),
                    reach: text(header::COPY_REACH).map(|lsn| lsn.parse().expect("an LSN")),
                    rows: lines(&message.payload),
                }
            })
            .collect()
    }

    /// Waits until so many parts are whole on the copy stream.
    async fn parts(&self, wanted: usize) -> Vec<Message> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.copy_stream().await;
            if parts(&found).len() >= wanted {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "{} parts\n{}",
                parts(&found).len(),
                self.capture.logs()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A replica of `t` by the stream, then the copy stream, then the sweep.
    async fn replica(&self) -> BTreeMap<String, String> {
        let end = self
            .stage
            .source_text("SELECT pg_current_wal_insert_lsn()::text")
            .await;
        let end: Lsn = end.parse().expect("an LSN");
        let mut held = Replica::default();
        let deadline = Instant::now() + PATIENCE;
        // Heartbeats bring an idle source's stream there.
        let changes = loop {
            let messages = self.raw(subject::stream_name("shop")).await;
            let changes: Vec<Value> = messages
                .iter()
                .flat_map(|message| lines(&message.payload))
                .collect();
            let newest = changes.iter().filter_map(|line| line["end_lsn"].as_u64());
            if newest.max() >= Some(end.0) {
                break changes;
            }
            assert!(Instant::now() < deadline, "{}", self.capture.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        for change in changes.iter().filter(|line| line.get("op").is_some()) {
            held.put(change);
        }
        let copied = self.copy_stream().await;
        for row in rows(&copied, "t") {
            held.put(row);
        }
        let begun = parts(&copied).iter().map(|part| part.lsn).min();
        let begun = begun.expect("a part");
        held.0
            .into_iter()
            .filter(|(_, (version, _))| commit_lsn(version) >= begun)
            .filter_map(|(key, (_, row))| Some((key, row?)))
            .collect()
    }

    /// The source's `t`.
    async fn source(&self) -> BTreeMap<String, String> {
        let rows = self
            .stage
            .source
            .query("SELECT id::text, v FROM t", &[])
            .await;
        let rows = rows.expect("rows");
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

/// Rows by key, guarded by their versions.
#[derive(Default)]
struct Replica(BTreeMap<String, (String, Option<String>)>);

impl Replica {
    fn put(&mut self, change: &Value) {
        let key = change["key"]["id"].to_string();
        let version = change["source"]["version"].as_str().expect("a version");
        let row = change["after"]["v"].as_str().map(str::to_owned);
        let stored = self.0.get(&key).map(|(version, _)| version.as_str());
        if stored.is_none_or(|stored| version > stored) {
            self.0.insert(key, (version.to_owned(), row));
        }
    }
}

fn lines(payload: &[u8]) -> Vec<Value> {
    let lines = payload.split(|byte| *byte == b'\n');
    lines
        .map(|line| serde_json::from_slice(line).expect("a line"))
        .collect()
}

fn commit_lsn(version: &str) -> Lsn {
    Lsn(u64::from_str_radix(&version[8..24], 16).expect("a version"))
}

fn version_of(row: &Value) -> Lsn {
    commit_lsn(row["source"]["version"].as_str().expect("a version"))
}

fn rows<'m>(messages: &'m [Message], of: &str) -> Vec<&'m Value> {
    let rows = messages.iter().filter_map(|message| match message {
        Message::Rows { table, rows, .. } if table == of => Some(rows),
        _ => None,
    });
    rows.flatten().collect()
}

fn ids(messages: &[Message]) -> Vec<i64> {
    let rows = rows(messages, "t");
    rows.iter()
        .map(|row| row["after"]["id"].as_i64().expect("an id"))
        .collect()
}

fn parts(messages: &[Message]) -> Vec<&Copied> {
    let parts = messages.iter().filter_map(|message| match message {
        Message::Whole(copied) => Some(copied),
        _ => None,
    });
    parts.collect()
}

fn chunks() -> Wanted {
    slowly(None)
}

fn slowly(rows_per_second: Option<u32>) -> Wanted {
    Wanted::Chunks {
        after: None,
        filter: None,
        rows_per_second,
        paused: false,
    }
}

async fn filled(rows: u32) -> Line {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, {rows}) i; ANALYZE t"
        ))
        .await;
    Line::on(stage).await
}

/// Waits until a query at the source is true.
async fn until(stage: &Stage, sql: &str) {
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(&format!("SELECT ({sql})::text")).await != "true" {
        assert!(Instant::now() < deadline, "{sql}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn chunks_cover_a_table_while_it_changes() {
    let line = filled(20_000).await;
    line.ask("r1", &[("t", chunks())]).await;
    let deadline = Instant::now() + PATIENCE;
    let mut n = 0;
    loop {
        n += 1;
        let sql = format!(
            "UPDATE t SET v = 'changed {n}' WHERE id = {}; DELETE FROM t WHERE id = {};
             INSERT INTO t VALUES ({}, 'new {n}'); UPDATE t SET id = -id WHERE id = {}",
            n * 7919 % 20_000,
            n * 104_729 % 20_000,
            30_000 + n,
            n * 31 % 20_000 + 1
        );
        line.stage.sql(&sql).await;
        let entry = line.copies.get("status.replica").await.expect("status");
        let status = entry.map(|entry| serde_json::from_slice::<CopyStatus>(&entry));
        if status.is_some_and(|status| status.expect("a status").copied.len() == 1) {
            break;
        }
        assert!(Instant::now() < deadline, "{}", line.capture.logs());
    }
    let status = line.copied("r1", 1).await;
    assert_eq!(status.estimates[0].1, 20_000);
    assert_eq!((status.cut.len(), status.loading), (0, None));
    let messages = line.copy_stream().await;
    let whole = parts(&messages);
    assert!(whole.len() > 3, "{} chunks", whole.len());
    let counted: u64 = whole.iter().map(|part| part.rows).sum();
    assert_eq!(counted as usize, ids(&messages).len());
    let last = |part: &&Copied| matches!(part.part, Part::Chunk { last: true, .. });
    assert_eq!(whole.iter().position(last), Some(whole.len() - 1));
    let begun = whole[0].lsn;
    assert!(whole.iter().all(|part| part.lsn == begun));
    assert!(ids(&messages).is_sorted_by(|one, next| one < next));
    for message in &messages {
        if let Message::Rows { reach, rows, .. } = message {
            let reach = reach.expect("a chunk has a reach");
            for row in rows {
                assert!(
                    (begun..reach).contains(&version_of(row)),
                    "{row} {begun} {reach}"
                );
                assert_eq!(
                    (row["op"].as_str(), row["source"]["seq"].as_u64()),
                    (Some("r"), Some(0))
                );
            }
        }
    }
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn keys_of_many_columns_and_any_text_are_followed() {
    let line = Line::start(Setting {
        schema: "CREATE TYPE size AS ENUM ('small', 'large', 'huge');
                 CREATE TABLE k (v text, s size, name text COLLATE \"C\", n numeric(8, 2), c char(3),
                                 PRIMARY KEY (s, name, n, c))",
        tables: &[("public.k", "")],
        ..Setting::default()
    })
    .await;
    line.stage
        .sql(
            "INSERT INTO k SELECT 'v', (ARRAY['huge', 'small', 'large'])[i % 3 + 1]::size,
             (ARRAY['', 'it''s', 'back\\slash', 'tab' || chr(9), 'Ä', 'NULL', '\\N'])[i % 7 + 1], i / 100.0, 'x'
             FROM generate_series(1, 3000) i",
        )
        .await;
    line.ask("r1", &[("k", chunks())]).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert!(parts(&messages).len() > 2);
    let mut keys: Vec<String> = rows(&messages, "k")
        .iter()
        .map(|row| row["key"].to_string())
        .collect();
    keys.sort();
    keys.dedup();
    assert_eq!((keys.len(), rows(&messages, "k").len()), (3_000, 3_000));
}

/// Waits until the server has taken the setting over: its checkpointer reads it, whenever it gets to it.
async fn until_commits_wait(stage: &Stage) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let client = stage.postgres.connect("source").await.expect("connects");
        let probe = tokio::spawn(async move {
            let probe = "SELECT pg_logical_emit_message(true, 'probe', '')";
            client.batch_execute(probe).await.expect("commits");
        });
        while !probe.is_finished() {
            // A commit that waits no more is a commit all the same.
            let cancel = "SELECT count(pg_cancel_backend(pid))::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            if stage.source_text(cancel).await != "0" {
                return probe.await.expect("commits");
            }
        }
        assert!(Instant::now() < deadline, "no commit waits for a standby");
    }
}

/// A transaction whose commit waits for a standby that is not there.
pub(crate) async fn in_limbo(stage: &Stage, sql: &'static str) -> tokio::task::JoinHandle<()> {
    stage
        .postgres
        .set("synchronous_standby_names", "nobody")
        .await
        .expect("set");
    let client = stage.postgres.connect("source").await.expect("connects");
    until_commits_wait(stage).await;
    let task = tokio::spawn(async move {
        client.batch_execute(sql).await.expect("commits at last");
    });
    until(
        stage,
        "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'",
    )
    .await;
    task
}

pub(crate) async fn release(stage: &Stage) {
    stage
        .postgres
        .set("synchronous_standby_names", "")
        .await
        .expect("set");
}

#[tokio::test]
async fn a_commit_that_is_not_visible_yet_wins_over_the_chunk_that_lacks_it() {
    let line = filled(3_000).await;
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    let held = in_limbo(
        &line.stage,
        "UPDATE t SET v = 'late' WHERE id > 2900; DELETE FROM t WHERE id = 2800",
    )
    .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let old = rows(&messages, "t");
    assert!(old.iter().all(|row| row["after"]["v"] != "late"));
    // The stream told of it before: the chunks since then must not rise above it.
    let versions: Vec<Lsn> = old.iter().map(|row| version_of(row)).collect();
    assert_eq!(versions.iter().max(), versions.last());
    release(&line.stage).await;
    held.await.expect("commits");
    let replica = line.replica().await;
    assert_eq!(replica.values().filter(|v| *v == "late").count(), 100);
    assert_eq!(replica, line.source().await);
}

#[tokio::test]
async fn nothing_is_read_while_a_commit_from_before_is_not_visible_even_by_a_new_capture() {
    let mut line = filled(100).await;
    let held = in_limbo(&line.stage, "UPDATE t SET v = 'late' WHERE id = 7").await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    line.ask("r1", &[("t", chunks())]).await;
    let told = |status: &CopyStatus| {
        let mut told = status.troubles.iter();
        told.any(|(_, text)| text.contains("E1122") && text.contains("SyncRep"))
    };
    line.told("r1", told).await;
    assert!(
        line.capture.logs().contains("E1122"),
        "{}",
        line.capture.logs()
    );
    assert!(ids(&line.copy_stream().await).is_empty());
    release(&line.stage).await;
    held.await.expect("commits");
    let status = line.copied("r1", 1).await;
    assert!(status.troubles.is_empty(), "{status:?}");
    let messages = line.copy_stream().await;
    let late = rows(&messages, "t");
    let late = late.iter().find(|row| row["after"]["id"] == 7);
    assert_eq!(late.expect("the row")["after"]["v"], "late");
}

#[tokio::test]
async fn an_open_transaction_is_waited_for_and_named() {
    let line = filled(100).await;
    let other = line
        .stage
        .postgres
        .connect("source")
        .await
        .expect("connects");
    let begin = "SET application_name = 'the import'; BEGIN; UPDATE t SET v = 'open' WHERE id = 1";
    other.batch_execute(begin).await.expect("begins");
    line.ask("r1", &[("t", chunks())]).await;
    let told = |status: &CopyStatus| {
        let mut told = status.troubles.iter();
        told.any(|(_, text)| text.contains("E1122") && text.contains("the import"))
    };
    line.told("r1", told).await;
    assert!(ids(&line.copy_stream().await).is_empty());
    other.batch_execute("COMMIT").await.expect("commits");
    line.copied("r1", 1).await;
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_table_that_is_rewritten_before_the_lock_is_granted_is_read_as_it_is_then() {
    let line = filled(1_000).await;
    let other = line
        .stage
        .postgres
        .connect("source")
        .await
        .expect("connects");
    let rewrite = "BEGIN; ALTER TABLE t ALTER COLUMN v TYPE text USING v || '!'";
    // The barrier must not wait for the ALTER: it begins between two chunks.
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    other.batch_execute(rewrite).await.expect("rewrites");
    until(
        &line.stage,
        "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'",
    )
    .await;
    let before = ids(&line.copy_stream().await);
    other.batch_execute("COMMIT").await.expect("commits");
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), (1..=1_000).collect::<Vec<i64>>());
    let rewritten = rows(&messages, "t");
    let rewritten = rewritten
        .iter()
        .filter(|row| row["after"]["v"].as_str().is_some_and(|v| v.ends_with('!')));
    assert_eq!(rewritten.count(), 1_000 - before.len());
    assert!(
        line.capture.logs().contains("its chunk is read again"),
        "{}",
        line.capture.logs()
    );
}

#[tokio::test]
async fn a_first_chunk_that_waited_for_a_rewrite_has_its_rows() {
    let line = Line::start(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)",
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i;
             INSERT INTO u SELECT i, 'row ' || i FROM generate_series(1, 1500) i",
        )
        .await;
    let other = line.stage.postgres.connect("source").await;
    let other = other.expect("connects");
    line.ask("r1", &[("u", slowly(Some(1_000))), ("t", chunks())])
        .await;
    // The barrier must not wait for it.
    line.parts(1).await;
    let rewrite = "BEGIN; ALTER TABLE t ALTER COLUMN v TYPE text USING v || '!'";
    other.batch_execute(rewrite).await.expect("rewrites");
    until(
        &line.stage,
        "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'",
    )
    .await;
    other.batch_execute("COMMIT").await.expect("commits");
    line.copied("r1", 2).await;
    let messages = line.copy_stream().await;
    let rewritten = rows(&messages, "t");
    let rewritten = rewritten
        .iter()
        .filter(|row| row["after"]["v"].as_str().is_some_and(|v| v.ends_with('!')));
    // Under a snapshot from before the rewrite the table has no rows.
    assert_eq!(rewritten.count(), 100);
}

#[tokio::test]
async fn a_source_that_takes_no_heartbeat_and_a_table_that_may_not_be_read_are_named() {
    let mut stage = Stage::set(Setting {
        schema: "CREATE TABLE closed (id int PRIMARY KEY, v text); CREATE TABLE t (id int PRIMARY KEY, v text);
                 INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i;
                 CREATE PUBLICATION millrace_shop FOR TABLE closed, t WITH (publish_via_partition_root = true);
                 CREATE ROLE capturer LOGIN REPLICATION PASSWORD 'capturing';
                 GRANT SELECT ON closed, t TO capturer;
                 CREATE FUNCTION emit(what text) RETURNS void LANGUAGE plpgsql AS $$ DECLARE f regprocedure; BEGIN
                 FOR f IN SELECT oid FROM pg_proc WHERE proname = 'pg_logical_emit_message' LOOP
                 EXECUTE format(what, f); END LOOP; END $$",
        tables: &[("public.closed", ""), ("public.t", "")],
        ..Setting::default()
    })
    .await;
    stage
        .sql("SELECT emit('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC')")
        .await;
    let source = format!(
        "postgres://capturer:capturing@127.0.0.1:{}/source",
        stage.postgres.port()
    );
    let config = stage.config(&source, &stage.postgres.url("target"), &stage.nats.url());
    stage.folder = config.write().expect("folder");
    let line = Line::on(stage).await;
    line.stage
        .sql("REVOKE SELECT ON closed FROM capturer")
        .await;
    line.ask("r1", &[("closed", chunks()), ("t", chunks())])
        .await;
    let tells = |status: &CopyStatus, table: &str, code: &str| {
        let mut told = status.troubles.iter();
        told.any(|(name, text)| name.table == table && text.starts_with(code))
    };
    line.told("r1", |status| tells(status, "t", "E1125")).await;
    line.stage
        .sql("SELECT emit('GRANT EXECUTE ON FUNCTION %s TO capturer')")
        .await;
    line.told("r1", |status| tells(status, "closed", "E1116"))
        .await;
    line.copied("r1", 1).await;
    line.stage.sql("GRANT SELECT ON closed TO capturer").await;
    let status = line.copied("r1", 2).await;
    assert!(status.troubles.is_empty(), "{status:?}");
    assert_eq!(ids(&line.copy_stream().await).len(), 100);
}

#[tokio::test]
async fn a_column_of_another_type_is_noticed_between_chunks() {
    let line = filled(2_000).await;
    line.ask("r1", &[("t", slowly(Some(1_000)))]).await;
    line.parts(1).await;
    line.stage
        .sql("ALTER TABLE t ADD COLUMN more int DEFAULT 5")
        .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let with = rows(&messages, "t");
    let with = with.iter().filter(|row| row["after"]["more"] == 5).count();
    assert!(with > 0 && with < ids(&messages).len());
}

#[tokio::test]
async fn a_backfill_goes_on_behind_what_the_sink_has_applied() {
    let mut line = filled(2_000).await;
    line.ask("r1", &[("t", slowly(Some(500)))]).await;
    let messages = line.parts(4).await;
    let applied = parts(&messages)[1].clone();
    let Part::Chunk {
        after: Some(after), ..
    } = &applied.part
    else {
        panic!("{applied:?}");
    };
    line.applied("r1", &[("t", after)]).await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    let mut attempts: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for message in &messages {
        if let Message::Rows { attempt, rows, .. } = message {
            let ids = rows
                .iter()
                .map(|row| row["after"]["id"].as_i64().expect("an id"));
            attempts.entry(attempt.clone()).or_default().extend(ids);
        }
    }
    let again = attempts.remove("r1/2").expect("a second attempt");
    let first: i64 = after[0].parse().expect("a number");
    assert_eq!(again, (first + 1..=2_000).collect::<Vec<i64>>());
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_condition_and_keys_select_rows_and_a_wrong_one_holds_nothing_else_up() {
    let line = Line::start(Setting {
        schema: "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE u (id int PRIMARY KEY, v text)",
        tables: &[("public.t", ""), ("public.u", "")],
        ..Setting::default()
    })
    .await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 3000) i;
             INSERT INTO u SELECT i, 'row ' || i FROM generate_series(1, 100) i",
        )
        .await;
    let keys = ["7", "2999", "5000"].map(|id| vec![id.to_owned()]);
    line.ask(
        "r1",
        &[(
            "t",
            Wanted::Keys {
                keys: keys.to_vec(),
            },
        )],
    )
    .await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), [7, 2999]);
    assert_eq!(parts(&messages)[0].part, Part::Keys);

    let part = |filter: &str, after: Option<&str>| Wanted::Chunks {
        after: after.map(|id| vec![id.to_owned()]),
        filter: Some(filter.to_owned()),
        rows_per_second: None,
        paused: false,
    };
    line.ask("r2", &[("t", part("id % 2 = 0 -- even", Some("10")))])
        .await;
    line.copied("r2", 1).await;
    let even = ids(&line.copy_stream().await).split_off(2);
    assert_eq!(even, (6..=1_500).map(|n| n * 2).collect::<Vec<i64>>());

    line.ask("r3", &[("t", part("nonsense > 1", None)), ("u", chunks())])
        .await;
    let status = line.copied("r3", 1).await;
    assert_eq!(status.copied[0].table, "u");
    let status = line.told("r3", |status| !status.troubles.is_empty()).await;
    let (table, told) = &status.troubles[0];
    assert!(table.table == "t" && told.contains("E1124"), "{told}");
    assert!(told.contains("nonsense"), "{told}");
    assert!(
        !line.capture.logs().contains("trying again\""),
        "capture goes on"
    );
}

#[tokio::test]
async fn a_rate_is_kept_and_a_pause_holds_until_another_request() {
    let line = filled(1_000).await;
    let paused = Wanted::Chunks {
        after: None,
        filter: None,
        rows_per_second: None,
        paused: true,
    };
    line.ask("r1", &[("t", paused)]).await;
    line.told("r1", |_| true).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(line.copy_stream().await.is_empty());
    let began = Instant::now();
    line.ask("r2", &[("t", slowly(Some(400)))]).await;
    line.copied("r2", 1).await;
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert_eq!(ids(&line.copy_stream().await).len(), 1_000);
    // Replaced in its middle, a request ends.
    line.ask("r3", &[("t", slowly(Some(100)))]).await;
    line.told("r3", |status| status.attempt > 0).await;
    line.ask("r4", &[("t", chunks())]).await;
    line.copied("r4", 1).await;
    assert!(
        !line.capture.logs().contains("E1121"),
        "{}",
        line.capture.logs()
    );
}

#[tokio::test]
async fn large_rows_are_cut_into_chunks_that_fit() {
    let line = Line::start(Setting::default()).await;
    line.stage
        .sql(
            "INSERT INTO t SELECT i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 8192) j)
             FROM generate_series(1, 80) i",
        )
        .await;
    line.ask("r1", &[("t", chunks())]).await;
    line.copied("r1", 1).await;
    let messages = line.copy_stream().await;
    assert_eq!(ids(&messages), (1..=80).collect::<Vec<i64>>());
    let sizes: Vec<u64> = parts(&messages).iter().map(|part| part.rows).collect();
    assert!(
        sizes.len() > 2 && sizes.iter().all(|rows| *rows <= 33),
        "{sizes:?}"
    );
    assert_eq!(line.replica().await, line.source().await);
}

#[tokio::test]
async fn a_load_that_was_cut_off_is_left_to_chunks() {
    let mut line = filled(200_000).await;
    // The load stands still before a sink that does not read, so it is there to be cut off.
    let jetstream = small_copy_stream(&line.stage).await;
    line.ask("r1", &[("t", Wanted::Load)]).await;
    line.told("r1", |status| status.loading.is_some()).await;
    line.capture.kill9();
    let line = Line::on(line.stage).await;
    let status = line.told("r1", |status| !status.cut.is_empty()).await;
    assert_eq!((status.cut[0].table.as_str(), status.loading), ("t", None));
    let left = held(&jetstream).await;
    assert!(left > 0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(held(&jetstream).await, left);
}
