//! The lives of capture: what its loop does, turn by turn, around the real machine.

use std::collections::{BTreeSet, HashMap, VecDeque};

use millrace_cdc::capture::{Capture, Input, Output, Resume, Settings};
use millrace_cdc::frontier::{Boundary, ConfirmPolicy};
use millrace_event::{Lsn, Position};
use rand::Rng;

use crate::broker::{BatchFailed, Message, Pipe, Place};
use crate::source::EPOCH;
use crate::world::{BATCH_IDLE, Failure, Sabotage, World};

/// One life: a replication connection, a publisher, and the machine between them.
pub(crate) struct Life {
    capture: Capture,
    pipe: Pipe,
    acked: u64,
    /// The next transaction that the connection sends.
    next: usize,
    known: BTreeSet<u32>,
    frames: VecDeque<(Lsn, Vec<u8>)>,
    /// How far it has read, as it told while that was asked for.
    pub(crate) told: Lsn,
    /// The broker crashed, and the publisher has not noticed yet.
    is_cut_off: bool,
}

impl Life {
    pub(crate) fn cut_off(&mut self) {
        self.is_cut_off = true;
        self.pipe.sent.clear();
    }
}

impl World {
    /// One turn of capture's loop, or the beginning of a life.
    pub(crate) fn capture_turn(&mut self) -> Result<(), Failure> {
        let Some(life) = &mut self.life else {
            return self.open_life();
        };
        let choice = self.rng.random_range(0..10);
        if life.is_cut_off && (choice < 4 || !self.faults) {
            self.note("capture noticed that the broker was gone");
            self.end_life();
            return Ok(());
        }
        match choice {
            0..4 => self.read_wal(),
            4..7 => {
                let most = if self.faults { 5 } else { 1_000 };
                let count = self.rng.random_range(1..=most);
                self.store(count);
                Ok(())
            }
            7..9 => self.acknowledge(),
            _ => self.capture_tick(),
        }
    }

    fn open_life(&mut self) -> Result<(), Failure> {
        let last_seq = self.broker.last_seq();
        self.zombie_turn();
        let confirmed = self.source.confirmed();
        let tail = self.broker.tail_covering(confirmed);
        if confirmed > tail.represented() {
            return Err(format!(
                "capture halts: the slot is at {confirmed}, the stream's tail {} at {}",
                tail.position,
                tail.represented()
            ));
        }
        let boundary = tail.end_lsn.map(|end_lsn| {
            let (stream_seq, position) = (tail.stream_seq, tail.position);
            let boundary = Boundary {
                stream_seq,
                position,
                end_lsn,
            };
            (boundary, self.now.saturating_sub(tail.stored_at))
        });
        let tables = self.source.specs.iter().filter(|spec| spec.configured);
        let settings = Settings {
            source: "shop".to_owned(),
            db: "db".to_owned(),
            epoch: EPOCH,
            tables: tables
                .map(|spec| (spec.name.clone(), spec.key_names()))
                .collect(),
            selections: HashMap::new(),
            limits: self.limits,
            confirm: self.confirm,
        };
        let last_seq = last_seq.max(tail.stream_seq);
        let resume = Resume {
            last_seq,
            tail: tail.position,
            boundary,
            confirmed,
        };
        self.publishers += 1;
        self.counts.lives += 1;
        self.life = Some(Life {
            capture: Capture::new(settings, resume, self.now),
            pipe: Pipe::new(self.publishers, last_seq),
            acked: 0,
            next: self.source.start(),
            known: BTreeSet::new(),
            frames: VecDeque::new(),
            told: Lsn::ZERO,
            is_cut_off: false,
        });
        let publisher = self.publishers;
        self.note(format!(
            "capture {publisher} behind {last_seq} at {}, slot {confirmed}",
            tail.position
        ));
        Ok(())
    }

