//! The capture's loop: it carries inputs to the machine and outputs to the world. Nothing is decided here but
//! what a failure means.

mod perform;
mod undescribed;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use async_nats::Subject;
use millrace_config::{Backoff, Code, Condition, Config, State, limits};
use millrace_event::{Position, TableName};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use self::perform::Mark;
use self::undescribed::Undescribed;
use crate::capture::{Capture, CaptureError, Input, Output};
use crate::commits::Commits;
use crate::copy::Copier;
use crate::left_out::LeftOut;
use crate::life::{self, Away, Life, Source, Stream};
use crate::publish::{self, Acks, Sender};
use crate::replication::{Frame, WalBatch, WalHandle, WalReader};
use crate::retention::{Fullness, Retention};
use crate::status::Status;
use crate::watch::watch;
use crate::{Error, heartbeat};

/// How often what has aged is confirmed and the counters are shown.
const TICK: Duration = Duration::from_millis(200);

/// How often a standby tries to take over.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

/// What a graceful stop may take of the process's deadline.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Captures until `stop`, through every failure that passes.
///
/// # Errors
/// A failure that needs an operator: [`Error::Halt`], or before streaming began [`Error::Refused`].
pub async fn run(config: &Config, status: &Status, stop: &CancellationToken) -> Result<(), Error> {
    let backoff = Backoff::default();
    let mut failures = 0_u32;
    let mut away = Away::default();
    loop {
        let Err(error) = Box::pin(live(config, status, &mut away, stop)).await else {
            return Ok(());
        };
        // A life that got as far as streaming starts the backoff anew.
        failures = if status.state().0 == State::Streaming {
            1
        } else {
            failures + 1
        };
        let wait = match error {
            Error::Halt(condition) => {
                status.set_state(State::Halted(condition.code), Some(condition.clone()));
                return Err(Error::Halt(condition));
            }
            Error::Refused(_) if !status.begun() => return Err(error),
            Error::Standby(condition) => {
                status.set_state(State::Standby, Some(condition));
                STANDBY_INTERVAL
            }
            Error::Refused(_) | Error::Retry { .. } => {
                let reason = error.chain();
                tracing::warn!(part = "capture", %reason, "trying again");
                let condition = match error {
                    Error::Refused(condition) => Some(condition),
                    Error::Retry { condition, .. } => condition,
                    _ => None,
                };
                if let Some(condition) = &condition {
                    tracing::warn!(code = condition.code.as_str(), remedy = %condition.remedy, "{}", condition.message);
                }
                status.set_state(State::Retrying(reason), condition);
                backoff.delay(failures, rand::random())
            }
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// One life: connects, streams, and returns at `stop` or with what ended it.
async fn live(
    config: &Config,
    status: &Status,
    away: &mut Away,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let began = Instant::now();
    // Boxed: it is the largest future here, and done when the loop begins.
    let life = tokio::select! {
        biased;
        // Before streaming there is nothing to drain.
        () = stop.cancelled() => return Ok(()),
        life = Box::pin(life::open(config, began.elapsed(), away)) => life?,
    };
    let Life {
        capture,
        after,
        wal,
        sender,
        acks,
        source,
        stream,
        watched,
        left_out,
        without,
    } = life;
    status.set_parked(without.parked());
    status.set_state(State::Streaming, None);
    status.set_confirmed(capture.confirmed());
    let commits = Commits::default();
    let copier = Copier::new(config, &source, &stream, status, &commits);
    let fullness = Fullness::default();
    let retention = Retention::new(config, &stream, &fullness, status);
    let line = Line {
        config,
        tables_by_oid: watched.by_oid(),
        handle: wal.handle(),
        after,
        capture,
        sender: Some(sender),
        source: &source,
        stream: &stream,
        left_out: &left_out,
        status,
        fullness: &fullness,
        commits: &commits,
        subjects: Vec::new(),
        pending: VecDeque::new(),
        undescribed: Undescribed::default(),
        heartbeats: VecDeque::new(),
        published: 0,
        changes_seen: 0,
        publisher: nuid(),
        began,
    };
    tokio::select! {
        biased;
        ended = line.run(wal, acks, stop) => ended,
        // The line itself ends first at `stop`; these only end with a failure.
        Err(error) = heartbeat::beat(&source.dsn, config.source.heartbeat_interval) => Err(error),
        Err(error) = watch(config, &source, &stream, watched, &left_out, without, status) => Err(error),
        Err(error) = copier.serve() => Err(error),
        Err(error) = retention.keep() => Err(error),
    }
}

/// A name for this life's chunk sets.
fn nuid() -> String {
    format!("{:016x}", rand::random::<u64>())
}

struct Line<'l> {
    config: &'l Config,
    /// The tables of this life, by their OID.
    tables_by_oid: HashMap<u32, TableName>,
    handle: WalHandle,
    capture: Capture,
    /// `None` once it was handed over to be finished.
    sender: Option<Sender>,
    source: &'l Source,
    stream: &'l Stream,
    left_out: &'l LeftOut,
    status: &'l Status,
    fullness: &'l Fullness,
    commits: &'l Commits,
    /// Everything above this position is published by this life.
    after: Position,
    /// What the machine's subject ids stand for.
    subjects: Vec<Subject>,
    pending: VecDeque<Output>,
    undescribed: Undescribed,
    /// Heartbeats on their way: the number of the message, and what to show once it is acknowledged.
    heartbeats: VecDeque<(u64, Mark)>,
    published: u64,
    changes_seen: u64,
    publisher: String,
    began: Instant,
}

/// What one turn of the loop brought.
enum Turn {
    Stop,
    Acked(publish::Acked),
    Sent,
    Batch(Option<WalBatch>),
    Tick,
}

impl Line<'_> {
    async fn run(
        mut self,
        mut wal: WalReader,
        mut acks: Acks,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.perform().await?;
            let outgoing = self.next_outgoing();
            let waiting = outgoing.is_some();
            let sender = self.sender.as_mut().expect("only taken below");
            let turn = tokio::select! {
                biased;
                () = stop.cancelled() => Turn::Stop,
                acked = acks.next() => Turn::Acked(acked.map_err(publish_failed)?),
                sent = send(sender, outgoing), if waiting => {
                    sent.map_err(publish_failed)?;
                    Turn::Sent
                }
                _ = ticks.tick() => Turn::Tick,
                batch = wal.next(), if !waiting && !self.fullness.is_full() => Turn::Batch(batch?),
            };
            match turn {
                Turn::Stop => return self.drain(acks).await,
                Turn::Acked(acked) => self.acked(acked)?,
                Turn::Sent => self.sent(),
                Turn::Tick => {
                    self.tick()?;
                    self.describe_undescribed().await;
                }
                Turn::Batch(None) => return Err(Error::retry_because("the WAL stream ended")),
                Turn::Batch(Some(batch)) => self.batch(&batch)?,
            }
        }
    }

    fn tick(&mut self) -> Result<(), Error> {
        // A source that shuts down ends its SQL sessions first and waits for its walsenders: ours must go too.
        if self.source.client.is_closed() {
            return Err(Error::retry_because("the source ended the session"));
        }
        for (table, op, changes) in self.capture.take_counts() {
            metrics::counter!(
                "millrace_source_changes_total",
                "table" => table.to_string(), "op" => op.letter()
            )
            .increment(changes);
        }
        self.input(Input::Tick)
    }

    /// Feeds a batch of WAL to the machine.
    fn batch(&mut self, batch: &WalBatch) -> Result<(), Error> {
        let recording = self.commits.wanted();
        self.capture.record_commits(recording);
        for frame in batch {
            match frame {
                Frame::Data {
                    start,
                    sent_at_us,
                    payload,
                    ..
                } => {
                    self.input(Input::Data {
                        start,
                        sent_at_us,
                        payload,
                    })?;
                }
                Frame::Keepalive {
                    wal_end,
                    sent_at_us,
                    ..
                } => {
                    self.input(Input::Keepalive {
                        wal_end,
                        sent_at_us,
                    })?;
                }
            }
        }
        if recording {
            let (position, commits) = self.capture.take_commits();
            self.commits.tell(position, &commits);
        }
        self.input(Input::EndOfBatch)
    }

    fn input(&mut self, input: Input<'_>) -> Result<(), Error> {
        self.capture
            .handle(input, self.began.elapsed())
            .map_err(capture_failed)
    }

    /// Publishes what is complete, waits for its acknowledgements, and confirms it. What the machine still
    /// holds of an open transaction is read again by the next life.
    async fn drain(mut self, mut acks: Acks) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + DRAIN_DEADLINE;
        let drained = tokio::time::timeout_at(deadline, async {
            loop {
                self.perform().await?;
                let outgoing = self.next_outgoing();
                let waiting = outgoing.is_some();
                if !waiting && self.capture.in_flight() == 0 {
                    break;
                }
                let sender = self.sender.as_mut().expect("taken once, below");
                tokio::select! {
                    biased;
                    acked = acks.next() => {
                        let acked = acked.map_err(publish_failed)?;
                        self.acked(acked)?;
                    }
                    sent = send(sender, outgoing), if waiting => {
                        sent.map_err(publish_failed)?;
                        self.sent();
                    }
                }
            }
            if let Some(sender) = self.sender.take() {
                acks.finish(sender).await.map_err(publish_failed)?;
            }
            Ok(())
        })
        .await;
        let stopped = self
            .handle
            .stop(limits::SHUTDOWN_DEADLINE - DRAIN_DEADLINE)
            .await;
        if let Err(error) = stopped {
            tracing::warn!(%error, "the replication connection did not end in order");
        }
        drained.unwrap_or_else(|_| Err(Error::retry_because("draining took too long")))
    }
}

/// Sends a message; never completes where there is none.
async fn send(
    sender: &mut Sender,
    outgoing: Option<publish::Outgoing>,
) -> Result<(), publish::PublishError> {
    match outgoing {
        Some(outgoing) => sender.send(outgoing).await,
        None => std::future::pending().await,
    }
}

fn publish_failed(error: publish::PublishError) -> Error {
    Error::retry(error.to_string(), error)
}

fn capture_failed(error: CaptureError) -> Error {
    let text = error.to_string();
    let halt = |code, remedy: &str| {
        let mut message = text.clone();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            message = format!("{message}: {inner}");
            cause = inner.source();
        }
        Error::halt(Condition::new(code, message, remedy))
    };
    match &error {
        CaptureError::Encode(_) => halt(
            Code::SourceEncoding,
            "correct the value at the source's client encoding",
        ),
        CaptureError::RowTooLarge(_) => halt(
            Code::RowTooLarge,
            "remove the table from the configuration, run `millrace drop`, then `millrace run`",
        ),
        // Damaged on the way: a new connection brings it again.
        CaptureError::Pgoutput(_) | CaptureError::Protocol(_) => Error::retry(text, error),
    }
}
