//! What a sink works with, and how it comes by it: the target, the stream, and the tables' layouts.

mod broker;
mod layouts;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use async_nats::jetstream::{self, kv};
use millrace_config::{Code, Config, OnDelete, OnTruncate, Sink as Settings, Table};
use millrace_connect::clock::now_us;
use millrace_connect::nats::{self, Reconnect};
use millrace_connect::postgres::Dsn;
use millrace_event::work::{self, ParkedClaim, SinkReport};
use millrace_event::{Position, TableName, Version};
use tokio::task::JoinHandle;

use self::broker::Broker;
use self::layouts::Layouts;
use self::stream::bucket;
use crate::batch::{Batch, Checkpoint, PositionRow};
use crate::copy::{Unread, withdraw};
use crate::error::Error;
use crate::postgres::{PostgresSink, connector};
use crate::progress::CopyProgress;
use crate::registration::{Registration, Standing, register};
use crate::row::Key;
use crate::sink::{Applied, Elected, Sink, SinkError};
use crate::status::Status;
use crate::worker::BatchLimits;

/// How often a sink's report is stored at most while there is news.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// A report is stored again after so long without news: the broker may have lost it, and has an older one then.
const REPORT_RENEWAL: Duration = Duration::from_secs(10);

/// The target, which is in use by one task at a time.
pub(crate) enum Target {
    /// Nothing is being applied.
    Idle(Box<PostgresSink>),
    /// A batch is being applied; the task brings the sink back.
    Applying(JoinHandle<(Box<PostgresSink>, Batch, Result<Applied, SinkError>)>),
}

/// One life of a sink.
pub(crate) struct Life<'l> {
    pub(crate) settings: &'l Settings,
    pub(crate) source: &'l str,
    pub(crate) tables: HashMap<TableName, &'l Table>,
    pub(crate) status: &'l Status,
    pub(crate) jetstream: jetstream::Context,
    broker: Broker,
    pub(crate) copies: kv::Store,
    schemas: kv::Store,
    reports: kv::Store,
    /// The request in the bucket of copies, where it is not understood.
    pub(crate) unread_request: Unread,
    reported_at: Option<tokio::time::Instant>,
    /// The committed sequence and position of the last report.
    reported: Option<(u64, Position)>,
    pub(crate) limits: BatchLimits,
    target: Option<Target>,
    pub(crate) checkpoint: Checkpoint,
    /// The same as it is committed: behind `checkpoint` while the target's transaction is open.
    committed: Checkpoint,
    pub(crate) progress: CopyProgress,
    /// What the target was made to fit: of a transaction that is open too.
    shapes: BTreeMap<TableName, String>,
    layouts: Layouts,
    meters: crate::meters::Meters,
}

impl<'l> Life<'l> {
    /// Opens the target and the stream, and registers a sink that is new.
    pub(crate) async fn open(
        config: &'l Config,
        settings: &'l Settings,
        status: &'l Status,
    ) -> Result<Self, Error> {
        let url = settings.url.clone();
        let connect = connector(&settings.name, move || {
            let url = url.read()?;
            Ok(Dsn::parse(url.expose())?)
        });
        let mut sink = PostgresSink::new(&settings.name, connect, settings.create);
        let Elected::Yes(row) = sink.open().await? else {
            return Err(Error::Standby);
        };
        let inbox = format!("_INBOX_millrace_sink_{}", settings.name);
        let name = format!("millrace sink {}", settings.name);
        let client = nats::connect(&config.stream, &name, &inbox, Reconnect::Itself).await?;
        let jetstream = jetstream::new(client.clone());
        let source = config.source.name.as_str();
        let PositionRow {
            checkpoint, copy, ..
        } = row;
        let mut life = Self {
            settings,
            source,
            tables: config
                .tables_of(&settings.name)
                .map(|table| (table.name.clone(), table))
                .collect(),
            status,
            copies: bucket(&jetstream, source, work::COPIES).await?,
            schemas: bucket(&jetstream, source, work::SCHEMAS).await?,
            reports: bucket(&jetstream, source, work::SINKS).await?,
            jetstream,
            broker: Broker::new(client),
            unread_request: Unread::default(),
            reported_at: None,
            reported: None,
            limits: BatchLimits {
                rows: settings.batch.max_rows as usize,
                bytes: usize::try_from(settings.batch.max_bytes).unwrap_or(usize::MAX),
            },
            target: Some(Target::Idle(Box::new(sink))),
            checkpoint,
            committed: checkpoint,
            shapes: copy.shapes.clone(),
            progress: copy,
            layouts: Layouts::default(),
            meters: crate::meters::Meters::new(&settings.name),
        };
        life.register().await?;
        Ok(life)
    }

