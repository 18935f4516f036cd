//! The model source: tables, committed transactions, a WAL and a slot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use millrace_event::{ColumnSchema, ColumnShape, Lsn, Relation, TableName, TableSchema, Version};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::transaction::{Builder, Expected, Locks};
use crate::visible::Visible;
use crate::wire::{self, Record};

/// The epoch of every version.
pub(crate) const EPOCH: u32 = 1;

/// Where the WAL of the simulation begins.
const WAL_START: u64 = 0x1_0000_1000;

/// Microseconds since 1970 of the first commit.
const CLOCK_START_US: i64 = 1_700_000_000_000_000;

pub(crate) type Row = Vec<Option<String>>;

/// A table's rows by their keys, each with the version of its last change.
pub(crate) type TableState = BTreeMap<Vec<String>, (Version, Row)>;

/// All tables, in the order of [`specs`].
pub(crate) type State = Vec<Arc<TableState>>;

/// A table of the source.
#[derive(Debug)]
pub(crate) struct TableSpec {
    pub(crate) oid: u32,
    pub(crate) name: TableName,
    /// Whether its replica identity is FULL.
    pub(crate) full: bool,
    /// Names and types.
    pub(crate) columns: Vec<(&'static str, u32)>,
    pub(crate) key: Vec<usize>,
    /// A column that updates may leave out.
    pub(crate) toast: Option<usize>,
    /// Whether the pipeline is configured to carry it.
    pub(crate) configured: bool,
}

const INT4: u32 = 23;
const TEXT: u32 = 25;

impl TableSpec {
    fn shapes(&self) -> Vec<ColumnShape<'static>> {
        let shape = |(name, type_oid): &(&'static str, u32)| ColumnShape {
            name,
            type_oid: *type_oid,
            typmod: -1,
        };
        self.columns.iter().map(shape).collect()
    }

    pub(crate) fn relation(&self) -> Relation {
        Relation::new(
            "shop",
            "db",
            self.name.clone(),
            &self.shapes(),
            self.key.clone(),
        )
    }

    /// The schema as capture would describe it.
    pub(crate) fn schema(&self) -> TableSchema {
        let column = |(name, type_oid): &(&'static str, u32)| ColumnSchema {
            name: (*name).to_owned(),
            type_name: if *type_oid == INT4 { "integer" } else { "text" }.to_owned(),
            type_oid: *type_oid,
            typmod: -1,
            not_null: false,
            number: 0,
            missing: None,
            former: Vec::new(),
        };
        TableSchema {
            name: self.name.clone(),
            version: self.relation().version().to_owned(),
            columns: self.columns.iter().map(column).collect(),
            key: self.key_names(),
            types: Vec::new(),
            oid: 0,
            dropped: Vec::new(),
        }
    }

    pub(crate) fn key_names(&self) -> Vec<String> {
        let name = |index: &usize| self.columns[*index].0.to_owned();
        self.key.iter().map(name).collect()
    }

    pub(crate) fn key_of(&self, row: &Row) -> Vec<String> {
        let value = |index: &usize| row[*index].clone().expect("a key is not null");
        self.key.iter().map(value).collect()
    }
}

pub(crate) fn specs() -> Vec<TableSpec> {
    let table = |oid, name, columns: &[(&'static str, u32)], key: &[usize], toast| TableSpec {
        oid,
        name: TableName::new("public", name),
        full: false,
        columns: columns.to_vec(),
        key: key.to_vec(),
        toast,
        configured: true,
    };
    let item = [("id", INT4), ("n", INT4), ("note", TEXT)];
    let pair = [("v", TEXT), ("a", INT4), ("b", TEXT)];
    let doc = [("id", INT4), ("title", TEXT), ("body", TEXT)];
    let mut full = table(104, "full", &doc, &[0], Some(2));
    full.full = true;
    let mut other = table(105, "other", &item, &[0], None);
    other.configured = false;
    vec![
        table(101, "item", &item, &[0], None),
        table(102, "pair", &pair, &[1, 2], None),
        table(103, "doc", &doc, &[0], Some(2)),
        full,
        other,
    ]
}

/// A committed transaction.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) commit_lsn: Lsn,
    pub(crate) end_lsn: Lsn,
    xid: u64,
    ts_us: i64,
    records: Vec<(Lsn, Record)>,
}

/// The source.
pub(crate) struct Source {
    pub(crate) specs: Arc<Vec<TableSpec>>,
    pub(crate) transactions: Vec<Committed>,
    /// The state before the first transaction, and after each.
    pub(crate) states: Vec<State>,
    /// What readers of the stream must see, in this order.
    pub(crate) expected: Vec<Expected>,
    /// Where the WAL ends.
    pub(crate) wal_end: Lsn,
    /// Transactions that nobody else has asked for: marks do not count.
    pub(crate) own: usize,
    pub(crate) visible: Visible,
    /// The table that most changes are of: one whose updates may leave a column out.
    hot: Option<usize>,
    slot: Vec<Lsn>,
}

impl Source {
    /// A source with some rows and a slot that was made just now.
    pub(crate) fn new(rng: &mut SmallRng) -> Self {
        let specs = Arc::new(specs());
        let empty: State = specs.iter().map(|_| Arc::default()).collect();
        let mut source = Self {
            visible: Visible::new(empty.clone(), rng),
            own: 0,
            hot: rng.random_bool(0.3).then_some(2),
            specs,
            transactions: Vec::new(),
            states: vec![empty],
            expected: Vec::new(),
            wal_end: Lsn(WAL_START),
            slot: Vec::new(),
        };
        for _ in 0..rng.random_range(0..4) {
            source.commit(rng);
        }
        // What was committed before the slot is not streamed, and a slot is not made before all of it is visible.
        source.visible.settle();
        source.transactions.clear();
        source.expected.clear();
        source.states.drain(..source.states.len() - 1);
        source.slot.push(source.wal_end);
        source
    }

