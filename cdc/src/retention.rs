//! What the stream may forget: messages that every required sink has applied and that are old enough.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_nats::jetstream::{Context, kv};
use millrace_config::{Code, Condition, Config, State};
use millrace_event::work::SinkReport;

use crate::Error;
use crate::life::Stream;
use crate::status::Status;
use crate::stream::{self, StreamState};

/// How often the stream's size is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Every so many looks, what may go is purged.
const LOOKS_A_PURGE: u64 = 10;

/// Above this part of its limit, in percent, the stream counts as full: the slot holds what follows.
const FULL_PERCENT: u64 = 90;

/// Whether the stream has room for more.
#[derive(Debug, Default)]
pub(crate) struct Fullness(AtomicBool);

impl Fullness {
    pub(crate) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Purges a stream by the reports of its required sinks.
pub(crate) struct Retention<'r> {
    jetstream: &'r Context,
    name: &'r str,
    sinks: &'r kv::Store,
    required: Vec<&'r str>,
    max_age: Duration,
    fullness: &'r Fullness,
    status: &'r Status,
}

impl<'r> Retention<'r> {
    pub(crate) fn new(
        config: &'r Config,
        stream: &'r Stream,
        fullness: &'r Fullness,
        status: &'r Status,
    ) -> Self {
        let required = config
            .sinks
            .iter()
            .filter(|sink| sink.required)
            .map(|sink| sink.name.as_str());
        Self {
            jetstream: &stream.jetstream,
            name: &stream.name,
            sinks: &stream.sinks,
            required: required.collect(),
            max_age: config.stream.retention.max_age,
            fullness,
            status,
        }
    }

    /// Purges what may go, until it fails. Returns only with an error.
    pub(crate) async fn keep(&self) -> Result<Infallible, Error> {
        let bytes = metrics::gauge!("millrace_stream_bytes");
        let limit = metrics::gauge!("millrace_stream_limit_bytes");
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for look in 0_u64.. {
            ticks.tick().await;
            let Some(state) = stream::find_stream(self.jetstream, self.name).await? else {
                return Err(Error::retry_because("the stream is gone"));
            };
            bytes.set(state.bytes as f64);
            limit.set(state.max_bytes as f64);
            let full = self.note_fullness(&state);
            if full || look % LOOKS_A_PURGE == 0 {
                self.purge(&state).await?;
            }
        }
        unreachable!("u64 looks outlive the process")
    }

    fn note_fullness(&self, state: &StreamState) -> bool {
        let full = state.bytes / FULL_PERCENT >= state.max_bytes / 100;
        if full == self.fullness.0.swap(full, Ordering::Relaxed) {
            return full;
        }
        let condition = full.then(|| {
            Condition::new(
                Code::StreamFull,
                format!(
                    "the stream has {} of {} bytes",
                    state.bytes, state.max_bytes
                ),
                "capture goes on reading when sinks have applied more, or when \
                 stream.retention.max_bytes is raised",
            )
        });
        if let Some(condition) = &condition {
            tracing::warn!(
                code = condition.code.as_str(),
                "{}; the slot holds what follows",
                condition.message
            );
        }
        self.status.set_state(State::Streaming, condition);
        full
    }

    async fn purge(&self, state: &StreamState) -> Result<(), Error> {
        // The newest message stays: it says how far the stream is.
        let may_go = self.applied().await?.min(state.last_seq.saturating_sub(1));
        if may_go < state.first_seq {
            return Ok(());
        }
        let before = state
            .now
            .checked_sub(self.max_age)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        if let Some(stream_seq) = self.newest_before(before, state.first_seq, may_go).await? {
            tracing::debug!(stream_seq, "purging the stream");
            stream::purge(self.jetstream, self.name, stream_seq).await?;
        }
        Ok(())
    }

    /// The newest sequence that every required sink has applied: 0 where one has not reported.
    async fn applied(&self) -> Result<u64, Error> {
        let mut applied = u64::MAX;
        for sink in &self.required {
            let entry = self
                .sinks
                .get(*sink)
                .await
                .map_err(|error| Error::retry("a sink's report cannot be read", error))?;
            let report = entry.and_then(|entry| serde_json::from_slice::<SinkReport>(&entry).ok());
            applied = applied.min(report.map_or(0, |report| report.stream_seq));
        }
        Ok(applied)
    }

    /// The newest message in a range of sequences that was stored before a time: by bisection, because times
    /// rise with sequences.
    async fn newest_before(
        &self,
        before: SystemTime,
        first: u64,
        last: u64,
    ) -> Result<Option<u64>, Error> {
        let (mut low, mut high) = (first, last + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            let message = stream::message(self.jetstream, self.name, middle).await?;
            // A sequence without a message was purged: it is older than what is asked for.
            if message.is_none_or(|message| message.stored_at < before) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok((low > first).then(|| low - 1))
    }
}
