//! The initial copy: a sink asks for tables, and their existing rows go onto its copy stream.
//!
//! All tables of an attempt are read under one exported snapshot, that of a temporary slot. Its consistent
//! point C divides history: the snapshot shows exactly the transactions whose commit record lies below C. So
//! every row gets the version (epoch, C, 0), above every change that it includes and below every change
//! that it does not, and the sink drops what the stream still says of these tables below C. After a crash the
//! tables that were not finished are read under another snapshot, with another C.

mod text;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::context::PublishAckFuture;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{Context, kv};
use bytes::{Buf as _, Bytes};
use futures_util::StreamExt;
use millrace_config::{Code, Condition, Config, limits};
use millrace_connect::postgres::{Session, connect};
use millrace_event::work::{Copied, CopyApplied, CopyRequest, CopyStatus};
use millrace_event::{
    Before, Change, Datum, LineEnd, Lsn, Op, Relation, TableName, Transaction, header,
    quote_identifier, quote_literal, subject, write_change, write_line_end,
};
use tokio_postgres::Client;

use self::text::CopyRow;
use crate::Error;
use crate::life::{MESSAGE_OVERHEAD_BYTES, Source, Stream, slot_blocked};
use crate::replication::{ReplicationConnection, SlotKind, Snapshot};
use crate::source::SourceTable;
use crate::stream;

/// A message of the copy stream holds at most this many payload bytes, unless one row alone is larger. It
/// travels in chunks where the broker takes less.
const MESSAGE_BYTES: usize = 256 * 1024;

/// So many messages may be published and not acknowledged.
const UNACKED_MAX: usize = 32;

/// So many bytes may lie on the copy stream that the sink has not applied: a quarter of its limit.
const AHEAD_BYTES_MAX: u64 = stream::COPY_BYTES_MAX / 4;

/// How often requests are looked for, and the sink's progress while it is awaited.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// How long creating the temporary slot may wait for transactions that are open at the source.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Answers the sinks' requests.
pub(crate) struct Copier<'c> {
    config: &'c Config,
    source: &'c Source,
    stream: &'c Stream,
}

impl<'c> Copier<'c> {
    pub(crate) fn new(config: &'c Config, source: &'c Source, stream: &'c Stream) -> Self {
        Self {
            config,
            source,
            stream,
        }
    }

