//! Has rows that are laid out fit another layout of the same version of their table: the target's columns may have got
//! other names and types since. Pure.

use std::sync::Arc;

use crate::batch::{Action, Batch, Move, RowOp, Step};
use crate::row::{Cell, Row, RowError, TableLayout};

/// Why rows do not fit another layout.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    /// A row does not have its key.
    #[error(transparent)]
    Row(#[from] RowError),
    /// The change may have brought a value that was left out. Kept as unknown, it would be taken for untouched.
    #[error("column {0:?} was left out of rows that are laid out already")]
    LeftOut(String),
}

/// How a row of one layout becomes one of another.
struct Refit<'l> {
    layout: &'l Arc<TableLayout>,
    /// For each column where it was; `None` for one that the old layout lacked.
    from: Vec<Option<usize>>,
    /// Whether the cells stay where they are, and the key stays the same.
    is_same: bool,
}

impl<'l> Refit<'l> {
    fn new(old: &TableLayout, layout: &'l Arc<TableLayout>) -> Self {
        let columns = layout.columns.iter();
        let from: Vec<_> = columns.map(|column| old.place_of(&column.source)).collect();
        let stays = from.iter().copied().eq((0..old.columns.len()).map(Some));
        let is_same = stays && old.key == layout.key;
        Self {
            layout,
            from,
            is_same,
        }
    }

    fn row(&self, row: &mut Row) {
        let cells = self.from.iter().map(|from| match from {
            Some(from) => row[*from].clone(),
            None => Cell::Missing,
        });
        *row = cells.collect();
    }

    fn knows_all(&self) -> Result<(), Unfit> {
        let columns = self.layout.columns.iter().zip(&self.from);
        let mut lacking = columns.filter(|(_, from)| from.is_none());
        match lacking.next() {
            None => Ok(()),
            Some((column, _)) => Err(Unfit::LeftOut(column.target.clone())),
        }
    }

    fn op(&self, op: &mut RowOp) -> Result<(), Unfit> {
        let row = match &mut op.action {
            Action::Put(row) => {
                self.knows_all()?;
                row
            }
            Action::Delete { key, last } => {
                last.iter_mut().for_each(|last| self.row(last));
                key
            }
        };
        self.row(row);
        op.key = self.layout.key_of(row)?;
        Ok(())
    }

    fn moved(&self, moved: &mut Move) -> Result<(), Unfit> {
        self.knows_all()?;
        let row = &mut moved.row;
        self.row(&mut row.old);
        self.row(&mut row.row);
        row.old_key = self.layout.key_of(&row.old)?;
        row.key = self.layout.key_of(&row.row)?;
        Ok(())
    }
}

impl Batch {
    /// A layout of its rows that is as asked for, if there is one.
    pub(crate) fn layout_that(
        &self,
        is_wanted: impl Fn(&Arc<TableLayout>) -> bool,
    ) -> Option<Arc<TableLayout>> {
        let mut layouts = self.steps.iter().flat_map(Step::layouts);
        layouts.find(|layout| is_wanted(layout)).cloned()
    }

    /// Has the rows that are laid out as `old` fit another layout of the same version.
    ///
    /// # Errors
    /// A row does not have the other layout's key, or perhaps had a value for a column that only the other one has.
    pub(crate) fn refit(
        &mut self,
        old: &Arc<TableLayout>,
        layout: &Arc<TableLayout>,
    ) -> Result<(), Unfit> {
        let refit = Refit::new(old, layout);
        let is_old = |known: &Arc<TableLayout>| Arc::ptr_eq(known, old);
        for step in &mut self.steps {
            match step {
                Step::Rows(tables) => {
                    for table in tables.iter_mut().filter(|table| is_old(&table.layout)) {
                        table.layout = Arc::clone(layout);
                        if !refit.is_same {
                            table.rows.iter_mut().try_for_each(|op| refit.op(op))?;
                        }
                    }
                }
                Step::Load(load) if is_old(&load.layout) => load.refit(layout),
                Step::Move(moves) => {
                    for moved in moves.iter_mut().filter(|moved| is_old(&moved.layout)) {
                        moved.layout = Arc::clone(layout);
                        if !refit.is_same {
                            refit.moved(moved)?;
                        }
                    }
                }
                Step::Truncate(tables) => {
                    let tables = tables.iter_mut().map(|(known, _)| known);
                    tables
                        .filter(|known| is_old(known))
                        .for_each(|known| *known = Arc::clone(layout));
                }
                Step::Sweep { table, .. } if is_old(table) => *table = Arc::clone(layout),
                Step::Load(_) | Step::Sweep { .. } => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
