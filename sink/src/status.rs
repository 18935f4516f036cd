//! What a running sink tells others: its state, and how far it is.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use millrace_config::{Condition, State};
use millrace_event::TableName;

use crate::batch::Checkpoint;
use crate::progress::{CopyProgress, CopyState};

/// The state of a sink, shared with those who show it.
#[derive(Debug)]
pub struct Status {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    condition: Option<Condition>,
    begun: bool,
    checkpoint: Checkpoint,
    /// This machine's clock when the checkpoint was committed, microseconds since 1970.
    applied_at_us: i64,
    tables: Vec<(TableName, State)>,
    /// Why tables are parked.
    parked: HashMap<TableName, Condition>,
    /// What an operator is told of tables that flow on.
    told: HashMap<TableName, Condition>,
    written: u64,
    stale: u64,
    dead_letters: u64,
}

/// How far a sink is.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What it is doing.
    pub state: State,
    /// The condition behind that, where there is one.
    pub condition: Option<Condition>,
    /// Whether it ever worked in this process: what fails later halts, and does not end it.
    pub begun: bool,
    /// How far it has applied the stream.
    pub checkpoint: Checkpoint,
    /// This machine's clock when that was committed, microseconds since 1970.
    pub applied_at_us: i64,
    /// Each table's state, and the condition behind that where there is one: also of a table that flows on.
    pub tables: Vec<(TableName, State, Option<Condition>)>,
    /// Rows written in this process, deletes included.
    pub written: u64,
    /// Rows that the version guard rejected in this process.
    pub stale: u64,
    /// Rows set aside in this process.
    pub dead_letters: u64,
}

impl Default for Status {
    fn default() -> Self {
        let inner = Inner {
            state: State::Starting,
            condition: None,
            begun: false,
            checkpoint: Checkpoint::default(),
            applied_at_us: 0,
            tables: Vec::new(),
            parked: HashMap::new(),
            told: HashMap::new(),
            written: 0,
            stale: 0,
            dead_letters: 0,
        };
        Self {
            inner: Mutex::new(inner),
        }
    }
}

impl Status {
    /// How far the sink is.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        Snapshot {
            state: inner.state.clone(),
            condition: inner.condition.clone(),
            begun: inner.begun,
            checkpoint: inner.checkpoint,
            applied_at_us: inner.applied_at_us,
            tables: inner
                .tables
                .iter()
                .map(|(table, state)| {
                    let condition = match state {
                        State::Streaming => inner.told.get(table),
                        _ => inner.parked.get(table),
                    };
                    (table.clone(), state.clone(), condition.cloned())
                })
                .collect(),
            written: inner.written,
            stale: inner.stale,
            dead_letters: inner.dead_letters,
        }
    }

    pub(crate) fn set_state(&self, sink: &str, state: State, condition: Option<Condition>) {
        let mut inner = self.lock();
        inner.begun |= state == State::Streaming;
        if inner.state != state {
            tracing::info!(part = "sink", sink, from = %inner.state, to = %state, "state changed");
        }
        (inner.state, inner.condition) = (state, condition);
    }

    /// What the target refuses from here on parks a table, and does not end the process.
    pub(crate) fn set_begun(&self) {
        self.lock().begun = true;
    }

    pub(crate) fn set_checkpoint(&self, checkpoint: Checkpoint, applied_at_us: i64) {
        let mut inner = self.lock();
        (inner.checkpoint, inner.applied_at_us) = (checkpoint, applied_at_us);
    }

    pub(crate) fn set_parked(&self, table: &TableName, condition: Condition) {
        self.lock().parked.insert(table.clone(), condition);
    }

    /// What an operator is told from here on of a table that flows on; `None`: nothing. Returns whether that is the first
    /// for this table since it was told nothing.
    pub(crate) fn tell(&self, table: &TableName, condition: Option<Condition>) -> bool {
        let mut inner = self.lock();
        match condition {
            Some(condition) => inner.told.insert(table.clone(), condition).is_none(),
            None => {
                inner.told.remove(table);
                false
            }
        }
    }

    pub(crate) fn set_tables(&self, copies: &CopyProgress) {
        let state = |table: &TableName, copy: &CopyState| match copy {
            CopyState::Parked { .. } | CopyState::Lapsed { .. } | CopyState::Refused { .. } => {
                State::Parked(table.clone())
            }
            CopyState::Copied { .. } => State::Streaming,
            CopyState::Pending { .. }
            | CopyState::Loading { .. }
            | CopyState::Loaded { .. }
            | CopyState::Chunks(_) => State::Snapshotting,
        };
        let mut inner = self.lock();
        let parked = copies.parked();
        inner.parked.retain(|table, _| parked.contains(table));
        // Of a table that is read again it is found out again.
        inner
            .told
            .retain(|table, _| matches!(copies.tables.get(table), Some(CopyState::Copied { .. })));
        inner.tables = copies
            .tables
            .iter()
            .map(|(table, copy)| (table.clone(), state(table, copy)))
            .collect();
    }

    pub(crate) fn count(&self, written: u64, stale: u64, dead_letters: u64) {
        let mut inner = self.lock();
        inner.written += written;
        inner.stale += stale;
        inner.dead_letters += dead_letters;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic while it was held ends the process anyway; what it left is whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use millrace_config::Code;
    use millrace_event::Lsn;

    use super::*;
    use crate::progress::Chunks;

    #[test]
    fn a_table_that_flows_on_shows_what_is_told_of_it_until_it_is_read_again() {
        let (status, table) = (Status::default(), TableName::new("public", "t"));
        let stands = |state| {
            let mut progress = CopyProgress::default();
            progress.tables.insert(table.clone(), state);
            status.set_tables(&progress);
        };
        let shown = || {
            let [(_, state, condition)] = &status.snapshot().tables[..] else {
                panic!("not one table")
            };
            (
                state.name(),
                condition.clone().map(|condition| condition.code),
            )
        };
        let condition = || Some(Condition::new(Code::KeyTooLong, "what", "do"));
        let copied = || CopyState::Copied { lsn: Lsn(1) };
        stands(copied());
        assert!(status.tell(&table, condition()));
        assert!(!status.tell(&table, condition()));
        assert_eq!(shown(), ("streaming", Some(Code::KeyTooLong)));
        assert!(!status.tell(&table, None));
        assert_eq!(shown(), ("streaming", None));
        assert!(status.tell(&table, condition()));
        stands(CopyState::Chunks(Chunks::begin(
            Default::default(),
            None,
            1,
        )));
        assert_eq!(shown(), ("snapshotting", None));
        stands(copied());
        assert_eq!(shown(), ("streaming", None));
    }
}
