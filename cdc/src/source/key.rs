//! Which columns of a table its rows are known by.

use std::collections::BTreeSet;

use millrace_config::{Code, Condition, Table};
use millrace_event::quote_identifier;

/// A unique index over plain columns of the whole table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UniqueIndex {
    /// Its name; that of its constraint, if it has one.
    pub(super) name: String,
    pub(super) primary: bool,
    /// Whether it was chosen with `REPLICA IDENTITY USING INDEX`.
    pub(super) identity: bool,
    /// False for a DEFERRABLE constraint.
    pub(super) immediate: bool,
    /// Its columns, in its order.
    pub(super) columns: Vec<String>,
    /// Whether all of them are NOT NULL.
    pub(super) not_null: bool,
}

/// The key that rows are known by, checked against what the table logs of old rows; `identity` is the
/// table's `relreplident`.
///
/// Only an immediate index is a key. Under a deferrable one two rows can share a key until the transaction's
/// end, and their changes cannot be told apart. Postgres takes none for a replica identity either.
pub(super) fn key_of(
    table: &Table,
    identity: &str,
    indexes: &[UniqueIndex],
) -> Result<Vec<String>, Condition> {
    let immediate = || indexes.iter().filter(|index| index.immediate);
    let (primary, by_identity) = (primary(indexes), by_identity(indexes));
    let found = match &table.key {
        Some(key) => immediate().find(|index| index.not_null && same_columns(&index.columns, key)),
        None => primary.or(by_identity),
    };
    let Some(found) = found else {
        return Err(no_key(table, indexes));
    };
    let key = table.key.as_ref().unwrap_or(&found.columns);
    match logs_key(identity, indexes, key) {
        true => Ok(key.clone()),
        false => Err(no_identity(table, identity, found, key, indexes)),
    }
}

fn primary(indexes: &[UniqueIndex]) -> Option<&UniqueIndex> {
    let mut immediate = indexes.iter().filter(|index| index.immediate);
    immediate.find(|index| index.primary)
}

/// Since Postgres 18 its columns may be NOT NULL for new rows only.
fn by_identity(indexes: &[UniqueIndex]) -> Option<&UniqueIndex> {
    let mut immediate = indexes.iter().filter(|index| index.immediate);
    immediate.find(|index| index.identity && index.not_null)
}

impl UniqueIndex {
    /// Whether every column of a key is among its own.
    pub(super) fn covers(&self, key: &[String]) -> bool {
        key.iter().all(|column| self.columns.contains(column))
    }
}

/// Whether a relation logs the key of its old rows.
pub(super) fn logs_key(identity: &str, indexes: &[UniqueIndex], key: &[String]) -> bool {
    let logged = match identity {
        "d" => primary(indexes),
        "i" => by_identity(indexes),
        _ => None,
    };
    identity == "f" || logged.is_some_and(|index| index.covers(key))
}

/// Whether the table logs anything to tell an old row by. Without it Postgres takes no update and no delete of a
/// table that is published. Which columns it is does not matter to Postgres.
pub(super) fn logs_old_rows(identity: &str, indexes: &[UniqueIndex]) -> bool {
    let mut immediate = indexes.iter().filter(|index| index.immediate);
    match identity {
        "f" => true,
        "d" => immediate.any(|index| index.primary),
        "i" => immediate.any(|index| index.identity),
        _ => false,
    }
}

fn same_columns(one: &[String], other: &[String]) -> bool {
    one.iter().collect::<BTreeSet<_>>() == other.iter().collect()
}

