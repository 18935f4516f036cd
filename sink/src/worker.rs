//! The sink's machine: from deliveries to batches of whole source transactions. It knows no network and no
//! clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millrace_event::{ChangeEvent, Control, Lsn, Position, TableName};

use crate::batch::{Batch, Checkpoint};
use crate::fold::Fold;
use crate::progress::CopyProgress;
use crate::row::{RowError, TableLayout};

/// How often a position is stored while only changes of other sinks' tables arrive.
const IDLE_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);

/// A batch of so many changes says that they come faster than batches are applied one by one.
const BUSY_ROWS: usize = 16;

/// After a busy batch more is let come together: a transaction costs the target as much as many rows.
const BUSY_REST: Duration = Duration::from_millis(3);

/// Batches that are full end anywhere, mostly within a transaction, and the target's stays open then. After so many of
/// them it is ended with the next transaction that ends, however little that adds: nothing is visible before, and
/// nothing beside the stream is applied.
const OPEN_PARTS_MAX: u32 = 8;

/// When a batch closes although more is waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Changes.
    pub rows: usize,
    /// Bytes of their values.
    pub bytes: usize,
}

/// What is done with a table's events.
#[derive(Clone, Debug)]
pub struct TableRule {
    /// Whether deletes are applied.
    pub deletes: bool,
    /// Whether truncates are applied.
    pub truncates: bool,
}

/// What happens to the machine.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// A message with changes came.
    Changes {
        /// Its stream sequence.
        stream_seq: u64,
        /// Its payload, which the events borrow from.
        payload: &'a Bytes,
        /// Its changes above the highest position seen before.
        events: &'a [ChangeEvent<'a>],
    },
    /// A control message came.
    Control {
        /// Its stream sequence.
        stream_seq: u64,
        /// What it says.
        control: &'a Control,
    },
    /// Nothing more is waiting.
    Drained,
    /// The batch that was handed out is applied.
    Flushed,
}

/// Where the machine stands in the source's transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    /// Everything collected is of whole transactions.
    Boundary,
    /// The last transaction collected goes on; or a part of it is in the target's open transaction.
    Transaction,
}

/// The batch that was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flight {
    /// None.
    Idle,
    /// One is being applied.
    Flushing,
}

/// Why a batch would be worth a transaction of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// Nothing new.
    None,
    /// Only the position moved, past changes that are not this sink's.
    Position,
    /// Rows to apply, or a heartbeat that readers measure lag by.
    Now,
}

/// A table that is applied.
#[derive(Debug)]
struct Followed {
    name: TableName,
    rule: TableRule,
    /// Its copy has what was committed below this.
    copied_below: Lsn,
    layout: Option<Arc<TableLayout>>,
}

impl Followed {
    /// The name in the order that names have.
    fn name_parts(&self) -> (&str, &str) {
        (&self.name.schema, &self.name.table)
    }
}

/// Collects deliveries into batches.
///
/// After every [`Worker::handle`], drain [`Worker::poll`] until it returns `None`; only then wait, and only
/// while [`Worker::wants_delivery`] for another delivery.
#[derive(Debug)]
pub struct Worker {
    limits: BatchLimits,
    /// This sink's tables, by name.
    tables: Vec<Followed>,
    /// Where the last event's table stands in them: the next one's is mostly the same.
    current: usize,
    fold: Fold,
    /// Where the target stands once everything handed out is applied.
    handed_out: Checkpoint,
    /// Where it stands once everything collected is.
    collected: Checkpoint,
    within: Within,
    flight: Flight,
    urgency: Urgency,
    /// How many batches without commit were handed out since the last one with: the target's transaction is open where
    /// there are any.
    open_parts: u32,
    /// Whether nothing more was waiting when last asked.
    drained: bool,
    stored_at: Duration,
    /// No batch is handed out before this, unless it is full.
    rest_until: Duration,
}

