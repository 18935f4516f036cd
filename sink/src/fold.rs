//! Folds a sequence of changes into the fewest steps with the same outcome: the newest version of each key.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use foldhash::fast::RandomState;
use millrace_event::{ChangeEvent, Columns, Op, Version};

use crate::batch::{Action, Move, MoveRow, RowOp, Step, TableRows};
use crate::row::{Cell, Key, Projection, Row, RowError, TableLayout, fill, is_full};

/// One change of a table, laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowChange {
    /// A row was written.
    Put {
        /// Whether the source had no row of this key before.
        created: bool,
        /// The row; a missing cell is one that the change did not touch.
        row: Row,
        /// The row's old key, in a row of which only the key's cells are set, if this change moved it.
        old: Option<Row>,
    },
    /// A row was deleted; only the key's cells are set.
    Delete(Row),
    /// The table was emptied.
    Truncate,
}

/// Collects changes in the order of the stream and hands them out as steps.
///
/// Folding is the same as applying one by one. For full rows and deletes because the guard lets the newest
/// version of a key win anyway. For a partial row because the change before it *in its key's history* is the
/// one folded here (the stream has each key's changes in order), so that change's cells are what the target
/// would have held. What cannot be folded becomes a step of its own, and everything before it is handed out
/// before it: a truncate, and a move (below).
///
/// **Moves.** A key change comes as the old key's delete and, next in the stream, the new key's row with the
/// columns that it did not touch missing. They are those of the old row. If this fold knows the old row (kept
/// on the delete for this), it fills them in. Else only the target knows: the delete is held back, all other
/// changes so far go out first (the old row is then what it was when the source moved it, because this fold
/// held no full version of it), the move copies from the old row, and the delete follows with what comes
/// later. A batch that ends between the two would lose the old row; hence [`Fold::cut`].
#[derive(Debug, Default)]
pub struct Fold {
    steps: Vec<Step>,
    /// By name, so that the same changes always give the same steps.
    tables: Vec<TableFold>,
    /// Where the last change's table stands in them: the next one's is mostly the same.
    current: usize,
    /// The delete that the very last change was: a move may refer to it.
    trailing: Option<Trailing>,
    rows: usize,
    bytes: usize,
    superseded: u64,
}

/// A delete: its table and key.
type Trailing = (Arc<TableLayout>, Key);

#[derive(Debug)]
struct TableFold {
    projection: Projection,
    /// Keys come from users' rows, so the hash has a random seed.
    index: HashMap<Key, usize, RandomState>,
    ops: Vec<RowOp>,
    /// How many there were when they were last handed out: about as many come next.
    expected: usize,
}

impl TableFold {
    fn new(layout: &Arc<TableLayout>) -> Self {
        Self {
            projection: Projection::new(Arc::clone(layout)),
            index: HashMap::default(),
            ops: Vec::new(),
            expected: 0,
        }
    }

    fn layout(&self) -> &Arc<TableLayout> {
        self.projection.layout()
    }
}

impl Fold {
    /// A fold without changes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many changes were pushed since the steps were last taken.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The bytes of their cells.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many changes were folded into a newer one of the same key, ever.
    #[must_use]
    pub fn superseded(&self) -> u64 {
        self.superseded
    }