    /// A batch of WAL.
    fn read_wal(&mut self) -> Result<(), Failure> {
        let Some(life) = &mut self.life else {
            return Ok(());
        };
        let sent_at_us = self.source.now_us();
        let failed = |error| format!("capture failed: {error}");
        let reading = &mut self.copier.reading;
        life.capture.record_commits(reading.is_some());
        for _ in 0..self.rng.random_range(1..25) {
            if life.frames.is_empty() {
                let next = self.source.transactions.get(life.next);
                if next.is_none() || self.rng.random_bool(0.1) {
                    // Sometimes the WAL is decoded up to the very commit record that comes next.
                    let wal_end = next.map_or(self.source.wal_end, |next| next.commit_lsn);
                    let input = Input::Keepalive {
                        wal_end,
                        sent_at_us,
                    };
                    life.capture.handle(input, self.now).map_err(failed)?;
                }
                if next.is_none() {
                    break;
                }
                life.frames
                    .extend(self.source.frames(life.next, &mut life.known));
                life.next += 1;
            }
            if let Some((start, payload)) = life.frames.pop_front() {
                let payload = &payload;
                let input = Input::Data {
                    start,
                    sent_at_us,
                    payload,
                };
                life.capture.handle(input, self.now).map_err(failed)?;
            }
        }
        if let Some(reading) = reading {
            let (position, commits) = life.capture.take_commits();
            life.told = position;
            reading.tell(position, &commits);
        }
        life.capture
            .handle(Input::EndOfBatch, self.now)
            .map_err(failed)?;
        self.perform()
    }

    /// Does what the machine asks for.
    fn perform(&mut self) -> Result<(), Failure> {
        loop {
            let Some(life) = &mut self.life else {
                return Ok(());
            };
            match life.capture.poll() {
                None => return Ok(()),
                // Tables keep their names here.
                Some(Output::Named(_)) => {}
                Some(Output::Describe(relation) | Output::DescribeIfLost(relation)) => {
                    let known = self
                        .schemas
                        .contains_key(&(relation.name().clone(), relation.version().to_owned()));
                    if !known {
                        return Err(format!("a shape of {} that never was", relation.name()));
                    }
                }
                Some(Output::LeftOut(error, _)) => return Err(error.to_string()),
                Some(Output::Publish(outgoing)) => {
                    let publisher = life.pipe.publisher;
                    let chunk = outgoing.chunk.map(|chunk| {
                        let (index, count) = (chunk.index, chunk.count);
                        (
                            outgoing.position,
                            Place {
                                index,
                                count,
                                publisher,
                            },
                        )
                    });
                    let subject = life.capture.subjects()[outgoing.subject.0 as usize].clone();
                    let payload = outgoing.payload;
                    if !life.is_cut_off {
                        life.pipe.sent.push_back(Message {
                            subject,
                            payload,
                            chunk,
                            mark: None,
                        });
                    }
                    if let Some(end_lsn) = outgoing.boundary
                        && self.sabotage(Sabotage::ConfirmEarly)
                    {
                        self.sabotaged = true;
                        self.confirm(end_lsn)?;
                    }
                }
                Some(Output::Verify(boundary)) => {
                    let stored = self.broker.position_at(boundary.stream_seq);
                    if stored != Some(boundary.position) {
                        self.note(format!(
                            "sequence {} is not ours any more",
                            boundary.stream_seq
                        ));
                        self.end_life();
                        return Ok(());
                    }
                    let input = Input::Verified(boundary);
                    let failed = |error| format!("capture failed: {error}");
                    life.capture.handle(input, self.now).map_err(failed)?;
                }
                Some(Output::Confirm(lsn)) => self.confirm(lsn)?,
            }
        }
    }

    fn confirm(&mut self, lsn: Lsn) -> Result<(), Failure> {
        self.note(format!("confirmed {lsn}"));
        self.check_confirmed(lsn)?;
        if !self.fault(0.1) {
            self.source.confirm(lsn);
        }
        Ok(())
    }

    /// Messages reach the stream.
    fn store(&mut self, count: u64) {
        let Some(mut life) = self.life.take() else {
            return;
        };
        for _ in 0..count {
            if life.pipe.sent.is_empty() {
                break;
            }
            if let Err(BatchFailed) = life.pipe.store(&mut self.broker, self.now) {
                self.note(format!("publisher {} was overtaken", life.pipe.publisher));
                self.copier.forget_attempt();
                return;
            }
            if self.sabotage(Sabotage::DropMessage) {
                self.sabotaged = self.broker.forget_last();
            }
            if self.sabotage(Sabotage::SwapMessages) {
                self.sabotaged = self.broker.swap_last_two();
            }
        }
        self.life = Some(life);
    }

