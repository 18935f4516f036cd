//! A capture that runs alone, and a test in the place of its sink.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, kv};
use millrace_event::work::{
    COPIES, Copied, CopyApplied, CopyRequest, CopyStatus, TableRequest, Wanted,
};
use millrace_event::{BinaryType, Lsn, TableName, header, subject};
use millrace_lab::Pipeline;
use serde_json::Value;

use crate::stage::{PATIENCE, Setting, Stage};

const CAPTURE: [&str; 3] = ["run", "--only", "capture"];

/// A stage whose capture runs alone, and what its sink would say to it.
pub(super) struct Line {
    pub(super) stage: Stage,
    pub(super) capture: Pipeline,
    pub(super) jetstream: jetstream::Context,
    pub(super) copies: kv::Store,
}

/// A message of the copy stream.
#[derive(Debug)]
pub(super) enum Message {
    /// An attempt begins.
    Mark,
    Rows {
        table: String,
        attempt: String,
        reach: Option<Lsn>,
        rows: Vec<Value>,
    },
    Whole {
        copied: Copied,
        reach: Option<Lsn>,
    },
}

impl Line {
    pub(super) async fn start(setting: Setting<'_>) -> Self {
        Self::on(Stage::set(setting).await).await
    }

    pub(super) async fn on(stage: Stage) -> Self {
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

    pub(super) async fn ask(&self, id: &str, tables: &[(&str, Wanted)]) {
        self.ask_for(id, tables, &[]).await;
    }

    /// Asks as a sink that takes loads in binary format does.
    pub(super) async fn ask_for_binary(&self, id: &str, tables: &[(&str, Wanted)]) {
        self.ask_for(id, tables, &BinaryType::TYPE_OIDS).await;
    }

    async fn ask_for(&self, id: &str, tables: &[(&str, Wanted)], binary: &[u32]) {
        let tables = tables.iter().map(|(table, rows)| TableRequest {
            table: TableName::new("public", *table),
            began_us: 0,
            rows: rows.clone(),
        });
        let request = CopyRequest {
            id: id.to_owned(),
            tables: tables.collect(),
            binary: binary.to_vec(),
        };
        let value = serde_json::to_vec(&request).expect("json");
        let put = self.copies.put("request.replica", value.into());
        put.await.expect("request");
    }

    pub(super) async fn applied(&self, id: &str, after: &[(&str, &[String])]) {
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
    pub(super) async fn told(&self, id: &str, wanted: impl Fn(&CopyStatus) -> bool) -> CopyStatus {
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

    pub(super) async fn copied(&self, id: &str, tables: usize) -> CopyStatus {
        self.told(id, |status| status.copied.len() == tables).await
    }

    pub(super) async fn raw(&self, name: String) -> Vec<jetstream::message::StreamMessage> {
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
    pub(super) async fn copy_stream(&self) -> Vec<Message> {
        let name = subject::copy_stream_name("shop", "replica");
        let messages = self.raw(name).await;
        messages
            .iter()
            .map(|message| {
                let text = |name: &str| message.headers.get(name).map(ToString::to_string);
                if text(header::COPY_NUMBER).is_none() {
                    return Message::Mark;
                }
                let reach = text(header::COPY_REACH).map(|lsn| lsn.parse().expect("an LSN"));
                if *message.subject == *subject::copied("shop", "replica") {
                    let copied = serde_json::from_slice(&message.payload).expect("json");
                    return Message::Whole { copied, reach };
                }
                Message::Rows {
                    table: message
                        .subject
                        .rsplit('.')
                        .next()
                        .expect("a table")
                        .to_owned(),
                    attempt: text(header::COPY).expect("an attempt"),
                    reach,
                    rows: lines(&message.payload),
                }
            })
            .collect()
    }

    /// Waits until so many parts are whole on the copy stream.
    pub(super) async fn parts(&self, wanted: usize) -> Vec<Message> {
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
    pub(super) async fn replica(&self) -> BTreeMap<String, String> {
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
    pub(super) async fn source(&self) -> BTreeMap<String, String> {
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
pub(super) struct Replica(BTreeMap<String, (String, Option<String>)>);

impl Replica {
    pub(super) fn put(&mut self, change: &Value) {
        let key = change["key"]["id"].to_string();
        let version = change["source"]["version"].as_str().expect("a version");
        let row = change["after"]["v"].as_str().map(str::to_owned);
        let stored = self.0.get(&key).map(|(version, _)| version.as_str());
        if stored.is_none_or(|stored| version > stored) {
            self.0.insert(key, (version.to_owned(), row));
        }
    }
}

pub(super) fn lines(payload: &[u8]) -> Vec<Value> {
    let lines = payload.split(|byte| *byte == b'\n');
    lines
        .map(|line| serde_json::from_slice(line).expect("a line"))
        .collect()
}

pub(super) fn commit_lsn(version: &str) -> Lsn {
    Lsn(u64::from_str_radix(&version[8..24], 16).expect("a version"))
}

pub(super) fn version_of(row: &Value) -> Lsn {
    commit_lsn(row["source"]["version"].as_str().expect("a version"))
}

pub(super) fn rows<'m>(messages: &'m [Message], of: &str) -> Vec<&'m Value> {
    let rows = messages.iter().filter_map(|message| match message {
        Message::Rows { table, rows, .. } if table == of => Some(rows),
        _ => None,
    });
    rows.flatten().collect()
}

pub(super) fn ids(messages: &[Message]) -> Vec<i64> {
    let rows = rows(messages, "t");
    rows.iter()
        .map(|row| row["after"]["id"].as_i64().expect("an id"))
        .collect()
}

pub(super) fn parts(messages: &[Message]) -> Vec<&Copied> {
    let parts = messages.iter().filter_map(|message| match message {
        Message::Whole { copied, .. } => Some(copied),
        _ => None,
    });
    parts.collect()
}

pub(super) fn chunks() -> Wanted {
    slowly(None)
}

pub(super) fn slowly(rows_per_second: Option<u32>) -> Wanted {
    Wanted::Chunks {
        after: None,
        filter: None,
        rows_per_second,
        paused: false,
    }
}

pub(super) async fn filled(rows: u32) -> Line {
    let stage = Stage::set(Setting::default()).await;
    stage
        .sql(&format!(
            "INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, {rows}) i; ANALYZE t"
        ))
        .await;
    Line::on(stage).await
}

/// Waits until a query at the source is true.
pub(super) async fn until(stage: &Stage, sql: &str) {
    let deadline = Instant::now() + PATIENCE;
    while stage.source_text(&format!("SELECT ({sql})::text")).await != "true" {
        assert!(Instant::now() < deadline, "{sql}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
