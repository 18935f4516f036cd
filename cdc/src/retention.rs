//! What the stream may forget: messages that every required sink has applied and that are old enough. While
//! the stream is full, "old enough" shrinks to what the slot needs as a safety net, and the oldest part goes.
//!
//! A parked table holds nothing back: its changes wait as long as the stream keeps them anyway.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_nats::jetstream::Context;
use async_nats::jetstream::kv::{self, Operation};
use millrace_config::{Code, Condition, Config, Sink, State};
use millrace_event::Position;
use millrace_event::work::{ParkedClaim, SinkReport};

use crate::Error;
use crate::life::Stream;
use crate::status::Status;
use crate::stream::{self, StreamState};
use crate::understood;

/// How often the stream's size is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Every so many looks, what may go is purged.
const LOOKS_A_PURGE: u64 = 10;

/// Above this part of its limit, in percent, the stream counts as full: the slot holds what follows.
const FULL_PERCENT: u64 = 90;

/// While the stream is full, each look lets one part in so many of its messages go, the oldest: readers that
/// are not required keep what they can.
const FULL_PARTS: u64 = 10;

/// A message stays for so long after the moment at which the slot may forget it: until then it is looked up in
/// the stream, and its absence would mean that the broker lost it.
const CONFIRM_SLACK: Duration = Duration::from_secs(30);

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
    source: &'r str,
    name: &'r str,
    reports: &'r kv::Store,
    sinks: &'r [Sink],
    max_age: Duration,
    /// How long a message is needed for the confirm policy.
    confirm_age: Duration,
    fullness: &'r Fullness,
    status: &'r Status,
    /// Of each sink, the revision of its last report that was not understood; revisions begin with 1.
    unread: Vec<AtomicU64>,
}

impl<'r> Retention<'r> {
    pub(crate) fn new(
        config: &'r Config,
        stream: &'r Stream,
        fullness: &'r Fullness,
        status: &'r Status,
    ) -> Self {
        let synced = config.stream.kept_until_synced();
        let confirm_age = synced.map_or(Duration::ZERO, |age| age + CONFIRM_SLACK);
        Self {
            jetstream: &stream.jetstream,
            source: &config.source.name,
            name: &stream.name,
            reports: &stream.sinks,
            sinks: &config.sinks,
            max_age: config.stream.retention.max_age,
            confirm_age,
            fullness,
            status,
            unread: config.sinks.iter().map(|_| AtomicU64::new(0)).collect(),
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
                self.purge(&state, full).await?;
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
                "capture goes on reading when the required sinks have applied more, or when \
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

    async fn purge(&self, state: &StreamState, full: bool) -> Result<(), Error> {
        let reports = self.reports(state, full).await?;
        let applied = applied(&reports, state);
        let Some(may_go) = may_go(state, full, applied) else {
            return Ok(());
        };
        let age = if full {
            self.confirm_age
        } else {
            self.max_age.max(self.confirm_age)
        };
        let before = state.now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        let (first, source) = (state.first_seq, self.source);
        let aged = stream::newest_before(self.jetstream, source, before, first, may_go).await?;
        if let Some(stream_seq) = aged {
            tracing::debug!(stream_seq, "purging the stream");
            stream::purge(self.jetstream, self.name, stream_seq).await?;
            for (sink, claim) in lapsing(&reports, state.first_seq, stream_seq) {
                tracing::warn!(
                    code = Code::ParkedTooLong.as_str(), sink, table = %claim.table,
                    "the stream reached its limit and let go of what a parked table had not applied; \
                     the table is copied again once the target takes it"
                );
            }
        }
        Ok(())
    }

    /// What each sink last said of itself, and what the stream has there. A full stream is also looked at as a whole:
    /// nothing but a purge lets it grow again.
    async fn reports(&self, state: &StreamState, full: bool) -> Result<Vec<Reported<'r>>, Error> {
        let mut reports = Vec::with_capacity(self.sinks.len());
        for (sink, unread) in self.sinks.iter().zip(&self.unread) {
            let entry = stream::entry(self.reports, &sink.name)
                .await
                .map_err(|error| Error::retry("a sink's report cannot be read", error))?;
            let entry = entry.filter(|entry| entry.operation == Operation::Put);
            let report = entry.and_then(|entry| self.understood(&sink.name, &entry, unread));
            let (name, required) = (sink.name.as_str(), sink.required);
            let found = match &report {
                Some(report) if required && report.stream_seq >= state.first_seq => {
                    stream::position_at(self.jetstream, self.name, report.stream_seq).await?
                }
                _ => None,
            };
            let has_all = match &report {
                Some(report) if required && full && found != Some(report.position) => {
                    stream::is_covered(self.jetstream, self.name, report.position).await?
                }
                _ => false,
            };
            reports.push(Reported {
                name,
                required,
                report,
                found,
                has_all,
            });
        }
        Ok(reports)
    }

    /// A report. One that is not understood keeps what a required sink has not applied, like none; that is said
    /// once: a sink that runs reports again within a second.
    fn understood(&self, sink: &str, entry: &kv::Entry, unread: &AtomicU64) -> Option<SinkReport> {
        let condition = match understood(&self.reports.name, sink, &entry.value) {
            Ok(report) => return Some(report),
            Err(condition) => condition,
        };
        let said = unread.swap(entry.revision, Ordering::Relaxed);
        if said != entry.revision {
            tracing::warn!(
                code = condition.code.as_str(), remedy = %condition.remedy,
                "nothing is purged for sink {sink}: {}", condition.message
            );
        }
        None
    }
}

/// A sink and its report, if it made one.
#[derive(Debug)]
struct Reported<'r> {
    name: &'r str,
    required: bool,
    report: Option<SinkReport>,
    /// The position of the message at the report's sequence, where the stream has one.
    found: Option<Position>,
    /// Whether the stream was seen to have nothing above the report's position.
    has_all: bool,
}

