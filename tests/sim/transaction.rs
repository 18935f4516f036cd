//! One random transaction of the model source, and what readers must see of it. The numbering and the events
//! are written from the format's description, not from capture's code.

use std::collections::BTreeSet;
use std::sync::Arc;

use millrace_event::{Lsn, Op, Version};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::source::{EPOCH, Row, State, TableSpec, TableState};
use crate::wire::{Cell, OldKind, Record};

/// One event that the stream must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) version: Version,
    /// The event as text; `check::text_of` writes a decoded event the same way.
    pub(crate) text: String,
}

/// What transactions hold until they have ended: the keys that they wrote, and the tables that they emptied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Locks {
    pub(crate) keys: BTreeSet<(usize, Vec<String>)>,
    pub(crate) tables: BTreeSet<usize>,
}

impl Locks {
    pub(crate) fn extend(&mut self, other: &Self) {
        self.keys.extend(other.keys.iter().cloned());
        self.tables.extend(&other.tables);
    }

    fn touch(&self, table: usize) -> bool {
        self.tables.contains(&table) || self.keys.iter().any(|(of, _)| *of == table)
    }
}

/// Builds a transaction.
pub(crate) struct Builder {
    specs: Arc<Vec<TableSpec>>,
    state: State,
    /// What others hold.
    held: Locks,
    own: Locks,
    commit_lsn: Lsn,
    end_lsn: Lsn,
    seq: u32,
    records: Vec<Record>,
    expected: Vec<Expected>,
}

impl Builder {
    pub(crate) fn new(
        specs: Arc<Vec<TableSpec>>,
        state: State,
        held: Locks,
        commit_lsn: Lsn,
        end_lsn: Lsn,
    ) -> Self {
        Self {
            specs,
            state,
            held,
            own: Locks::default(),
            commit_lsn,
            end_lsn,
            seq: 0,
            records: Vec::new(),
            expected: Vec::new(),
        }
    }

    pub(crate) fn finish(mut self) -> (Vec<Record>, Vec<Expected>, State, Locks) {
        if let Some(last) = self.expected.last_mut() {
            last.text.push_str(&format!(" last={}", self.end_lsn.0));
        }
        (self.records, self.expected, self.state, self.own)
    }

    pub(crate) fn heartbeat(&mut self, mark: Option<u64>) {
        self.records.push(Record::Heartbeat(mark));
    }

    /// One random change, or three that swap two keys; mostly of the hot table.
    pub(crate) fn change(&mut self, hot: Option<usize>, rng: &mut SmallRng) {
        let any = rng.random_range(0..self.specs.len());
        let table = hot.filter(|_| rng.random_bool(0.7)).unwrap_or(any);
        if self.held.tables.contains(&table) {
            return;
        }
        let keys = self.state[table].keys();
        let keys = keys.filter(|key| self.is_free(table, key));
        let keys: Vec<_> = keys.cloned().collect();
        let pick = |rng: &mut SmallRng| keys[rng.random_range(0..keys.len())].clone();
        match rng.random_range(0..20) {
            0 => self.truncate(table, rng),
            1..=2 if keys.len() >= 2 => {
                let (a, b) = (pick(rng), pick(rng));
                let spare = self.free_key(table, rng);
                if let (true, Some(spare)) = (a != b, spare) {
                    self.update(table, &a, Some(&spare), rng);
                    self.update(table, &b, Some(&a), rng);
                    self.update(table, &spare, Some(&b), rng);
                }
            }
            3..=5 if !keys.is_empty() => self.delete(table, &pick(rng)),
            6..=8 if !keys.is_empty() => {
                let key = pick(rng);
                if let Some(to) = self.free_key(table, rng) {
                    self.update(table, &key, Some(&to), rng);
                }
            }
            9..=14 if !keys.is_empty() => self.update(table, &pick(rng), None, rng),
            _ => {
                if let Some(key) = self.free_key(table, rng) {
                    self.insert(table, &key, rng);
                }
            }
        }
    }

