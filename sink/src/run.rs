//! The sink's loop: it carries deliveries to the machine and batches to the target. Nothing is decided here
//! but what a failure means.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_config::{Backoff, Code, Condition, Config, Sink as Settings, State, limits};
use millrace_consumer::{Body, Delivery, Reader, ReaderOptions, Start, Token};
use millrace_event::TableName;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::batch::Batch;
use crate::beside::Beside;
use crate::copy::withdraw;
use crate::error::Error;
use crate::late::may_turn_aside;
use crate::life::{Life, now_us};
use crate::progress::{CopyProgress, CopyState};
use crate::rejoin;
use crate::sink::CopyTooOld;
use crate::status::Status;
use crate::turns::{Turns, Whose};
use crate::upkeep::Upkeep;
use crate::waiting::Waiting;
use crate::worker::{Input, TableRule, Worker};

/// How often the machine is asked without a delivery.
const TICK: Duration = Duration::from_millis(250);

/// How often a standby tries to take over.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

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
    let started = Instant::now();
    let mut waiting = Waiting::default();
    let mut upkeep = Upkeep::begin(started);
    loop {
        let began = started.elapsed();
        let error = match live(config, settings, status, parking.take(), &mut upkeep, stop).await {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Rejoin) => continue,
            Err(error) => error,
        };
        if !matches!(error, Error::Waiting(_)) {
            waiting.ended();
        }
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
                let look = waiting.look(&what, began, started.elapsed());
                let reason = format!("waiting for capture to {what}");
                if look.is_new {
                    tracing::info!(part = "sink", sink, "{reason}");
                }
                if look.is_long {
                    status.set_state(sink, State::Retrying(reason), None);
                }
                look.pause
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
    /// Tables stand differently: one rejoins, or its changes are applied from here on.
    Rejoin,
}

/// One life: opens the target, follows the stream and does what is beside it; returns at `stop` or with what ended
/// it.
async fn live(
    config: &Config,
    settings: &Settings,
    status: &Status,
    parking: Option<(TableName, Condition)>,
    upkeep: &mut Upkeep,
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
    Box::pin(rejoin::rejoin(&mut life, stop)).await?;
    if stop.is_cancelled() {
        return Ok(Ended::Stopped);
    }
    let state = state_of(&life.progress);
    status.set_state(&settings.name, state, None);
    Box::pin(follow(life, upkeep, stop)).await
}

/// A sink of which no table has its rows yet is not streaming, though its stream is read.
fn state_of(progress: &CopyProgress) -> State {
    let waits = |state: &CopyState| !state.is_followed() && !state.is_parked();
    match progress.tables.values().all(waits) && !progress.tables.is_empty() {
        true => State::Snapshotting,
        false => State::Streaming,
    }
}

/// What one turn of the loop brought.
enum Turn {
    Stop,
    Applied,
    Delivery(Box<Delivery>),
    Rested,
    Beside,
    Tick,
}

/// One life's loop.
struct Following<'l> {
    life: Life<'l>,
    worker: Worker,
    beside: Beside,
    turns: Turns,
    /// The tables whose changes the worker applies.
    followed: Vec<TableName>,
    began: Instant,
}