    /// Adds a change event, whose texts are slices of `payload`.
    ///
    /// # Errors
    /// The event does not have its key.
    pub fn push(
        &mut self,
        layout: &Arc<TableLayout>,
        event: &ChangeEvent<'_>,
        payload: &Bytes,
    ) -> Result<(), RowError> {
        let projection = &mut self.table(layout).projection;
        let mut row = |columns: &Option<Columns<'_>>| {
            columns
                .as_ref()
                .map(|columns| projection.row(columns, payload))
        };
        let change = match event.op {
            Op::Truncate => RowChange::Truncate,
            Op::Delete => RowChange::Delete(only_key(
                layout,
                row(&event.key).or_else(|| row(&event.before)),
            )),
            Op::Create | Op::Update | Op::Read => {
                let before = row(&event.before);
                let mut after = row(&event.after).unwrap_or_else(|| unknown(layout));
                if let Some(before) = &before {
                    // Under REPLICA IDENTITY FULL the old row has what the new one did not touch.
                    fill(&mut after, before);
                }
                let moved = event.op == Op::Create && before.is_some();
                RowChange::Put {
                    created: event.op != Op::Update,
                    row: after,
                    old: moved.then(|| only_key(layout, before)),
                }
            }
        };
        self.change(layout, event.source.version, change)
    }

    /// Adds a change that is laid out already.
    ///
    /// # Errors
    /// The row does not have its key.
    pub fn change(
        &mut self,
        layout: &Arc<TableLayout>,
        version: Version,
        change: RowChange,
    ) -> Result<(), RowError> {
        self.rows += 1;
        let trailing = self.trailing.take();
        match change {
            RowChange::Truncate => self.truncate(layout, version),
            RowChange::Delete(row) => {
                let key = layout.key_of(&row)?;
                self.bytes += bytes_of(&row);
                self.trailing = Some((Arc::clone(layout), key.clone()));
                let action = Action::Delete {
                    key: row,
                    last: None,
                };
                self.put(
                    layout,
                    RowOp {
                        key,
                        version,
                        created: false,
                        action,
                    },
                );
            }
            RowChange::Put {
                created,
                mut row,
                old,
            } => {
                let key = layout.key_of(&row)?;
                self.bytes += bytes_of(&row);
                if let Some(old) = old.filter(|_| !is_full(&row)) {
                    let old_key = layout.key_of(&old)?;
                    self.fill_from_deleted(layout, &old_key, &mut row);
                    if !is_full(&row) {
                        let row = MoveRow {
                            old,
                            old_key,
                            key,
                            row,
                            version,
                        };
                        self.move_row(layout, trailing.as_ref(), row);
                        return Ok(());
                    }
                }
                self.put(
                    layout,
                    RowOp {
                        key,
                        version,
                        created,
                        action: Action::Put(row),
                    },
                );
            }
        }
        Ok(())
    }

    /// Adds the end of a table's copy.
    pub fn sweep(&mut self, layout: &Arc<TableLayout>, below: Version, keeps_rows: bool) {
        self.flush(None);
        self.steps.push(Step::Sweep {
            table: Arc::clone(layout),
            below,
            keeps_rows,
        });
    }

    /// Takes the steps at the end of a source transaction.
    #[must_use]
    pub fn finish(&mut self) -> Vec<Step> {
        self.trailing = None;
        self.cut()
    }

    /// Takes the steps in the middle of a source transaction: a delete at the very end stays here, because
    /// the next change may be the other half of its key change.
    #[must_use]
    pub fn cut(&mut self) -> Vec<Step> {
        let trailing = self.trailing.clone();
        self.flush(trailing.as_ref());
        self.rows = self.tables.iter().map(|table| table.ops.len()).sum();
        self.bytes = 0;
        std::mem::take(&mut self.steps)
    }

    fn table(&mut self, layout: &Arc<TableLayout>) -> &mut TableFold {
        let is_current = self
            .tables
            .get(self.current)
            .is_some_and(|table| Arc::ptr_eq(table.layout(), layout));
        if !is_current {
            self.current = self.find(layout);
        }
        &mut self.tables[self.current]
    }

    /// Where a table stands in [`Fold::tables`], entered where it is new.
    fn find(&mut self, layout: &Arc<TableLayout>) -> usize {
        let by_name = |table: &TableFold| table.layout().source.cmp(&layout.source);
        match self.tables.binary_search_by(by_name) {
            Ok(index) => {
                if !Arc::ptr_eq(self.tables[index].layout(), layout) {
                    // Rows of two shapes never share a step.
                    self.flush(None);
                    self.tables[index] = TableFold::new(layout);
                }
                index
            }
            Err(index) => {
                self.tables.insert(index, TableFold::new(layout));
                index
            }
        }
    }

    fn put(&mut self, layout: &Arc<TableLayout>, mut op: RowOp) {
        let table = self.table(layout);
        let at = match table.index.entry(op.key.clone()) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                if table.ops.is_empty() {
                    table.ops.reserve(table.expected);
                }
                entry.insert(table.ops.len());
                table.ops.push(op);
                return;
            }
        };
        let stored = &mut table.ops[at];
        if op.version <= stored.version {
            self.superseded += 1;
            return;
        }
        match (&mut stored.action, &mut op.action) {
            (Action::Put(older), Action::Put(row)) => fill(row, older),
            (Action::Put(older), Action::Delete { last, .. }) => {
                *last = Some(std::mem::take(older))
            }
            (Action::Delete { .. }, Action::Put(row)) if !is_full(row) => {
                // Not a history that a source has. Applied one by one, the row would be missing: so be it.
                self.flush(None);
                self.put(layout, op);
                return;
            }
            (Action::Delete { .. }, _) => {}
        }
        op.created = stored.created;
        *stored = op;
        self.superseded += 1;
    }

    fn fill_from_deleted(&mut self, layout: &Arc<TableLayout>, old_key: &Key, row: &mut Row) {
        let table = self.table(layout);
        let old = table.index.get(old_key).map(|at| &table.ops[*at].action);
        if let Some(Action::Delete {
            last: Some(last), ..
        }) = old
        {
            fill(row, last);
        }
    }

    fn move_row(&mut self, layout: &Arc<TableLayout>, trailing: Option<&Trailing>, row: MoveRow) {
        let held =
            trailing.filter(|(held, key)| held.source == layout.source && *key == row.old_key);
        self.flush(held);
        let step = Move {
            layout: Arc::clone(layout),
            row,
        };
        match self.steps.last_mut() {
            Some(Step::Move(moves)) => moves.push(step),
            _ => self.steps.push(Step::Move(vec![step])),
        }
    }

    fn truncate(&mut self, layout: &Arc<TableLayout>, version: Version) {
        self.flush(None);
        let step = (Arc::clone(layout), version);
        match self.steps.last_mut() {
            Some(Step::Truncate(tables)) => tables.push(step),
            _ => self.steps.push(Step::Truncate(vec![step])),
        }
    }

    /// Hands out everything so far except the held delete.
    fn flush(&mut self, held: Option<&Trailing>) {
        let mut tables = Vec::new();
        for table in &mut self.tables {
            let held_at = held
                .filter(|(layout, _)| layout.source == table.layout().source)
                .and_then(|(_, key)| table.index.get(key).copied());
            let mut rows = std::mem::take(&mut table.ops);
            table.expected = rows.len();
            table.index.clear();
            if let Some(at) = held_at {
                let op = rows.swap_remove(at);
                table.index.insert(op.key.clone(), 0);
                table.ops.push(op);
            }
            if !rows.is_empty() {
                let layout = Arc::clone(table.layout());
                tables.push(TableRows { layout, rows });
            }
        }
        if !tables.is_empty() {
            self.steps.push(Step::Rows(tables));
        }
    }
}

fn unknown(layout: &TableLayout) -> Row {
    vec![Cell::Missing; layout.columns.len()].into()
}

fn only_key(layout: &TableLayout, row: Option<Row>) -> Row {
    let mut row = row.unwrap_or_else(|| unknown(layout));
    for (index, cell) in row.iter_mut().enumerate() {
        if !layout.is_key(index) {
            *cell = Cell::Missing;
        }
    }
    row
}

fn bytes_of(row: &Row) -> usize {
    row.iter()
        .map(|cell| {
            if let Cell::Text(text) = cell {
                text.len()
            } else {
                0
            }
        })
        .sum()
}

#[cfg(test)]
mod tests;