    /// Answers requests until it fails. Returns only with an error.
    pub(crate) async fn serve(&self) -> Result<Infallible, Error> {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            for sink in &self.config.sinks {
                self.look(&sink.name).await?;
            }
        }
    }

    async fn look(&self, sink: &str) -> Result<(), Error> {
        let name = &self.config.source.name;
        let request: Option<CopyRequest> =
            read(&self.stream.copies, &format!("request.{sink}")).await?;
        let status: Option<CopyStatus> =
            read(&self.stream.copies, &format!("status.{sink}")).await?;
        let Some(request) = request else {
            if status.is_some() {
                // The sink has everything: its stream may go.
                let stream_name = subject::copy_stream_name(name, sink);
                stream::delete_stream(&self.stream.jetstream, &stream_name).await?;
                for key in [format!("status.{sink}"), format!("applied.{sink}")] {
                    self.stream.copies.delete(&key).await.map_err(|error| {
                        Error::retry("a finished copy cannot be cleared away", error)
                    })?;
                }
            }
            return Ok(());
        };
        let status = status.filter(|status| status.request == request.id);
        let copied = status
            .as_ref()
            .map(|status| status.copied.clone())
            .unwrap_or_default();
        let remaining: Vec<_> = request
            .tables
            .iter()
            // A table that is not configured here (yet) waits; the sink goes on asking.
            .filter(|table| !copied.contains(table) && self.table(table).is_some())
            .cloned()
            .collect();
        if remaining.is_empty() {
            return Ok(());
        }
        let attempt = status.as_ref().map_or(0, |status| status.attempt) + 1;
        let status = CopyStatus {
            request: request.id,
            attempt,
            copied,
            last_seq: 0,
        };
        Box::pin(self.attempt(sink, status, &remaining)).await
    }

    fn table(&self, name: &TableName) -> Option<&SourceTable> {
        self.source.tables.iter().find(|table| table.name == *name)
    }

    /// Copies tables under one snapshot.
    async fn attempt(
        &self,
        sink: &str,
        mut status: CopyStatus,
        tables: &[TableName],
    ) -> Result<(), Error> {
        let replicas = usize::from(self.config.stream.replicas);
        let source = &self.config.source.name;
        stream::ensure_copy_stream(&self.stream.jetstream, source, sink, replicas).await?;
        self.store(sink, &status).await?;

        // The snapshot lives as long as this connection runs nothing else, and the slot as long as it lives.
        let mut exporter =
            ReplicationConnection::connect(&self.source.dsn, "millrace copy").await?;
        let slot = format!("millrace_{source}_copy_{:08x}", rand::random::<u32>());
        let created = exporter.create_slot(&slot, SlotKind::Temporary, Snapshot::Export);
        let created = match tokio::time::timeout(SLOT_TIMEOUT, created).await {
            Ok(created) => created?,
            Err(_) => {
                return Err(Error::retry_because(
                    slot_blocked(&self.source.client).await,
                ));
            }
        };
        let snapshot = created
            .snapshot_name
            .ok_or_else(|| Error::retry_because("the source exported no snapshot"))?;
        let session = Session {
            application_name: "millrace copy".to_owned(),
            options: Vec::new(),
        };
        let client = connect(&self.source.dsn, session).await?;
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
                quote_literal(&snapshot)
            ))
            .await?;
        let lsn = created.consistent_point;
        tracing::info!(sink, consistent_point = %lsn, tables = tables.len(), "copying");
        let mut out = CopyStream::new(self, sink, &status);
        for name in tables {
            let table = self.table(name).expect("only configured tables are copied");
            let rows = self.copy_table(&client, table, lsn, &mut out).await?;
            let epoch = self.source.epoch;
            let copied = Copied {
                table: name.clone(),
                epoch,
                lsn,
                rows,
            };
            let payload = serde_json::to_vec(&copied).expect("plain JSON");
            out.publish(subject::copied(source, sink), payload.into())
                .await?;
            status.last_seq = out.settle().await?;
            status.copied.push(name.clone());
            self.store(sink, &status).await?;
            tracing::info!(sink, table = %name, rows, "table copied");
        }
        exporter.terminate().await;
        Ok(())
    }

    async fn copy_table(
        &self,
        client: &Client,
        table: &SourceTable,
        lsn: Lsn,
        out: &mut CopyStream<'_>,
    ) -> Result<u64, Error> {
        let Config { source, .. } = self.config;
        let relation = Relation::new(
            &source.name,
            &self.source.facts.database,
            table.name.clone(),
            &table.shapes(),
            table.key_indexes(),
        );
        let now_us = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |age| i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
        let transaction = Transaction::new(self.source.epoch, lsn, 0, now_us);
        let columns: Vec<_> = table
            .columns
            .iter()
            .map(|(name, ..)| quote_identifier(name))
            .collect();
        let sql = format!(
            "COPY (SELECT {} FROM {}) TO STDOUT",
            columns.join(", "),
            table.name.quoted()
        );
        let subject = subject::copy(&source.name, out.sink, &table.name);
        let mut lines = pin!(client.copy_out(&sql).await?);
        let mut row = CopyRow::default();
        let mut payload = Vec::with_capacity(MESSAGE_BYTES + MESSAGE_BYTES / 4);
        let mut rows = 0_u64;
        while let Some(line) = lines.next().await {
            let line = line?;
            row.read(&line)
                .map_err(|error| Error::retry("COPY cannot be read", error))?;
            let data: Vec<Datum<'_>> = row.data().collect();
            let before = payload.len();
            if before > 0 {
                payload.push(b'\n');
            }
            let change = Change {
                op: Op::Read,
                before: Before::None,
                after: Some(&data),
                key: Some(&data),
                seq: 0,
                lsn,
                sent_at_us: now_us,
            };
            write_change(&mut payload, &relation, &transaction, &change)
                .map_err(|error| Error::retry("a row cannot be written", error))?;
            write_line_end(&mut payload, LineEnd::More);
            rows += 1;
            if payload.len() >= MESSAGE_BYTES {
                let full =
                    std::mem::replace(&mut payload, Vec::with_capacity(MESSAGE_BYTES * 5 / 4));
                let mut full = Bytes::from(full);
                // A large row does not share a message: it alone must keep to the limit of a row.
                if before > 0 && full.len() - before > MESSAGE_BYTES {
                    out.publish(subject.clone(), full.split_to(before)).await?;
                    full.advance(1);
                }
                if full.len() > limits::ROW_BYTES_MAX {
                    return Err(too_large(&table.name, full.len()));
                }
                out.publish(subject.clone(), full).await?;
            }
        }
        if !payload.is_empty() {
            out.publish(subject, payload.into()).await?;
        }
        Ok(rows)
    }

    async fn store(&self, sink: &str, status: &CopyStatus) -> Result<(), Error> {
        let value = serde_json::to_vec(status).expect("plain JSON");
        self.stream
            .copies
            .put(format!("status.{sink}"), value.into())
            .await
            .map(|_| ())
            .map_err(|error| Error::retry("a copy's progress cannot be stored", error))
    }
}

fn too_large(table: &TableName, bytes: usize) -> Error {
    Error::halt(Condition::new(
        Code::RowTooLarge,
        format!(
            "a row of table {table} needs {bytes} bytes on the stream and may have {}",
            limits::ROW_BYTES_MAX
        ),
        "make the row's values smaller in the source",
    ))
}

