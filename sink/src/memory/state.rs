//! What a target transaction does to a database in memory: each step of a batch, under the version guard.

use std::collections::BTreeMap;

use millrace_config::{Code, Condition};
use millrace_event::{TableName, Version};

use super::{MemoryLetter, MemoryTable};
use crate::batch::{Action, MoveRow, PositionRow, RowOp, Step};
use crate::guard::applies;
use crate::progress::CopyProgress;
use crate::row::{Cell, Key, Row, TableLayout, fill, is_full};
use crate::sink::{Applied, SinkError};
use crate::sql::INCOMPLETE;

/// Everything that a target transaction changes.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) positions: BTreeMap<String, PositionRow>,
    pub(super) tables: BTreeMap<TableName, MemoryTable>,
    pub(super) letters: Vec<MemoryLetter>,
}

/// What a row did.
enum Outcome {
    Written,
    Stale,
    Refused(String),
}

impl State {
    /// Applies a step. `copies` is how far the copies were before the batch; rows of the tables in `halts` that are refused
    /// end it.
    pub(super) fn step(
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
                let of = |letter: &&mut MemoryLetter| {
                    let is_row = letter.table == layout.target && letter.key == *key;
                    is_row && letter.open && letter.reason == INCOMPLETE
                };
                // A row's newest change is what it lacks columns for.
                match self.letters.iter_mut().find(of) {
                    Some(known) if reason == INCOMPLETE && known.version >= version => {
                        applied.stale += 1;
                        return Ok(());
                    }
                    Some(known) if reason == INCOMPLETE => known.version = version,
                    _ => self.letters.push(MemoryLetter {
                        table: layout.target.clone(),
                        key: key.clone(),
                        version,
                        reason,
                        open: true,
                    }),
                }
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
