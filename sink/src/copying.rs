//! The machine of a sink's copies: from the copy stream's messages to batches. It knows no network and no
//! clock.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use millrace_event::work::{Copied, CopyRequest, Part, TableRequest, Wanted};
use millrace_event::{ChangeEvent, LoadError, LoadHead, TableName, Version};

use crate::batch::{Batch, Checkpoint, Step};
use crate::fold::{Fold, RowChange};
use crate::load::Load;
use crate::progress::{CopyProgress, CopyState, Reading};
use crate::row::{Cell, RowError, TableLayout};
use crate::worker::BatchLimits;

/// Where on its copy stream a message belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyMark<'a> {
    /// The request's id.
    pub request: &'a str,
    /// The attempt.
    pub attempt: u64,
    /// The message's number in the attempt, from 1.
    pub number: u64,
}

/// A message of the copy stream.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Rows.
    Rows {
        /// Where it belongs.
        mark: CopyMark<'a>,
        /// Its payload, which the events borrow from.
        payload: &'a Bytes,
        /// Its rows.
        events: &'a [ChangeEvent<'a>],
    },
    /// Rows of a load.
    Load {
        /// Where they belong.
        mark: CopyMark<'a>,
        /// What is the same for all of them.
        head: &'a LoadHead,
        /// The rows.
        rows: &'a Bytes,
    },
    /// The end of a table, a chunk, or the keys that were asked for.
    Copied {
        /// Where it belongs.
        mark: CopyMark<'a>,
        /// What it says.
        copied: &'a Copied,
    },
}

/// Why a copy stream cannot be followed any further.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Messages are missing: the broker lost them. What remains must be asked for again.
    #[error("copy stream misses message {expected}: it goes on with {found}")]
    Gap {
        /// The number that should have come.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// Rows of a load that are not what its head says.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A row without its key.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// Which rows of a table stay that are gone at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// Those that were deleted there, and perhaps those of a truncate.
    Deleted,
    /// Those of a truncate only.
    Truncated,
}

/// Applies the answer to one request.
#[derive(Debug)]
pub struct Copying {
    request: CopyRequest,
    limits: BatchLimits,
    /// Tables of which rows stay that are gone at the source.
    keeps: HashMap<TableName, Keeps>,
    layouts: HashMap<TableName, Arc<TableLayout>>,
    progress: CopyProgress,
    attempt: u64,
    number: u64,
    fold: Fold,
    loads: Vec<Load>,
    load_bytes: usize,
    changed: bool,
}

impl Copying {
    /// Begins, or goes on where the target's progress says.
    #[must_use]
    pub fn new(
        request: CopyRequest,
        limits: BatchLimits,
        keeps: HashMap<TableName, Keeps>,
        progress: CopyProgress,
    ) -> Self {
        let reading = progress.reading.as_ref();
        let reading = reading.filter(|reading| reading.request == request.id);
        let (attempt, number) = reading.map_or((0, 0), |at| (at.attempt, at.number));
        Self {
            request,
            limits,
            keeps,
            layouts: HashMap::new(),
            progress,
            attempt,
            number,
            fold: Fold::new(),
            loads: Vec::new(),
            load_bytes: 0,
            changed: false,
        }
    }

    /// Takes over how the tables stand, which others change too. Everything taken must have been applied.
    pub fn rebase(&mut self, progress: &CopyProgress) {
        assert!(self.is_at_rest(), "what was taken would be forgotten");
        self.progress.clone_from(progress);
    }

    /// What it answers.
    #[must_use]
    pub fn request(&self) -> &CopyRequest {
        &self.request
    }

    /// Whether the machine needs the layout of this version of a table, or any of it where none is named, and does not
    /// have it: fetch it, and call [`Copying::set_layout`] before the message is handled.
    #[must_use]
    pub fn misses(&self, table: &TableName, version: Option<&str>) -> bool {
        let known = self.layouts.get(table);
        let has = known.is_some_and(|layout| version.is_none_or(|version| layout.shape == version));
        self.takes(table) && !has
    }

    /// The layout of a table, where the machine has one.
    #[must_use]
    pub fn layout(&self, table: &TableName) -> Option<&Arc<TableLayout>> {
        self.layouts.get(table)
    }

