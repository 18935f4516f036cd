//! Copies of existing rows: a sink asks for tables, and their rows go onto its copy stream.
//!
//! A *load* reads whole tables at once: all tables of an attempt are read under one exported snapshot, that of a temporary slot. Its consistent
//! point C divides history: the snapshot shows exactly the transactions whose commit record lies below C. So
//! every row gets the version (epoch, C, 0), above every change that it includes and below every change
//! that it does not, and the sink drops what the stream still says of these tables below C. A load that was cut
//! off behind its first rows cannot go on, since its snapshot is gone: its sink asks for chunks.
//!
//! *Chunks* come in the order of the key, each under a snapshot of its own, while the sink applies the table's
//! changes. Which version their rows get is the matter of [`rule::version`]. They go on wherever they were cut off.
//! The rows of single *keys* are read like a chunk.
//!
//! Each sink's copies run by themselves and beside the streaming. What fails of them is tried again by itself
//! and shown meanwhile; nothing else stands still for it.

mod ahead;
mod attempt;
mod backfill;
mod failure;
mod keyset;
mod load;
mod pack;
mod ranges;
mod reading;
mod room;
pub mod rule;
mod session;
mod setbacks;
mod span;
mod text;
mod throttle;
mod waits;
mod writer;

use std::convert::Infallible;
use std::time::{Duration, Instant};

use async_nats::jetstream::kv;
use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use millrace_config::{Condition, Config};
use millrace_connect::clock::now_us;
use millrace_event::work::{CopyRequest, CopyStatus, TableRequest, Wanted};
use millrace_event::{TableName, subject};

use self::failure::Failure;
use self::reading::Reading;
pub(crate) use self::rule::{COMMITS_MAX, Recent};
use self::setbacks::Setbacks;
use self::writer::store_status;
use crate::Error;
use crate::commits::Commits;
use crate::life::{Source, Stream};
use crate::source::{self, SourceTable};
use crate::status::{CopyTrouble, Status};
use crate::stream;
use crate::understood;

/// How often requests are looked for, should nothing tell of them.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// So long after the newest chunk commits are still recorded: keys that heal rows may be asked for every second, and
/// a recording that begins anew has to wait for all transactions that are open then.
const RECORDED_FOR: Duration = Duration::from_secs(60);

/// Answers the sinks' requests.
pub(crate) struct Copier<'c> {
    config: &'c Config,
    source: &'c Source,
    stream: &'c Stream,
    status: &'c Status,
    commits: &'c Commits,
    began: Instant,
}

impl<'c> Copier<'c> {
    pub(crate) fn new(
        config: &'c Config,
        source: &'c Source,
        stream: &'c Stream,
        status: &'c Status,
        commits: &'c Commits,
    ) -> Self {
        Self {
            config,
            source,
            stream,
            status,
            commits,
            began: Instant::now(),
        }
    }

    /// Answers requests, each sink's beside the others', for as long as this life may. Returns only with an
    /// error: one that another copy would meet again until capture has found out anew what the source is.
    pub(crate) async fn serve(&self) -> Result<Infallible, Error> {
        let sinks = self.config.sinks.iter();
        let served = sinks.map(|sink| {
            let asked = Asked {
                copier: self,
                sink: &sink.name,
                setbacks: Setbacks::default(),
                reading: None,
                read_at: Duration::ZERO,
            };
            asked.serve()
        });
        match try_join_all(served).await {
            Err(error) => Err(error),
            // Without a sink nobody asks.
            Ok(_) => std::future::pending().await,
        }
    }

    fn table(&self, name: &TableName) -> Option<&'c SourceTable> {
        self.source.tables.iter().find(|table| table.name == *name)
    }
}

/// What one sink asks for, and what failed of it.
struct Asked<'c> {
    copier: &'c Copier<'c>,
    sink: &'c str,
    setbacks: Setbacks,
    /// `None` while nothing is read in chunks: commits are recorded only for that.
    reading: Option<Reading<'c>>,
    /// When the newest turn at chunks ended, by the copier's clock.
    read_at: Duration,
}

