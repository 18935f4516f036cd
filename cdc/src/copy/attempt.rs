//! One attempt: tables read under one snapshot.

use std::pin::pin;
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, Bytes};
use futures_util::StreamExt;
use millrace_config::{Condition, Config, limits};
use millrace_connect::postgres::{ConnectError, Dsn, Session, connect};
use millrace_event::work::{Copied, CopyStatus, Part};
use millrace_event::{
    Before, Change, Datum, LineEnd, Lsn, Op, Relation, TableName, Transaction, quote_identifier,
    quote_literal, subject, write_change, write_line_end,
};
use tokio_postgres::Client;

use super::Asked;
use super::failure::Failure;
use super::text::CopyRow;
use super::writer::Writer;
use crate::Error;
use crate::life::slot_blocked;
use crate::replication::{ReplicationConnection, SlotKind, Snapshot};
use crate::source::SourceTable;
use crate::stream;

/// A message of the copy stream holds at most this many payload bytes, unless one row alone is larger. It
/// travels in chunks where the broker takes less.
const MESSAGE_BYTES: usize = 256 * 1024;

/// How long creating the temporary slot may wait for transactions that are open at the source.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a table's lock may be waited for, in milliseconds: the other tables wait behind it.
const LOCK_TIMEOUT_MS: u32 = 30_000;

impl Asked<'_> {
    /// Copies tables under one snapshot. Ends well also where some could not be copied: those are noted, and
    /// due later.
    pub(super) async fn attempt(
        &mut self,
        mut status: CopyStatus,
        tables: &[TableName],
    ) -> Result<(), Failure> {
        let copier = self.copier;
        let (config, sink) = (copier.config, self.sink);
        let source = &config.source.name;
        let replicas = usize::from(config.stream.replicas);
        stream::ensure_copy_stream(&copier.stream.jetstream, source, sink, replicas).await?;
        self.store(&status).await?;
        let name = subject::copy_stream_name(source, sink);
        let Some(first) = tables.first() else {
            return Ok(());
        };
        let mark = subject::copy(source, sink, first);
        // Before there is a snapshot, which costs the source something for as long as it lives.
        let mut out = Writer::begin(copier.stream, sink, name, &status, mark).await?;

        // The secret may have changed since this life began.
        let dsn = Dsn::parse(config.source.url.read().map_err(Error::from)?.expose())
            .map_err(|error| Error::from(ConnectError::from(error)))?;
        // The snapshot lives as long as this connection runs nothing else, and the slot as long as it lives.
        let mut exporter = ReplicationConnection::connect(&dsn, "millrace copy")
            .await
            .map_err(Error::from)?;
        let slot = format!("millrace_{source}_copy_{:08x}", rand::random::<u32>());
        let created = exporter.create_slot(&slot, SlotKind::Temporary, Snapshot::Export);
        let created = match tokio::time::timeout(SLOT_TIMEOUT, created).await {
            Ok(created) => created.map_err(Error::from)?,
            Err(_) => {
                let blocked = slot_blocked(&copier.source.client).await;
                return Err(Failure::Attempt(blocked));
            }
        };
        let snapshot = created
            .snapshot_name
            .ok_or_else(|| Error::retry_because("the source exported no snapshot"))?;
        let session = Session {
            application_name: "millrace copy".to_owned(),
            options: Vec::new(),
        };
        let client = connect(&dsn, session).await.map_err(Error::from)?;
        client
            .batch_execute(&format!(
                "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; \
                 SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}",
                quote_literal(&snapshot)
            ))
            .await?;
        let lsn = created.consistent_point;
        tracing::info!(sink, consistent_point = %lsn, tables = tables.len(), "copying");
        self.setbacks.attempt_goes_on();
        self.show();
        for name in tables {
            let table = copier
                .table(name)
                .expect("only configured tables are copied");
            client.batch_execute("SAVEPOINT one").await?;
            let rows = match self.copy_table(&client, table, lsn, &mut out).await {
                Ok(rows) => rows,
                Err(Failure::Table {
                    condition,
                    snapshot_lives,
                }) => {
                    self.table_failed(name, condition);
                    if snapshot_lives {
                        client.batch_execute("ROLLBACK TO SAVEPOINT one").await?;
                        continue;
                    }
                    // The next look makes another attempt for the tables that are left.
                    return Ok(());
                }
                Err(failure) => return Err(failure),
            };
            client.batch_execute("RELEASE SAVEPOINT one").await?;
            let copied = Copied {
                table: name.clone(),
                epoch: copier.source.epoch,
                lsn,
                rows,
                part: Part::Load,
            };
            let payload = serde_json::to_vec(&copied).expect("plain JSON");
            out.publish(subject::copied(source, sink), payload.into())
                .await?;
            status.last_seq = out.settle().await?;
            status.copied.push(name.clone());
            self.store(&status).await?;
            self.setbacks.copied(name);
            self.show();
            tracing::info!(sink, table = %name, rows, "table copied");
        }
        exporter.terminate().await;
        Ok(())
    }

    async fn copy_table(
        &mut self,
        client: &Client,
        table: &SourceTable,
        lsn: Lsn,
        out: &mut Writer<'_>,
    ) -> Result<u64, Failure> {
        let copier = self.copier;
        let Config { source, .. } = copier.config;
        let relation = Relation::new(
            &source.name,
            &copier.source.facts.database,
            table.name.clone(),
            &table.shapes(),
            table.key_indexes(),
        );
        let now_us = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |age| i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
        let transaction = Transaction::new(copier.source.epoch, lsn, 0, now_us);
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
        let refused = |error| Failure::of_table(&table.name, error);
        let subject = subject::copy(&source.name, out.sink(), &table.name);
        let mut lines = pin!(client.copy_out(&sql).await.map_err(refused)?);
        let mut row = CopyRow::default();
        let mut payload = Vec::with_capacity(MESSAGE_BYTES + MESSAGE_BYTES / 4);
        let mut rows = 0_u64;
        while let Some(line) = lines.next().await {
            let line = line.map_err(refused)?;
            row.read(&line)
                .map_err(|error| Failure::of_row(&table.name, &error))?;
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
                .map_err(|error| Failure::of_row(&table.name, &error))?;
            write_line_end(&mut payload, LineEnd::More);
            rows += 1;
            if rows == 1 {
                self.setbacks.table_goes_on(&table.name);
                self.show();
            }
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
                    return Err(Failure::too_large(&table.name, full.len()));
                }
                out.publish(subject.clone(), full).await?;
            }
        }
        if !payload.is_empty() {
            out.publish(subject, payload.into()).await?;
        }
        Ok(rows)
    }

    fn table_failed(&mut self, table: &TableName, condition: Condition) {
        let (code, remedy) = (condition.code, condition.remedy.clone());
        let message = condition.message.clone();
        let now = self.copier.began.elapsed();
        let wait = self
            .setbacks
            .table_failed(table, condition, now, rand::random());
        tracing::warn!(
            sink = self.sink, %table, code = code.as_str(), remedy, again_in = ?wait, "{message}"
        );
        self.show();
    }

    async fn store(&self, status: &CopyStatus) -> Result<(), Error> {
        let value = serde_json::to_vec(status).expect("plain JSON");
        self.copier
            .stream
            .copies
            .put(format!("status.{}", self.sink), value.into())
            .await
            .map(|_| ())
            .map_err(|error| Error::retry("a copy's progress cannot be stored", error))
    }
}