    /// Acknowledgements reach capture: all, or some, or of the whole batch.
    fn acknowledge(&mut self) -> Result<(), Failure> {
        let Some(life) = &mut self.life else {
            return Ok(());
        };
        if life.is_cut_off {
            return Ok(());
        }
        if self.rng.random_bool(0.6)
            && let Err(BatchFailed) = life.pipe.commit(&self.broker)
        {
            self.note("publisher found a foreign message in its batch");
            self.end_life();
            return Ok(());
        }
        let stored = life.pipe.stored;
        let least = if self.faults { life.acked } else { stored };
        life.acked = self.rng.random_range(least..=stored);
        let input = Input::Acked { count: life.acked };
        let failed = |error| format!("capture failed: {error}");
        life.capture.handle(input, self.now).map_err(failed)?;
        let unsynced = self
            .broker
            .get(self.broker.last_seq())
            .and_then(|stored| stored.end_lsn);
        if let (Some(end_lsn), ConfirmPolicy::Synced(_)) = (unsynced, self.confirm)
            && self.sabotage(Sabotage::ConfirmUnsynced)
        {
            self.sabotaged = true;
            self.confirm(end_lsn)?;
        }
        self.perform()
    }

    pub(crate) fn capture_tick(&mut self) -> Result<(), Failure> {
        let Some(life) = &mut self.life else {
            return Ok(());
        };
        let failed = |error| format!("capture failed: {error}");
        life.capture.handle(Input::Tick, self.now).map_err(failed)?;
        self.perform()
    }

    /// What a life did for the sinks' copies ends with it.
    pub(crate) fn end_life(&mut self) {
        self.life = None;
        self.copier.forget_attempt();
    }

    /// Kill -9. What was sent may still arrive: nothing of it, a part at once, or a part later.
    pub(crate) fn kill_life(&mut self) {
        self.copier.forget_attempt();
        let Some(mut life) = self.life.take() else {
            return;
        };
        let publisher = life.pipe.publisher;
        let in_flight = life.capture.in_flight();
        self.note(format!("capture {publisher} killed, {in_flight} in flight"));
        match self.rng.random_range(0..4) {
            0 => {}
            1 => {
                for _ in 0..self.rng.random_range(0..=life.pipe.sent.len()) {
                    if life.pipe.store(&mut self.broker, self.now).is_err() {
                        break;
                    }
                }
            }
            _ if !life.is_cut_off => {
                self.counts.zombies += 1;
                self.zombie = Some(life.pipe);
                self.zombie_until = self.now + BATCH_IDLE;
            }
            _ => {}
        }
    }

    /// A dead publisher's messages arrive.
    pub(crate) fn zombie_turn(&mut self) {
        let Some(mut zombie) = self.zombie.take() else {
            return;
        };
        for _ in 0..self.rng.random_range(1..4) {
            if zombie.sent.is_empty() || zombie.store(&mut self.broker, self.now).is_err() {
                return;
            }
        }
        let at = self.broker.tail().position;
        self.note(format!(
            "publisher {} still stores, now at {at}",
            zombie.publisher
        ));
        if self.rng.random_bool(0.8) {
            self.zombie = Some(zombie);
        }
    }

    /// The slot may forget only what is in the stream and stays there.
    fn check_confirmed(&self, lsn: Lsn) -> Result<(), Failure> {
        let durable = match self.confirm {
            ConfirmPolicy::Acked => self.broker.last_seq(),
            ConfirmPolicy::Synced(_) => self.broker.synced(),
        };
        let highest = self
            .broker
            .get(durable)
            .map_or(Position::ZERO, |stored| stored.highest);
        let below = self
            .source
            .expected
            .partition_point(|event| event.version.commit_lsn < lsn);
        if let Some(last) = self.source.expected[..below].last()
            && Position::from(last.version) > highest
        {
            return Err(format!(
                "confirmed {lsn}, but {} is not safe: the stream is safe up to {highest}",
                last.version
            ));
        }
        let represents = |seq| {
            let end_lsn = self.broker.get(seq).and_then(|stored| stored.end_lsn);
            let chunk = self
                .broker
                .get(seq)
                .is_some_and(|stored| stored.message.chunk.is_some());
            // The last chunk of a transaction's last event says it inside its row.
            chunk || end_lsn.is_some_and(|end_lsn| end_lsn >= lsn)
        };
        if (1..=durable).rev().any(represents) {
            return Ok(());
        }
        Err(format!(
            "confirmed {lsn}, which nothing in the stream represents"
        ))
    }
}
