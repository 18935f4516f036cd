//! A sink's copies: asks capture for rows, and reads what comes on the copy stream.

mod answer;
mod bucket;
mod carried_out;
mod crowd;
mod debts;
mod healing;
mod quiet;
mod request;
mod search;
mod taking;
mod told;
mod unread;

use std::time::Duration;

use millrace_connect::clock::now_us;
use millrace_consumer::{Ordering, Reader, ReaderOptions, Start};
use millrace_event::work::{CopyApplied, CopyStatus};
use millrace_event::{Position, TableName, subject};
use tokio::time::Instant;

use self::answer::Answer;
pub(crate) use self::bucket::withdraw;
use self::bucket::{Stored, put, stored_request, strike};
use self::carried_out::CarriedOut;
use self::healing::Healing;
use self::quiet::Quiet;
use self::taking::{Taken, reach_of, take};
use self::told::{Telling, Told, Word};
pub(crate) use self::unread::Unread;
use crate::asking::{self, Debts};
use crate::batch::{Batch, Checkpoint};
use crate::error::Error;
use crate::life::Life;
use crate::progress::{CopyProgress, CopyState};

/// How often orders, debts and capture's progress are looked at while nothing is awaited.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// After so many messages of the copy stream capture is told that they are applied, also between two looks. They have
/// 256 KiB each.
const TELL_MESSAGES: u64 = 32;

/// What a sink asks for, and the answer.
#[derive(Default)]
pub(crate) struct Copies {
    telling: Option<Telling>,
    answer: Option<Answer>,
    looked_at: Option<Instant>,
    /// Whether the bucket has no request of ours.
    withdrawn: bool,
    /// The incomplete rows that are being asked for.
    debts: Debts,
    healing: Healing,
    carried_out: CarriedOut,
    quiet: Quiet,
    /// Messages of the copy stream are missing: nothing is asked for before capture has cleared the stream away.
    clearing: bool,
}

/// What a look brought.
pub(crate) enum Looked {
    /// Nothing that would end a life.
    Nothing,
    /// The tables stand differently from here on: store it.
    Changed(CopyProgress),
}

impl Copies {
    /// When to look again.
    pub(crate) fn due(&self) -> Option<Instant> {
        let looked_at = self.looked_at?;
        let news = self.telling.as_ref().is_some_and(Telling::has_news);
        // What was taken comes first: nothing may be looked at before.
        Some(if news && self.is_at_rest() {
            looked_at
        } else {
            looked_at + CHECK_INTERVAL
        })
    }

