//! One life of a sink: the stream is followed, and copies have their turn in between.

use std::collections::BTreeMap;

use millrace_event::TableName;
use millrace_sink::batch::Batch;
use millrace_sink::progress::{CopyProgress, CopyState};
use millrace_sink::sink::Sink;
use millrace_sink::worker::{Input, Worker};
use rand::Rng;

use super::beside::Beside;
use super::rejoin::{CatchUp, near};
use super::{End, Stage, beside, events_above, now};
use crate::reader::{Body, Reader};
use crate::world::{Failure, Sabotage, World};

/// Whose batch is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Worker,
    Beside,
}

/// One life's loop.
pub(super) struct Following {
    worker: Worker,
    pub(super) reader: Reader,
    flight: Option<(Whose, Box<Batch>)>,
    pub(super) beside: Beside,
    behind: Option<CatchUp>,
    /// The tables whose changes the worker applies.
    followed: Vec<TableName>,
    /// How the tables stand in the target.
    pub(super) progress: CopyProgress,
}

impl Following {
    pub(super) fn new(
        worker: Worker,
        reader: Reader,
        followed: Vec<TableName>,
        progress: CopyProgress,
    ) -> Self {
        Self {
            worker,
            reader,
            flight: None,
            beside: Beside::default(),
            behind: None,
            followed,
            progress,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.flight.is_some() || self.worker.is_open()
    }

    /// Whether the target has no transaction open and nothing to apply.
    fn may_turn(&self) -> bool {
        self.flight.is_none() && self.worker.is_at_rest()
    }

    /// Whether tables stand differently than this life took them.
    fn has_turned(&self, near_messages: u64) -> bool {
        let at = self.worker.checkpoint();
        let is_near = !near(&self.progress, at, near_messages).is_empty();
        let may_end = self.flight.is_none() && !self.worker.is_open();
        may_end && (is_near || self.progress.those(CopyState::is_followed) != self.followed)
    }
}

impl World {
    pub(super) fn follow(&mut self, mut life: Box<Following>) -> Result<(), Failure> {
        if self.fault(0.04) {
            life.reader.disconnect();
        }
        if self.fault(0.04) {
            let back = self.rng.random_range(1..10);
            life.reader
                .rewind(life.reader.stream_seq.saturating_sub(back));
        }
        if life.reader.stream_seq < self.broker.last_seq() && self.sabotage(Sabotage::SkipMessage) {
            life.reader.skip();
            self.sabotaged = true;
        }
        if let Some((Whose::Beside, _)) = life.flight
            && self.rng.random_bool(0.5)
        {
            // While the target works.
            let at = life.worker.checkpoint();
            self.collect(&mut life.beside, at)?;
        }
        if !self.rng.random_bool(0.3) && !self.take_deliveries(&mut life)? {
            return Ok(());
        }
        if life.may_turn() && self.fault(0.05) {
            self.forget_deletes(&life)?;
        }
        if life.may_turn() && self.rng.random_bool(0.6) {
            self.turn_beside(&mut life)?;
        }
        self.hand_out(&mut life);
        if (!self.faults || self.rng.random_bool(0.6)) && life.flight.is_some() {
            if !self.flush(&mut life)? {
                return Ok(());
            }
            if life.has_turned(self.replica.near_messages) {
                return Ok(());
            }
            self.hand_out(&mut life);
        }
        self.replica.stage = Stage::Following(life);
        Ok(())
    }

    /// What is beside the stream has its turn.
    fn turn_beside(&mut self, life: &mut Following) -> Result<(), Failure> {
        let (at, collected) = (life.worker.checkpoint(), life.worker.collected().position);
        if life.beside.is_at_rest() && self.rng.random_bool(0.5) {
            let looked = self.look_beside(&mut life.beside, &life.progress, collected)?;
            if let Some(progress) = looked {
                life.flight = Some((Whose::Beside, Box::new(beside(at, progress))));
                return Ok(());
            }
        }
        let batch = match self.beside_batch(&mut life.beside, &life.progress, at)? {
            Some(batch) => Some(batch),
            None => self.catch_up(&mut life.behind, &life.progress, at)?,
        };
        life.flight = batch.map(|batch| (Whose::Beside, Box::new(batch)));
        Ok(())
    }

