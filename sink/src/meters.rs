//! The sink's counters, as handles: a look-up by name on every batch would cost more than the count.

use std::collections::HashMap;

use metrics::{Counter, counter};
use millrace_event::TableName;

use crate::batch::{Batch, Step};
use crate::sink::Applied;

/// What became of rows, by table.
pub(crate) struct Meters {
    sink: String,
    tables: HashMap<(TableName, &'static str, &'static str), Counter>,
    batches: Counter,
}

impl Meters {
    pub(crate) fn new(sink: &str) -> Self {
        let batches = counter!("millrace_sink_batches_total", "sink" => sink.to_owned());
        Self {
            sink: sink.to_owned(),
            tables: HashMap::new(),
            batches,
        }
    }

    /// Counts a batch that was applied. What was offered and neither written nor set aside was stale.
    pub(crate) fn applied(&mut self, batch: &Batch, applied: &Applied) {
        self.batches.increment(1);
        for (table, became) in outcomes(batch, applied) {
            let Outcomes { upserts, deletes } = became;
            self.count(&table, "upsert", "applied", upserts.applied);
            self.count(&table, "upsert", "stale", upserts.stale);
            self.count(&table, "upsert", "dead_letter", upserts.dead_letters);
            self.count(&table, "delete", "applied", deletes.applied);
            self.count(&table, "delete", "stale", deletes.stale);
            self.count(&table, "delete", "dead_letter", deletes.dead_letters);
        }
    }

    fn count(&mut self, table: &TableName, op: &'static str, outcome: &'static str, rows: u64) {
        if rows == 0 {
            return;
        }
        let sink = &self.sink;
        self.tables
            .entry((table.clone(), op, outcome))
            .or_insert_with(|| {
                counter!(
                    "millrace_sink_rows_total",
                    "sink" => sink.clone(), "table" => table.to_string(), "op" => op, "outcome" => outcome
                )
            })
            .increment(rows);
    }
}

/// What became of one table's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcomes {
    upserts: Rows,
    deletes: Rows,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rows {
    offered: u64,
    applied: u64,
    dead_letters: u64,
    stale: u64,
}

impl Rows {
    /// Takes as many dead letters as these rows can have; the rest is the other kind's.
    fn settle(&mut self, dead_letters: u64) -> u64 {
        let open = self.offered.saturating_sub(self.applied);
        self.dead_letters = dead_letters.min(open);
        self.stale = open - self.dead_letters;
        dead_letters - self.dead_letters
    }
}

fn outcomes(batch: &Batch, applied: &Applied) -> Vec<(TableName, Outcomes)> {
    let mut tables: Vec<(TableName, Outcomes)> = Vec::new();
    // A batch has few tables.
    let mut of = |table: &TableName, add: &dyn Fn(&mut Outcomes)| match tables
        .iter_mut()
        .find(|(name, _)| name == table)
    {
        Some((_, outcomes)) => add(outcomes),
        None => {
            let mut outcomes = Outcomes::default();
            add(&mut outcomes);
            tables.push((table.clone(), outcomes));
        }
    };
    for step in &batch.steps {
        match step {
            Step::Rows(all) => {
                for rows in all {
                    let deletes = rows.rows.iter().filter(|row| row.is_delete()).count() as u64;
                    of(&rows.layout.source, &|outcomes| {
                        outcomes.deletes.offered += deletes;
                        outcomes.upserts.offered += rows.rows.len() as u64 - deletes;
                    });
                }
            }
            Step::Load(load) => of(&load.layout.source, &|outcomes| {
                outcomes.upserts.offered += load.rows() as u64;
            }),
            Step::Move(moves) => {
                for moved in moves {
                    let add = |outcomes: &mut Outcomes| outcomes.upserts.offered += 1;
                    of(&moved.layout.source, &add);
                }
            }
            Step::Truncate(_) | Step::Sweep { .. } => {}
        }
    }
    for written in &applied.tables {
        of(&written.table, &|outcomes| {
            outcomes.upserts.applied += written.upserts;
            outcomes.deletes.applied += written.deletes;
        });
    }
    for (table, outcomes) in &mut tables {
        let letters = applied.dead_letters.iter();
        let letters = letters
            .filter(|(name, _)| name == table)
            .map(|(_, rows)| rows)
            .sum();
        // Almost all refused rows are upserts; which ones a statement does not tell.
        let rest = outcomes.upserts.settle(letters);
        outcomes.deletes.settle(rest);
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_written_nor_set_aside_was_stale() {
        let rows = |offered, applied| Rows {
            offered,
            applied,
            ..Rows::default()
        };
        let (mut upserts, mut deletes) = (rows(10, 6), rows(4, 1));
        let rest = upserts.settle(5);
        assert_eq!((upserts.dead_letters, upserts.stale, rest), (4, 0, 1));
        assert_eq!(deletes.settle(rest), 0);
        assert_eq!((deletes.dead_letters, deletes.stale), (1, 2));
        // A statement may write more than it was offered where a trigger adds rows.
        let mut more = rows(1, 2);
        assert_eq!(more.settle(0), 0);
        assert_eq!(more.stale, 0);
    }
}
