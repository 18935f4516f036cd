//! The sink's loop: it carries deliveries to the machine and batches to the target. Nothing is decided here
//! but what a failure means.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use millrace_config::{Backoff, Code, Condition, Config, Sink as Settings, State, limits};
use millrace_consumer::{Body, Delivery, Reader, ReaderOptions, Start, Token};
use millrace_event::{TableName, Version};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::copy::{copy, withdraw};
use crate::error::Error;
use crate::life::{LOOK_INTERVAL, Life};
use crate::rejoin;
use crate::sink::Sink;
use crate::status::Status;
use crate::worker::{Input, TableRule, Worker};

/// How often the machine is asked without a delivery.
const TICK: Duration = Duration::from_millis(250);

/// How often a standby tries to take over.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

/// How often the target is asked whether it takes a parked table again.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// How often deletes are forgotten that no older row can follow.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(60);

/// A delete is remembered for this many clean-ups after the sink passed it, for those who look into a fault.
const CLEAN_UPS_KEPT: usize = 10;

/// What a graceful stop may take of the process's deadline.
const DRAIN_DEADLINE: Duration = Duration::from_secs(15);

/// Keeps one sink up to date until `stop`, through every failure that passes.
///
/// # Errors
/// A failure that needs an operator: [`Error::Halt`], or before the sink ever worked [`Error::Refused`].
pub async fn run(
    config: &Config,
    settings: &Settings,
    status: &Status,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let sink = settings.name.as_str();
    let backoff = Backoff::default();
    let mut failures = 0_u32;
    // The table that the target has just refused.
    let mut parking = None;
    let mut waited_for: Option<String> = None;
    loop {
        let error = match live(config, settings, status, parking.take(), stop).await {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Rejoin) => continue,
            Err(error) => error,
        };
        let streamed = status.snapshot().state == State::Streaming;
        failures = if streamed { 1 } else { failures + 1 };
        let wait = match error {
            Error::Halt(condition) => {
                status.set_state(sink, State::Halted(condition.code), Some(condition.clone()));
                return Err(Error::Halt(condition));
            }
            Error::Table { condition, .. } if !status.snapshot().begun => {
                return Err(Error::Halt(condition));
            }
            Error::Table { table, condition } => {
                parking = Some((table, condition));
                limits::BACKOFF_FIRST
            }
            Error::Refused(_) if !status.snapshot().begun => return Err(error),
            Error::Standby => {
                status.set_state(sink, State::Standby, None);
                STANDBY_INTERVAL
            }
            Error::Waiting(what) => {
                failures = 0;
                if waited_for.as_deref() != Some(what.as_str()) {
                    tracing::info!(part = "sink", sink, "waiting for capture to {what}");
                }
                waited_for = Some(what);
                LOOK_INTERVAL
            }
            Error::Refused(_) | Error::Retry { .. } => {
                let reason = error.chain();
                tracing::warn!(part = "sink", sink, %reason, "trying again");
                let condition = match error {
                    Error::Refused(condition) => Some(condition),
                    Error::Retry { condition, .. } => condition,
                    _ => None,
                };
                if let Some(condition) = &condition {
                    tracing::warn!(code = condition.code.as_str(), remedy = %condition.remedy, "{}", condition.message);
                }
                status.set_state(sink, State::Retrying(reason), condition);
                backoff.delay(failures, rand::random())
            }
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Why a life ended without a failure.
enum Ended {
    /// The process stops.
    Stopped,
    /// The target takes a parked table again, or its claim has lapsed.
    Rejoin,
}

/// One life: opens the target, copies what is missing, follows the stream; returns at `stop` or with what
/// ended it.
async fn live(
    config: &Config,
    settings: &Settings,
    status: &Status,
    parking: Option<(TableName, Condition)>,
    stop: &CancellationToken,
) -> Result<Ended, Error> {
    let mut life = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(Ended::Stopped),
        life = Box::pin(Life::open(config, settings, status)) => life?,
    };
    if let Some((table, condition)) = parking {
        Box::pin(rejoin::park(&mut life, &table, &condition)).await?;
    }
    if !life.progress.is_complete() {
        status.set_state(&settings.name, State::Snapshotting, None);
        Box::pin(copy(&mut life, stop)).await?;
        if stop.is_cancelled() {
            return Ok(Ended::Stopped);
        }
    }
    // A crash may have left a request behind whose last table was applied.
    withdraw(&life).await?;
    Box::pin(rejoin::rejoin(&mut life, stop)).await?;
    if !life.progress.is_complete() {
        return Ok(Ended::Rejoin);
    }
    status.set_state(&settings.name, State::Streaming, None);
    Box::pin(follow(life, stop)).await
}

/// What one turn of the loop brought.
enum Turn {
    Stop,
    Applied,
    Delivery(Box<Delivery>),
    Rested,
    Tick,
}

async fn follow(mut life: Life<'_>, stop: &CancellationToken) -> Result<Ended, Error> {
    let began = Instant::now();
    let checkpoint = life.checkpoint;
    let token = Token {
        stream_seq: checkpoint.stream_seq,
        position: checkpoint.position,
    };
    let options = ReaderOptions::new(life.jetstream.clone(), life.source, Start::After(token));
    let mut reader = Reader::open(options);
    let parked = life.progress.parked();
    let rules: HashMap<_, _> = life
        .tables
        .keys()
        .filter(|name| !parked.contains(name))
        .map(|name| {
            let (deletes, truncates) = life.rule(name);
            (name.clone(), TableRule { deletes, truncates })
        })
        .collect();
    let progress = life.progress.clone();
    let mut worker = Worker::new(life.limits, rules, checkpoint, progress, began.elapsed());
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut passed = VecDeque::new();
    let mut cleaned_at = Instant::now();
    let mut probed_at = Instant::now();
    loop {
        // Everything that has arrived already, as far as there is room.
        while worker.wants_delivery() && !stop.is_cancelled() {
            let Some(delivery) = reader.try_next()? else {
                worker.handle(Input::Drained).map_err(no_key)?;
                break;
            };
            take(&mut life, &mut worker, &delivery).await?;
            // Before nothing more is waiting only a full batch is handed out: the clock is not asked for each.
            if worker.is_full()
                && let Some(batch) = worker.poll(began.elapsed())
            {
                life.begin(batch);
            }
        }
        if let Some(batch) = worker.poll(began.elapsed()) {
            life.begin(batch);
        }
        let rest = worker.rests_until(began.elapsed());
        let wants = worker.wants_delivery() && rest.is_none();
        let turn = tokio::select! {
            biased;
            () = stop.cancelled() => Turn::Stop,
            applied = life.applied(), if life.is_applying() => {
                applied?;
                Turn::Applied
            }
            delivery = reader.next(), if wants => Turn::Delivery(Box::new(delivery?)),
            () = tokio::time::sleep_until((began + rest.unwrap_or_default()).into()), if rest.is_some() => {
                Turn::Rested
            }
            _ = ticks.tick() => Turn::Tick,
        };
        match turn {
            Turn::Stop => return drain(life).await.map(|()| Ended::Stopped),
            Turn::Applied => {
                worker.handle(Input::Flushed).map_err(no_key)?;
                life.report(false).await?;
            }
            Turn::Rested => {}
            Turn::Delivery(delivery) => take(&mut life, &mut worker, &delivery).await?,
            Turn::Tick => {
                // A stream that is full brings nothing more before this is known.
                life.report(false).await?;
                let rests = worker.is_at_rest() && !life.is_applying();
                if rests && cleaned_at.elapsed() >= CLEAN_UP_INTERVAL {
                    cleaned_at = Instant::now();
                    clean_up(&mut life, &mut passed).await?;
                }
                let due = !parked.is_empty() && probed_at.elapsed() >= PROBE_INTERVAL;
                if due && rests {
                    probed_at = Instant::now();
                    if rejoin::is_wanted(&mut life, &parked).await? {
                        return Ok(Ended::Rejoin);
                    }
                }
            }
        }
    }
}

/// Feeds a delivery to the machine, with the layouts that it needs.
async fn take(life: &mut Life<'_>, worker: &mut Worker, delivery: &Delivery) -> Result<(), Error> {
    let stream_seq = delivery.stream_seq;
    let payload = match &delivery.body {
        Body::Control(control) => {
            return worker
                .handle(Input::Control {
                    stream_seq,
                    control,
                })
                .map_err(no_key);
        }
        Body::Changes(payload) => payload,
    };
    for event in delivery.changes() {
        let event = event.map_err(|error| {
            Error::Halt(Condition::new(
                Code::StreamShape,
                format!("stream sequence {stream_seq} holds what is no change event: {error}"),
                "only millrace may publish to the stream's subjects; \
             if a newer release wrote this, upgrade this one",
            ))
        })?;
        if let Some(table) = worker.missing_layout(&event) {
            // The target is asked about the table, so nothing else may be going on there.
            if life.is_applying() {
                life.applied().await?;
                worker.handle(Input::Flushed).map_err(no_key)?;
            }
            let version = event.source.table_version.as_ref();
            worker.set_layout(life.layout(&table, Some(version)).await?);
        }
        worker
            .handle(Input::Changes {
                stream_seq,
                payload,
                events: std::slice::from_ref(&event),
            })
            .map_err(no_key)?;
    }
    Ok(())
}

/// Forgets the deletes that the sink passed a while ago: nothing at or below its position is applied again.
async fn clean_up(life: &mut Life<'_>, passed: &mut VecDeque<Version>) -> Result<(), Error> {
    passed.push_back(life.kept_from().1.0);
    if passed.len() > CLEAN_UPS_KEPT
        && let Some(version) = passed.pop_front()
    {
        let forgotten = life.sink().clean_up(version).await?;
        tracing::debug!(sink = %life.settings.name, forgotten, "old deletes forgotten");
    }
    Ok(())
}

/// Waits for the batch in flight. What was not handed out comes again after the next start.
async fn drain(mut life: Life<'_>) -> Result<(), Error> {
    if life.is_applying() {
        tokio::time::timeout(DRAIN_DEADLINE, life.applied())
            .await
            .unwrap_or_else(|_| Err(Error::retry_because("draining took too long")))?;
    }
    life.report(true).await
}

fn no_key(error: crate::row::RowError) -> Error {
    Error::Halt(Condition::new(
        Code::StreamShape,
        error.to_string(),
        "only millrace may publish to the stream's subjects",
    ))
}
