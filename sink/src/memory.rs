//! A target in memory: the model that every other sink is compared with, and the simulation's target.

mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use millrace_config::{Code, Condition, OnRowError, Table};
use millrace_event::{TableName, TableSchema, Version};

use self::state::State;
use crate::batch::{Batch, PositionRow};
use crate::row::{Key, LayoutColumn, Row, TableLayout};
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

    /// Somebody else's hand: from now on a row is this one, or is gone, and no event tells of it.
    pub fn set(&self, table: &TableName, key: Key, row: Option<(Version, Row)>) {
        let mut shared = self.lock();
        let table = shared.committed.tables.entry(table.clone()).or_default();
        match row {
            Some(row) => table.rows.insert(key, row),
            None => table.rows.remove(&key),
        };
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
}

impl Drop for MemorySink {
    fn drop(&mut self) {
        let mut shared = self.target.lock();
        if shared.elected.get(&self.name) == Some(&self.fence) {
            shared.elected.remove(&self.name);
        }
    }
}

/// How a table's rows are laid out for the model, which takes every column.
fn lay_out(schema: &TableSchema, settings: &Table) -> TableLayout {
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
    let names = settings.key.as_ref().unwrap_or(&schema.key);
    let index = |name: &String| columns.iter().position(|column| column.source == *name);
    let key = names.iter().filter_map(index).collect();
    TableLayout {
        source: schema.name.clone(),
        target: settings.target.clone(),
        columns,
        key,
        shape: schema.version.clone(),
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
        let layout = Arc::new(lay_out(schema, settings));
        let columns = layout.columns.iter();
        table.columns = columns
            .map(|column| (column.target.clone(), column.cast.clone()))
            .collect();
        self.halts.insert(
            schema.name.clone(),
            settings.on_row_error == OnRowError::Halt,
        );
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

    /// In the model every delete is an old one.
    async fn clean_up(
        &mut self,
        up_to: &BTreeMap<TableName, Version>,
        _kept: Duration,
        max: u32,
    ) -> Result<u64, SinkError> {
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
        for (name, table) in &mut shared.committed.tables {
            let Some(up_to) = up_to.get(name) else {
                continue;
            };
            table.tombstones.retain(|_, version| {
                let goes = *version <= *up_to && dropped < u64::from(max);
                dropped += u64::from(goes);
                !goes
            });
        }
        Ok(dropped)
    }
}