    /// Takes the layout of a table.
    pub fn set_layout(&mut self, layout: Arc<TableLayout>) {
        self.layouts.insert(layout.source.clone(), layout);
    }

    /// How far each table is, once everything handed out is applied.
    #[must_use]
    pub fn progress(&self) -> &CopyProgress {
        &self.progress
    }

    /// Whether nothing was taken that was not handed out.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        !self.changed
    }

    /// Takes one message. The layout of its table must be known, and the stream must have been applied as far
    /// as a chunk's snapshot reaches.
    ///
    /// # Errors
    /// Messages are missing, or rows are not what they should be.
    pub fn handle(&mut self, input: Input<'_>) -> Result<(), CopyError> {
        match input {
            Input::Rows {
                mark,
                payload,
                events,
            } => {
                if !self.follow(mark)? {
                    return Ok(());
                }
                for event in events {
                    let table = event.source.table_name();
                    if !self.takes(&table) {
                        continue;
                    }
                    let layout = self.layouts.get(&table).expect("the caller asked for it");
                    self.fold.push(layout, event, payload)?;
                    self.note_rows(&table, event.source.version, 1);
                }
            }
            Input::Load { mark, head, rows } => {
                if self.follow(mark)? && self.takes(&head.load) {
                    self.load(head, rows)?;
                }
            }
            Input::Copied { mark, copied } => {
                if self.follow(mark)? && self.takes(&copied.table) {
                    self.end(copied)?;
                }
            }
        }
        Ok(())
    }

    /// The next batch, if there is something to apply: at the limits, or when nothing more is waiting. The sink
    /// stands at `checkpoint`.
    pub fn poll(&mut self, checkpoint: Checkpoint, drained: bool) -> Option<Batch> {
        if !self.changed || !(self.is_full() || drained) {
            return None;
        }
        self.changed = false;
        self.progress.reading = Some(Reading {
            request: self.request.id.clone(),
            attempt: self.attempt,
            number: self.number,
        });
        self.load_bytes = 0;
        // A load's end comes behind its rows, and is the fold's.
        let loads = std::mem::take(&mut self.loads).into_iter().map(Step::Load);
        Some(Batch {
            from: checkpoint,
            to: checkpoint,
            copy: Some(self.progress.clone()),
            steps: loads.chain(self.fold.finish()).collect(),
            commit: true,
        })
    }

    /// Whether a batch is due although more is waiting.
    #[must_use]
    pub fn is_full(&self) -> bool {
        // A load's rows are not laid out: their bytes alone count.
        let bytes = self.fold.bytes() + self.load_bytes;
        self.fold.rows() >= self.limits.rows || bytes >= self.limits.bytes
    }

    /// Whether a message is the next of ours; `false` for a repetition and for what others were sent.
    fn follow(&mut self, mark: CopyMark<'_>) -> Result<bool, CopyError> {
        if mark.request != self.request.id || mark.attempt < self.attempt {
            return Ok(false);
        }
        if mark.attempt > self.attempt {
            self.attempt = mark.attempt;
            self.number = 0;
        }
        if mark.number <= self.number {
            return Ok(false);
        }
        if mark.number != self.number + 1 {
            return Err(CopyError::Gap {
                expected: self.number + 1,
                found: mark.number,
            });
        }
        self.number = mark.number;
        self.changed = true;
        Ok(true)
    }

    /// How a table was asked for.
    fn asked(&self, table: &TableName) -> Option<&TableRequest> {
        self.request
            .tables
            .iter()
            .find(|asked| asked.table == *table)
    }

    /// Whether rows of this table are applied: its state is the one that they were asked for in. Of a copy that was
    /// given up and begun again, the rows before that did not come.
    fn takes(&self, table: &TableName) -> bool {
        let (Some(asked), Some(state)) = (self.asked(table), self.progress.tables.get(table))
        else {
            return false;
        };
        let is_same = state.copy_began_us() == Some(asked.began_us);
        match asked.rows {
            Wanted::Load => {
                is_same && matches!(state, CopyState::Pending { .. } | CopyState::Loading { .. })
            }
            Wanted::Chunks { .. } => is_same && matches!(state, CopyState::Chunks(_)),
            Wanted::Keys { .. } => state.is_followed(),
        }
    }

    fn load(&mut self, head: &LoadHead, rows: &Bytes) -> Result<(), CopyError> {
        let count = head.count(rows)?;
        match self.loads.last_mut() {
            Some(load) if load.takes(head) => load.push(rows.clone(), count),
            _ => {
                let layout = self.layouts.get(&head.load);
                let layout = layout.expect("the caller asked for it");
                let mut load = Load::new(Arc::clone(layout), head);
                load.push(rows.clone(), count);
                self.loads.push(load);
            }
        }
        self.load_bytes += rows.len();
        self.note_rows(&head.load, head.version, count as u64);
        Ok(())
    }

    fn note_rows(&mut self, table: &TableName, version: Version, count: u64) {
        self.progress.copied_to = self.progress.copied_to.max(version);
        match self.progress.tables.get_mut(table) {
            Some(state @ CopyState::Pending { .. }) => {
                let claim = state.claim().expect("a pending table has one");
                let began_us = state
                    .copy_began_us()
                    .expect("a pending table awaits its copy");
                *state = CopyState::Loading {
                    lsn: version.commit_lsn,
                    rows: count,
                    claim,
                    began_us,
                };
            }
            Some(CopyState::Loading { rows, .. }) => *rows += count,
            Some(CopyState::Chunks(chunks)) => chunks.rows += count,
            _ => {}
        }
    }

    fn end(&mut self, copied: &Copied) -> Result<(), CopyError> {
        let table = &copied.table;
        let layout = self.layouts.get(table).expect("the caller asked for it");
        let layout = Arc::clone(layout);
        let below = Version::new(copied.epoch, copied.lsn, 0);
        self.progress.copied_to = self.progress.copied_to.max(below);
        let state = self.progress.tables.get_mut(table);
        match (&copied.part, state) {
            (Part::Load, Some(state @ (CopyState::Pending { .. } | CopyState::Loading { .. }))) => {
                let claim = state.claim().expect("a table that is loaded has one");
                *state = CopyState::Loaded {
                    lsn: copied.lsn,
                    claim,
                };
                let keeps_rows = self.keeps.contains_key(table);
                self.fold.sweep(&layout, below, keeps_rows);
            }
            (Part::Chunk { after, last }, Some(CopyState::Chunks(chunks))) => {
                chunks.chunk_ended(after.as_ref(), below);
                if *last {
                    self.last_chunk(&layout);
                }
            }
            (Part::Keys, _) => self.keys(&layout, below)?,
            _ => {}
        }
        Ok(())
    }

    fn last_chunk(&mut self, layout: &Arc<TableLayout>) {
        let copied = CopyState::Copied {
            lsn: millrace_event::Lsn::ZERO,
        };
        let state = self.progress.tables.insert(layout.source.clone(), copied);
        let Some(CopyState::Chunks(chunks)) = state else {
            unreachable!("chunks are taken in that state only")
        };
        let order = chunks.order.as_ref();
        // Chunks of a part of the table say nothing about the rest.
        if order.is_none_or(|order| order.filter.is_none()) {
            let keeps_rows = self.keeps.contains_key(&layout.source);
            self.fold.sweep(layout, chunks.sweeps_below(), keeps_rows);
        }
        self.progress
            .finished
            .extend(order.map(|order| order.id.clone()));
    }

    /// Keys that were asked for and have no row at the source are gone: a delete tells the target so, and settles
    /// what is open about them. Below the version at which they were looked for it cannot harm a row that came
    /// again.
    fn keys(&mut self, layout: &Arc<TableLayout>, at: Version) -> Result<(), CopyError> {
        let asked = self.asked(&layout.source);
        let Some(Wanted::Keys { keys }) = asked.map(|asked| &asked.rows) else {
            return Ok(());
        };
        if self.keeps.get(&layout.source) == Some(&Keeps::Deleted) {
            return Ok(());
        }
        for key in keys.clone() {
            let mut row: crate::row::Row = vec![Cell::Missing; layout.columns.len()].into();
            for (column, text) in layout.key.iter().zip(key) {
                row[*column] = Cell::Text(text.into());
            }
            self.fold.change(layout, at, RowChange::Delete(row))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