async fn read<T: serde::de::DeserializeOwned>(
    store: &kv::Store,
    key: &str,
) -> Result<Option<T>, Error> {
    let entry = store
        .get(key)
        .await
        .map_err(|error| Error::retry("copy requests cannot be read", error))?;
    entry
        .map(|value| serde_json::from_slice(&value))
        .transpose()
        .map_err(|error| Error::retry("a copy request cannot be understood", error))
}

/// The writing end of one attempt's copy stream. Messages are numbered, so that the sink notices a loss.
struct CopyStream<'c> {
    jetstream: &'c Context,
    copies: &'c kv::Store,
    stream_name: String,
    sink: &'c str,
    /// Whose rows these are: `<request>/<attempt>`.
    copy: String,
    request: String,
    number: u64,
    /// How many payload bytes the broker takes in one message.
    chunk_bytes: usize,
    unacked: VecDeque<(PublishAckFuture, u64)>,
    /// Acknowledged messages that the sink has not applied: sequence and bytes.
    ahead: VecDeque<(u64, u64)>,
    ahead_bytes: u64,
    last_seq: u64,
}

impl<'c> CopyStream<'c> {
    fn new(copier: &Copier<'c>, sink: &'c str, status: &CopyStatus) -> Self {
        let max_payload = copier.stream.jetstream.client().server_info().max_payload;
        Self {
            jetstream: &copier.stream.jetstream,
            copies: &copier.stream.copies,
            stream_name: subject::copy_stream_name(&copier.config.source.name, sink),
            sink,
            copy: format!("{}/{}", status.request, status.attempt),
            request: status.request.clone(),
            number: 0,
            chunk_bytes: max_payload.saturating_sub(MESSAGE_OVERHEAD_BYTES).max(1024),
            unacked: VecDeque::new(),
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            last_seq: 0,
        }
    }

    async fn publish(&mut self, subject: String, payload: Bytes) -> Result<(), Error> {
        // Not between chunks: the sink applies none of them before it has them all.
        self.wait_for_sink().await?;
        self.number += 1;
        let count = payload.len().div_ceil(self.chunk_bytes);
        for index in 0..count {
            while self.unacked.len() >= UNACKED_MAX {
                self.next_ack().await?;
            }
            let end = payload.len().min((index + 1) * self.chunk_bytes);
            let part = payload.slice(index * self.chunk_bytes..end);
            let bytes = part.len() as u64;
            let mut message = PublishMessage::build()
                .payload(part)
                .header(header::COPY, self.copy.as_str())
                .header(header::COPY_NUMBER, self.number.to_string());
            if count > 1 {
                let place = format!("{}/{count}/{}", index + 1, self.copy);
                message = message.header(header::CHUNK, place);
            }
            let ack = self
                .jetstream
                .send_publish(subject.clone(), message)
                .await
                .map_err(|error| Error::retry("copied rows cannot be published", error))?;
            self.unacked.push_back((ack, bytes));
        }
        Ok(())
    }

    /// Waits until everything published is in the stream; returns its last sequence.
    async fn settle(&mut self) -> Result<u64, Error> {
        while !self.unacked.is_empty() {
            self.next_ack().await?;
        }
        Ok(self.last_seq)
    }

    async fn next_ack(&mut self) -> Result<(), Error> {
        let Some((ack, bytes)) = self.unacked.pop_front() else {
            return Ok(());
        };
        let ack = ack
            .await
            .map_err(|error| Error::retry("copied rows were not stored", error))?;
        self.last_seq = ack.sequence;
        self.ahead.push_back((ack.sequence, bytes));
        self.ahead_bytes += bytes;
        Ok(())
    }

    /// Waits until the sink has not too much before it, and removes what it has behind it.
    async fn wait_for_sink(&mut self) -> Result<(), Error> {
        while self.ahead_bytes >= AHEAD_BYTES_MAX {
            let applied: Option<CopyApplied> =
                read(self.copies, &format!("applied.{}", self.sink)).await?;
            let wanted: Option<CopyRequest> =
                read(self.copies, &format!("request.{}", self.sink)).await?;
            if wanted.is_none_or(|wanted| wanted.id != self.request) {
                return Err(Error::retry_because("the copy's request was replaced"));
            }
            let applied = applied.filter(|applied| applied.request == self.request);
            let applied = applied.map_or(0, |applied| applied.stream_seq);
            while let Some((_, bytes)) = self.ahead.front().filter(|(seq, _)| *seq <= applied) {
                self.ahead_bytes -= bytes;
                self.ahead.pop_front();
            }
            if self.ahead_bytes >= AHEAD_BYTES_MAX {
                tokio::time::sleep(LOOK_INTERVAL).await;
            } else {
                stream::purge(self.jetstream, &self.stream_name, applied).await?;
            }
        }
        Ok(())
    }
}
