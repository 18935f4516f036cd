//! One attempt: tables read under one snapshot.

use std::time::Duration;

use millrace_config::Condition;
use millrace_connect::postgres::{ConnectError, Dsn, connect};
use millrace_event::work::{Copied, CopyStatus, Part};
use millrace_event::{TableName, subject};

use super::Asked;
use super::failure::Failure;
use super::load::{self, Reader};
use super::session::session;
use super::writer::Writer;
use crate::Error;
use crate::heartbeat;
use crate::life::slot_blocked;
use crate::replication::{ReplicationConnection, SlotKind, Snapshot};
use crate::source::room_for;
use crate::stream;

/// How long creating the temporary slot may wait for transactions that are open at the source.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Ends what was done about one table. Only a rollback gives its lock back: those who change its shape, and behind them
/// its writers, must not wait for the tables that follow.
const FORGET: &str = "ROLLBACK TO SAVEPOINT one; RELEASE SAVEPOINT one";

impl Asked<'_> {
    /// Copies tables under one snapshot. Ends well also where some could not be copied: those are noted, and
    /// due later.
    pub(super) async fn attempt(
        &mut self,
        mut status: CopyStatus,
        tables: &[TableName],
        takes_binary: bool,
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
        let together: Vec<_> = tables.iter().collect();
        if let Some(Condition {
            code,
            message,
            remedy,
        }) = room_for(&copier.source.client, source, &together).await?
        {
            tracing::warn!(sink, code = code.as_str(), remedy, "{message}");
        }
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
        let client = connect(&dsn, session()).await.map_err(Error::from)?;
        client.batch_execute(&load::begin(&snapshot)).await?;
        let lsn = created.consistent_point;
        tracing::info!(sink, consistent_point = %lsn, tables = tables.len(), "copying");
        self.setbacks.attempt_goes_on();
        self.show();
        let reader = Reader {
            dsn: &dsn,
            client: &client,
            snapshot: &snapshot,
            lsn,
            takes_binary,
        };
        for name in tables {
            let table = copier
                .table(name)
                .expect("only configured tables are copied");
            client.batch_execute("SAVEPOINT one").await?;
            // Told with its first row: from then on it can only be finished, or be cut off.
            out.tell_first(CopyStatus {
                loading: Some(name.clone()),
                ..status.clone()
            });
            let copied = self.load(&reader, table, &mut out).await;
            let told = out.has_told();
            let rows = match copied {
                Ok(rows) => rows,
                Err(Failure::Table {
                    condition,
                    snapshot_lives,
                }) => {
                    self.table_failed(name, condition);
                    if told {
                        status.cut.push(name.clone());
                        self.store(&status).await?;
                    }
                    if snapshot_lives {
                        client.batch_execute(FORGET).await?;
                        continue;
                    }
                    // The next look makes another attempt for the tables that are left.
                    return Ok(());
                }
                Err(failure) => return Err(failure),
            };
            client.batch_execute(FORGET).await?;
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
        // The tables are complete once their sink has passed the snapshot's point: an idle source must get there.
        client.batch_execute("COMMIT").await?;
        let told = heartbeat::write_now(&client).await;
        if let Err(error) = told {
            tracing::debug!(%error, "no heartbeat follows the copy");
        }
        Ok(())
    }

    pub(super) fn table_failed(&mut self, table: &TableName, condition: Condition) {
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
