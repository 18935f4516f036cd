//! The description of a table's columns, as it is kept beside the stream.

use serde::{Deserialize, Serialize};

use crate::TableName;
use crate::fnv::fnv1a_64;

/// A table as it was described when events were written under it. Kept in the KV bucket
/// `MILLRACE_<source>_schemas`; events name it by `table_version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableSchema {
    /// The table.
    pub name: TableName,
    /// The fingerprint that events carry as `table_version`: 16 hexadecimal digits.
    pub version: String,
    /// The published columns, in the relation's order.
    pub columns: Vec<ColumnSchema>,
    /// The key columns, in the key's order.
    pub key: Vec<String>,
    /// Enums and domains that the columns use, in the order in which they can be created.
    #[serde(default)]
    pub types: Vec<TypeSchema>,
    /// The table's OID in the source: column numbers mean something only under the same one. 0 where it is not
    /// known.
    #[serde(default)]
    pub oid: u32,
    /// In a table's latest schema: names that columns of earlier versions had and that none has now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dropped: Vec<String>,
}

/// One column of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnSchema {
    /// The column's name.
    pub name: String,
    /// The type as Postgres's `format_type` spells it, modifiers included: `numeric(12,2)`, `text[]`.
    pub type_name: String,
    /// The type's OID in the source.
    pub type_oid: u32,
    /// The type modifier, -1 for none.
    pub typmod: i32,
    /// Whether the source forbids NULL.
    pub not_null: bool,
    /// The column's number in the source's catalog, which a rename leaves alone; 0 where it is not known.
    #[serde(default)]
    pub number: i16,
    /// What rows have in it that were there when the column was added with a default: the value's text. `None`:
    /// NULL, or every row was written since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
    /// In a table's latest schema: names that the column had before, the newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<String>,
}

/// So many former names are kept of a column.
const FORMER_MAX: usize = 32;

/// So many names of dropped columns are kept of a table.
const DROPPED_MAX: usize = 1600;

impl TableSchema {
    /// The column of this number, if numbers of that table mean anything here.
    #[must_use]
    pub fn column_of(&self, oid: u32, number: i16) -> Option<&ColumnSchema> {
        let same = oid != 0 && oid == self.oid && number != 0;
        let mut columns = self.columns.iter();
        columns.find(|column| same && column.number == number)
    }

    /// Whether a column of this name is, was or may have been the table's.
    #[must_use]
    pub fn had(&self, name: &str) -> bool {
        let had = |column: &ColumnSchema| {
            column.name == name || column.former.iter().any(|former| former == name)
        };
        self.columns.iter().any(had)
            || self.dropped.iter().any(|dropped| dropped == name)
            || self.dropped.len() >= DROPPED_MAX
    }

    /// Takes over what an earlier description of the table knew and this one does not show any more: former names,
    /// the values of rows that are older than a column, and names that are gone.
    #[must_use]
    pub fn following(mut self, earlier: &Self) -> Self {
        for column in &mut self.columns {
            let Some(before) = earlier.column_of(self.oid, column.number) else {
                continue;
            };
            let mut names: Vec<String> = column.former.clone();
            let known = std::iter::once(&before.name).chain(&before.former);
            for name in known {
                if *name != column.name && !names.contains(name) && names.len() < FORMER_MAX {
                    names.push(name.clone());
                }
            }
            column.former = names;
        }
        let mut following = self.with_missing_of(earlier);
        let gone = earlier.columns.iter().map(|column| &column.name);
        for name in gone.chain(&earlier.dropped) {
            let known =
                |column: &ColumnSchema| column.name == *name || column.former.contains(name);
            if !following.columns.iter().any(known)
                && !following.dropped.contains(name)
                && following.dropped.len() < DROPPED_MAX
            {
                following.dropped.push(name.clone());
            }
        }
        let columns = &following.columns;
        following
            .dropped
            .retain(|name| !columns.iter().any(|column| column.name == *name));
        following
    }

    /// Takes over the values of rows that are older than a column from an earlier description, where that is of the
    /// very same column.
    #[must_use]
    pub fn with_missing_of(mut self, earlier: &Self) -> Self {
        for column in &mut self.columns {
            let before = earlier.column_of(self.oid, column.number);
            let before = before.filter(|before| before.type_oid == column.type_oid);
            if column.missing.is_none() {
                column.missing = before.and_then(|before| before.missing.clone());
            }
        }
        self
    }

    /// Leaves out the values of rows that are older than a column, of the columns for which this holds.
    #[must_use]
    pub fn withholding(mut self, withheld: impl Fn(&ColumnSchema) -> bool) -> Self {
        for column in &mut self.columns {
            if withheld(column) {
                column.missing = None;
            }
        }
        self
    }

    /// Keeps the column numbers that an earlier description of the same version has: once a column was renamed,
    /// its old name says nothing in the catalog.
    #[must_use]
    pub fn with_numbers_of(mut self, earlier: &Self) -> Self {
        if earlier.oid == 0 || earlier.version != self.version {
            return self;
        }
        self.oid = earlier.oid;
        for column in &mut self.columns {
            if let Some(before) = earlier
                .columns
                .iter()
                .find(|before| before.name == column.name)
            {
                column.number = before.number;
                column.missing.clone_from(&before.missing);
            }
        }
        self
    }
}

