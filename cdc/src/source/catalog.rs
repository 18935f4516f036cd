//! A table as the source's catalog has it, or why it cannot be captured so.

use std::sync::Arc;

use millrace_config::{Condition, Table};
use millrace_event::{ColumnShape, Datum, TableName, quote_identifier};

use super::membership::{Clause, Member};
use crate::Error;
use crate::selection::{Binding, Selection};

/// A configured table as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTable {
    /// The table.
    pub name: TableName,
    /// Whether its rows are in partitions.
    pub partitioned: bool,
    /// Its key columns, in the key's order.
    pub key: Vec<String>,
    /// Its published columns, as they are published: name, type OID, type modifier.
    pub columns: Vec<(String, u32, i32)>,
    /// The rows that are published, as Postgres spells the condition; none: all.
    pub filter: Option<String>,
    /// The columns that the publication must list, by number and name; none: it has no list.
    pub list: Option<Vec<(i16, String)>>,
    /// What is done about its columns before they are published.
    pub selection: Arc<Selection>,
    /// The same for rows of `columns`, as a copy reads them.
    pub(crate) binding: Option<Binding>,
    /// The membership that published it when capture was here last, by its OID, and the rows that it had.
    pub(crate) published: Option<(u32, Option<String>)>,
    /// Every column of the catalog, by number.
    pub(crate) known: Vec<(i16, String)>,
    /// Columns that the table's own file names and the catalog does not have.
    pub(crate) absent: Vec<String>,
    /// The table's settings.
    pub(crate) settings: Table,
}

impl SourceTable {
    /// The columns' shapes, as a relation message tells them.
    #[must_use]
    pub fn shapes(&self) -> Vec<ColumnShape<'_>> {
        self.columns
            .iter()
            .map(|(name, type_oid, typmod)| ColumnShape {
                name,
                type_oid: *type_oid,
                typmod: *typmod,
            })
            .collect()
    }

    /// The published columns for a `SELECT`: what a copy reads, and nothing beside it.
    #[must_use]
    pub fn select_list(&self) -> String {
        let names = self.columns.iter().map(|(name, ..)| quote_identifier(name));
        names.collect::<Vec<_>>().join(", ")
    }

    /// What a `SELECT` of the table's own rows reads from. Children by inheritance are tables of their own; partitions
    /// hold the table's rows.
    pub(crate) fn in_from(&self) -> String {
        match self.partitioned {
            true => self.name.quoted(),
            false => format!("ONLY {}", self.name.quoted()),
        }
    }

    /// ` WHERE ..` for a copy's `SELECT`: the rows that are published and for which all of these conditions
    /// hold. Empty where there is no condition.
    #[must_use]
    pub fn where_clause(&self, conditions: &[&str]) -> String {
        let own = self.filter.as_deref();
        let all = own.into_iter().chain(conditions.iter().copied());
        // The newline ends a comment.
        let all: Vec<_> = all.map(|condition| format!("({condition}\n)")).collect();
        match all.is_empty() {
            true => String::new(),
            false => format!(" WHERE {}", all.join(" AND ")),
        }
    }

    /// Makes a row that was read with [`SourceTable::select_list`] the one that is published. `room` holds what
    /// masks wrote; it is used again for each row.
    pub fn publish<'r>(&self, row: &mut [Datum<'r>], room: &'r mut Vec<u8>) {
        if let Some(binding) = &self.binding {
            binding.mask(row, room);
        }
    }

    /// The name that the column of this number has in the catalog.
    pub(crate) fn name_of(&self, number: i16) -> Option<&str> {
        let known = self.known.iter().find(|(known, _)| *known == number);
        known.map(|(_, name)| name.as_str())
    }

    /// What the publication must publish of the table.
    #[must_use]
    pub fn clause(&self) -> Clause {
        Clause {
            columns: self.list.as_deref().map(numbers),
            filter: self.filter.clone(),
        }
    }

    /// The indexes of the key columns.
    ///
    /// # Panics
    /// Never: a key column was found among the columns.
    #[must_use]
    pub fn key_indexes(&self) -> Vec<usize> {
        let index = |name: &String| self.columns.iter().position(|(column, ..)| column == name);
        self.key
            .iter()
            .map(|name| index(name).expect("a key column is a column"))
            .collect()
    }
}

/// The numbers of listed columns.
pub(super) fn numbers(list: &[(i16, String)]) -> Vec<i16> {
    list.iter().map(|(number, _)| *number).collect()
}

/// The configured tables, as the source has them.
#[derive(Debug)]
pub struct Inspected {
    /// Those that can be captured.
    pub tables: Vec<SourceTable>,
    /// Those that cannot, as they are or as they are configured.
    pub refused: Vec<Refused>,
}

/// A configured table that cannot be captured for now.
#[derive(Clone, Debug)]
pub struct Refused {
    /// The table.
    pub name: TableName,
    /// Why, and what is to be done.
    pub condition: Condition,
    /// What it does to the application to publish it.
    pub harm: Harm,
}

/// When Postgres refuses the application's own updates and deletes of a table that is published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Never: only capture cannot do with the table.
    None,
    /// As long as it is published at all: it logs nothing to tell old rows by.
    Published,
    /// As long as it is published with these columns and rows: what it logs of old rows does not fit them.
    PublishedAs(Clause),
}

impl Refused {
    /// Whether the application cannot update or delete rows of the table while it is published so.
    #[must_use]
    pub fn harms(&self, member: &Member) -> bool {
        match &self.harm {
            Harm::None => false,
            Harm::Published => true,
            Harm::PublishedAs(clause) => *clause == member.clause,
        }
    }
}

impl Inspected {
    /// All tables, if each can be captured.
    ///
    /// # Errors
    /// [`Error::Halt`] with every table that cannot.
    pub fn all(self) -> Result<Vec<SourceTable>, Error> {
        match together(&self.refused) {
            None => Ok(self.tables),
            Some(condition) => Err(Error::halt(condition)),
        }
    }
}

/// The first condition, with every refused table in its text; `None` where there is none.
pub(crate) fn together<'r>(refused: impl IntoIterator<Item = &'r Refused>) -> Option<Condition> {
    let conditions: Vec<_> = refused.into_iter().map(|table| &table.condition).collect();
    let join = |part: fn(&Condition) -> &str| {
        let parts: Vec<_> = conditions.iter().copied().map(part).collect();
        parts.join("; ")
    };
    let first = conditions.first()?;
    Some(Condition::new(
        first.code,
        join(|condition| &condition.message),
        join(|condition| &condition.remedy),
    ))
}
