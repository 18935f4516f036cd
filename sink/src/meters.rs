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

    /// Counts a batch that was applied.
    pub(crate) fn applied(&mut self, batch: &Batch, applied: &Applied) {
        self.batches.increment(1);
        for step in &batch.steps {
            let Step::Rows(tables) = step else { continue };
            for rows in tables {
                let deletes = rows.rows.iter().filter(|row| row.is_delete()).count() as u64;
                let puts = rows.rows.len() as u64 - deletes;
                self.count(&rows.layout.source, "delete", "applied", deletes);
                self.count(&rows.layout.source, "upsert", "applied", puts);
            }
        }
        for (table, rows) in &applied.dead_letters {
            self.count(table, "upsert", "dead_letter", *rows);
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