/// A type that a target may have to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum TypeSchema {
    /// `CREATE TYPE .. AS ENUM (..)`.
    Enum {
        /// The type's schema-qualified name.
        name: TableName,
        /// Its labels, in order.
        labels: Vec<String>,
    },
    /// `CREATE DOMAIN .. AS .. [NOT NULL] [CHECK ..]`.
    Domain {
        /// The type's schema-qualified name.
        name: TableName,
        /// The type under it, as `format_type` spells it.
        base: String,
        /// Whether it forbids NULL.
        not_null: bool,
        /// Its check constraints, as `pg_get_constraintdef` spells them.
        checks: Vec<String>,
    },
}

/// The part of a column that its relation message tells: what a fingerprint is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnShape<'a> {
    /// The column's name.
    pub name: &'a str,
    /// The type's OID.
    pub type_oid: u32,
    /// The type modifier, -1 for none.
    pub typmod: i32,
}

/// The fingerprint of a table's shape: 16 hexadecimal digits. The same columns and key give the same
/// fingerprint on every machine, so re-reading the WAL names the same schema again.
#[must_use]
pub fn fingerprint<'a>(
    columns: impl IntoIterator<Item = ColumnShape<'a>>,
    key: impl IntoIterator<Item = &'a str>,
) -> String {
    let mut bytes = Vec::new();
    let mut field = |part: &[u8]| {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    };
    for column in columns {
        field(column.name.as_bytes());
        field(&column.type_oid.to_be_bytes());
        field(&column.typmod.to_be_bytes());
    }
    field(b"key");
    for name in key {
        field(name.as_bytes());
    }
    format!("{:016x}", fnv1a_64([bytes.as_slice()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(oid: u32, columns: &[(i16, &str, Option<&str>)]) -> TableSchema {
        let column = |(number, name, missing): &(i16, &str, Option<&str>)| ColumnSchema {
            name: (*name).to_owned(),
            type_name: "integer".to_owned(),
            type_oid: 23,
            typmod: -1,
            not_null: false,
            number: *number,
            missing: missing.map(str::to_owned),
            former: Vec::new(),
        };
        TableSchema {
            name: TableName::new("public", "t"),
            version: format!("{columns:?}"),
            columns: columns.iter().map(column).collect(),
            key: vec!["id".to_owned()],
            types: Vec::new(),
            oid,
            dropped: Vec::new(),
        }
    }

    #[test]
    fn what_a_table_was_is_carried_on() {
        let first = described(7, &[(1, "id", None), (2, "a", None), (3, "b", Some("5"))]);
        let second =
            described(7, &[(1, "id", None), (2, "c", None), (3, "b", None)]).following(&first);
        assert_eq!(second.columns[1].former, ["a"]);
        assert_eq!(second.columns[2].missing.as_deref(), Some("5"));
        assert_eq!(second.dropped, [] as [&str; 0]);
        let third = described(7, &[(1, "id", None), (2, "d", None)]).following(&second);
        assert_eq!(third.columns[1].former, ["c", "a"]);
        assert_eq!(third.dropped, ["b"]);
        // Twice the same adds nothing.
        assert_eq!(third.clone().following(&third), third);
        // Numbers of another table of that name mean nothing.
        let again = described(8, &[(1, "id", None), (2, "e", None)]).following(&third);
        assert_eq!(again.columns[1].former, [] as [&str; 0]);
        assert_eq!(again.dropped, ["d", "b"]);
        // A name that is back is not gone.
        let back =
            described(8, &[(1, "id", None), (2, "e", None), (3, "b", None)]).following(&again);
        assert_eq!(back.dropped, ["d"]);
    }

    #[test]
    fn a_version_that_is_described_again_keeps_its_numbers() {
        let first = described(7, &[(1, "id", None), (2, "a", Some("1"))]);
        // The name means nothing in the catalog any more.
        let again = described(7, &[(1, "id", None), (0, "a", None)]);
        let again = TableSchema {
            version: first.version.clone(),
            ..again
        };
        assert_eq!(again.with_numbers_of(&first), first);
        let other = described(7, &[(1, "id", None), (0, "a", None)]);
        assert_eq!(other.clone().with_numbers_of(&first), other);
    }

    #[test]
    fn a_fingerprint_tells_names_types_modifiers_and_key_apart() {
        let shape = |name, type_oid, typmod| ColumnShape {
            name,
            type_oid,
            typmod,
        };
        let base = fingerprint([shape("a", 23, -1), shape("b", 25, -1)], ["a"]);
        assert_eq!(
            base,
            fingerprint([shape("a", 23, -1), shape("b", 25, -1)], ["a"])
        );
        for other in [
            fingerprint([shape("a", 23, -1), shape("b", 25, -1)], ["b"]),
            fingerprint([shape("a", 23, -1), shape("c", 25, -1)], ["a"]),
            fingerprint([shape("a", 20, -1), shape("b", 25, -1)], ["a"]),
            fingerprint([shape("a", 23, -1), shape("b", 25, 7)], ["a"]),
            fingerprint([shape("b", 25, -1), shape("a", 23, -1)], ["a"]),
        ] {
            assert_ne!(base, other);
            assert_eq!(other.len(), 16);
        }
    }
}