    /// Fails where the connection to the broker has been broken for a while.
    pub(crate) fn look_at_broker(&mut self) -> Result<(), Error> {
        self.broker.look(tokio::time::Instant::now())
    }

    /// Finds the stream and, for a sink or a table that is new, stores where it begins: behind everything that
    /// is in the stream now. Copies are asked for later, so their snapshots see all of that.
    async fn register(&mut self) -> Result<(), Error> {
        let (stream, newest) = self.newest().await?;
        let Registration { standing, progress } = register(
            &self.progress,
            self.checkpoint.into(),
            self.tables.keys(),
            stream,
            newest.into(),
            now_us(),
        )
        .map_err(Error::Halt)?;
        if standing == Standing::Moved {
            tracing::warn!(sink = %self.settings.name, "the stream was begun anew; copying every table again");
        }
        if standing != Standing::Same {
            // An answer to an earlier request may lie on the copy stream: its rows are older than this beginning.
            withdraw(self).await?;
        }
        if progress != self.progress {
            let to = match standing {
                Standing::New | Standing::Moved => newest,
                Standing::Same => self.checkpoint,
            };
            let (from, copy) = (self.checkpoint, Some(progress));
            self.apply(Batch {
                from,
                to,
                copy,
                steps: Vec::new(),
                commit: true,
            })
            .await?;
        }
        self.status.set_tables(&self.progress);
        self.report(true).await
    }

    /// Applies a batch and waits for it.
    pub(crate) async fn apply(&mut self, batch: Batch) -> Result<(), Error> {
        self.begin(batch).await?;
        self.applied().await
    }

    /// Begins to apply a batch.
    ///
    /// # Errors
    /// The target's tables have changed since its rows were laid out, and those of now do not take them.
    pub(crate) async fn begin(&mut self, mut batch: Batch) -> Result<(), Error> {
        self.refit(&mut batch).await?;
        if batch.commit && (batch.copy.is_some() || self.progress.shapes != self.shapes) {
            let copy = batch.copy.get_or_insert_with(|| self.progress.clone());
            copy.shapes.clone_from(&self.shapes);
        }
        let Some(Target::Idle(mut sink)) = self.target.take() else {
            unreachable!("one batch is applied at a time")
        };
        // A task of its own: the next batch is decoded meanwhile.
        self.target = Some(Target::Applying(tokio::spawn(async move {
            let applied = sink.apply(&batch).await;
            (sink, batch, applied)
        })));
        Ok(())
    }

    /// Waits until the batch in flight is applied; for ever where there is none. Safe to cancel.
    pub(crate) async fn applied(&mut self) -> Result<(), Error> {
        let Some(Target::Applying(task)) = &mut self.target else {
            return std::future::pending().await;
        };
        let (sink, batch, applied) = task
            .await
            .map_err(|error| Error::retry("applying a batch was cut off", error))?;
        self.target = Some(Target::Idle(sink));
        let applied = applied?;
        self.meters.applied(&batch, &applied);
        self.status
            .count(applied.written, applied.stale, applied.dead());
        for (table, rows) in &applied.dead_letters {
            tracing::warn!(
                sink = %self.settings.name, %table, rows, code = Code::RowRefused.as_str(),
                "the target refused rows; they are in millrace.dead_letter"
            );
        }
        self.checkpoint = batch.to;
        if batch.commit {
            self.committed = batch.to;
        }
        if let Some(progress) = batch.copy {
            self.progress = progress;
            self.status.set_tables(&self.progress);
        }
        if batch.commit && self.checkpoint.source_ts_us != 0 {
            self.status.set_checkpoint(self.checkpoint, now_us());
        }
        Ok(())
    }