impl Worker {
    /// Begins behind a stored checkpoint, with rules for the tables whose changes are applied as they come.
    #[must_use]
    pub fn new(
        limits: BatchLimits,
        rules: HashMap<TableName, TableRule>,
        checkpoint: Checkpoint,
        copies: CopyProgress,
        now: Duration,
    ) -> Self {
        assert!(
            rules.keys().all(|table| copies.tables[table].is_followed()),
            "changes of a table that waits for its rows are left out"
        );
        assert!(
            limits.rows > 0 && limits.bytes > 0,
            "a batch holds something"
        );
        let tables = rules.into_iter().map(|(name, rule)| Followed {
            copied_below: copies.copied_below(&name),
            name,
            rule,
            layout: None,
        });
        let mut tables: Vec<_> = tables.collect();
        tables.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            limits,
            tables,
            current: 0,
            fold: Fold::new(),
            handed_out: checkpoint,
            collected: checkpoint,
            within: Within::Boundary,
            flight: Flight::Idle,
            urgency: Urgency::None,
            open_parts: 0,
            drained: false,
            stored_at: now,
            rest_until: now,
        }
    }

    /// The layout that an event needs and that the machine does not have: fetch it, and call
    /// [`Worker::set_layout`] before the event is handled.
    #[must_use]
    pub fn missing_layout(&self, event: &ChangeEvent<'_>) -> Option<TableName> {
        let table = &self.tables[self.find(&event.source.schema, &event.source.table)?];
        let known = table
            .layout
            .as_ref()
            .is_some_and(|layout| layout.shape == event.source.table_version);
        (!known).then(|| table.name.clone())
    }

    /// The layout that a table's rows were last collected in, where there were any.
    #[must_use]
    pub fn layout(&self, table: &TableName) -> Option<&Arc<TableLayout>> {
        let found = self.find(&table.schema, &table.table)?;
        self.tables[found].layout.as_ref()
    }

    /// Takes the layout for a table's events from here on.
    pub fn set_layout(&mut self, layout: Arc<TableLayout>) {
        if let Some(index) = self.find(&layout.source.schema, &layout.source.table) {
            self.tables[index].layout = Some(layout);
        }
    }

    /// Whether another delivery may be handled: there is room for it.
    #[must_use]
    pub fn wants_delivery(&self) -> bool {
        self.flight == Flight::Idle || !self.is_full()
    }

    /// Until when more changes are let come together: ask again then, and not before.
    #[must_use]
    pub fn rests_until(&self, now: Duration) -> Option<Duration> {
        let waits = self.flight == Flight::Idle && self.urgency == Urgency::Now && !self.is_full();
        (waits && now < self.rest_until).then_some(self.rest_until)
    }

    /// Whether the target has no transaction open and nothing to apply.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.flight == Flight::Idle && !self.is_open()
    }

    /// Whether a part of a transaction is in the target's, which is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open_parts > 0
    }

    /// Whether nothing more was waiting when it was last asked.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.drained
    }

    /// Up to where everything was collected: what comes next lies above.
    #[must_use]
    pub fn collected(&self) -> Checkpoint {
        self.collected
    }

    /// Where the target stands once everything handed out is applied.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        self.handed_out
    }

    /// How many changes were folded into a newer one of the same key, ever.
    #[must_use]
    pub fn superseded(&self) -> u64 {
        self.fold.superseded()
    }

    /// Takes one input.
    ///
    /// # Errors
    /// An event does not have its key.
    pub fn handle(&mut self, input: Input<'_>) -> Result<(), RowError> {
        match input {
            Input::Changes {
                stream_seq,
                payload,
                events,
            } => {
                self.drained = false;
                for event in events {
                    self.on_event(stream_seq, payload, event)?;
                }
            }
            Input::Control {
                stream_seq,
                control,
            } => {
                self.drained = false;
                if self.advance(stream_seq, control.position, control.ts_us) {
                    self.within = Within::Boundary;
                    self.urgency = Urgency::Now;
                }
            }
            Input::Drained => self.drained = true,
            Input::Flushed => {
                assert_eq!(
                    self.flight,
                    Flight::Flushing,
                    "only what was handed out is flushed"
                );
                self.flight = Flight::Idle;
            }
        }
        Ok(())
    }

    /// The next batch to apply, if it is time for one.
    pub fn poll(&mut self, now: Duration) -> Option<Batch> {
        if self.flight == Flight::Flushing {
            return None;
        }
        let boundary = self.within == Within::Boundary;
        let idle = now.saturating_sub(self.stored_at) < IDLE_CHECKPOINT_INTERVAL;
        let due = match self.urgency {
            Urgency::None => false,
            Urgency::Position => self.drained && boundary && (!idle || self.is_open()),
            Urgency::Now => self.drained && boundary && now >= self.rest_until,
        };
        // A delete that was held back counts as a row, and is nothing new to apply.
        if !due && (!self.is_full() || self.urgency == Urgency::None) {
            return None;
        }
        Some(self.next_batch(now))
    }

    /// Everything collected as a batch, before the shape of a table that has rows in it changes.
    pub fn cut(&mut self, now: Duration) -> Option<Batch> {
        let idle = self.flight == Flight::Idle;
        (idle && self.fold.rows() > 0 && self.urgency != Urgency::None)
            .then(|| self.next_batch(now))
    }

    fn next_batch(&mut self, now: Duration) -> Batch {
        let boundary = self.within == Within::Boundary;
        let busy = self.fold.rows() >= BUSY_ROWS && !self.is_full();
        self.rest_until = if busy { now + BUSY_REST } else { now };
        self.stored_at = now;
        self.flight = Flight::Flushing;
        self.urgency = Urgency::None;
        self.open_parts = match boundary {
            true => 0,
            false => self.open_parts.saturating_add(1),
        };
        let steps = if boundary {
            self.fold.finish()
        } else {
            self.fold.cut()
        };
        let batch = Batch {
            from: self.handed_out,
            to: self.collected,
            copy: None,
            steps,
            commit: boundary,
        };
        assert!(
            batch.to.position >= batch.from.position,
            "a checkpoint never goes back"
        );
        self.handed_out = self.collected;
        batch
    }

    /// Whether a batch is due although more is waiting.
    #[must_use]
    pub fn is_full(&self) -> bool {
        let full = self.fold.rows() >= self.limits.rows || self.fold.bytes() >= self.limits.bytes;
        full || self.open_parts >= OPEN_PARTS_MAX && self.within == Within::Boundary
    }

    fn on_event(
        &mut self,
        stream_seq: u64,
        payload: &Bytes,
        event: &ChangeEvent<'_>,
    ) -> Result<(), RowError> {
        let version = event.source.version;
        if !self.advance(stream_seq, version.into(), event.source.ts_us) {
            return Ok(());
        }
        self.within = if event.source.last {
            Within::Boundary
        } else {
            Within::Transaction
        };
        self.urgency = self.urgency.max(Urgency::Position);
        let Some(index) = self.find(&event.source.schema, &event.source.table) else {
            return Ok(());
        };
        self.current = index;
        let table = &self.tables[index];
        let wanted = match event.op {
            millrace_event::Op::Delete => table.rule.deletes,
            millrace_event::Op::Truncate => table.rule.truncates,
            _ => true,
        };
        if !wanted || version.commit_lsn < table.copied_below {
            return Ok(());
        }
        let layout = table
            .layout
            .as_ref()
            .expect("the caller asked for missing layouts");
        self.urgency = Urgency::Now;
        self.fold.push(layout, event, payload)
    }

    /// Where a table stands in [`Worker::tables`]; `None` for one that is not this sink's.
    fn find(&self, schema: &str, table: &str) -> Option<usize> {
        let current = self.tables.get(self.current);
        if current.is_some_and(|followed| followed.name_parts() == (schema, table)) {
            return Some(self.current);
        }
        self.tables
            .binary_search_by(|followed| followed.name_parts().cmp(&(schema, table)))
            .ok()
    }

    /// Moves on to a position; `false` where it is not above everything seen: a repetition.
    fn advance(&mut self, stream_seq: u64, position: Position, source_ts_us: i64) -> bool {
        if position <= self.collected.position {
            return false;
        }
        if position.commit_lsn() > self.collected.position.commit_lsn() {
            // A transaction whose `last` never came, because the configuration changed, ends here.
            self.within = Within::Boundary;
        }
        self.collected = Checkpoint {
            stream_seq,
            position,
            source_ts_us,
        };
        true
    }
}

#[cfg(test)]
mod tests;
