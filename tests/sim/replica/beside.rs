//! What a sink does beside its stream: it asks capture for rows, and takes what comes on the copy stream. The decisions
//! are `millrace_sink`'s; what is written here is what its loop carries between them, the buckets and the streams.

use std::collections::HashMap;

use millrace_event::work::{Copied, CopyApplied, CopyRequest, CopyStatus, Wanted};
use millrace_event::{Position, TableName, Version};
use millrace_sink::asking::{self, Debts};
use millrace_sink::batch::{Batch, Checkpoint};
use millrace_sink::copying::{CopyError, CopyMark, Copying, Input};
use millrace_sink::progress::{CopyProgress, CopyState};
use millrace_sink::row::Key;
use millrace_sink::sink::Sink;
use rand::Rng;

use super::{events_above, now};
use crate::broker::Stored;
use crate::source::EPOCH;
use crate::world::{Failure, Sabotage, World};

/// What a sink asks for, and the answer.
#[derive(Default)]
pub(super) struct Beside {
    answer: Option<Answer>,
    /// The incomplete rows that are being asked for.
    debts: Debts,
    /// Messages of the copy stream are missing: nothing is asked for before capture has cleared the stream away.
    clearing: bool,
}

/// The answer to one request.
struct Answer {
    machine: Copying,
    /// Whether capture has taken the request up: then its stream is read.
    is_read: bool,
    status: Option<CopyStatus>,
    /// The sequence of the last message that was taken, the same of what was handed out, of what is committed in the
    /// target, and of what capture was told.
    taken_seq: u64,
    handed_seq: u64,
    applied_seq: u64,
    told_seq: u64,
}

impl Beside {
    pub(super) fn is_at_rest(&self) -> bool {
        let answer = self.answer.as_ref();
        answer.is_none_or(|answer| answer.machine.is_at_rest())
    }

    /// The batch that was handed out is applied.
    pub(super) fn applied(&mut self) {
        if let Some(answer) = &mut self.answer {
            answer.applied_seq = answer.handed_seq;
        }
    }

    fn take_status(&mut self, status: Option<&CopyStatus>) {
        if let Some(answer) = &mut self.answer {
            let id = &answer.machine.request().id;
            answer.status = status.filter(|status| status.request == *id).cloned();
            answer.is_read |= answer.status.is_some();
        }
    }
}

impl World {
    /// Looks at orders, at incomplete rows, and at what capture says, and asks for what is needed. Returns how the tables
    /// stand from here on, if that is different.
    pub(super) fn look_beside(
        &mut self,
        beside: &mut Beside,
        progress: &CopyProgress,
        collected: Position,
    ) -> Result<Option<CopyProgress>, Failure> {
        let now_us = self.replica.now_us();
        let orders = &self.copier.orders;
        if let Some(mut next) = asking::follow_orders(progress, orders, collected, now_us) {
            let begun = asking::begun(progress, &next);
            if !begun.is_empty() {
                let newest = self.broker.tail().position;
                asking::doubt(&mut next, &begun, collected.max(newest));
            }
            let asked = beside.answer.as_ref();
            let asked = asked.map(|answer| answer.machine.request());
            if !asked.is_some_and(|asked| asking::must_stay(&asked.tables, progress)) {
                self.withdraw(beside);
            }
            self.replica.mended.extend(begun);
            return Ok(Some(next));
        }
        if self.rng.random_bool(0.5) {
            let finished = |id: &String| progress.finished.contains(id);
            self.copier.orders.retain(|order| !finished(&order.id));
        }
        beside.clearing &= self.copier.status.is_some();
        beside.take_status(self.copier.status.as_ref());
        let cut = self.cut_loads(beside, progress);
        if !cut.is_empty() {
            self.note(format!("a load of {cut:?} was cut off"));
            let mut next = progress.clone();
            let now_us = self.replica.now_us();
            asking::begin_chunks(&mut next, &cut, collected, now_us);
            self.replica.mended.extend(cut);
            return Ok(Some(next));
        }
        self.find_debts(beside, progress)?;
        self.ask(beside, progress);
        beside.take_status(self.copier.status.as_ref());
        self.tell_applied(beside, progress);
        Ok(None)
    }

    fn withdraw(&mut self, beside: &mut Beside) {
        beside.answer = None;
        self.copier.request = None;
    }

    /// Gives up what was asked for, because the copy stream lost some of it.
    fn give_up(&mut self, beside: &mut Beside, why: &str) {
        self.note(format!("{why}: asking for the rows again"));
        self.counts.copies_lost += 1;
        beside.clearing = true;
        self.withdraw(beside);
    }