    fn free_key(&self, table: usize, rng: &mut SmallRng) -> Option<Vec<String>> {
        let id = rng.random_range(1..9_u32);
        let key = if self.specs[table].key.len() == 1 {
            vec![id.to_string()]
        } else {
            vec![
                (id % 3).to_string(),
                ["", "1:", "x\"y\\", "ü\n"][id as usize % 4].to_owned(),
            ]
        };
        let is_free = !self.state[table].contains_key(&key) && self.is_free(table, &key);
        is_free.then_some(key)
    }

    /// Whoever writes a row waits until the one before has ended.
    fn is_free(&self, table: usize, key: &[String]) -> bool {
        !self.held.keys.contains(&(table, key.to_vec()))
    }

    fn hold(&mut self, table: usize, key: &[String]) {
        self.own.keys.insert((table, key.to_vec()));
    }

    fn version(&self) -> Version {
        Version::new(EPOCH, self.commit_lsn, self.seq)
    }

    fn table(&mut self, table: usize) -> &mut TableState {
        Arc::make_mut(&mut self.state[table])
    }

    fn insert(&mut self, table: usize, key: &[String], rng: &mut SmallRng) {
        let specs = Arc::clone(&self.specs);
        let spec = &specs[table];
        let mut row: Row = spec
            .columns
            .iter()
            .map(|column| value(column.1, rng))
            .collect();
        for (index, part) in spec.key.iter().zip(key) {
            row[*index] = Some(part.clone());
        }
        self.seq += 1;
        let version = self.version();
        let new = cells(&row);
        self.expect(spec, Op::Create, None, Some(&new), &row);
        self.hold(table, key);
        self.table(table).insert(key.to_vec(), (version, row));
        self.records.push(Record::Insert { table, new });
    }

    fn delete(&mut self, table: usize, key: &[String]) {
        let specs = Arc::clone(&self.specs);
        let spec = &specs[table];
        let Some((_, row)) = self.table(table).remove(key) else {
            return;
        };
        self.hold(table, key);
        self.seq += 1;
        let old = old_tuple(spec, &row);
        self.expect(spec, Op::Delete, Some(&old), None, &row);
        self.records.push(Record::Delete { table, old });
    }

    fn update(&mut self, table: usize, key: &[String], to: Option<&[String]>, rng: &mut SmallRng) {
        let specs = Arc::clone(&self.specs);
        let spec = &specs[table];
        let Some((_, old_row)) = self.table(table).remove(key) else {
            return;
        };
        let mut row = old_row.clone();
        let mut new_cells: Option<usize> = None;
        for (index, column) in spec.columns.iter().enumerate() {
            if spec.key.contains(&index) {
                continue;
            }
            if spec.toast == Some(index) && row[index].is_some() && rng.random_bool(0.6) {
                new_cells = Some(index);
            } else if rng.random_bool(0.6) {
                row[index] = value(column.1, rng);
            }
        }
        for (index, part) in spec.key.iter().zip(to.unwrap_or(key)) {
            row[*index] = Some(part.clone());
        }
        let mut new = cells(&row);
        if let Some(index) = new_cells {
            new[index] = Cell::Unchanged;
        }
        // A key that is stored apart is logged although it stayed.
        let logged = spec.full || to.is_some() || (spec.key.len() > 1 && rng.random_bool(0.2));
        let old = logged.then(|| old_tuple(spec, &old_row));
        self.seq += 1;
        let seen = if spec.full { cells(&row) } else { new.clone() };
        if to.is_some() {
            self.expect(spec, Op::Delete, old.as_ref(), None, &old_row);
            self.seq += 1;
            self.expect(spec, Op::Create, old.as_ref(), Some(&seen), &row);
        } else {
            let before = old.as_ref().filter(|(kind, _)| *kind == OldKind::Full);
            self.expect(spec, Op::Update, before, Some(&seen), &row);
        }
        let version = self.version();
        // An update that logs its old row takes two numbers, whether its key changed or not.
        if logged && to.is_none() {
            self.seq += 1;
        }
        let new_key = spec.key_of(&row);
        self.hold(table, key);
        self.hold(table, &new_key);
        self.table(table).insert(new_key, (version, row));
        self.records.push(Record::Update { table, old, new });
    }

