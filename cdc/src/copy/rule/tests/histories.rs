//! The rule over random histories: commits in limbo, deletes and keys that come back, chunks that come late and
//! twice, a reader that starts anew, transaction ids beyond 2^32. Wrong rules must be found out.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

use super::super::*;

const KEYS: u8 = 5;
/// Rows of a chunk.
const CHUNK: usize = 2;
/// The first transaction's id: most histories cross 2^32.
const XID_FIRST: u64 = (1 << 32) - 4;
/// Histories that are looked through for a violation of a wrong rule.
const HISTORIES: usize = 20_000;

/// Which rule gives a chunk its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Proven,
    /// `m` alone: the low watermark.
    Watermark,
    /// The proven rule, with the end of the WAL before the snapshot for `m`.
    WalBefore,
    /// The end of the WAL after the rows were read.
    WalAfter,
    /// The proven rule, without a new barrier when the reader has started anew.
    NoBarrier,
    /// The proven rule, with chunks published whose version lies below the request's begin.
    NoBegin,
    /// The proven rule, with ids that are never widened.
    Narrow,
}

type Rows = BTreeMap<u8, u64>;

enum Phase {
    Open,
    /// Open too: capture's own, that of the barrier.
    Own,
    /// The commit record is in the WAL, and nobody sees it.
    Limbo,
    Ended,
}

struct Transaction {
    xid: u64,
    phase: Phase,
    /// `None` deletes.
    writes: BTreeMap<u8, Option<u64>>,
}

/// A commit record, its end, and what it did.
struct Commit {
    xid: u64,
    lsn: u64,
    end: u64,
    writes: BTreeMap<u8, Option<u64>>,
}

struct Chunk {
    version: Lsn,
    rows: Rows,
    /// How many commits the sink must have applied.
    reach: usize,
    after: Option<u8>,
    last: bool,
}

/// What capture does next for the request.
enum Step {
    TakeBarrier,
    /// Commits the barrier's transaction, by its number.
    Begin(usize),
    /// The barrier's commit, by its number.
    SeeBegin(usize),
    Position,
    Snapshot(Lsn),
    /// Rows were read under this snapshot.
    Read(Snapshot, Lsn, Rows, bool),
    /// Waits until the reader has read so many commits.
    Publish(Chunk),
    Done,
}

struct World {
    rule: Rule,
    wal_end: u64,
    next_xid: u64,
    transactions: Vec<Transaction>,
    commits: Vec<Commit>,
    visible: Rows,
    values: u64,
    /// Commits that the reader has read.
    read: usize,
    recent: Recent,
    step: Step,
    begun: Lsn,
    /// The smallest begin of all lives.
    begun_first: Option<Lsn>,
    after: Option<u8>,
    published: Vec<Chunk>,
    /// Chunks of earlier lives that the sink had not applied: they may still come, at any time.
    late: Vec<Chunk>,
    /// Commits that the sink has applied.
    applied: usize,
    /// Versions as commit LSN and seq, with rows and tombstones.
    sink: BTreeMap<u8, ((u64, u32), Option<u64>)>,
    /// How many chunks the sink has applied, each for the first time in order.
    chunks_applied: usize,
}

impl World {
    /// The source has rows, and the sink has an outdated replica of what is not known.
    fn new(rule: Rule) -> Self {
        let mut world = Self {
            rule,
            wal_end: 1_000,
            next_xid: XID_FIRST,
            transactions: Vec::new(),
            commits: Vec::new(),
            visible: BTreeMap::new(),
            values: 0,
            read: 0,
            recent: Recent::new(Lsn::ZERO, COMMITS_MAX),
            step: Step::TakeBarrier,
            begun: Lsn::ZERO,
            begun_first: None,
            after: None,
            published: Vec::new(),
            late: Vec::new(),
            applied: 0,
            sink: BTreeMap::new(),
            chunks_applied: 0,
        };
        for key in [0, 1, 3] {
            let value = world.value();
            world.visible.insert(key, value);
        }
        for key in [1, 2, 3] {
            let value = world.value();
            world.sink.insert(key, ((999, 1), Some(value)));
        }
        world
    }