impl Reported<'_> {
    /// The newest sequence of the stream that the sink has applied.
    ///
    /// A sequence alone says nothing: after the broker lost the stream's end, the same sequence may hold a message
    /// that the sink has never seen. Until it reports what it finds there, it has applied nothing. Unless it had
    /// applied all that is left: it waits for the stream to grow, which a full one does only when something goes.
    /// Below the stream's beginning there is nothing left to let go.
    fn applied(&self, state: &StreamState) -> u64 {
        let Some(report) = &self.report else {
            return 0;
        };
        if report.stream_seq < state.first_seq || self.found == Some(report.position) {
            return report.stream_seq;
        }
        if self.has_all { state.last_seq } else { 0 }
    }
}

/// The newest sequence that every required sink has applied: 0 where that is not known of one.
fn applied(reports: &[Reported<'_>], state: &StreamState) -> u64 {
    let required = reports.iter().filter(|sink| sink.required);
    required
        .map(|sink| sink.applied(state))
        .min()
        .unwrap_or(u64::MAX)
}

/// The newest sequence that may go if it is old enough. The newest message stays: it says how far the stream is.
fn may_go(state: &StreamState, full: bool, applied: u64) -> Option<u64> {
    let held = state.last_seq.checked_sub(state.first_seq)?;
    let part = if full { held / FULL_PARTS } else { held };
    let may_go = (state.first_seq + part)
        .min(state.last_seq.saturating_sub(1))
        .min(applied);
    (may_go >= state.first_seq).then_some(may_go)
}

/// The parked tables whose next message is among those that go: each is found once.
fn lapsing<'p>(
    reports: &'p [Reported<'_>],
    first: u64,
    last: u64,
) -> impl Iterator<Item = (&'p str, &'p ParkedClaim)> {
    let claims = reports.iter().flat_map(|sink| {
        let parked = sink.report.iter().flat_map(|report| &report.parked);
        parked.map(move |claim| (sink.name, claim))
    });
    claims.filter(move |(_, claim)| (first..=last).contains(&(claim.stream_seq + 1)))
}

#[cfg(test)]
mod tests {
    use millrace_event::{Lsn, TableName};

    use super::*;

    fn state(first_seq: u64, last_seq: u64) -> StreamState {
        StreamState {
            created: String::new(),
            first_seq,
            last_seq,
            messages: last_seq + 1 - first_seq,
            bytes: 0,
            max_bytes: 1,
            now: SystemTime::UNIX_EPOCH,
        }
    }

    /// The position of the message at a sequence, in a stream that never lost anything.
    fn at(stream_seq: u64) -> Position {
        Position::new(1, Lsn(stream_seq), 1)
    }

