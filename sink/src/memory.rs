//! A target in memory: the model that every other sink is compared with, and the simulation's target.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use millrace_config::{Code, Condition, OnRowError, Table};
use millrace_event::{TableName, TableSchema, Version};

use crate::batch::{Action, Batch, MoveRow, PositionRow, RowOp, Step};
use crate::guard::applies;
use crate::progress::CopyProgress;
use crate::row::{Cell, Key, LayoutColumn, Row, TableLayout, fill, is_full};
use crate::sink::{Applied, Elected, Ensured, Sink, SinkError};
use crate::sql::INCOMPLETE;

/// A database in memory that several sinks, one after the other or at once, are opened on.
#[derive(Clone, Debug, Default)]
pub struct MemoryTarget(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    committed: State,
    /// The fence of the worker that holds each sink's lock.
    elected: BTreeMap<String, i64>,
}

/// Everything that a target transaction changes.
#[derive(Clone, Debug, Default)]
struct State {
    positions: BTreeMap<String, PositionRow>,
    tables: BTreeMap<TableName, MemoryTable>,
    letters: Vec<MemoryLetter>,
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    /// The target's column names and types.
    pub columns: Vec<(String, String)>,
    /// The rows and their versions.
    pub rows: BTreeMap<Key, (Version, Row)>,
    /// The deleted keys.
    pub tombstones: BTreeMap<Key, Version>,
    /// The version of the last truncate.
    pub floor: Version,
}

/// One row set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLetter {
    /// The target's table.
    pub table: TableName,
    /// The row's key.
    pub key: Key,
    /// The row's version.
    pub version: Version,
    /// Why it was set aside.
    pub reason: String,
    /// Whether nothing newer has taken its place.
    pub open: bool,
}

impl MemoryTarget {
    /// An empty database.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A sink of this name on it.
    #[must_use]
    pub fn sink(&self, name: &str) -> MemorySink {
        MemorySink {
            target: self.clone(),
            name: name.to_owned(),
            fence: 0,
            open: None,
            halts: BTreeMap::new(),
            tables: BTreeSet::new(),
        }
    }

    /// Takes the lock away from a sink's worker, as a lost connection does, without its knowledge.
    pub fn depose(&self, sink: &str) {
        self.lock().elected.remove(sink);
    }

    /// The committed state of a table.
    #[must_use]
    pub fn table(&self, name: &TableName) -> MemoryTable {
        self.lock()
            .committed
            .tables
            .get(name)
            .cloned()
            .unwrap_or_default()
    }

    /// The committed position of a sink.
    #[must_use]
    pub fn position(&self, sink: &str) -> Option<PositionRow> {
        self.lock().committed.positions.get(sink).cloned()
    }

    /// All rows ever set aside.
    #[must_use]
    pub fn letters(&self) -> Vec<MemoryLetter> {
        self.lock().committed.letters.clone()
    }

