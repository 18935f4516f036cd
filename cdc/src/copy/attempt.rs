//! One attempt: tables read under one snapshot.

use std::time::Duration;

use millrace_config::Condition;
use millrace_connect::postgres::{Dsn, connect};
use millrace_event::work::{Copied, CopyStatus, Part};
use millrace_event::{Lsn, TableName, subject};

use super::Asked;
use super::failure::Failure;
use super::load::{self, Reader};
use super::session::session;
use super::writer::{Writer, store_status};
use crate::Error;
use crate::heartbeat;
use crate::life::slot_blocked;
use crate::replication::{ReplicationConnection, SlotKind, Snapshot};
use crate::{source, stream};

/// How long creating the temporary slot may wait for transactions that are open at the source.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Ends what was done about one table. Only a rollback gives its lock back: those who change its shape, and behind them
/// its writers, must not wait for the tables that follow.
const FORGET: &str = "ROLLBACK TO SAVEPOINT one; RELEASE SAVEPOINT one";

/// A snapshot that the source has exported.
struct Exported {
    /// The snapshot lives as long as this connection runs nothing else, and its slot as long as it lives.
    exporter: ReplicationConnection,
    snapshot: String,
    /// Its consistent point.
    lsn: Lsn,
}

/// What a table leaves behind for those that follow it.
enum Turn {
    /// The snapshot: the next one is read under it.
    Over,
    /// Nothing: what was read of it has taken the session along.
    SnapshotGone,
}

impl Asked<'_> {
    /// Copies tables under one snapshot. Ends well also where some could not be copied: those are noted, and
    /// due later.
    pub(super) async fn attempt(
        &mut self,
        mut status: CopyStatus,
        tables: &[TableName],
        binary: &[u32],
    ) -> Result<(), Failure> {
        let (copier, sink) = (self.copier, self.sink);
        let (config, stream) = (copier.config, copier.stream);
        let source = &config.source.name;
        let replicas = usize::from(config.stream.replicas);
        stream::ensure_copy_stream(&stream.jetstream, source, sink, replicas).await?;
        store_status(&stream.copies, sink, &status).await?;
        let Some(first) = tables.first() else {
            return Ok(());
        };
        self.warn_of_room(tables).await?;
        let (name, mark) = (
            subject::copy_stream_name(source, sink),
            subject::copy(source, sink, first),
        );
        // Before there is a snapshot, which costs the source something for as long as it lives.
        let mut out = Writer::begin(stream, sink, name, &status, mark).await?;

        let dsn = source::dsn(&config.source)?;
        let Exported {
            exporter,
            snapshot,
            lsn,
        } = self.export(&dsn).await?;
        let client = connect(&dsn, session()).await.map_err(Error::from)?;
        client.batch_execute(&load::begin(&snapshot)).await?;
        tracing::info!(sink, consistent_point = %lsn, tables = tables.len(), "copying");
        self.setbacks.attempt_goes_on();
        self.show();
        let reader = Reader {
            dsn: &dsn,
            client: &client,
            snapshot: &snapshot,
            lsn,
            binary,
        };
        for table in tables {
            match self.turn(&reader, table, &mut out, &mut status).await? {
                Turn::Over => {}
                // The next look makes another attempt for the tables that are left.
                Turn::SnapshotGone => return Ok(()),
            }
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

    /// Warns where the source's slot may be lost while these tables are read.
    async fn warn_of_room(&self, tables: &[TableName]) -> Result<(), Error> {
        let (copier, sink) = (self.copier, self.sink);
        let together: Vec<_> = tables.iter().collect();
        let source = &copier.config.source.name;
        if let Some(Condition {
            code,
            message,
            remedy,
        }) = source::room_for(&copier.source.client, source, &together).await?
        {
            tracing::warn!(sink, code = code.as_str(), remedy, "{message}");
        }
        Ok(())
    }

    /// Has the source export a snapshot: that of a temporary slot, whose consistent point says what it shows.
    async fn export(&self, dsn: &Dsn) -> Result<Exported, Failure> {
        let mut exporter = ReplicationConnection::connect(dsn, "millrace copy")
            .await
            .map_err(Error::from)?;
        let source = &self.copier.config.source.name;
        let slot = format!("millrace_{source}_copy_{:08x}", rand::random::<u32>());
        let created = exporter.create_slot(&slot, SlotKind::Temporary, Snapshot::Export);
        let created = match tokio::time::timeout(SLOT_TIMEOUT, created).await {
            Ok(created) => created.map_err(Error::from)?,
            Err(_) => {
                let blocked = slot_blocked(&self.copier.source.client).await;
                return Err(Failure::Attempt(blocked));
            }
        };
        let snapshot = created
            .snapshot_name
            .ok_or_else(|| Error::retry_because("the source exported no snapshot"))?;
        Ok(Exported {
            exporter,
            snapshot,
            lsn: created.consistent_point,
        })
    }

    /// Copies one table. What fails of it alone is noted, and in the status where its sink has rows of it.
    async fn turn(
        &mut self,
        reader: &Reader<'_>,
        name: &TableName,
        out: &mut Writer<'_>,
        status: &mut CopyStatus,
    ) -> Result<Turn, Failure> {
        let table = self
            .copier
            .table(name)
            .expect("only configured tables are copied");
        reader.client.batch_execute("SAVEPOINT one").await?;
        // Told with its first row: from then on it can only be finished, or be cut off.
        out.tell_first(CopyStatus {
            loading: Some(name.clone()),
            ..status.clone()
        });
        let loaded = self.load(reader, table, out).await;
        let told = out.has_told();
        match loaded {
            Ok(rows) => {
                reader.client.batch_execute(FORGET).await?;
                let copied = Copied {
                    table: name.clone(),
                    epoch: self.copier.source.epoch,
                    lsn: reader.lsn,
                    rows,
                    part: Part::Load,
                };
                self.copied(&copied, out, status).await?;
                Ok(Turn::Over)
            }
            Err(Failure::Table {
                condition,
                snapshot_lives,
            }) => {
                self.table_failed(name, condition);
                if told {
                    status.cut.push(name.clone());
                    store_status(&self.copier.stream.copies, self.sink, status).await?;
                }
                if !snapshot_lives {
                    return Ok(Turn::SnapshotGone);
                }
                reader.client.batch_execute(FORGET).await?;
                Ok(Turn::Over)
            }
            Err(failure) => Err(failure),
        }
    }

    /// All rows of a table are on the stream: says so there, and in the status.
    async fn copied(
        &mut self,
        copied: &Copied,
        out: &mut Writer<'_>,
        status: &mut CopyStatus,
    ) -> Result<(), Failure> {
        let (sink, name) = (self.sink, &copied.table);
        let payload = serde_json::to_vec(copied).expect("plain JSON");
        let subject = subject::copied(&self.copier.config.source.name, sink);
        out.publish(subject, payload.into()).await?;
        status.last_seq = out.settle().await?;
        status.copied.push(name.clone());
        store_status(&self.copier.stream.copies, sink, status).await?;
        self.setbacks.copied(name);
        self.show();
        tracing::info!(sink, table = %name, rows = copied.rows, "table copied");
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
}