    fn value(&mut self) -> u64 {
        self.values += 1;
        self.values
    }

    /// Takes `length` bytes of WAL; returns where they begin.
    fn wal(&mut self, length: u64) -> u64 {
        let start = self.wal_end;
        self.wal_end += length;
        start
    }

    fn act(&mut self, choice: u32) {
        let pick = (choice >> 8) as usize;
        match choice % 23 {
            0..=4 => self.write(pick),
            5..=6 => self.commit(pick),
            7 => self.end(pick),
            8 => self.abort(pick),
            9..=11 => self.reader(),
            12..=16 => self.copier(),
            17..=18 => self.apply_commit(),
            19..=20 => self.apply_chunk(),
            21 => self.apply_again(pick),
            _ if pick.is_multiple_of(4) => self.restart(pick / 4),
            _ => self.corrupt(pick / 4),
        }
    }

    fn begin(&mut self, phase: Phase) -> usize {
        self.transactions.push(Transaction {
            xid: self.next_xid,
            phase,
            writes: BTreeMap::new(),
        });
        self.next_xid += 1;
        self.transactions.len() - 1
    }

    fn of_phase(&self, pick: usize, wanted: fn(&Phase) -> bool) -> Option<usize> {
        let found: Vec<usize> = (0..self.transactions.len())
            .filter(|index| wanted(&self.transactions[*index].phase))
            .collect();
        (!found.is_empty()).then(|| found[pick % found.len()])
    }

    /// Writes a key, in an open transaction or a new one, unless another one that has not ended holds it.
    fn write(&mut self, pick: usize) {
        let key = (pick % usize::from(KEYS)) as u8;
        let pick = pick / usize::from(KEYS);
        let index = match self.of_phase(pick / 2, |phase| matches!(phase, Phase::Open)) {
            Some(index) if pick.is_multiple_of(2) => index,
            _ => self.begin(Phase::Open),
        };
        let locked = self.transactions.iter().enumerate().any(|(other, t)| {
            other != index && !matches!(t.phase, Phase::Ended) && t.writes.contains_key(&key)
        });
        if locked {
            return;
        }
        self.wal(10);
        let value = (!pick.is_multiple_of(3)).then(|| self.value());
        self.transactions[index].writes.insert(key, value);
    }

    fn commit(&mut self, pick: usize) {
        let Some(index) = self.of_phase(pick, |phase| matches!(phase, Phase::Open)) else {
            return;
        };
        self.transactions[index].phase = Phase::Limbo;
        let Transaction { xid, writes, .. } = &self.transactions[index];
        let (xid, writes) = (*xid, writes.clone());
        self.record(xid, writes);
    }

    fn record(&mut self, xid: u64, writes: BTreeMap<u8, Option<u64>>) {
        let lsn = self.wal(10);
        let end = self.wal_end;
        let commit = Commit {
            xid,
            lsn,
            end,
            writes,
        };
        self.commits.push(commit);
    }

    /// A commit becomes visible.
    fn end(&mut self, pick: usize) {
        let Some(index) = self.of_phase(pick, |phase| matches!(phase, Phase::Limbo)) else {
            return;
        };
        self.transactions[index].phase = Phase::Ended;
        for (key, value) in &self.transactions[index].writes {
            match value {
                Some(value) => self.visible.insert(*key, *value),
                None => self.visible.remove(key),
            };
        }
    }

    fn abort(&mut self, pick: usize) {
        if let Some(index) = self.of_phase(pick, |phase| matches!(phase, Phase::Open)) {
            self.transactions[index].phase = Phase::Ended;
            self.transactions[index].writes.clear();
        }
    }