    fn hand_out(&mut self, life: &mut Following) {
        if life.flight.is_none() {
            let batch = life.worker.poll(self.now);
            life.flight = batch.map(|batch| (Whose::Worker, Box::new(batch)));
        }
    }

    /// Applies what is in flight; `false` where that ends the life.
    fn flush(&mut self, life: &mut Following) -> Result<bool, Failure> {
        let Some((whose, batch)) = life.flight.take() else {
            return Ok(true);
        };
        let End::Applied = self.apply(&batch)? else {
            return Ok(false);
        };
        match whose {
            Whose::Worker => life
                .worker
                .handle(Input::Flushed)
                .map_err(|error| error.to_string())?,
            Whose::Beside => life.beside.applied(),
        }
        if let Some(progress) = batch.copy {
            life.progress = progress;
        }
        Ok(true)
    }

    /// Takes what the stream has; `false` where that ends the life.
    fn take_deliveries(&mut self, life: &mut Following) -> Result<bool, Failure> {
        for _ in 0..self.rng.random_range(1..30) {
            let has_room = match life.flight {
                Some((Whose::Beside, _)) => !life.worker.is_full(),
                _ => life.worker.wants_delivery(),
            };
            if !has_room {
                break;
            }
            let searches = life.reader.searches;
            let delivery = life.reader.next(&self.broker);
            self.counts.resumes_searched += life.reader.searches - searches;
            let Some(delivery) = delivery else {
                life.worker
                    .handle(Input::Drained)
                    .map_err(|error| error.to_string())?;
                break;
            };
            self.check_delivery(&delivery)?;
            let stream_seq = delivery.stream_seq;
            match &delivery.body {
                Body::Control(control) => life.worker.handle(Input::Control {
                    stream_seq,
                    control,
                }),
                Body::Changes(payload) => {
                    let events = events_above(payload, delivery.floor.0)?;
                    for event in &events {
                        if let Some(table) = life.worker.missing_layout(event) {
                            if !self.flush(life)? {
                                return Ok(false);
                            }
                            let version = Some(event.source.table_version.as_ref());
                            life.worker.set_layout(self.layout(&table, version)?);
                        }
                    }
                    life.worker.handle(Input::Changes {
                        stream_seq,
                        payload,
                        events: &events,
                    })
                }
            }
            .map_err(|error| error.to_string())?;
            self.hand_out(life);
        }
        Ok(true)
    }

    /// Forgets deletes that no older row can follow.
    fn forget_deletes(&mut self, life: &Following) -> Result<(), Failure> {
        let passed = self.replica.position().unwrap_or_default();
        let passed = passed.checkpoint.position.0;
        let breaks = self.sabotage == Sabotage::ForgetDeletes;
        let mut up_to = BTreeMap::new();
        for (table, state) in &life.progress.tables {
            if state.is_begun() {
                let forgettable = life.progress.forgettable(table, passed);
                self.sabotaged |= breaks && forgettable < passed;
                up_to.insert(table.clone(), if breaks { passed } else { forgettable });
            }
        }
        let Some(sink) = &mut self.replica.sink else {
            return Ok(());
        };
        let forgotten = now(sink.clean_up(&up_to, std::time::Duration::ZERO, u32::MAX));
        let forgotten = forgotten.map_err(|error| error.to_string())?;
        self.note(format!("{forgotten} deletes forgotten"));
        self.replica.mended.extend(up_to.keys().cloned());
        if !breaks {
            self.replica.forgotten.extend(up_to);
        }
        Ok(())
    }
}
