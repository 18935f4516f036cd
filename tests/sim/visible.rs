//! What snapshots of the source show. A commit is in the WAL first and visible later, as on a Postgres that waits for
//! its standby; meanwhile it holds what it wrote.

use std::collections::BTreeSet;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::source::State;
use crate::transaction::Locks;

/// The first transaction's id is up to so many below 2^32, so that most histories cross it.
const BEFORE_TURN: u64 = 60;
/// At most so many transactions are open, and so many in limbo.
const OPEN_MAX: usize = 2;
const LIMBO_MAX: usize = 3;

/// A transaction that is in the WAL, and that nobody sees yet.
#[derive(Debug)]
struct Limbo {
    xid: u64,
    locks: Locks,
    /// The tables right behind it.
    after: State,
}

/// The transactions as snapshots see them.
#[derive(Debug)]
pub(crate) struct Visible {
    state: State,
    /// Which file each table is in: a truncate makes a new one.
    files: Vec<u32>,
    next_xid: u64,
    /// The highest id of those that have ended.
    ended: u64,
    open: BTreeSet<u64>,
    limbo: Vec<Limbo>,
    /// How likely a commit gets into limbo.
    probability: f64,
}

impl Visible {
    pub(crate) fn new(state: State, rng: &mut SmallRng) -> Self {
        let next_xid = (1 << 32) - rng.random_range(0..BEFORE_TURN);
        Self {
            files: vec![0; state.len()],
            state,
            next_xid,
            ended: next_xid - 1,
            open: BTreeSet::new(),
            limbo: Vec::new(),
            probability: [0.0, 0.4, 0.9][rng.random_range(0..3)],
        }
    }

    /// A transaction takes an id, and stays open for a while.
    pub(crate) fn open(&mut self) {
        if self.open.len() < OPEN_MAX {
            let xid = self.new_xid();
            self.open.insert(xid);
        }
    }

    /// An id that was not given before.
    pub(crate) fn new_xid(&mut self) -> u64 {
        self.next_xid += 1;
        self.next_xid - 1
    }

    /// The id of the transaction that commits next: a new one, or of one that was open.
    pub(crate) fn take_xid(&mut self, rng: &mut SmallRng) -> u64 {
        let oldest = self.open.first().copied().filter(|_| rng.random_bool(0.3));
        match oldest {
            Some(xid) => {
                self.open.remove(&xid);
                xid
            }
            None => self.new_xid(),
        }
    }

    /// What the transactions in limbo hold.
    pub(crate) fn held(&self) -> Locks {
        let mut held = Locks::default();
        self.limbo
            .iter()
            .for_each(|limbo| held.extend(&limbo.locks));
        held
    }

    /// A transaction is in the WAL; it is visible at once, or later.
    pub(crate) fn committed(&mut self, xid: u64, locks: Locks, after: State, rng: &mut SmallRng) {
        let waits = self.limbo.len() < LIMBO_MAX && rng.random_bool(self.probability);
        self.limbo.push(Limbo { xid, locks, after });
        if !waits {
            self.end(self.limbo.len() - 1);
        }
    }

    /// A transaction that wrote no row is in the WAL, and visible.
    pub(crate) fn ended(&mut self, xid: u64) {
        self.ended = self.ended.max(xid);
    }

    /// One of those in limbo becomes visible, not always the oldest. Returns its id.
    pub(crate) fn surface(&mut self, rng: &mut SmallRng) -> Option<u64> {
        let count = self.limbo.len();
        (count > 0).then(|| self.end(rng.random_range(0..count)))
    }

    /// A crash, or rest: what is in the WAL is visible, and what was open is gone.
    pub(crate) fn settle(&mut self) {
        while !self.limbo.is_empty() {
            self.end(0);
        }
        if let Some(last) = self.open.last() {
            self.ended = self.ended.max(*last);
        }
        self.open.clear();
    }

    fn end(&mut self, at: usize) -> u64 {
        let Limbo { xid, locks, after } = self.limbo.remove(at);
        for (table, key) in locks.keys {
            let rows = std::sync::Arc::make_mut(&mut self.state[table]);
            match after[table].get(&key) {
                Some(row) => rows.insert(key, row.clone()),
                None => rows.remove(&key),
            };
        }
        for table in locks.tables {
            self.files[table] += 1;
        }
        self.ended(xid);
        xid
    }

    /// What a snapshot shows, and the transactions that it says so of, as Postgres prints it.
    pub(crate) fn snapshot(&self) -> (String, State) {
        let xmax = self.ended + 1;
        let running = self.limbo.iter().map(|limbo| limbo.xid);
        let running: BTreeSet<u64> = running.chain(self.open.iter().copied()).collect();
        let xmin = running.first().map_or(xmax, |first| xmax.min(*first));
        let open: Vec<_> = running.range(..xmax).map(u64::to_string).collect();
        (
            format!("{xmin}:{xmax}:{}", open.join(",")),
            self.state.clone(),
        )
    }

    /// The file that a table is in; `None` while somebody who empties it holds it.
    pub(crate) fn file(&self, table: usize) -> Option<u32> {
        let held = self
            .limbo
            .iter()
            .any(|limbo| limbo.locks.tables.contains(&table));
        (!held).then(|| self.files[table])
    }
}