    fn cut_loads(&self, beside: &Beside, progress: &CopyProgress) -> Vec<TableName> {
        if progress.is_complete() {
            return Vec::new();
        }
        if let Some(answer) = &beside.answer {
            let cut = answer.status.as_ref();
            let cut = cut.map_or(&[][..], |status| &status.cut);
            let asked = answer.machine.request().id.as_str();
            return asking::cut_loads(progress, Some(asked), cut);
        }
        let stored = self.copier.request.as_ref();
        asking::cut_loads(progress, stored.map(|stored| stored.id.as_str()), &[])
    }

    fn find_debts(&mut self, beside: &mut Beside, progress: &CopyProgress) -> Result<(), Failure> {
        let answer = beside.answer.as_ref();
        let awaited = answer.map_or_else(Vec::new, |answer| {
            let status = answer.status.as_ref();
            let copied = status.map_or(&[][..], |status| &status.copied);
            let is_read = status.is_some_and(|status| answer.applied_seq >= status.last_seq);
            asking::awaited_keys(&answer.machine.request().tables, copied, is_read)
        });
        beside.debts.retain(|(table, _)| awaited.contains(table));
        let stays = answer
            .is_some_and(|answer| asking::must_stay(&answer.machine.request().tables, progress));
        if stays || beside.clearing {
            return Ok(());
        }
        let tables = progress.those(|state| matches!(state, CopyState::Copied { .. }));
        for table in tables.into_iter().filter(|table| !awaited.contains(table)) {
            let at = self.source.table(&table);
            let columns = self.source.specs[at].key.len();
            let sink = self.replica.sink.as_mut().ok_or("no sink")?;
            let found = now(sink.incomplete(&table, "", 10)).map_err(|error| error.to_string())?;
            let keys: Option<Vec<_>> = found.iter().map(|key| Key::texts(key, columns)).collect();
            let keys = keys.ok_or("a key that is none")?;
            if !keys.is_empty() {
                self.counts.rows_healed += keys.len() as u64;
                self.replica.mended.insert(table.clone());
                beside.debts.push((table, keys));
            }
        }
        Ok(())
    }

    /// Asks for what is needed and not asked for, and for what the broker has lost on its way.
    fn ask(&mut self, beside: &mut Beside, progress: &CopyProgress) {
        let wanted = asking::wanted(progress, &beside.debts);
        if wanted.is_empty() {
            return self.withdraw(beside);
        }
        if self.is_lost(beside, progress) {
            return self.give_up(beside, "the end of the copy stream is missing");
        }
        if beside.clearing {
            return;
        }
        let goes_on = |asked: &CopyRequest| {
            asking::brings(&asked.tables, &wanted) || asking::must_stay(&asked.tables, progress)
        };
        let answer = beside.answer.as_ref();
        let answer = answer.filter(|answer| goes_on(answer.machine.request()));
        if answer.is_some_and(|answer| answer.status.is_some()) {
            return;
        }
        let stored = self.copier.request.clone();
        if let Some(answer) = answer {
            let asked = answer.machine.request();
            if stored.is_none_or(|stored| stored.id != asked.id) {
                self.copier.request = Some(asked.clone());
            }
            return;
        }
        let request = match stored.filter(goes_on) {
            // A crash left it behind: it is gone on with.
            Some(stored) if beside.answer.is_none() => stored,
            _ => {
                let request = CopyRequest {
                    id: self.copier.next_name(),
                    tables: wanted,
                    binary: Vec::new(),
                };
                self.note(format!("asked for {request:?}"));
                self.copier.request = Some(request.clone());
                request
            }
        };
        let limits = self.replica.limits;
        beside.answer = Some(Answer {
            machine: Copying::new(request, limits, HashMap::new(), progress.clone()),
            is_read: false,
            status: None,
            taken_seq: 0,
            handed_seq: 0,
            applied_seq: 0,
            told_seq: 0,
        });
    }

    /// Whether all of a table was put on the copy stream, and the stream is read to its end, and yet something of the
    /// table is missing.
    fn is_lost(&self, beside: &Beside, progress: &CopyProgress) -> bool {
        let Some(answer) = &beside.answer else {
            return false;
        };
        let (Some(status), true) = (&answer.status, answer.machine.is_at_rest()) else {
            return false;
        };
        let mut asked = answer.machine.request().tables.iter();
        let is_left = asked.any(|asked| {
            let state = progress.tables.get(&asked.table);
            let awaited = state.and_then(CopyState::copy_began_us);
            !matches!(asked.rows, Wanted::Keys { .. })
                && status.copied.contains(&asked.table)
                && awaited == Some(asked.began_us)
        });
        is_left && self.copier.stream.get(answer.taken_seq + 1).is_none()
    }