    /// Capture's own small transaction, which nothing holds in limbo.
    fn heartbeat(&mut self) {
        let index = self.begin(Phase::Ended);
        self.record(self.transactions[index].xid, BTreeMap::new());
    }

    fn snapshot(&self) -> Snapshot {
        let ended = self.transactions.iter().rev();
        let ended = ended.filter(|t| matches!(t.phase, Phase::Ended));
        let xmax = ended.map(|t| t.xid + 1).max().unwrap_or(XID_FIRST);
        let open: Vec<u64> = self
            .transactions
            .iter()
            .filter(|t| !matches!(t.phase, Phase::Ended) && t.xid < xmax)
            .map(|t| t.xid)
            .collect();
        let xmin = open.first().copied().unwrap_or(xmax);
        let list: Vec<String> = open.iter().map(ToString::to_string).collect();
        let text = format!("{xmin}:{xmax}:{}", list.join(","));
        text.parse().expect("a snapshot")
    }

    /// Before the request begins somebody spoils a row of the sink, whatever its version.
    fn corrupt(&mut self, pick: usize) {
        let value = self.value();
        let key = (pick % usize::from(KEYS)) as u8;
        if let (Step::TakeBarrier, None, Some((_, row))) =
            (&self.step, self.begun_first, self.sink.get_mut(&key))
        {
            *row = Some(value);
        }
    }

    fn reader(&mut self) {
        let Some(commit) = self.commits.get(self.read) else {
            return;
        };
        self.read += 1;
        // What goes over the wire has 32 bits.
        self.recent.committed(commit.xid as u32, Lsn(commit.lsn));
        self.recent.read_to(Lsn(commit.end));
    }

    /// The reader begins anew, somewhere behind, and with it the copier: what it published stays.
    fn restart(&mut self, pick: usize) {
        self.read = pick % (self.read + 1);
        let position = match self.read {
            0 => 0,
            read => self.commits[read - 1].end,
        };
        self.recent = Recent::new(Lsn(position), COMMITS_MAX);
        for transaction in &mut self.transactions {
            if matches!(transaction.phase, Phase::Own) {
                transaction.phase = Phase::Ended;
            }
        }
        let began = self.begun_first.is_some();
        self.step = Step::TakeBarrier;
        if self.rule == Rule::NoBarrier && began {
            self.recent.barrier = Barrier::Passed;
            self.step = Step::Position;
        }
        let applied = self.published.get(..self.chunks_applied);
        let newest = applied.unwrap_or_default().last();
        self.after = newest.and_then(|chunk| chunk.after);
        if newest.is_some_and(|chunk| chunk.last) {
            self.step = Step::Done;
        } else {
            let unapplied = self.published.drain(self.chunks_applied..);
            self.late.extend(unapplied);
        }
    }

    fn judge(&self, m: Lsn, snapshot: &Snapshot) -> Result<Lsn, Wait> {
        match self.rule {
            Rule::Proven | Rule::WalBefore | Rule::NoBarrier => {
                version(m, snapshot, &self.recent, self.begun)
            }
            Rule::NoBegin => version(m, snapshot, &self.recent, Lsn::ZERO),
            // They wait where the rule does: only the version is theirs.
            Rule::Watermark => version(m, snapshot, &self.recent, self.begun).map(|_| m),
            Rule::WalAfter => {
                let waited = version(m, snapshot, &self.recent, self.begun);
                waited.map(|_| Lsn(self.wal_end))
            }
            Rule::Narrow => {
                let narrow = |xid: &u32| !snapshot.shows(u64::from(*xid));
                let hidden = self.recent.commits.iter().find(|(xid, _)| narrow(xid));
                Ok(hidden.map_or(m, |(_, lsn)| m.min(*lsn)))
            }
        }
    }