    fn reported(name: &str, required: bool, stream_seq: u64, parked: Option<u64>) -> Reported<'_> {
        let table = TableName::new("public", "t");
        let claim = |stream_seq| ParkedClaim {
            table: table.clone(),
            stream_seq,
        };
        let report = SinkReport {
            stream_seq,
            position: at(stream_seq),
            at_us: 0,
            parked: parked.map(claim).into_iter().collect(),
        };
        Reported {
            name,
            required,
            report: Some(report),
            found: Some(at(stream_seq)),
            has_all: false,
        }
    }

    #[test]
    fn only_the_own_position_of_a_required_sink_holds_messages_back() {
        let mut sinks = vec![
            reported("a", true, 900, Some(100)),
            reported("b", true, 950, None),
            reported("c", false, 5, None),
        ];
        assert_eq!(applied(&sinks, &state(1, 1000)), 900);
        assert_eq!(
            may_go(&state(1, 1000), false, applied(&sinks, &state(1, 1000))),
            Some(900)
        );
        sinks[1].report = None;
        assert_eq!(applied(&sinks, &state(1, 1000)), 0);
        assert_eq!(
            may_go(&state(1, 1000), true, applied(&sinks, &state(1, 1000))),
            None
        );
        assert_eq!(applied(&sinks[2..], &state(1, 1000)), u64::MAX);
    }

    #[test]
    fn a_report_counts_only_while_the_stream_has_its_position_at_its_sequence() {
        let mut sinks = vec![
            reported("a", true, 900, None),
            reported("b", true, 950, None),
        ];
        // The stream lost its end and was written again in fewer messages.
        sinks[0].found = Some(at(910));
        assert_eq!(applied(&sinks, &state(1, 1000)), 0);
        // Or it ends before, or has a message of somebody else there.
        sinks[0].found = None;
        assert_eq!(applied(&sinks, &state(1, 1000)), 0);
        assert_eq!(applied(&sinks, &state(900, 1000)), 0);
        // What was let go cannot be looked at, and holds the rest back as it is.
        assert_eq!(applied(&sinks, &state(901, 1000)), 900);
        assert_eq!(
            may_go(&state(901, 1000), false, applied(&sinks, &state(901, 1000))),
            None
        );
        sinks[0] = reported("a", true, 890, None);
        assert_eq!(applied(&sinks, &state(1, 1000)), 890);
    }

    #[test]
    fn a_sink_that_has_all_of_a_stream_that_lost_its_end_holds_nothing_back() {
        let mut sink = reported("a", true, 1_000, None);
        let after_the_loss = state(1, 970);
        sink.found = None;
        assert_eq!(applied(&[sink], &after_the_loss), 0);
        let mut sink = reported("a", true, 1_000, None);
        (sink.found, sink.has_all) = (None, true);
        let sinks = [sink];
        assert_eq!(applied(&sinks, &after_the_loss), 970);
        assert_eq!(may_go(&after_the_loss, true, 970), Some(97));
        assert_eq!(may_go(&state(970, 970), true, 970), None);
    }

    #[test]
    fn the_newest_message_stays_and_a_full_stream_lets_its_oldest_part_go() {
        assert_eq!(may_go(&state(1, 1000), false, u64::MAX), Some(999));
        assert_eq!(may_go(&state(101, 1101), true, u64::MAX), Some(201));
        assert_eq!(may_go(&state(101, 1101), true, 150), Some(150));
        assert_eq!(may_go(&state(101, 1101), true, 100), None);
        assert_eq!(may_go(&state(7, 7), true, u64::MAX), None);
        // An empty stream.
        assert_eq!(may_go(&state(8, 7), false, u64::MAX), None);
        // However little it holds, something goes.
        assert_eq!(may_go(&state(7, 8), true, u64::MAX), Some(7));
    }

    #[test]
    fn a_parked_table_is_named_once_when_its_next_message_goes() {
        let sinks = [
            reported("a", true, 900, Some(100)),
            reported("b", false, 900, Some(300)),
        ];
        let names = |first, last| {
            let lapsing = lapsing(&sinks, first, last);
            lapsing.map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(1, 100), Vec::<&str>::new());
        assert_eq!(names(1, 101), ["a"]);
        assert_eq!(names(102, 300), Vec::<&str>::new());
        assert_eq!(names(102, 400), ["b"]);
    }
}