    /// Tells capture where chunks would go on.
    fn tell_applied(&mut self, beside: &mut Beside, progress: &CopyProgress) {
        let Some(answer) = &mut beside.answer else {
            return;
        };
        if answer.told_seq == answer.applied_seq {
            return;
        }
        answer.told_seq = answer.applied_seq;
        let after = progress.tables.iter().filter_map(|(table, state)| {
            let CopyState::Chunks(chunks) = state else {
                return None;
            };
            Some((table.clone(), chunks.after.clone()?))
        });
        self.copier.applied = Some(CopyApplied {
            request: answer.machine.request().id.clone(),
            stream_seq: answer.applied_seq,
            after: after.collect(),
        });
    }

    /// The next batch of copied rows, as far as the stream was applied for them.
    pub(super) fn beside_batch(
        &mut self,
        beside: &mut Beside,
        progress: &CopyProgress,
        at: Checkpoint,
    ) -> Result<Option<Batch>, Failure> {
        if let Some(answer) = &mut beside.answer
            && answer.machine.is_at_rest()
        {
            answer.machine.rebase(progress);
        }
        let drained = self.collect(beside, at)?;
        let Some(answer) = &mut beside.answer else {
            return Ok(None);
        };
        let batch = answer.machine.poll(at, drained);
        if batch.is_some() {
            answer.handed_seq = answer.taken_seq;
        } else if answer.machine.is_at_rest() {
            // What was taken was nobody's, or is there already.
            answer.applied_seq = answer.taken_seq;
        }
        if self.rng.random_bool(0.3) {
            self.tell_applied(beside, progress);
        }
        Ok(batch)
    }

    /// Takes what has come, up to a full batch; returns whether nothing more is waiting.
    pub(super) fn collect(&mut self, beside: &mut Beside, at: Checkpoint) -> Result<bool, Failure> {
        loop {
            let Some(answer) = &mut beside.answer else {
                return Ok(true);
            };
            if answer.machine.is_full() || self.rng.random_bool(0.1) {
                return Ok(false);
            }
            let next = self.copier.stream.get(answer.taken_seq + 1);
            let Some(next) = next.filter(|_| answer.is_read).cloned() else {
                return Ok(true);
            };
            let mark = next.message.mark.as_ref();
            let reach = mark.and_then(|mark| mark.reach);
            if reach.is_some_and(|reach| Position::new(EPOCH, reach, 0) > at.position) {
                self.counts.chunks_waited += 1;
                return Ok(true);
            }
            match self.take(&mut answer.machine, &next)? {
                Ok(()) => answer.taken_seq += 1,
                Err(error) => {
                    self.counts.gaps += 1;
                    self.give_up(beside, &error.to_string());
                    return Ok(true);
                }
            }
        }
    }

    /// Feeds a message of the copy stream to the machine, with the layout that its rows need.
    fn take(
        &mut self,
        machine: &mut Copying,
        stored: &Stored,
    ) -> Result<Result<(), CopyError>, Failure> {
        let mark = stored.message.mark.as_ref();
        let mark = mark.ok_or("a copy stream's message has a mark")?;
        let mut mark = CopyMark {
            request: &mark.request,
            attempt: mark.attempt,
            number: mark.number,
        };
        if self.sabotage == Sabotage::NoNumbers {
            let handled = self.take_marked(machine, stored, mark)?;
            let Err(CopyError::Gap { expected, .. }) = handled else {
                return Ok(handled);
            };
            self.sabotaged = true;
            mark.number = expected;
        }
        self.take_marked(machine, stored, mark)
    }

    fn take_marked(
        &mut self,
        machine: &mut Copying,
        stored: &Stored,
        mark: CopyMark<'_>,
    ) -> Result<Result<(), CopyError>, Failure> {
        let payload = &stored.message.payload;
        let copied: Option<Copied> = serde_json::from_slice(payload).ok();
        if let Some(copied) = &copied {
            if machine.misses(&copied.table, None) {
                machine.set_layout(self.layout(&copied.table, None)?);
            }
            return Ok(machine.handle(Input::Copied { mark, copied }));
        }
        let events = events_above(payload, Version::ZERO)?;
        if let Some(first) = events.first() {
            let (table, version) = (first.source.table_name(), &first.source.table_version);
            if machine.misses(&table, Some(version)) {
                machine.set_layout(self.layout(&table, None)?);
            }
        }
        let events = &events;
        Ok(machine.handle(Input::Rows {
            mark,
            payload,
            events,
        }))
    }
}
