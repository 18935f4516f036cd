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