    /// Commits a random transaction.
    pub(crate) fn commit(&mut self, rng: &mut SmallRng) {
        let hot = self.hot;
        let changes = match rng.random_range(0..12) {
            0 => 0,
            1 => rng.random_range(8..20),
            _ => rng.random_range(1..5),
        };
        self.commit_with(rng, |builder, rng| {
            for _ in 0..changes {
                builder.change(hot, rng);
            }
            if rng.random_bool(0.1) {
                builder.heartbeat(None);
            }
        });
        self.own += 1;
    }

    /// Commits nothing but a heartbeat.
    pub(crate) fn heartbeat(&mut self, rng: &mut SmallRng) {
        self.commit_with(rng, |builder, _| builder.heartbeat(None));
        self.own += 1;
    }

    /// Commits a mark that somebody waits for; returns its transaction's id.
    pub(crate) fn mark(&mut self, mark: u64, rng: &mut SmallRng) -> u64 {
        self.commit_with(rng, |builder, _| builder.heartbeat(Some(mark)))
    }

    fn commit_with(
        &mut self,
        rng: &mut SmallRng,
        fill: impl FnOnce(&mut Builder, &mut SmallRng),
    ) -> u64 {
        // Sometimes the commit record follows directly on the commit record before it.
        let commit_lsn = Lsn(self.wal_end.0 + [0, 8, 1000][rng.random_range(0..3)]);
        let end_lsn = Lsn(commit_lsn.0 + 48);
        self.wal_end = Lsn(end_lsn.0 + if rng.random_bool(0.3) { 0 } else { 56 });
        let state = self.states.last().cloned().unwrap_or_default();
        let specs = Arc::clone(&self.specs);
        let held = self.visible.held();
        let mut builder = Builder::new(specs, state, held, commit_lsn, end_lsn);
        fill(&mut builder, rng);
        let (records, expected, state, locks) = builder.finish();
        let xid = if locks == Locks::default() {
            let xid = self.visible.new_xid();
            self.visible.ended(xid);
            xid
        } else {
            let xid = self.visible.take_xid(rng);
            self.visible.committed(xid, locks, state.clone(), rng);
            xid
        };
        // Transactions run at the same time: a change may lie below the commit before.
        let mut lsns: Vec<u64> = records
            .iter()
            .map(|_| commit_lsn.0 - rng.random_range(1..1500))
            .collect();
        lsns.sort_unstable();
        let number = self.transactions.len() as u32;
        self.transactions.push(Committed {
            commit_lsn,
            end_lsn,
            xid,
            ts_us: CLOCK_START_US + i64::from(number) * 1_000_003,
            records: lsns.into_iter().map(Lsn).zip(records).collect(),
        });
        self.expected.extend(expected);
        self.states.push(state);
        xid
    }

    /// Where a table of ours stands in all of them.
    pub(crate) fn table(&self, name: &TableName) -> usize {
        let found = self.specs.iter().position(|spec| spec.name == *name);
        found.expect("a table of ours")
    }

    /// What the slot has forgotten.
    pub(crate) fn confirmed(&self) -> Lsn {
        self.slot.last().copied().unwrap_or(Lsn::ZERO)
    }

    /// The slot forgets up to here.
    pub(crate) fn confirm(&mut self, lsn: Lsn) {
        if lsn > self.confirmed() {
            self.slot.push(lsn);
        }
    }

    /// The source crashes: its slot may know only an older confirmed position.
    pub(crate) fn crash(&mut self, rng: &mut SmallRng) {
        let kept = rng.random_range(1..=self.slot.len());
        self.slot.truncate(kept);
        self.visible.settle();
    }

    /// The first transaction that a connection streams.
    pub(crate) fn start(&self) -> usize {
        let confirmed = self.confirmed();
        self.transactions
            .partition_point(|transaction| transaction.commit_lsn < confirmed)
    }

    /// A transaction as WAL messages with their places; relations are announced once per connection.
    pub(crate) fn frames(&self, at: usize, known: &mut BTreeSet<u32>) -> Vec<(Lsn, Vec<u8>)> {
        let transaction = &self.transactions[at];
        let Committed {
            commit_lsn,
            end_lsn,
            ts_us,
            ..
        } = *transaction;
        let mut frames = vec![(
            commit_lsn,
            wire::begin(commit_lsn, ts_us, transaction.xid as u32),
        )];
        for (lsn, record) in &transaction.records {
            for table in record.tables() {
                let spec = &self.specs[table];
                if known.insert(spec.oid) {
                    frames.push((Lsn::ZERO, wire::relation(spec)));
                }
            }
            frames.push((*lsn, wire::record(record, &self.specs, *lsn)));
        }
        frames.push((commit_lsn, wire::commit(commit_lsn, end_lsn, ts_us)));
        frames
    }

    /// The source's clock, microseconds since 1970.
    pub(crate) fn now_us(&self) -> i64 {
        CLOCK_START_US + self.transactions.len() as i64 * 1_000_003
    }

    /// A snapshot at a consistent point: it shows exactly the commits below.
    pub(crate) fn snapshot(&mut self) -> (Lsn, State) {
        // Making a slot writes a record of the running transactions.
        self.wal_end = Lsn(self.wal_end.0 + 56);
        (
            self.wal_end,
            self.states.last().cloned().unwrap_or_default(),
        )
    }
}