    fn copier(&mut self) {
        self.step = match std::mem::replace(&mut self.step, Step::Done) {
            Step::TakeBarrier => {
                self.recent.take_barrier();
                Step::Begin(self.begin(Phase::Own))
            }
            Step::Begin(index) => {
                let xid = self.transactions[index].xid;
                self.transactions[index].phase = Phase::Ended;
                self.record(xid, BTreeMap::new());
                self.recent.barrier_taken(xid);
                Step::SeeBegin(self.commits.len())
            }
            Step::SeeBegin(number) if self.read < number => Step::SeeBegin(number),
            Step::SeeBegin(number) => {
                self.begun = Lsn(self.commits[number - 1].lsn);
                self.begun_first.get_or_insert(self.begun);
                Step::Position
            }
            Step::Position if self.rule == Rule::WalBefore => Step::Snapshot(Lsn(self.wal_end)),
            Step::Position => Step::Snapshot(self.recent.position()),
            Step::Snapshot(m) => {
                let from = self.after.map_or(0, |after| after + 1);
                let mut rows: Rows = self.visible.range(from..).map(|(k, v)| (*k, *v)).collect();
                let last = rows.len() < CHUNK;
                if let Some(beyond) = rows.keys().nth(CHUNK).copied() {
                    rows.split_off(&beyond);
                }
                Step::Read(self.snapshot(), m, rows, last)
            }
            Step::Read(snapshot, m, rows, last) => {
                let judged = self.judge(m, &snapshot);
                self.recent.shown(&snapshot);
                match judged {
                    Err(_) => Step::Position,
                    Ok(version) => {
                        self.heartbeat();
                        let after = rows.keys().next_back().copied().or(self.after);
                        Step::Publish(Chunk {
                            version,
                            rows,
                            reach: self.commits.len(),
                            after,
                            last,
                        })
                    }
                }
            }
            Step::Publish(chunk) if self.read < chunk.reach => Step::Publish(chunk),
            Step::Publish(chunk) => {
                self.after = chunk.after;
                let last = chunk.last;
                self.published.push(chunk);
                match last {
                    true => Step::Done,
                    false => Step::Position,
                }
            }
            Step::Done => Step::Done,
        };
    }

    fn put(&mut self, key: u8, version: (u64, u32), row: Option<u64>) {
        let stored = self.sink.get(&key).map(|(version, _)| *version);
        if stored.is_none_or(|stored| version > stored) {
            self.sink.insert(key, (version, row));
        }
    }

    fn apply(&mut self, index: usize) {
        let Commit { lsn, writes, .. } = &self.commits[index];
        let (lsn, writes) = (*lsn, writes.clone());
        for (seq, (key, row)) in (1..).zip(writes) {
            self.put(key, (lsn, seq), row);
        }
    }

    fn apply_commit(&mut self) {
        // The stream holds what any life of the reader has read.
        if self.applied < self.read {
            self.apply(self.applied);
            self.applied += 1;
        }
    }

    /// The next chunk that the sink may apply.
    fn apply_chunk(&mut self) {
        let next = self.published.get(self.chunks_applied);
        if next.is_some_and(|chunk| chunk.reach <= self.applied) {
            let chunk = &self.published[self.chunks_applied];
            self.put_chunk(chunk.version, chunk.rows.clone());
            self.chunks_applied += 1;
        }
    }

    fn put_chunk(&mut self, version: Lsn, rows: Rows) {
        for (key, row) in rows {
            self.put(key, (version.0, 0), Some(row));
        }
    }

    /// What was applied comes once more, or what an earlier life has published comes late.
    fn apply_again(&mut self, pick: usize) {
        let applied = self.published.iter().take(self.chunks_applied);
        let late = self.late.iter();
        let chunks: Vec<&Chunk> = applied
            .chain(late.filter(|chunk| chunk.reach <= self.applied))
            .collect();
        if pick.is_multiple_of(2) && !chunks.is_empty() {
            let chunk = chunks[pick / 2 % chunks.len()];
            self.put_chunk(chunk.version, chunk.rows.clone());
        } else if self.applied > 0 {
            self.apply(pick / 2 % self.applied);
        }
    }

