//! What a running capture tells others: its state, and how far it is.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use millrace_config::{Condition, State};
use millrace_event::{Lsn, Position, TableName};

/// The state of a capture, shared with those who show it.
#[derive(Debug)]
pub struct Status {
    inner: Mutex<Inner>,
    /// Whether changes ever flowed in this process: what fails later halts, and does not end it.
    begun: AtomicBool,
    covered: AtomicU64,
    confirmed: AtomicU64,
    changes: AtomicU64,
    messages: AtomicU64,
}

/// A copy that fails for now, while the streaming goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTrouble {
    /// The sink that asked for it.
    pub sink: String,
    /// The table; `None` where it concerns all that the sink asked for.
    pub table: Option<TableName>,
    /// Why.
    pub condition: Condition,
}

#[derive(Debug)]
struct Inner {
    state: State,
    condition: Option<Condition>,
    copy_troubles: Vec<CopyTrouble>,
    parked: Vec<(TableName, Condition)>,
    position: Position,
    source_ts_us: i64,
}

impl Default for Status {
    fn default() -> Self {
        let inner = Inner {
            state: State::Starting,
            condition: None,
            copy_troubles: Vec::new(),
            parked: Vec::new(),
            position: Position::ZERO,
            source_ts_us: 0,
        };
        Self {
            inner: Mutex::new(inner),
            begun: AtomicBool::new(false),
            covered: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            messages: AtomicU64::new(0),
        }
    }
}

impl Status {
    /// What it is doing, and the condition behind that where there is one.
    #[must_use]
    pub fn state(&self) -> (State, Option<Condition>) {
        let inner = self.lock();
        (inner.state.clone(), inner.condition.clone())
    }

    /// The copies that fail for now; each is tried again by itself.
    #[must_use]
    pub fn copy_troubles(&self) -> Vec<CopyTrouble> {
        self.lock().copy_troubles.clone()
    }

    /// The tables that are not captured, and why: the others are.
    #[must_use]
    pub fn parked(&self) -> Vec<(TableName, Condition)> {
        self.lock().parked.clone()
    }

    /// Whether changes ever flowed in this process.
    #[must_use]
    pub fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// The stream, acknowledged, is complete up to this LSN of the source.
    #[must_use]
    pub fn covered(&self) -> Lsn {
        Lsn(self.covered.load(Ordering::Acquire))
    }

    /// What the slot may forget.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Acquire))
    }

    /// How many changes were read from the WAL.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// How many messages were acknowledged.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// The newest acknowledged heartbeat: its position, and the source's clock when it was written
    /// (microseconds since 1970).
    #[must_use]
    pub fn heartbeat(&self) -> (Position, i64) {
        let inner = self.lock();
        (inner.position, inner.source_ts_us)
    }

    pub(crate) fn set_state(&self, state: State, condition: Option<Condition>) {
        if state == State::Streaming {
            self.begun.store(true, Ordering::Release);
        }
        let mut inner = self.lock();
        if inner.state != state {
            tracing::info!(part = "capture", from = %inner.state, to = %state, "state changed");
        }
        (inner.state, inner.condition) = (state, condition);
    }

    /// Replaces what fails of one sink's copies.
    pub(crate) fn set_copy_troubles(&self, sink: &str, troubles: Vec<CopyTrouble>) {
        let mut inner = self.lock();
        inner.copy_troubles.retain(|trouble| trouble.sink != sink);
        inner.copy_troubles.extend(troubles);
    }

    pub(crate) fn set_parked(&self, parked: Vec<(TableName, Condition)>) {
        let mut inner = self.lock();
        for (table, condition) in &parked {
            if !inner.parked.iter().any(|(before, _)| before == table) {
                let (code, remedy) = (condition.code.as_str(), &condition.remedy);
                tracing::error!(%table, code, %remedy, "parked: {}", condition.message);
            }
        }
        inner.parked = parked;
    }

    pub(crate) fn set_covered(&self, lsn: Lsn) {
        self.covered.fetch_max(lsn.0, Ordering::AcqRel);
    }

    pub(crate) fn set_confirmed(&self, lsn: Lsn) {
        self.confirmed.store(lsn.0, Ordering::Release);
    }

    pub(crate) fn add(&self, changes: u64, messages: u64) {
        self.changes.fetch_add(changes, Ordering::Relaxed);
        self.messages.fetch_add(messages, Ordering::Relaxed);
    }

    pub(crate) fn set_heartbeat(&self, position: Position, source_ts_us: i64) {
        let mut inner = self.lock();
        (inner.position, inner.source_ts_us) = (position, source_ts_us);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic while it was held ends the process anyway; what it left is whole.
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