async fn follow(
    life: Life<'_>,
    upkeep: &mut Upkeep,
    stop: &CancellationToken,
) -> Result<Ended, Error> {
    let began = Instant::now();
    let checkpoint = life.checkpoint;
    let token = Token {
        stream_seq: checkpoint.stream_seq,
        position: checkpoint.position,
    };
    let options = ReaderOptions::new(life.jetstream.clone(), life.source, Start::After(token));
    let mut reader = Reader::open(options);
    let followed = life.progress.those(CopyState::is_followed);
    let rules: HashMap<_, _> = followed
        .iter()
        .map(|name| {
            let (deletes, truncates) = life.rule(name);
            (name.clone(), TableRule { deletes, truncates })
        })
        .collect();
    let progress = life.progress.clone();
    let worker = Worker::new(life.limits, rules, checkpoint, progress, began.elapsed());
    let mut line = Following {
        life,
        worker,
        beside: Beside::default(),
        turns: Turns::new(),
        followed,
        began,
    };
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Before anything is handed out: where changes never pause, the next batch follows the last one at once.
        let now = Instant::now();
        if line.may_turn()
            && upkeep.is_due(&line.life, now)
            && upkeep.turn(&mut line.life, now).await?
        {
            return Ok(Ended::Rejoin);
        }
        // Where every batch is full the stream is never drained, and what is beside it would never have its turn.
        if line.turns.is_beside_due() && line.is_besides_turn() {
            line.turn().await?;
        }
        // Before more is collected: a batch that ends with a transaction of the source ends the target's.
        if line.worker.is_full() {
            line.hand_out().await?;
        }
        // Everything that has arrived already, as far as there is room.
        while line.wants_delivery() && !stop.is_cancelled() {
            let next = match reader.try_next() {
                Ok(next) => next,
                Err(gap) => return Err(line.life.gap(gap).await),
            };
            let Some(delivery) = next else {
                line.worker.handle(Input::Drained).map_err(no_key)?;
                break;
            };
            line.take(&delivery).await?;
            // Before nothing more is waiting only a full batch is handed out: the clock is not asked for each.
            if line.worker.is_full() {
                line.hand_out().await?;
            }
        }
        if line.is_besides_turn() {
            line.turn().await?;
        }
        line.hand_out().await?;
        // What was collected beside the stream while the target worked may be the last of it: nothing would wake us.
        if line.is_besides_turn() && line.beside.has_collected() {
            continue;
        }
        let rest = line.worker.rests_until(began.elapsed());
        let wants = line.wants_delivery() && rest.is_none();
        let (applying, may_turn) = (line.life.is_applying(), line.may_turn());
        let in_flight = line.turns.in_flight();
        let collects = in_flight == Whose::Besides && line.beside.has_room();
        let position = line.worker.checkpoint().position;
        let turn = tokio::select! {
            biased;
            () = stop.cancelled() => Turn::Stop,
            applied = line.life.applied(), if applying => {
                line.applied(applied).await?;
                Turn::Applied
            }
            delivery = reader.next(), if wants => match delivery {
                Ok(delivery) => Turn::Delivery(Box::new(delivery)),
                Err(gap) => return Err(line.life.gap(gap).await),
            },
            () = tokio::time::sleep_until((began + rest.unwrap_or_default()).into()), if rest.is_some() => {
                Turn::Rested
            }
            () = line.beside.next(position, may_turn), if may_turn || collects => Turn::Beside,
            _ = ticks.tick() => Turn::Tick,
        };
        match turn {
            Turn::Stop => return drain(line.life).await.map(|()| Ended::Stopped),
            Turn::Applied => {
                line.life.report(false).await?;
                if line.has_turned() {
                    return Ok(Ended::Rejoin);
                }
            }
            Turn::Rested => {}
            Turn::Beside => {
                let at = line.worker.checkpoint();
                if in_flight == Whose::Besides {
                    line.beside.collect(&mut line.life, at).await?;
                }
            }
            Turn::Delivery(delivery) => line.take(&delivery).await?,
            Turn::Tick => {
                line.life.look_at_broker()?;
                // A stream that is full brings nothing more before this is known.
                line.life.report(false).await?;
                if line.has_turned() {
                    return Ok(Ended::Rejoin);
                }
            }
        }
    }
}

