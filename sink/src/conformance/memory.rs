//! The memory model as a target of the suite.

use super::{Rows, Target};
use crate::memory::{MemorySink, MemoryTarget};
use crate::row::{Cell, TableLayout};

impl Target for MemoryTarget {
    type Sink = MemorySink;

    fn sink(&self, name: &str) -> Self::Sink {
        Self::sink(self, name)
    }

    async fn rows(&self, layout: &TableLayout) -> Rows {
        let table = self.table(&layout.target);
        let text = |cell: &Cell| match cell {
            Cell::Text(text) => Some(String::from_utf8_lossy(text).into_owned()),
            Cell::Null | Cell::Missing => None,
        };
        let rows = table.rows.into_iter().map(|(key, (version, row))| {
            (
                key.text().into_owned(),
                (version, row.iter().map(text).collect()),
            )
        });
        rows.collect()
    }

    async fn open_letters(&self, layout: &TableLayout) -> usize {
        let letters = self.letters();
        letters
            .iter()
            .filter(|letter| letter.open && letter.table == layout.target)
            .count()
    }
}
