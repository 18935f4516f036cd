//! The machine of a sink's initial copy: from the copy stream's messages to batches. It knows no network and
//! no clock.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use millrace_event::work::Copied;
use millrace_event::{ChangeEvent, TableName, Version};

use crate::batch::{Batch, Checkpoint, CopyProgress, CopyState};
use crate::fold::Fold;
use crate::row::{RowError, TableLayout};
use crate::worker::BatchLimits;

/// Where on its copy stream a message belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyMark<'a> {
    /// The request's id.
    pub request: &'a str,
    /// The attempt.
    pub attempt: u32,
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
    /// The end of a table.
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
    /// Messages are missing: the broker lost them. The remaining tables must be asked for again.
    #[error("copy stream misses message {expected}: it goes on with {found}")]
    Gap {
        /// The number that should have come.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A row without its key.
    #[error(transparent)]
    Row(#[from] RowError),
}

/// Applies the answer to one request.
#[derive(Debug)]
pub struct Copying {
    request: String,
    limits: BatchLimits,
    checkpoint: Checkpoint,
    layouts: HashMap<TableName, Arc<TableLayout>>,
    progress: CopyProgress,
    attempt: u32,
    number: u64,
    fold: Fold,
    changed: bool,
}

impl Copying {
    /// Begins, or goes on where the target's progress says.
    #[must_use]
    pub fn new(
        request: String,
        limits: BatchLimits,
        checkpoint: Checkpoint,
        progress: CopyProgress,
    ) -> Self {
        let newest = progress
            .tables
            .values()
            .filter_map(|state| match state {
                CopyState::Copying {
                    request: of,
                    attempt,
                    number,
                    ..
                } if *of == request => Some((*attempt, *number)),
                _ => None,
            })
            .max();
        let (attempt, number) = newest.unwrap_or((0, 0));
        Self {
            request,
            limits,
            checkpoint,
            layouts: HashMap::new(),
            progress,
            attempt,
            number,
            fold: Fold::new(),
            changed: false,
        }
    }

    /// The table of an event whose layout the machine does not have and needs: fetch it, and call
    /// [`Copying::set_layout`] before the event is handled.
    #[must_use]
    pub fn missing_layout(&self, event: &ChangeEvent<'_>) -> Option<TableName> {
        let table = event.source.table_name();
        let known = self.layouts.get(&table);
        let missing = !self.is_copied(&table)
            && known.is_none_or(|layout| layout.shape != event.source.table_version);
        missing.then_some(table)
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

    /// Takes one message. The layout of its table must be known.
    ///
    /// # Errors
    /// Messages are missing, or a row is.
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
                    if self.is_copied(&table) {
                        continue;
                    }
                    let layout = self.layouts.get(&table).expect("the caller asked for it");
                    self.fold.push(layout, event, payload)?;
                    self.note(&table, event.source.version);
                }
            }
            Input::Copied { mark, copied } => {
                if !self.follow(mark)? {
                    return Ok(());
                }
                if !self.is_copied(&copied.table) {
                    let layout = self
                        .layouts
                        .get(&copied.table)
                        .expect("the caller asked for it");
                    let below = Version::new(copied.epoch, copied.lsn, 0);
                    self.fold.sweep(layout, below);
                    let state = CopyState::Copied { lsn: copied.lsn };
                    self.progress.tables.insert(copied.table.clone(), state);
                    self.progress.copied_to = self.progress.copied_to.max(below);
                    self.pass_number_on(below);
                }
            }
        }
        Ok(())
    }

    /// The next batch, if there is something to apply: at the limits, or when nothing more is waiting.
    pub fn poll(&mut self, drained: bool) -> Option<Batch> {
        let full = self.fold.rows() >= self.limits.rows || self.fold.bytes() >= self.limits.bytes;
        if !self.changed || !(full || drained) {
            return None;
        }
        self.changed = false;
        Some(Batch {
            from: self.checkpoint,
            to: self.checkpoint,
            copy: Some(self.progress.clone()),
            steps: self.fold.finish(),
            commit: true,
        })
    }

    /// Whether a message is the next of ours; `false` for a repetition and for what others were sent.
    fn follow(&mut self, mark: CopyMark<'_>) -> Result<bool, CopyError> {
        if mark.request != self.request || mark.attempt < self.attempt {
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

    fn is_copied(&self, table: &TableName) -> bool {
        let state = self.progress.tables.get(table);
        state.is_some_and(CopyState::is_copied)
    }

    fn note(&mut self, table: &TableName, version: Version) {
        let state = CopyState::Copying {
            request: self.request.clone(),
            attempt: self.attempt,
            number: self.number,
            lsn: version.commit_lsn,
        };
        self.progress.tables.insert(table.clone(), state);
        self.progress.copied_to = self.progress.copied_to.max(version);
    }

    /// The number reached must outlive the table that reached it: the next table that waits carries it.
    fn pass_number_on(&mut self, below: Version) {
        let waits = |state: &CopyState| !state.is_copied();
        let next = self.progress.tables.iter().find(|(_, state)| waits(state));
        if let Some(next) = next.map(|(table, _)| table.clone()) {
            self.note(&next, below);
        }
    }
}