    /// A row that is there before any sink is.
    pub fn insert(&self, table: &TableName, key: Key, row: Row) {
        let mut shared = self.lock();
        let table = shared.committed.tables.entry(table.clone()).or_default();
        table.rows.insert(key, (Version::ZERO, row));
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic of a test elsewhere leaves whole values behind.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A sink on a [`MemoryTarget`].
#[derive(Debug)]
pub struct MemorySink {
    target: MemoryTarget,
    name: String,
    fence: i64,
    /// The open target transaction.
    open: Option<State>,
    halts: BTreeMap<TableName, bool>,
    /// The target's tables that this sink writes.
    tables: BTreeSet<TableName>,
}

impl Drop for MemorySink {
    fn drop(&mut self) {
        let mut shared = self.target.lock();
        if shared.elected.get(&self.name) == Some(&self.fence) {
            shared.elected.remove(&self.name);
        }
    }
}

impl Sink for MemorySink {
    async fn open(&mut self) -> Result<Elected, SinkError> {
        self.open = None;
        let mut shared = self.target.lock();
        if shared
            .elected
            .get(&self.name)
            .is_some_and(|fence| *fence != self.fence)
        {
            return Ok(Elected::No);
        }
        let row = shared
            .committed
            .positions
            .entry(self.name.clone())
            .or_default();
        row.fence += 1;
        let row = row.clone();
        shared.elected.insert(self.name.clone(), row.fence);
        self.fence = row.fence;
        Ok(Elected::Yes(row))
    }

    async fn ensure_table(
        &mut self,
        schema: &TableSchema,
        _: Option<&TableSchema>,
        settings: &Table,
    ) -> Result<Ensured, SinkError> {
        let mut shared = self.target.lock();
        let committed = &mut shared.committed;
        let position = committed.positions.get(&self.name);
        let begun = position.is_some_and(|row| {
            let state = row.copy.tables.get(&schema.name);
            !matches!(
                state,
                None | Some(crate::progress::CopyState::Pending { .. })
            )
        });
        let begins = position.map(|row| row.checkpoint.position.0);
        let created = !committed.tables.contains_key(&settings.target);
        let table = committed.tables.entry(settings.target.clone()).or_default();
        let newer = |(version, _): &(Version, Row)| begins.is_some_and(|begins| *version > begins);
        let in_the_way = if settings.adopt {
            table.rows.values().any(newer)
        } else {
            !table.rows.is_empty()
        };
        if !begun && in_the_way {
            let message = format!(
                "target table {} already holds rows of its own",
                settings.target
            );
            return Err(SinkError::Table {
                table: schema.name.clone(),
                condition: Box::new(Condition::new(Code::TargetOccupied, message, "empty it")),
                source: None,
            });
        }
        let columns: Vec<_> = schema
            .columns
            .iter()
            .filter(|column| !settings.columns.exclude.contains(&column.name))
            .map(|column| {
                let rename = settings
                    .columns
                    .rename
                    .iter()
                    .find(|(from, _)| *from == column.name);
                let target = rename.map_or_else(|| column.name.clone(), |(_, to)| to.clone());
                let (source, cast) = (column.name.clone(), column.type_name.clone());
                LayoutColumn {
                    source,
                    target,
                    cast,
                }
            })
            .collect();
        table.columns = columns
            .iter()
            .map(|column| (column.target.clone(), column.cast.clone()))
            .collect();
        let names = settings.key.as_ref().unwrap_or(&schema.key);
        let index = |name: &String| columns.iter().position(|column| column.source == *name);
        let key = names.iter().filter_map(index).collect();
        self.tables.insert(settings.target.clone());
        self.halts.insert(
            schema.name.clone(),
            settings.on_row_error == OnRowError::Halt,
        );
        let layout = Arc::new(TableLayout {
            source: schema.name.clone(),
            target: settings.target.clone(),
            columns,
            key,
            shape: schema.version.clone(),
        });
        Ok(Ensured {
            layout,
            warnings: Vec::new(),
            created,
            others: Vec::new(),
        })
    }

    async fn apply(&mut self, batch: &Batch) -> Result<Applied, SinkError> {
        let mut shared = self.target.lock();
        let mut state = self.open.take().unwrap_or_else(|| shared.committed.clone());
        let stored = shared
            .committed
            .positions
            .get(&self.name)
            .map(|row| row.fence);
        let row = state.positions.entry(self.name.clone()).or_default();
        let expected = (row.checkpoint.stream_seq, row.checkpoint.position);
        if stored != Some(self.fence) || expected != (batch.from.stream_seq, batch.from.position) {
            return Err(SinkError::Fenced);
        }
        row.checkpoint = batch.to;
        row.epoch = batch.to.position.epoch();
        let before = row.copy.clone();
        if let Some(copy) = &batch.copy {
            row.copy = copy.clone();
        }
        let mut applied = Applied::default();
        for step in &batch.steps {
            state.step(step, &before, &self.halts, &mut applied)?;
        }
        if batch.commit {
            shared.committed = state;
        } else {
            self.open = Some(state);
        }
        Ok(applied)
    }

    async fn roll_back(&mut self) -> Result<(), SinkError> {
        self.open = None;
        Ok(())
    }

    async fn incomplete(
        &mut self,
        target: &TableName,
        after: &str,
        max: usize,
    ) -> Result<Vec<String>, SinkError> {
        let shared = self.target.lock();
        let letters = shared.committed.letters.iter();
        let keys = letters
            .filter(|letter| letter.table == *target && letter.open && letter.reason == INCOMPLETE)
            .map(|letter| letter.key.text().into_owned());
        let keys: BTreeSet<_> = keys.filter(|key| key.as_str() > after).collect();
        Ok(keys.into_iter().take(max).collect())
    }

    async fn clean_up(&mut self, up_to: Version) -> Result<u64, SinkError> {
        let mut shared = self.target.lock();
        if shared
            .committed
            .positions
            .get(&self.name)
            .map(|row| row.fence)
            != Some(self.fence)
        {
            return Err(SinkError::Fenced);
        }
        let mut dropped = 0;
        let ours = shared
            .committed
            .tables
            .iter_mut()
            .filter(|(name, _)| self.tables.contains(name));
        for (_, table) in ours {
            let before = table.tombstones.len();
            table.tombstones.retain(|_, version| *version > up_to);
            dropped += (before - table.tombstones.len()) as u64;
        }
        Ok(dropped)
    }
}

/// What a row did.
enum Outcome {
    Written,
    Stale,
    Refused(String),
}

impl State {
    fn step(
        &mut self,
        step: &Step,
        copies: &CopyProgress,
        halts: &BTreeMap<TableName, bool>,
        applied: &mut Applied,
    ) -> Result<(), SinkError> {
        match step {
            Step::Load(load) => {
                let rows = load.laid_out().map_err(|error| SinkError::Transient {
                    what: "laying a load's rows out",
                    condition: None,
                    source: error.into(),
                })?;
                self.step(&Step::Rows(vec![rows]), copies, halts, applied)?;
            }
            Step::Rows(tables) => {
                for table in tables {
                    for op in &table.rows {
                        let uncovered = copies.uncovered_below(&table.layout.source);
                        let outcome = self.row(&table.layout, op, uncovered);
                        let place = (&*table.layout, &op.key, op.version);
                        self.count(outcome, place, halts, applied)?;
                    }
                }
            }
            Step::Move(moves) => {
                for moved in moves {
                    let uncovered = copies.uncovered_below(&moved.layout.source);
                    let outcome = self.move_row(&moved.layout, &moved.row, uncovered);
                    let place = (&*moved.layout, &moved.row.key, moved.row.version);
                    self.count(outcome, place, halts, applied)?;
                }
            }
            Step::Truncate(tables) => {
                for (layout, version) in tables {
                    let floor = &mut self.table(layout).floor;
                    *floor = (*floor).max(*version);
                    self.below(layout, *version, false);
                }
            }
            Step::Sweep {
                table,
                below,
                keeps_rows,
            } => self.below(table, *below, *keeps_rows),
        }
        Ok(())
    }

    fn table(&mut self, layout: &TableLayout) -> &mut MemoryTable {
        self.tables.entry(layout.target.clone()).or_default()
    }

    fn below(&mut self, layout: &TableLayout, version: Version, keeps_rows: bool) {
        let table = self.table(layout);
        table
            .rows
            .retain(|_, (stored, _)| keeps_rows || *stored >= version);
        table.tombstones.retain(|_, stored| *stored >= version);
        for letter in &mut self.letters {
            letter.open &= letter.table != layout.target || letter.version >= version;
        }
    }

    fn has_letter(&self, layout: &TableLayout, key: &Key) -> bool {
        let of = |letter: &&MemoryLetter| letter.table == layout.target && letter.key == *key;
        self.letters.iter().filter(of).any(|letter| letter.open)
    }

    fn resolve(&mut self, layout: &TableLayout, key: &Key, version: Version) {
        for letter in &mut self.letters {
            letter.open &=
                letter.table != layout.target || letter.key != *key || letter.version >= version;
        }
    }

    fn row(&mut self, layout: &TableLayout, op: &RowOp, uncovered: Version) -> Outcome {
        let RowOp {
            key,
            version,
            action,
            ..
        } = op;
        let version = *version;
        let has_letter = self.has_letter(layout, key);
        let table = self.table(layout);
        let stored = table.rows.get(key);
        let buried = table.tombstones.get(key).copied();
        let applies = applies(
            stored.map(|(stored, _)| *stored),
            buried,
            table.floor,
            version,
        );
        let outcome = match action {
            _ if !applies => Outcome::Stale,
            Action::Delete { .. } => {
                let was_there = table.rows.remove(key).is_some();
                table.tombstones.insert(key.clone(), version);
                if was_there {
                    Outcome::Written
                } else {
                    Outcome::Stale
                }
            }
            Action::Put(row) => {
                let mut row = row.clone();
                if !is_full(&row) {
                    match stored {
                        Some((known, older)) if !has_letter && *known >= uncovered => {
                            fill(&mut row, older);
                        }
                        _ => return Outcome::Refused(INCOMPLETE.to_owned()),
                    }
                }
                if let Some(reason) = refusal(layout, &row) {
                    return Outcome::Refused(reason);
                }
                table.rows.insert(key.clone(), (version, row));
                Outcome::Written
            }
        };
        if !matches!(action, Action::Put(row) if !is_full(row)) {
            self.resolve(layout, key, version);
        }
        outcome
    }

    fn move_row(&mut self, layout: &TableLayout, moved: &MoveRow, uncovered: Version) -> Outcome {
        let has_letter = self.has_letter(layout, &moved.old_key);
        let table = self.table(layout);
        let stored = table.rows.get(&moved.key).map(|(stored, _)| *stored);
        let buried = table.tombstones.get(&moved.key).copied();
        if !applies(stored, buried, table.floor, moved.version) {
            return Outcome::Stale;
        }
        let mut row = moved.row.clone();
        match table.rows.get(&moved.old_key) {
            Some((known, old)) if *known < moved.version && *known >= uncovered && !has_letter => {
                fill(&mut row, old);
            }
            _ => return Outcome::Refused(INCOMPLETE.to_owned()),
        }
        if let Some(reason) = refusal(layout, &row) {
            return Outcome::Refused(reason);
        }
        table.rows.insert(moved.key.clone(), (moved.version, row));
        Outcome::Written
    }

    fn count(
        &mut self,
        outcome: Outcome,
        (layout, key, version): (&TableLayout, &Key, Version),
        halts: &BTreeMap<TableName, bool>,
        applied: &mut Applied,
    ) -> Result<(), SinkError> {
        match outcome {
            Outcome::Written => applied.written += 1,
            Outcome::Stale => applied.stale += 1,
            Outcome::Refused(reason) => {
                if reason != INCOMPLETE && halts.get(&layout.source) == Some(&true) {
                    let condition = Condition::new(Code::RowRefused, reason, "mend the row");
                    let condition = Box::new(condition);
                    return Err(SinkError::Fatal {
                        condition,
                        source: None,
                    });
                }
                let (table, key) = (layout.target.clone(), key.clone());
                self.letters.push(MemoryLetter {
                    table,
                    key,
                    version,
                    reason,
                    open: true,
                });
                applied.dead_letter(&layout.source, 1);
            }
        }
        Ok(())
    }
}

/// Why a row is refused: this database knows integers, and takes every text for every other type.
fn refusal(layout: &TableLayout, row: &Row) -> Option<String> {
    layout
        .columns
        .iter()
        .zip(row.iter())
        .find_map(|(column, cell)| match cell {
            Cell::Text(text) if column.cast == "integer" || column.cast == "bigint" => {
                let text = String::from_utf8_lossy(text);
                let fits = match column.cast.as_str() {
                    "integer" => text.parse::<i32>().is_ok(),
                    _ => text.parse::<i64>().is_ok(),
                };
                (!fits).then(|| format!("invalid input syntax for type {}: {text:?}", column.cast))
            }
            _ => None,
        })
}