impl Asked<'_> {
    async fn serve(mut self) -> Result<Infallible, Error> {
        // What an earlier life told is of that life.
        self.show();
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let key = format!("request.{}", self.sink);
        let mut told = self.copier.stream.copies.watch(key).await.ok();
        loop {
            let request = async {
                match &mut told {
                    Some(told) => told.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = ticks.tick() => {}
                request = request => if !matches!(request, Some(Ok(_))) {
                    told = None;
                },
            }
            if !self.setbacks.allow(self.copier.began.elapsed()) {
                continue;
            }
            match self.look().await {
                Ok(()) => {}
                Err(Failure::Life(error)) => return Err(error),
                Err(Failure::Replaced) => {
                    tracing::info!(sink = self.sink, "a copy's request was replaced");
                }
                // A source that goes away takes capture's own session along: that is the streaming's to notice.
                Err(Failure::Attempt(condition) | Failure::Table { condition, .. }) => {
                    self.attempt_failed(condition);
                }
            }
        }
    }

    async fn look(&mut self) -> Result<(), Failure> {
        let (sink, copies) = (self.sink, &self.copier.stream.copies);
        let request: Option<CopyRequest> = read(copies, &format!("request.{sink}")).await?;
        let status: Option<CopyStatus> = read(copies, &format!("status.{sink}")).await?;
        let Some(request) = request else {
            if status.is_some() {
                self.clear_away().await?;
            }
            self.setbacks.keep_only(&[]);
            self.let_go();
            self.show();
            return Ok(());
        };
        let mut status = self.begun(&request, status).await?;
        let binary = request.binary;
        let remaining: Vec<TableRequest> = request
            .tables
            .into_iter()
            .filter(|wanted| !status.copied.contains(&wanted.table))
            .filter(|wanted| !status.cut.contains(&wanted.table))
            // A table that is not configured here (yet) waits; the sink goes on asking.
            .filter(|wanted| self.copier.table(&wanted.table).is_some())
            .collect();
        let names: Vec<_> = remaining
            .iter()
            .map(|wanted| wanted.table.clone())
            .collect();
        self.setbacks.keep_only(&names);
        self.show();
        let troubles = self.troubles(&names);
        if troubles != status.troubles {
            status.troubles = troubles;
            store_status(copies, sink, &status).await?;
        }
        let Some((stage, due)) = self.due(&remaining) else {
            let waits = |wanted: &TableRequest| Stage::of(&wanted.rows) != Stage::Paused;
            if !remaining.iter().any(waits) {
                self.let_go();
            }
            return Ok(());
        };
        status.attempt = next_attempt(status.attempt, now_us());
        if stage == Stage::Load {
            self.reading = None;
            let tables: Vec<_> = due.into_iter().map(|wanted| wanted.table).collect();
            return Box::pin(self.attempt(status, &tables, &binary)).await;
        }
        Box::pin(self.backfill(status, &due)).await
    }

    /// The status of a request that is taken up, `found` beside it.
    async fn begun(
        &self,
        request: &CopyRequest,
        found: Option<CopyStatus>,
    ) -> Result<CopyStatus, Failure> {
        let copies = &self.copier.stream.copies;
        let found = found.filter(|status| status.request == request.id);
        let mut status = match found {
            Some(status) => status,
            None => {
                let first = self.first_status(request).await?;
                store_status(copies, self.sink, &first).await?;
                first
            }
        };
        // Nothing runs now: what still says that it is loading was cut off.
        if let Some(table) = status.loading.take() {
            tracing::info!(sink = self.sink, %table, "a load was cut off");
            status.cut.push(table);
            store_status(copies, self.sink, &status).await?;
        }
        Ok(status)
    }

    /// What is done next about the tables that remain; `None` where nothing may be done now.
    fn due(&self, remaining: &[TableRequest]) -> Option<(Stage, Vec<TableRequest>)> {
        let now = self.copier.began.elapsed();
        let due = |stage: Stage| -> Vec<TableRequest> {
            let due = remaining
                .iter()
                .filter(|wanted| Stage::of(&wanted.rows) == stage);
            let due = due.filter(|wanted| self.setbacks.allow_table(&wanted.table, now));
            due.cloned().collect()
        };
        let stages = [Stage::Keys, Stage::Load, Stage::Chunks];
        let due = stages.map(|stage| (stage, due(stage)));
        due.into_iter().find(|(_, due)| !due.is_empty())
    }

    /// Commits are no longer recorded where nothing was read for a while.
    fn let_go(&mut self) {
        let now = self.copier.began.elapsed();
        if now.saturating_sub(self.read_at) >= RECORDED_FOR {
            self.reading = None;
        }
    }

    /// The status of a request that nothing is known of yet.
    async fn first_status(&self, request: &CopyRequest) -> Result<CopyStatus, Failure> {
        let mut status = CopyStatus::new(request.id.clone());
        let whole = request.tables.iter().filter(|wanted| {
            !matches!(wanted.rows, Wanted::Keys { .. })
                && self.copier.table(&wanted.table).is_some()
        });
        let tables: Vec<_> = whole.map(|wanted| &wanted.table).collect();
        let client = &self.copier.source.client;
        let known = source::estimate_rows(client, tables.iter().copied()).await?;
        // 0 where the source does not know.
        let estimate = |table: &TableName| known.get(table).copied().unwrap_or(0);
        let estimates = tables.into_iter();
        status.estimates = estimates
            .map(|table| (table.clone(), estimate(table)))
            .collect();
        Ok(status)
    }

    /// The sink has everything: its stream may go.
    async fn clear_away(&self) -> Result<(), Error> {
        let (sink, stream) = (self.sink, self.copier.stream);
        let stream_name = subject::copy_stream_name(&self.copier.config.source.name, sink);
        stream::delete_stream(&stream.jetstream, &stream_name).await?;
        for key in [format!("status.{sink}"), format!("applied.{sink}")] {
            stream
                .copies
                .delete(&key)
                .await
                .map_err(|error| Error::retry("a finished copy cannot be cleared away", error))?;
        }
        Ok(())
    }

    fn attempt_failed(&mut self, condition: Condition) {
        let (code, remedy) = (condition.code, condition.remedy.clone());
        let message = condition.message.clone();
        let now = self.copier.began.elapsed();
        let wait = self.setbacks.attempt_failed(condition, now, rand::random());
        tracing::warn!(
            sink = self.sink, code = code.as_str(), remedy, again_in = ?wait,
            "a copy was cut off: {message}"
        );
        self.show();
    }

    /// Why nothing comes of these tables for now, for the sink that waits.
    fn troubles(&self, tables: &[TableName]) -> Vec<(TableName, String)> {
        let mut troubles = Vec::new();
        for table in tables {
            let mut told = self.setbacks.troubles();
            // Its own says more than that of all.
            let told = told
                .by_ref()
                .filter(|(of, _)| of.is_none_or(|of| of == table))
                .last();
            if let Some((_, condition)) = told {
                troubles.push((table.clone(), format!("{condition}; {}", condition.remedy)));
            }
        }
        troubles
    }

    /// Lets the status tell what fails.
    fn show(&self) {
        let troubles = self.setbacks.troubles();
        let troubles = troubles.map(|(table, condition)| CopyTrouble {
            sink: self.sink.to_owned(),
            table: table.cloned(),
            condition: condition.clone(),
        });
        self.copier
            .status
            .set_copy_troubles(self.sink, troubles.collect());
    }
}

/// The number of an attempt behind `last`. A status that the broker has lost is no reason to give a number twice: a sink
/// takes what it has read of that attempt for read.
fn next_attempt(last: u64, now_us: i64) -> u64 {
    u64::try_from(now_us).unwrap_or(0).max(last + 1)
}

/// What is done with a part of a request. Keys come before loads, and loads before chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Keys,
    Load,
    Chunks,
    /// Chunks that nobody reads until another request says so.
    Paused,
}

impl Stage {
    fn of(rows: &Wanted) -> Self {
        match rows {
            Wanted::Keys { .. } => Self::Keys,
            Wanted::Load => Self::Load,
            Wanted::Chunks { paused: false, .. } => Self::Chunks,
            Wanted::Chunks { paused: true, .. } => Self::Paused,
        }
    }
}

async fn read<T: serde::de::DeserializeOwned>(
    store: &kv::Store,
    key: &str,
) -> Result<Option<T>, Error> {
    let entry = stream::value(store, key)
        .await
        .map_err(|error| Error::retry("copy requests cannot be read", error))?;
    let value = entry.map(|value| understood(&store.name, key, &value));
    Ok(value.transpose()?)
}