    /// Waits until a message may be taken, or is known to be lost, or there is news to look at. Safe to cancel.
    pub(crate) async fn ready(&mut self, position: Position) {
        let at_rest = self.is_at_rest();
        let news = async {
            match &mut self.telling {
                Some(telling) if at_rest => telling.news().await,
                _ => std::future::pending().await,
            }
        };
        let message = async {
            let Some(answer) = &mut self.answer else {
                return std::future::pending().await;
            };
            match (&answer.next, &mut answer.reader) {
                (Some(next), _) if reach_of(next) <= position => {}
                (None, Some(reader)) if !answer.lost => match reader.next().await {
                    Ok(next) => answer.next = Some(next),
                    Err(gap) => answer.lose(&gap),
                },
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            () = message => {}
            () = news => {}
        }
    }

    /// Looks at orders, at incomplete rows, and at what capture says, and asks for what is needed. The worker has
    /// collected the stream up to `collected`. Nothing may be in flight, and everything taken applied.
    pub(crate) async fn look(
        &mut self,
        life: &mut Life<'_>,
        collected: Position,
    ) -> Result<Looked, Error> {
        let looked = self.look_now(life, collected).await;
        self.looked_at = match &looked {
            // Once that is stored there is something to ask for.
            Ok(Looked::Changed(_)) => None,
            // From its end: where the broker is far, there is time for the rows in between.
            _ => Some(Instant::now()),
        };
        looked
    }

    async fn look_now(
        &mut self,
        life: &mut Life<'_>,
        collected: Position,
    ) -> Result<Looked, Error> {
        let telling = self
            .telling
            .get_or_insert_with(|| Telling::begin(life.copies.clone(), &life.settings.name));
        let Some(Told { orders, status }) = telling.latest() else {
            return Ok(Looked::Nothing);
        };
        let ordered = match &orders {
            Word::Said(orders) => {
                asking::follow_orders(&life.progress, orders, collected, now_us())
            }
            // What was ordered before goes on, and what was carried out is not forgotten.
            Word::Unread => None,
        };
        if let Some(mut progress) = ordered {
            let begun = asking::begun(&life.progress, &progress);
            if !begun.is_empty() {
                let (_, newest) = life.newest().await?;
                asking::doubt(&mut progress, &begun, collected.max(newest.position));
            }
            // A request that an order has changed the sense of must not be gone on with.
            let asked = self.answer.as_ref().map(|answer| answer.machine.request());
            if !asked.is_some_and(|asked| asking::must_stay(&asked.tables, &life.progress)) {
                self.withdraw(life).await?;
            }
            return Ok(Looked::Changed(progress));
        }
        if let Word::Said(orders) = &orders {
            let ripe = self
                .carried_out
                .ripe(&life.progress.finished, Instant::now());
            strike(life, orders, &ripe).await?;
        }
        // What capture said before holds until it is understood again.
        if let Word::Said(status) = &status {
            self.clearing &= status.is_some();
            self.take_status(life, status.as_ref()).await?;
        }
        let cut = self.cut_loads(life).await?;
        if !cut.is_empty() {
            tracing::warn!(
                sink = %life.settings.name, tables = cut.len(),
                "a load was cut off behind its first rows; the tables come in chunks, beside their changes"
            );
            let mut progress = life.progress.clone();
            asking::begin_chunks(&mut progress, &cut, collected, now_us());
            return Ok(Looked::Changed(progress));
        }
        self.find_debts(life).await?;
        self.ask(life).await?;
        if let Word::Said(status) = &status {
            // A request that is gone on with may be answered already, and that is no news then.
            self.take_status(life, status.as_ref()).await?;
        }
        self.tell_applied(life).await?;
        Ok(Looked::Nothing)
    }

    async fn take_status(
        &mut self,
        life: &mut Life<'_>,
        status: Option<&CopyStatus>,
    ) -> Result<(), Error> {
        let Some(answer) = &mut self.answer else {
            return Ok(());
        };
        let request = answer.machine.request();
        let status = status.filter(|status| status.request == request.id);
        answer.status = status.cloned();
        if answer.reader.is_none() && answer.status.is_some() {
            let options = ReaderOptions {
                stream: subject::copy_stream_name(life.source, &life.settings.name),
                ordering: Ordering::ByStream,
                ..ReaderOptions::new(life.jetstream.clone(), life.source, Start::Beginning)
            };
            answer.reader = Some(Reader::open(options));
            // The target refuses what it refuses before any row comes.
            let tables: Vec<_> = request.tables.iter().map(|t| t.table.clone()).collect();
            for table in tables {
                // What the target refuses has been parked, and must not keep the others from their rows.
                let state = life.progress.tables.get(&table);
                let refused = state.is_some_and(CopyState::is_parked);
                if !life.tables.contains_key(&table) || refused {
                    continue;
                }
                match life.layout(&table, None).await {
                    Ok(layout) => answer.machine.set_layout(layout),
                    // Nor must one that capture does not know yet. Nothing of it can come before it is described.
                    Err(Error::Waiting(what)) => {
                        tracing::debug!(sink = %life.settings.name, "capture has yet to {what}");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The loads that nobody goes on with.
    async fn cut_loads(&mut self, life: &Life<'_>) -> Result<Vec<TableName>, Error> {
        if life.progress.is_complete() {
            return Ok(Vec::new());
        }
        if let Some(answer) = &self.answer {
            let cut = answer.status.as_ref();
            let cut = cut.map_or(&[][..], |status| &status.cut);
            let asked = answer.machine.request().id.as_str();
            return Ok(asking::cut_loads(&life.progress, Some(asked), cut));
        }
        let stored = match stored_request(life).await? {
            // Nobody knows whether it is the one that is being answered.
            Stored::Unread => return Ok(Vec::new()),
            Stored::Request(request) => Some(request.id),
            Stored::Nothing => None,
        };
        Ok(asking::cut_loads(&life.progress, stored.as_deref(), &[]))
    }

    /// Tells capture what the copy stream need not keep any longer, and where chunks would go on.
    async fn tell_applied(&mut self, life: &Life<'_>) -> Result<(), Error> {
        let Some(answer) = &mut self.answer else {
            return Ok(());
        };
        if answer.told_seq == answer.applied_seq {
            return Ok(());
        }
        answer.told_seq = answer.applied_seq;
        let after = life.progress.tables.iter().filter_map(|(table, state)| {
            let CopyState::Chunks(chunks) = state else {
                return None;
            };
            Some((table.clone(), chunks.after.clone()?))
        });
        let applied = CopyApplied {
            request: answer.machine.request().id.clone(),
            stream_seq: answer.applied_seq,
            after: after.collect(),
        };
        let key = format!("applied.{}", life.settings.name);
        put(life, &key, &applied).await
    }

    /// Tells capture so, once enough was applied since: it reads no further ahead than a little.
    pub(crate) async fn tell(&mut self, life: &Life<'_>) -> Result<(), Error> {
        let answer = self.answer.as_ref();
        match answer.is_some_and(|answer| answer.applied_seq >= answer.told_seq + TELL_MESSAGES) {
            true => self.tell_applied(life).await,
            false => Ok(()),
        }
    }

    /// The next batch of copied rows, as far as the stream was applied for them. Nothing may be in flight; the sink
    /// stands at `checkpoint`.
    ///
    /// # Errors
    /// The copy stream lacks something, or cannot be understood.
    pub(crate) async fn next_batch(
        &mut self,
        life: &mut Life<'_>,
        checkpoint: Checkpoint,
    ) -> Result<Option<Batch>, Error> {
        if let Some(answer) = &mut self.answer
            && answer.machine.is_at_rest()
        {
            answer.machine.rebase(&life.progress);
        }
        let drained = self.collect(life, checkpoint).await?;
        let Some(answer) = &mut self.answer else {
            return Ok(None);
        };
        if answer.lost && answer.machine.is_at_rest() {
            self.give_up(life).await?;
            return Ok(None);
        }
        let batch = answer.machine.poll(checkpoint, drained);
        if batch.is_some() {
            answer.handed_seq = answer.taken_seq;
        } else if answer.machine.is_at_rest() {
            // What was taken was nobody's, or is there already.
            answer.applied_seq = answer.taken_seq;
        }
        Ok(batch)
    }

    /// Takes what has come, up to a full batch; returns whether nothing more is waiting. While a batch of ours is in
    /// flight the next one is collected: only what the target must be asked about waits.
    ///
    /// # Errors
    /// As [`Copies::next_batch`].
    pub(crate) async fn collect(
        &mut self,
        life: &mut Life<'_>,
        checkpoint: Checkpoint,
    ) -> Result<bool, Error> {
        loop {
            let Some(answer) = &mut self.answer else {
                return Ok(true);
            };
            if answer.machine.is_full() {
                return Ok(false);
            }
            let next = match (answer.next.take(), &mut answer.reader) {
                (Some(next), _) => Some(next),
                (None, Some(reader)) if !answer.lost => {
                    let next = reader.try_next();
                    next.unwrap_or_else(|gap| {
                        answer.lose(&gap);
                        None
                    })
                }
                (None, _) => None,
            };
            let Some(next) = next else { return Ok(true) };
            if reach_of(&next) > checkpoint.position {
                answer.next = Some(next);
                return Ok(true);
            }
            match take(life, &mut answer.machine, &next).await {
                Ok(()) => answer.taken_seq = next.stream_seq,
                Err(Taken::Later) => {
                    answer.next = Some(next);
                    return Ok(false);
                }
                Err(Taken::Lost(error)) => {
                    tracing::warn!(sink = %life.settings.name, %error, "asking for the rows again");
                    self.give_up(life).await?;
                    return Ok(true);
                }
                Err(Taken::Failed(error)) => return Err(error),
            }
        }
    }

    /// Whether everything that was taken was handed out: only then may be looked, and the tables stand differently.
    pub(crate) fn is_at_rest(&self) -> bool {
        let answer = self.answer.as_ref();
        answer.is_none_or(|answer| answer.machine.is_at_rest())
    }

    /// Whether there is room for what comes next while a batch is in flight.
    pub(crate) fn has_room(&self) -> bool {
        let answer = self.answer.as_ref();
        answer.is_some_and(|answer| {
            answer.next.is_none() && !answer.lost && !answer.machine.is_full()
        })
    }

    /// The batch that was handed out is applied.
    pub(crate) fn applied(&mut self) {
        if let Some(answer) = &mut self.answer {
            answer.applied_seq = answer.handed_seq;
        }
    }
}
