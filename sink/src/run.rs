//! The sink's loop: it carries deliveries to the machine and batches to the target. Nothing is decided here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace_config::{Code, Condition, Config, Sink as Settings, State};
use millrace_connect::clock::now_us;
use millrace_consumer::{Body, Delivery, Reader, ReaderOptions, Start, Token};
use millrace_event::TableName;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::batch::Batch;
use crate::beside::Beside;
use crate::copy::withdraw;
use crate::error::Error;
use crate::failures::Failures;
use crate::late::may_run_beside;
use crate::life::Life;
use crate::progress::{CopyProgress, CopyState};
use crate::rejoin;
use crate::schedule::{InFlight, Schedule};
use crate::sink::CopyTooOld;
use crate::status::Status;
use crate::upkeep::Upkeep;
use crate::worker::{Input, TableRule, Worker};

/// How often the machine is asked without a delivery.
const TICK: Duration = Duration::from_millis(250);

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
    let started = Instant::now();
    let mut failures = Failures::new(&settings.name, status);
    let mut upkeep = Upkeep::begin(started);
    loop {
        let began = started.elapsed();
        let refused = failures.take_refused();
        let error = match live(config, settings, status, refused, &mut upkeep, stop).await {
            Ok(Ended::Stopped) => return Ok(()),
            Ok(Ended::Rejoin) => continue,
            Err(error) => error,
        };
        let pause = failures.pause_after(error, began, started.elapsed())?;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
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
    refused: Option<(TableName, Condition)>,
    upkeep: &mut Upkeep,
    stop: &CancellationToken,
) -> Result<Ended, Error> {
    let mut life = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(Ended::Stopped),
        life = Box::pin(Life::open(config, settings, status)) => life?,
    };
    if let Some((table, condition)) = refused {
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

/// What the loop waited for.
enum Wakeup {
    /// The process stops.
    Stop,
    /// What was in flight is applied.
    Applied,
    /// A delivery of the stream came.
    Delivery(Box<Delivery>),
    /// What was let come together is due.
    Rested,
    /// There may be something to do beside the stream.
    Beside,
    /// A while has passed.
    Tick,
}

/// One life's loop.
struct Following<'l> {
    life: Life<'l>,
    worker: Worker,
    beside: Beside,
    schedule: Schedule,
    /// The tables whose changes the worker applies.
    followed: Vec<TableName>,
    began: Instant,
}

async fn follow(
    life: Life<'_>,
    upkeep: &mut Upkeep,
    stop: &CancellationToken,
) -> Result<Ended, Error> {
    let mut reader = open_reader(&life);
    let mut line = Following::begin(life);
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Before anything is handed out: where changes never pause, the next batch follows the last one at once.
        let now = Instant::now();
        if line.is_idle()
            && upkeep.is_due(&line.life, now)
            && upkeep.perform(&mut line.life, now).await?
        {
            return Ok(Ended::Rejoin);
        }
        line.collect(&mut reader, stop).await?;
        if line.is_beside_next() {
            line.begin_beside().await?;
        }
        line.hand_out().await?;
        // What was collected beside the stream while the target worked may be the last of it: nothing would wake us. The
        // next round hands it out, because nothing is being applied.
        if line.is_beside_next() && line.beside.has_collected() {
            continue;
        }
        match line.wait(&mut reader, &mut ticks, stop).await? {
            Wakeup::Stop => return drain(line.life).await.map(|()| Ended::Stopped),
            Wakeup::Applied => {
                line.life.report(false).await?;
                if line.must_rejoin() {
                    return Ok(Ended::Rejoin);
                }
            }
            Wakeup::Rested => {}
            Wakeup::Beside => line.collect_beside().await?,
            Wakeup::Delivery(delivery) => line.take(&delivery).await?,
            Wakeup::Tick => {
                line.life.look_at_broker()?;
                // A stream that is full brings nothing more before this is known.
                line.life.report(false).await?;
                if line.must_rejoin() {
                    return Ok(Ended::Rejoin);
                }
            }
        }
    }
}

/// Reads the stream from where the target is.
fn open_reader(life: &Life<'_>) -> Reader {
    let token = Token {
        stream_seq: life.checkpoint.stream_seq,
        position: life.checkpoint.position,
    };
    let options = ReaderOptions::new(life.jetstream.clone(), life.source, Start::After(token));
    Reader::open(options)
}

impl<'l> Following<'l> {
    fn begin(life: Life<'l>) -> Self {
        let began = Instant::now();
        let followed = life.progress.those(CopyState::is_followed);
        let rules = followed.iter().map(|name| {
            let (deletes, truncates) = life.rule(name);
            (name.clone(), TableRule { deletes, truncates })
        });
        let (rules, progress) = (rules.collect(), life.progress.clone());
        let worker = Worker::new(
            life.limits,
            rules,
            life.checkpoint,
            progress,
            began.elapsed(),
        );
        Self {
            life,
            worker,
            beside: Beside::default(),
            schedule: Schedule::new(),
            followed,
            began,
        }
    }

