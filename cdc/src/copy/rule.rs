//! Which version the rows of a chunk get: the heart of the backfill. Pure.

use std::collections::VecDeque;
use std::str::FromStr;

use millrace_event::Lsn;

#[cfg(test)]
mod tests;

/// How many commits are remembered for one sink: 4 MiB, and more than two minutes of 2,000 a second. Only those
/// since the newest snapshot must be; what it showed is forgotten.
pub const COMMITS_MAX: usize = 1 << 18;

/// What a snapshot of the primary shows of transactions, as `pg_current_snapshot()` prints it. Ids have 64 bits and
/// never wrap around.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Every transaction below had ended.
    xmin: u64,
    /// No transaction from here on had ended.
    xmax: u64,
    /// Those in between that had not, in order.
    open: Vec<u64>,
}

/// A text that is not a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a snapshot of the form 10:20:10,14: {0:?}")]
pub struct ParseSnapshotError(String);

impl FromStr for Snapshot {
    type Err = ParseSnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseSnapshotError(text.to_owned());
        let id = |digits: &str| digits.parse::<u64>().map_err(|_| refused());
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().ok_or_else(refused);
        let (xmin, xmax, open) = (id(part()?)?, id(part()?)?, part()?);
        let mut open: Vec<u64> = match open {
            "" => Vec::new(),
            list => list.split(',').map(id).collect::<Result<_, _>>()?,
        };
        open.sort_unstable();
        let within = open.iter().all(|xid| (xmin..xmax).contains(xid));
        match within && xmin <= xmax {
            true => Ok(Self { xmin, xmax, open }),
            false => Err(refused()),
        }
    }
}

impl Snapshot {
    /// Whether what this transaction did is seen, provided that it committed.
    fn shows(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.open.binary_search(&xid).is_err())
    }

    /// The 64 bits of an id of which the WAL tells 32. Postgres never has ids in use that are 2^31 apart, so the
    /// one that is nearest to the snapshot's end is meant.
    fn widen(&self, xid: u32) -> u64 {
        let end = self.xmax as u32;
        let distance = xid.wrapping_sub(end).cast_signed();
        // Below zero there is none. Not shown is the answer that is always safe.
        self.xmax
            .checked_add_signed(i64::from(distance))
            .unwrap_or(self.xmax)
    }
}

/// What is known of the transactions that committed before the reader began to record commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    /// Nothing: at the begin, and since commits were forgotten because there were too many.
    Absent,
    /// An id is being taken.
    Taking,
    /// This id was taken after all of them had committed, so theirs are lower.
    Taken(u64),
    /// A snapshot showed all of them. So does every later one.
    Passed,
}

/// What the reader of the WAL has told since it was asked first: how far it is, and who committed.
#[derive(Clone, Debug)]
pub struct Recent {
    /// Every transaction whose commit record lies below was read to its end.
    position: Lsn,
    /// Id and commit LSN, in the order of the LSNs, of transactions that no snapshot has shown yet.
    commits: VecDeque<(u32, Lsn)>,
    commits_max: usize,
    barrier: Barrier,
}

/// Why a chunk cannot be read now: another snapshot, later, may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The barrier must be taken: see [`Recent::take_barrier`].
    Barrier,
    /// Transactions that are older than the barrier are still open.
    Older,
    /// A transaction that committed before the request began is not visible yet.
    Limbo,
}

impl Recent {
    /// Begins to record, where the reader is now.
    pub fn new(position: Lsn, commits_max: usize) -> Self {
        Self {
            position,
            commits: VecDeque::new(),
            commits_max,
            barrier: Barrier::Absent,
        }
    }

    /// How far the reader is: the `m` of [`version`], if it is asked before the snapshot is taken.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The reader has read a transaction to its end. Its commit LSN is above those of all before it.
    pub fn committed(&mut self, xid: u32, commit_lsn: Lsn) {
        if self.commits.len() >= self.commits_max {
            self.commits.clear();
            self.barrier = Barrier::Absent;
        }
        self.commits.push_back((xid, commit_lsn));
    }

    /// The reader has read every transaction whose commit record lies below.
    pub fn read_to(&mut self, position: Lsn) {
        self.position = self.position.max(position);
    }

    /// Whether nothing says of the transactions before the recording: a barrier must be taken.
    pub fn lacks_barrier(&self) -> bool {
        matches!(self.barrier, Barrier::Absent | Barrier::Taking)
    }

    /// The next transaction id of the source is about to be taken.
    pub fn take_barrier(&mut self) {
        self.barrier = Barrier::Taking;
    }