impl Following<'_> {
    /// Whether another delivery may be collected.
    fn wants_delivery(&self) -> bool {
        match self.turns.in_flight() {
            Whose::Besides => !self.worker.is_full(),
            Whose::Workers | Whose::Nobodys => self.worker.wants_delivery(),
        }
    }

    /// Whether the target has no transaction open and nothing to apply.
    fn may_turn(&self) -> bool {
        self.turns.in_flight() == Whose::Nobodys && self.worker.is_at_rest()
    }

    /// Whether what is beside the stream comes first.
    fn is_besides_turn(&self) -> bool {
        let source_ts_us = self.life.checkpoint.source_ts_us;
        self.may_turn()
            && self.turns.is_besides()
            && may_turn_aside(source_ts_us, now_us(), self.worker.is_drained())
    }

    async fn hand_out(&mut self) -> Result<(), Error> {
        if self.turns.in_flight() != Whose::Nobodys {
            return Ok(());
        }
        if let Some(batch) = self.worker.poll(self.began.elapsed()) {
            self.begin(batch, Whose::Workers).await?;
        } else {
            self.turns.passed();
        }
        Ok(())
    }

    async fn turn(&mut self) -> Result<(), Error> {
        let (at, collected) = (self.worker.checkpoint(), self.worker.collected().position);
        self.turns.asked_beside();
        let batch = self.beside.turn(&mut self.life, at, collected).await?;
        if let Some(batch) = batch {
            self.begin(batch, Whose::Besides).await?;
        }
        // While the target works.
        self.beside.tell(&self.life).await
    }

    async fn begin(&mut self, batch: Batch, whose: Whose) -> Result<(), Error> {
        self.life.begin(batch).await?;
        self.turns.begun(whose);
        Ok(())
    }

    /// Has the worker lay rows out for the target's tables as they are now: what is beside it may have changed them.
    async fn renew_layouts(&mut self) -> Result<(), Error> {
        for table in self.life.take_changed() {
            let Some(known) = self.worker.layout(&table) else {
                continue;
            };
            let renewed = self.life.renewed(&Arc::clone(known)).await?;
            self.worker.set_layout(renewed);
        }
        Ok(())
    }

    /// What was in flight is applied, or was not.
    async fn applied(&mut self, applied: Result<(), Error>) -> Result<(), Error> {
        let whose = self.turns.ended();
        if let Err(error) = applied {
            if is_too_old(&error) {
                // The same rows would be refused for ever: another request reads them again.
                tracing::warn!(sink = %self.life.settings.name, error = error.chain(), "asking for the rows again");
                withdraw(&self.life).await?;
            }
            return Err(error);
        }
        match whose {
            Whose::Workers => self.worker.handle(Input::Flushed).map_err(no_key)?,
            Whose::Besides => self.beside.applied(),
            Whose::Nobodys => {}
        }
        Ok(())
    }

    /// Waits for what is in flight.
    async fn settle(&mut self) -> Result<(), Error> {
        if self.life.is_applying() {
            let applied = self.life.applied().await;
            self.applied(applied).await?;
        }
        Ok(())
    }

    /// Whether tables stand differently than this life took them.
    fn has_turned(&self) -> bool {
        let may_end =
            self.may_turn() || self.turns.in_flight() == Whose::Nobodys && !self.worker.is_open();
        let progress = &self.life.progress;
        may_end
            && (progress.those(CopyState::is_followed) != self.followed
                || rejoin::is_near(&self.life))
    }

    /// Feeds a delivery to the machine, with the layouts that it needs.
    async fn take(&mut self, delivery: &Delivery) -> Result<(), Error> {
        take(self, delivery).await
    }
}

fn is_too_old(error: &Error) -> bool {
    matches!(error, Error::Retry { source: Some(source), .. } if source.is::<CopyTooOld>())
}

/// Feeds a delivery to the machine, with the layouts that it needs.
async fn take(line: &mut Following<'_>, delivery: &Delivery) -> Result<(), Error> {
    let stream_seq = delivery.stream_seq;
    let payload = match &delivery.body {
        Body::Control(control) => {
            return line
                .worker
                .handle(Input::Control {
                    stream_seq,
                    control,
                })
                .map_err(no_key);
        }
        Body::Changes(payload) => payload,
    };
    line.renew_layouts().await?;
    for event in delivery.changes() {
        let event = event.map_err(|error| {
            Error::Halt(Condition::new(
                Code::StreamShape,
                format!("stream sequence {stream_seq} holds what is no change event: {error}"),
                "only millrace may publish to the stream's subjects; \
             if a newer release wrote this, upgrade this one",
            ))
        })?;
        if let Some(table) = line.worker.missing_layout(&event) {
            // The target is asked about the table, so nothing else may be going on there.
            line.settle().await?;
            // Rows that are laid out for an older shape go before the target gets another.
            if line.worker.layout(&table).is_some()
                && let Some(batch) = line.worker.cut(line.began.elapsed())
            {
                line.begin(batch, Whose::Workers).await?;
                line.settle().await?;
            }
            let version = event.source.table_version.as_ref();
            let layout = line.life.layout(&table, Some(version)).await?;
            line.worker.set_layout(layout);
        }
        line.worker
            .handle(Input::Changes {
                stream_seq,
                payload,
                events: std::slice::from_ref(&event),
            })
            .map_err(no_key)?;
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