    fn truncate(&mut self, table: usize, rng: &mut SmallRng) {
        if self.held.touch(table) {
            return;
        }
        let mut tables = vec![table];
        let other = rng.random_range(0..self.specs.len());
        if other != table && !self.held.touch(other) && rng.random_bool(0.5) {
            tables.push(other);
        }
        let specs = Arc::clone(&self.specs);
        for table in &tables {
            self.seq += 1;
            let keys: Vec<_> = self.state[*table].keys().cloned().collect();
            keys.iter().for_each(|key| self.hold(*table, key));
            self.own.tables.insert(*table);
            self.table(*table).clear();
            self.expect(&specs[*table], Op::Truncate, None, None, &Vec::new());
        }
        self.records.push(Record::Truncate { tables });
    }

    fn expect(
        &mut self,
        spec: &TableSpec,
        op: Op,
        before: Option<&(OldKind, Vec<Cell>)>,
        after: Option<&[Cell]>,
        key_of: &Row,
    ) {
        if !spec.configured {
            return;
        }
        let version = self.version();
        let named = |cells: &[Cell], only: Option<&[usize]>| {
            let mut order: Vec<usize> = (0..cells.len()).collect();
            if let Some(only) = only {
                order = only.to_vec();
            }
            columns_text(order.into_iter().filter_map(|index| match &cells[index] {
                Cell::Unchanged => None,
                Cell::Null => Some((spec.columns[index].0, None)),
                Cell::Text(text) => Some((spec.columns[index].0, Some(text.as_str()))),
            }))
        };
        let before = before.map(|(kind, cells)| match kind {
            OldKind::Full => named(cells, None),
            OldKind::Key => named(cells, Some(&spec.key)),
        });
        let key = (op != Op::Truncate).then(|| named(&cells(key_of), Some(&spec.key)));
        let after = after.map(|cells| named(cells, None));
        let text = event_text(version, op, &spec.name.table, [before, after, key]);
        self.expected.push(Expected { version, text });
    }
}

/// An event as one line of text.
pub(crate) fn event_text(
    version: Version,
    op: Op,
    table: &str,
    [before, after, key]: [Option<String>; 3],
) -> String {
    let part = |part: Option<String>| part.unwrap_or_else(|| "-".to_owned());
    let (before, after, key) = (part(before), part(after), part(key));
    format!(
        "{version} {} {table} before {before} after {after} key {key}",
        op.letter()
    )
}

/// Named values as text.
pub(crate) fn columns_text<'a>(
    columns: impl Iterator<Item = (&'a str, Option<&'a str>)>,
) -> String {
    let texts: Vec<_> = columns
        .map(|(name, value)| format!("{name}={value:?}"))
        .collect();
    format!("{{{}}}", texts.join(","))
}

fn cells(row: &Row) -> Vec<Cell> {
    row.iter()
        .map(|value| value.clone().map_or(Cell::Null, Cell::Text))
        .collect()
}

fn old_tuple(spec: &TableSpec, row: &Row) -> (OldKind, Vec<Cell>) {
    if spec.full {
        return (OldKind::Full, cells(row));
    }
    let mut old = vec![Cell::Null; row.len()];
    for index in &spec.key {
        old[*index] = row[*index].clone().map_or(Cell::Null, Cell::Text);
    }
    (OldKind::Key, old)
}

fn value(type_oid: u32, rng: &mut SmallRng) -> Option<String> {
    let number = rng.random_range(0..100_000_u32);
    match (type_oid, rng.random_range(0..10)) {
        (_, 0) => None,
        (23, _) => Some(number.to_string()),
        (_, 1) => Some(String::new()),
        (_, 2) => Some(format!("tab\tquote\" back\\ line\n ü {number}")),
        (_, 3) => Some("long ".repeat(rng.random_range(20..120)) + &number.to_string()),
        _ => Some(format!("v{number}")),
    }
}
