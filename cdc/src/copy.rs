//! The initial copy: a sink asks for tables, and their existing rows go onto its copy stream.
//!
//! All tables of an attempt are read under one exported snapshot, that of a temporary slot. Its consistent
//! point C divides history: the snapshot shows exactly the transactions whose commit record lies below C. So
//! every row gets the version (epoch, C, 0), above every change that it includes and below every change
//! that it does not, and the sink drops what the stream still says of these tables below C. After a crash the
//! tables that were not finished are read under another snapshot, with another C.
//!
//! Each sink's copies run by themselves and beside the streaming. What fails of them is tried again by itself
//! and shown meanwhile; nothing else stands still for it.

mod ahead;
mod attempt;
mod failure;
mod setbacks;
mod text;
mod writer;

use std::convert::Infallible;
use std::time::{Duration, Instant};

use async_nats::jetstream::kv;
use futures_util::future::try_join_all;
use millrace_config::{Condition, Config};
use millrace_event::work::{CopyRequest, CopyStatus};
use millrace_event::{TableName, subject};

use self::failure::Failure;
use self::setbacks::Setbacks;
use crate::Error;
use crate::life::{Source, Stream};
use crate::source::SourceTable;
use crate::status::{CopyTrouble, Status};
use crate::stream;

/// How often requests are looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Answers the sinks' requests.
pub(crate) struct Copier<'c> {
    config: &'c Config,
    source: &'c Source,
    stream: &'c Stream,
    status: &'c Status,
    began: Instant,
}

impl<'c> Copier<'c> {
    pub(crate) fn new(
        config: &'c Config,
        source: &'c Source,
        stream: &'c Stream,
        status: &'c Status,
    ) -> Self {
        Self {
            config,
            source,
            stream,
            status,
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
}

impl Asked<'_> {
    async fn serve(mut self) -> Result<Infallible, Error> {
        // What an earlier life told is of that life.
        self.show();
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.setbacks.allow(self.copier.began.elapsed()) {
                continue;
            }
            match self.look().await {
                Ok(()) => {}
                Err(Failure::Life(error)) => return Err(error),
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
            self.show();
            return Ok(());
        };
        let status = status.filter(|status| status.request == request.id);
        let status = status.unwrap_or_else(|| CopyStatus::new(request.id));
        let remaining: Vec<_> = request
            .tables
            .into_iter()
            .map(|wanted| wanted.table)
            // A table that is not configured here (yet) waits; the sink goes on asking.
            .filter(|table| !status.copied.contains(table) && self.copier.table(table).is_some())
            .collect();
        self.setbacks.keep_only(&remaining);
        self.show();
        let now = self.copier.began.elapsed();
        let due: Vec<_> = remaining
            .into_iter()
            .filter(|table| self.setbacks.allow_table(table, now))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let attempt = status.attempt + 1;
        let status = CopyStatus { attempt, ..status };
        Box::pin(self.attempt(status, &due)).await
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