fn no_key(table: &Table, indexes: &[UniqueIndex]) -> Condition {
    let (name, quoted) = (&table.name, table.name.quoted());
    let deferrable = indexes.iter().find(|index| {
        !index.immediate
            && match &table.key {
                Some(key) => same_columns(&index.columns, key),
                None => index.primary,
            }
    });
    let (message, remedy) = match (&table.key, deferrable) {
        (_, Some(index)) => {
            let kind = match index.primary {
                true => "PRIMARY KEY",
                false => "UNIQUE",
            };
            let list = list(&index.columns);
            let nullable = match index.not_null {
                true => "",
                false => ", and make its columns NOT NULL",
            };
            let constraint = quote_identifier(&index.name);
            (
                format!(
                    "table {name}: the {kind} constraint on its key ({list}) is DEFERRABLE: \
                     two rows may share a key until the transaction's end"
                ),
                format!(
                    "ALTER TABLE {quoted} DROP CONSTRAINT {constraint}, ADD {kind} ({list}){nullable}; or keep it, \
                     and CREATE UNIQUE INDEX over other columns that are NOT NULL, \
                     ALTER TABLE {quoted} REPLICA IDENTITY USING INDEX that index, \
                     and name its columns as `key` in tables/{name}.toml"
                ),
            )
        }
        (Some(key), None) => {
            let list = list(key);
            (
                format!(
                    "table {name}: no unique index on exactly its key ({list}), or a column may be NULL"
                ),
                format!("ALTER TABLE {quoted} ADD UNIQUE ({list}), and make its columns NOT NULL"),
            )
        }
        (None, None) if indexes.iter().any(|index| index.identity) => (
            format!("table {name} has a replica identity whose columns may be NULL in old rows"),
            format!(
                "ALTER TABLE {quoted} VALIDATE CONSTRAINT the NOT NULL constraints of these columns, after \
                 giving every row a value"
            ),
        ),
        (None, None) => (
            format!("table {name} has no primary key"),
            format!(
                "ALTER TABLE {quoted} ADD PRIMARY KEY (..), or name a unique key in tables/{name}.toml"
            ),
        ),
    };
    Condition::new(Code::NoKey, message, remedy)
}

fn no_identity(
    table: &Table,
    identity: &str,
    found: &UniqueIndex,
    key: &[String],
    indexes: &[UniqueIndex],
) -> Condition {
    let (name, quoted) = (&table.name, table.name.quoted());
    let deferrable = indexes
        .iter()
        .any(|index| index.primary && !index.immediate);
    let reason = match identity {
        "d" if deferrable => " (Postgres does not take a DEFERRABLE primary key for one)",
        "n" => " (REPLICA IDENTITY NOTHING)",
        _ => "",
    };
    Condition::new(
        Code::NoReplicaIdentity,
        format!(
            "table {name} has no replica identity that covers its key ({}){reason}: \
             publishing it would break the application's own updates and deletes",
            list(key)
        ),
        identity_remedy(&quoted, found),
    )
}

/// The statement that makes an index what a relation logs of its old rows.
pub(super) fn identity_remedy(quoted: &str, index: &UniqueIndex) -> String {
    let choice = match index.primary {
        true => "DEFAULT".to_owned(),
        false => format!("USING INDEX {}", quote_identifier(&index.name)),
    };
    format!("ALTER TABLE {quoted} REPLICA IDENTITY {choice}, or FULL")
}

pub(super) fn list(columns: &[String]) -> String {
    let quoted: Vec<_> = columns
        .iter()
        .map(|column| quote_identifier(column))
        .collect();
    quoted.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_asks_for_an_identity_and_not_for_our_key() {
        let index = |primary, identity, immediate| UniqueIndex {
            name: "i".to_owned(),
            primary,
            identity,
            immediate,
            columns: vec!["id".to_owned()],
            not_null: true,
        };
        let primary = [index(true, false, true)];
        for (identity, logs) in [("d", true), ("f", true), ("i", false), ("n", false)] {
            assert_eq!(logs_old_rows(identity, &primary), logs, "{identity}");
            assert_eq!(logs_old_rows(identity, &[]), identity == "f", "{identity}");
        }
        assert!(logs_old_rows("i", &[index(false, true, true)]));
        assert!(
            !logs_old_rows("d", &[index(true, false, false)]),
            "DEFERRABLE"
        );
    }
}