    /// Whether a batch is being applied.
    pub(crate) fn is_applying(&self) -> bool {
        matches!(self.target, Some(Target::Applying(_)))
    }

    /// The idle target.
    pub(crate) fn sink(&mut self) -> &mut PostgresSink {
        match &mut self.target {
            Some(Target::Idle(sink)) => sink,
            _ => unreachable!("asked for only while nothing is in flight"),
        }
    }

    /// What is applied for good: no change at or below it comes again, but of tables that are behind.
    pub(crate) fn passed(&self) -> Version {
        self.committed.position.0
    }

    /// Whether a table's deletes and truncates are applied.
    pub(crate) fn rule(&self, table: &TableName) -> (bool, bool) {
        let settings = self.tables.get(table);
        settings.map_or((false, false), |table| {
            (
                table.on_delete == OnDelete::Delete,
                table.on_truncate == OnTruncate::Apply,
            )
        })
    }

    /// The keys of a table's rows of which columns are missing: at most so many, behind `after`.
    pub(crate) async fn incomplete(
        &mut self,
        table: &TableName,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, Error> {
        let Some(settings) = self.tables.get(table).copied() else {
            return Ok(Vec::new());
        };
        let keys = self.sink().incomplete(&settings.target, after, max).await?;
        Ok(keys)
    }

    /// These keys, each with the texts of its columns; `None` for a key that is none of the table's as it is now.
    pub(crate) async fn key_texts(
        &mut self,
        table: &TableName,
        keys: Vec<String>,
    ) -> Result<Vec<(String, Option<Vec<String>>)>, Error> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let columns = self.layout(table, None).await?.key.len();
        let with_texts = keys.into_iter().map(|key| {
            let texts = Key::texts(&key, columns);
            (key, texts)
        });
        Ok(with_texts.collect())
    }

    /// Tells capture what the stream need not keep for this sink any longer, and which parked tables would like
    /// it to keep more.
    pub(crate) async fn report(&mut self, at_once: bool) -> Result<(), Error> {
        let now = tokio::time::Instant::now();
        // The same sequence with another position is news too: the broker may have lost its tail in between.
        let stands_at = (self.committed.stream_seq, self.committed.position);
        let news = at_once || self.reported != Some(stands_at);
        let age = self.reported_at.map(|at| now - at);
        if !(at_once || is_due(age, news)) {
            return Ok(());
        }
        self.reported_at = Some(now);
        self.reported = Some(stands_at);
        let claims = self.progress.claims();
        let report = SinkReport {
            stream_seq: self.committed.stream_seq,
            position: self.committed.position,
            at_us: now_us(),
            parked: claims
                .map(|(table, claim)| ParkedClaim {
                    table: table.clone(),
                    stream_seq: claim.stream_seq,
                })
                .collect(),
        };
        let value = serde_json::to_vec(&report).expect("plain JSON");
        match self.reports.put(&self.settings.name, value.into()).await {
            Ok(_) => Ok(()),
            Err(error) if news => Err(Error::retry("the sink's report cannot be stored", error)),
            // The broker is away, and nobody waits for this: the next one says the same.
            Err(_) => Ok(()),
        }
    }
}

/// Whether a sink reports, `age` after its last report.
fn is_due(age: Option<Duration>, news: bool) -> bool {
    let after = if news {
        REPORT_INTERVAL
    } else {
        REPORT_RENEWAL
    };
    age.is_none_or(|age| age >= after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_reported_within_a_second_and_a_report_is_renewed_without_any() {
        let after = |millis| Some(Duration::from_millis(millis));
        assert!(is_due(None, false));
        assert!(!is_due(after(999), true));
        assert!(is_due(after(1_000), true));
        assert!(!is_due(after(9_999), false));
        assert!(is_due(after(10_000), false));
    }
}