    /// Lets everything come to its end, and compares.
    fn finish(mut self) -> Result<(), String> {
        while self
            .of_phase(0, |phase| matches!(phase, Phase::Open))
            .is_some()
        {
            self.commit(0);
        }
        while self
            .of_phase(0, |phase| matches!(phase, Phase::Limbo))
            .is_some()
        {
            self.end(0);
        }
        loop {
            while self.read < self.commits.len() {
                self.reader();
            }
            if matches!(self.step, Step::Done) {
                break;
            }
            self.copier();
        }
        while self.applied < self.commits.len() {
            self.apply_commit();
        }
        while self.chunks_applied < self.published.len() {
            self.apply_chunk();
        }
        // The sweep: what nothing confirmed is a row too many.
        let begun = self.begun_first.expect("a request begins").0;
        let held: Rows = self
            .sink
            .iter()
            .filter(|(_, (version, _))| version.0 >= begun)
            .filter_map(|(key, (_, row))| Some((*key, (*row)?)))
            .collect();
        match held == self.visible {
            true => Ok(()),
            false => Err(format!("sink {held:?}, source {:?}", self.visible)),
        }
    }
}

fn history(rule: Rule, choices: &[u32]) -> Result<(), String> {
    let mut world = World::new(rule);
    for choice in choices {
        world.act(*choice);
    }
    world.finish()
}

fn choices() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(any::<u32>(), 0..220)
}

/// How many of the histories a rule gets wrong, up to the first.
fn violation(rule: Rule) -> Option<usize> {
    let mut runner = TestRunner::deterministic();
    let strategy = choices();
    (0..HISTORIES).find(|_| {
        let tree = strategy.new_tree(&mut runner).expect("choices");
        history(rule, &tree.current()).is_err()
    })
}

proptest! {
    #![proptest_config(Config { cases: 10_000, ..Config::default() })]

    #[test]
    fn every_history_ends_equal(choices in choices()) {
        prop_assert_eq!(history(Rule::Proven, &choices), Ok(()));
    }
}

#[test]
fn the_histories_are_not_dull() {
    let mut runner = TestRunner::deterministic();
    let strategy = choices();
    let mut seen = BTreeSet::new();
    for _ in 0..2_000 {
        let tree = strategy.new_tree(&mut runner).expect("choices");
        let mut world = World::new(Rule::Proven);
        for choice in tree.current() {
            let judged = match &world.step {
                Step::Read(snapshot, m, ..) => Some((world.judge(*m, snapshot), *m)),
                _ => None,
            };
            match judged {
                Some((Ok(version), m)) if version < m => seen.insert("limbo"),
                Some((Err(Wait::Limbo), _)) => seen.insert("limbo before the begin"),
                Some((Err(Wait::Older), _)) => seen.insert("older"),
                _ => false,
            };
            world.act(choice);
        }
        if world.next_xid > 1 << 32 && world.chunks_applied > 1 {
            seen.insert("beyond 2^32");
        }
    }
    let all = ["beyond 2^32", "limbo", "limbo before the begin", "older"];
    assert_eq!(seen, BTreeSet::from(all));
}

#[test]
fn the_low_watermark_is_found_out() {
    assert!(violation(Rule::Watermark).is_some());
}

#[test]
fn the_end_of_the_wal_is_found_out_before_the_snapshot_and_after_the_read() {
    assert!(violation(Rule::WalBefore).is_some());
    assert!(violation(Rule::WalAfter).is_some());
}

#[test]
fn a_restart_without_a_barrier_is_found_out() {
    assert!(violation(Rule::NoBarrier).is_some());
}

#[test]
fn a_version_below_the_begin_is_found_out() {
    assert!(violation(Rule::NoBegin).is_some());
}

#[test]
fn ids_that_are_not_widened_are_found_out() {
    assert!(violation(Rule::Narrow).is_some());
}