    /// Collects everything that has arrived already, as far as there is room.
    async fn collect(
        &mut self,
        reader: &mut Reader,
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        // Where every batch is full the stream is never drained, and nothing beside it would ever be applied.
        if self.schedule.is_beside_due() && self.is_beside_next() {
            self.begin_beside().await?;
        }
        // Before more is collected: a batch that ends with a transaction of the source ends the target's.
        if self.worker.is_full() {
            self.hand_out().await?;
        }
        while self.wants_delivery() && !stop.is_cancelled() {
            let next = match reader.try_next() {
                Ok(next) => next,
                Err(gap) => return Err(self.life.gap(gap).await),
            };
            let Some(delivery) = next else {
                self.worker.handle(Input::Drained).map_err(no_key)?;
                break;
            };
            self.take(&delivery).await?;
            // Before nothing more is waiting only a full batch is handed out: the clock is not asked for each.
            if self.worker.is_full() {
                self.hand_out().await?;
            }
        }
        Ok(())
    }

    /// Waits until there is something to do.
    async fn wait(
        &mut self,
        reader: &mut Reader,
        ticks: &mut Interval,
        stop: &CancellationToken,
    ) -> Result<Wakeup, Error> {
        let rest = self.worker.rests_until(self.began.elapsed());
        let rested = (self.began + rest.unwrap_or_default()).into();
        let wants = self.wants_delivery() && rest.is_none();
        let (applying, is_idle) = (self.life.is_applying(), self.is_idle());
        let collects = self.schedule.in_flight() == InFlight::Beside && self.beside.has_room();
        let position = self.worker.checkpoint().position;
        Ok(tokio::select! {
            biased;
            () = stop.cancelled() => Wakeup::Stop,
            applied = self.life.applied(), if applying => {
                self.applied(applied).await?;
                Wakeup::Applied
            }
            delivery = reader.next(), if wants => match delivery {
                Ok(delivery) => Wakeup::Delivery(Box::new(delivery)),
                Err(gap) => return Err(self.life.gap(gap).await),
            },
            () = tokio::time::sleep_until(rested), if rest.is_some() => Wakeup::Rested,
            () = self.beside.ready(position, is_idle), if is_idle || collects => Wakeup::Beside,
            _ = ticks.tick() => Wakeup::Tick,
        })
    }

    /// Whether another delivery may be collected.
    fn wants_delivery(&self) -> bool {
        match self.schedule.in_flight() {
            InFlight::Beside => !self.worker.is_full(),
            InFlight::Stream | InFlight::Nothing => self.worker.wants_delivery(),
        }
    }

    /// Whether the target has no transaction open and nothing to apply.
    fn is_idle(&self) -> bool {
        self.schedule.in_flight() == InFlight::Nothing && self.worker.is_at_rest()
    }

    /// Whether what is beside the stream comes before the stream's next batch.
    fn is_beside_next(&self) -> bool {
        let source_ts_us = self.life.checkpoint.source_ts_us;
        self.is_idle()
            && self.schedule.is_beside_next()
            && may_run_beside(source_ts_us, now_us(), self.worker.is_drained())
    }

    /// Begins to apply the stream's next batch, if it is time for one.
    async fn hand_out(&mut self) -> Result<(), Error> {
        if self.schedule.in_flight() != InFlight::Nothing {
            return Ok(());
        }
        if let Some(batch) = self.worker.poll(self.began.elapsed()) {
            self.begin_batch(batch, InFlight::Stream).await?;
        } else {
            self.schedule.stream_had_none();
        }
        Ok(())
    }

    /// Begins to apply the next batch of what is beside the stream, if there is one.
    async fn begin_beside(&mut self) -> Result<(), Error> {
        let (at, collected) = (self.worker.checkpoint(), self.worker.collected().position);
        self.schedule.asked_beside();
        let life = &mut self.life;
        if let Some(batch) = self.beside.next_batch(life, at, collected).await? {
            self.begin_batch(batch, InFlight::Beside).await?;
        }
        // While the target works.
        self.beside.tell(&self.life).await
    }

    /// Collects what is beside the stream while a batch of it is in flight.
    async fn collect_beside(&mut self) -> Result<(), Error> {
        match self.schedule.in_flight() {
            InFlight::Beside => {
                let at = self.worker.checkpoint();
                self.beside.collect(&mut self.life, at).await
            }
            InFlight::Stream | InFlight::Nothing => Ok(()),
        }
    }

    async fn begin_batch(&mut self, batch: Batch, of: InFlight) -> Result<(), Error> {
        self.life.begin(batch).await?;
        self.schedule.begun(of);
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
        let of = self.schedule.ended();
        if let Err(error) = applied {
            if is_too_old(&error) {
                // The same rows would be refused for ever: another request reads them again.
                tracing::warn!(sink = %self.life.settings.name, error = error.chain(), "asking for the rows again");
                withdraw(&self.life).await?;
            }
            return Err(error);
        }
        match of {
            InFlight::Stream => self.worker.handle(Input::Flushed).map_err(no_key)?,
            InFlight::Beside => self.beside.applied(),
            InFlight::Nothing => {}
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
    fn must_rejoin(&self) -> bool {
        let may_end = self.is_idle()
            || self.schedule.in_flight() == InFlight::Nothing && !self.worker.is_open();
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
                line.begin_batch(batch, InFlight::Stream).await?;
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