    /// The id that was taken. Without effect if commits were forgotten meanwhile: it does not cover those.
    pub fn barrier_taken(&mut self, xid: u64) {
        if self.barrier == Barrier::Taking {
            self.barrier = Barrier::Taken(xid);
        }
    }

    /// Takes note of what a snapshot shows: every later one shows it too. It must not be told of a snapshot while
    /// an older one is still to be judged.
    pub fn shown(&mut self, snapshot: &Snapshot) {
        self.commits
            .retain(|(xid, _)| !snapshot.shows(snapshot.widen(*xid)));
        if self.passes(snapshot) {
            self.barrier = Barrier::Passed;
        }
    }

    /// Whether a snapshot shows every transaction whose commit was not recorded.
    fn passes(&self, snapshot: &Snapshot) -> bool {
        match self.barrier {
            Barrier::Absent | Barrier::Taking => false,
            Barrier::Taken(xid) => snapshot.xmin > xid,
            Barrier::Passed => true,
        }
    }
}

/// The version (its commit LSN; its seq is 0) of the rows that a snapshot S of the primary shows, for a request that
/// began at `begun`.
///
/// `m` is the reader's position, asked **before** S was taken. `recent` is what the reader has told up to now.
///
/// A sink holds for each key a version with a row or a tombstone, and takes a row only if its version is higher. A
/// change has the version (commit LSN c(T), 1..) of its transaction T. What must come true: once a chunk's rows and
/// all changes are applied, in any order and repeatedly, each key of the chunk is as at the source. It does if
///
/// - (a) V <= c(T) for every T that ever commits and is not visible in S,
/// - (b) every other transaction that the stream does not bring to the sink is visible in S,
/// - (c) tombstones above V live until the chunk was applied for the last time,
/// - (d) the stream's changes carry whole rows, or what they lack is fetched again,
/// - (e) S was taken when the table's lock was held, so no rewrite of the table is hidden from it.
///
/// Take the changes E1..En of one key, in commit order. Whoever writes a row waits until the one before has *ended*,
/// that is, is visible; so on one key commit order is the order of visibility, and S shows a prefix E1..Ej.
/// If j < n, the source is as En says, and by (a) En has a version above V and above all other changes: it wins,
/// as a row or as a tombstone that (c) keeps. If j = n, S and En say the same, and who wins does not matter; where En
/// is a delete, S has no row that could raise the key again. If there is no change, S alone speaks.
///
/// Across keys commit order is **not** the order of visibility. A commit writes its record to the WAL first, then
/// may wait for a synchronous standby, and only then becomes visible. In this limbo the stream already brings T, and
/// a new snapshot does not show it yet: its rows are older than a change that lies *before* any mark written to
/// the WAL after it. So a mark in the WAL, "low watermark" or LSN, is no version for a chunk: its outdated rows would
/// win over T's. Hence the rule: V is the smallest of `m` and of c(T) of all T below `m` that S does not show.
///
/// (a) holds: for c(T) >= m because V <= m; for c(T) < m because T was read to its end when `m` was asked, so it is
/// in `recent` unless an earlier snapshot showed it, or it committed before recording began. These latter have
/// ids below the barrier's X, which was taken after recording began: S must show them, so it must have xmin > X
/// ([`Wait::Older`]). After a restart of the reader recording begins anew, and so must the barrier. A smaller V is
/// always as right as a larger one, only weaker.
///
/// Too weak is a V that does not rise above what an outdated replica holds. `begun` is the commit LSN of the
/// transaction that began the request, X or a later one: what a sink held then is below. A chunk whose V falls below it, because
/// of an older commit in limbo, repairs nothing, so it is read again later ([`Wait::Limbo`]). Then every row that
/// the source had has a version of at least `begun` at the sink, and what stays below is a row too many.
///
/// Not decided here: the rows wait until the sink has applied the stream up to an LSN above all that S shows.
pub fn version(m: Lsn, snapshot: &Snapshot, recent: &Recent, begun: Lsn) -> Result<Lsn, Wait> {
    match recent.barrier {
        Barrier::Absent | Barrier::Taking => return Err(Wait::Barrier),
        Barrier::Taken(_) if !recent.passes(snapshot) => return Err(Wait::Older),
        Barrier::Taken(_) | Barrier::Passed => {}
    }
    let hidden = recent
        .commits
        .iter()
        .find(|(xid, _)| !snapshot.shows(snapshot.widen(*xid)));
    // The first one has the smallest commit LSN.
    let version = hidden.map_or(m, |(_, commit_lsn)| m.min(*commit_lsn));
    match version >= begun {
        true => Ok(version),
        false => Err(Wait::Limbo),
    }
}
