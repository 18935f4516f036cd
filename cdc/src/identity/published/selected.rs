//! What was kept back of a table, and what has changed about it. Pure.

use std::sync::Arc;

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use serde::{Deserialize, Serialize};

use super::Remembered;
use crate::selection::{Mask, Selection};
use crate::source::{self, SourceTable};

/// How many names of columns that are kept back are remembered of a table, those it had before a rename included.
const WITHHELD_MAX: usize = 2000;

/// A column that did not travel as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Withheld {
    /// Its number in the catalog, which outlasts its name.
    pub(super) number: i16,
    /// The name that it had.
    pub(super) name: String,
    /// What was done about it.
    pub(super) by: String,
}

/// What becomes of a column that is left out.
const EXCLUDED: &str = "exclude";

/// A table whose rows in the stream and in the replicas were captured under another selection: they are right again
/// once the table is copied anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SelectionChange {
    /// The table.
    pub(super) table: TableName,
    /// What has changed, in words.
    pub(super) what: String,
}

impl SelectionChange {
    pub(super) fn warn(&self) {
        let Self { table, what } = self;
        tracing::warn!(
            %table,
            code = Code::SelectionChanged.as_str(),
            "the selection of table {table} was changed ({what}): its rows are read again"
        );
    }
}

/// What a table withholds, and what is remembered of names that it had.
pub(super) fn withheld(table: &SourceTable, before: Option<&Remembered>) -> Vec<Withheld> {
    let current = table.known.iter().filter_map(|(number, name)| {
        Some(Withheld {
            number: *number,
            name: name.clone(),
            by: word(&table.selection, name)?,
        })
    });
    let mut withheld: Vec<_> = current.collect();
    let earlier = before.into_iter().flat_map(|before| &before.withheld);
    for earlier in earlier {
        let gone = !table.known.iter().any(|(_, name)| *name == earlier.name);
        let known = withheld.iter().any(|known| known.name == earlier.name);
        if gone && !known && withheld.len() < WITHHELD_MAX {
            withheld.push(earlier.clone());
        }
    }
    withheld
}

/// What is done about a column, so that a change of it is noticed.
fn word(selection: &Selection, name: &str) -> Option<String> {
    if selection.excludes(name) {
        return Some(EXCLUDED.to_owned());
    }
    Some(match selection.mask_of(name)? {
        Mask::Hash(salt) => format!("hash:{}", salt.fingerprint()),
        Mask::Text => "redact".to_owned(),
        Mask::Null => "redact:null".to_owned(),
        Mask::Truncate(characters) => format!("truncate:{characters}"),
    })
}

pub(super) fn change(
    table: &SourceTable,
    before: &Remembered,
    after: &Remembered,
) -> Option<SelectionChange> {
    let mut what = Vec::new();
    if before.clause.filter != after.clause.filter {
        what.push("another `where`".to_owned());
    }
    for (number, name) in &table.known {
        let by = |of: &Remembered| {
            let found = of
                .withheld
                .iter()
                .find(|withheld| withheld.number == *number);
            found.map(|withheld| withheld.by.clone())
        };
        let listed = |of: &Remembered| {
            let columns = of.clause.columns.as_ref();
            columns.is_none_or(|columns| columns.contains(number))
        };
        let (was, is) = (by(before), by(after));
        let excluded = |by: &Option<String>| by.as_deref() == Some(EXCLUDED);
        match (excluded(&was), excluded(&is)) {
            (true, false) => what.push(format!("column {name:?} came in")),
            (false, true) => what.push(format!("column {name:?} is left out")),
            (true, true) => {}
            // One that was added at the source, and that the column list kept out until now.
            (false, false) if !listed(before) && listed(after) => {
                what.push(format!("column {name:?} came in"));
            }
            (false, false) if was != is => what.push(format!("another mask of column {name:?}")),
            (false, false) => {}
        }
    }
    let table = table.name.clone();
    (!what.is_empty()).then(|| SelectionChange {
        table,
        what: what.join(", "),
    })
}

pub(super) fn carry_over(table: &mut SourceTable, before: &[Withheld]) -> Result<(), Condition> {
    let mut selection = Selection::clone(&table.selection);
    for Withheld { number, name, .. } in before {
        // A column of that name is spoken of by the configuration.
        if table.known.iter().any(|(_, known)| known == name) {
            continue;
        }
        match table.name_of(*number) {
            Some(now) if selection.excludes(now) => selection.exclude(name),
            Some(now) => match selection.mask_of(now).cloned() {
                Some(mask) => selection.mask(name, mask),
                None if names(table, name) => {
                    return Err(source::renamed_column(&table.settings, name, now));
                }
                // The configuration speaks of neither: it was let go.
                None => continue,
            },
            // It was dropped: only older WAL has it.
            None => {
                if table.absent.contains(name) {
                    tracing::warn!(table = %table.name, column = name, "a column that the table's file names was dropped");
                }
                selection.exclude(name);
            }
        }
        table.absent.retain(|absent| absent != name);
    }
    table.selection = Arc::new(selection);
    match table.absent.is_empty() {
        true => Ok(()),
        false => Err(source::unknown_columns(&table.settings, &table.absent)),
    }
}

/// Whether a table's settings exclude or mask a column of this name.
fn names(table: &SourceTable, name: &str) -> bool {
    let columns = &table.settings.columns;
    columns.exclude.iter().any(|column| column == name)
        || columns.mask.iter().any(|(column, _)| column == name)
}
