//! What the partitions of a table log: Postgres writes to them, under their own replica identities.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Client;

use super::inspect::{KEYS, unique_index};
use super::key::{UniqueIndex, identity_remedy, list, logs_key, logs_old_rows};
use super::partitions::partition_tree;
use crate::Error;

/// So many partitions a condition has the statements of; the others are told once these are mended.
const TOLD_MAX: usize = 8;

/// A partition that holds rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) name: TableName,
    /// Its `relreplident`.
    pub(super) identity: String,
    /// Whether its changes are in the WAL.
    pub(super) logged: bool,
    pub(super) indexes: Vec<UniqueIndex>,
}

impl Leaf {
    /// Whether Postgres takes updates and deletes of its rows while its table is published.
    pub(super) fn logs_old_rows(&self) -> bool {
        // Of an unlogged one nothing is published.
        !self.logged || logs_old_rows(&self.identity, &self.indexes)
    }
}

/// The partitions of every level that hold rows, by name. One snapshot shows them with their indexes: one that is
/// dropped meanwhile is not taken for one without.
pub(super) async fn leaves(client: &Client, oid: u32) -> Result<Vec<Leaf>, Error> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text, c.relreplident::text, c.relpersistence = 'p', k.* \
         FROM {tree} t JOIN pg_class c ON c.oid = t.relid \
         JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN LATERAL ({KEYS}) k ON true \
         WHERE t.isleaf AND c.relkind = 'r' ORDER BY 1, 2",
        tree = partition_tree("$1::oid")
    );
    let mut leaves: Vec<Leaf> = Vec::new();
    for row in client.query(&sql, &[&oid]).await? {
        let name = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        if leaves.last().is_none_or(|last| last.name != name) {
            leaves.push(Leaf {
                name,
                identity: row.get(2),
                logged: row.get(3),
                indexes: Vec::new(),
            });
        }
        let has_index = row.get::<_, Option<bool>>(4).is_some();
        if let Some(last) = leaves.last_mut().filter(|_| has_index) {
            last.indexes.push(unique_index(&row, 4));
        }
    }
    Ok(leaves)
}

/// Checks that the changes of every partition are in the WAL, with the table's key of old rows.
pub(super) fn check_leaves(
    table: &TableName,
    key: &[String],
    leaves: &[Leaf],
) -> Result<(), Condition> {
    let unlogged: Vec<_> = leaves.iter().filter(|leaf| !leaf.logged).collect();
    if let [first, ..] = unlogged.as_slice() {
        return Err(told(
            Code::TableMissing,
            format!(
                "table {table}: its partition {} is unlogged: its changes are not in the WAL",
                first.name
            ),
            &unlogged,
            |leaf| format!("ALTER TABLE {} SET LOGGED", leaf.name.quoted()),
        ));
    }
    let keyless = |leaf: &&Leaf| !logs_key(&leaf.identity, &leaf.indexes, key);
    let keyless: Vec<_> = leaves.iter().filter(keyless).collect();
    let [first, ..] = keyless.as_slice() else {
        return Ok(());
    };
    let reason = match first.identity.as_str() {
        "n" => " (REPLICA IDENTITY NOTHING)",
        "i" if !first.logs_old_rows() => " (the index of its replica identity is gone)",
        _ => "",
    };
    let harm = match keyless.iter().all(|leaf| leaf.logs_old_rows()) {
        true => "the old rows of updates and deletes could not be told",
        false => "publishing it would break the application's own updates and deletes",
    };
    let message = format!(
        "table {table}: its partition {} has no replica identity that covers its key ({}){reason}: {harm}",
        first.name,
        list(key)
    );
    let statement = |leaf: &Leaf| remedy(leaf, key);
    Err(told(Code::NoReplicaIdentity, message, &keyless, statement))
}

/// The statement that has a partition log the key.
fn remedy(leaf: &Leaf, key: &[String]) -> String {
    let quoted = leaf.name.quoted();
    let fits = |index: &&UniqueIndex| index.immediate && index.not_null && index.covers(key);
    let fitting = || leaf.indexes.iter().filter(fits);
    // Its primary key needs no index to be named.
    let found = fitting().find(|index| index.primary).or(fitting().next());
    match found {
        Some(index) => identity_remedy(&quoted, index),
        None => format!("ALTER TABLE {quoted} REPLICA IDENTITY FULL"),
    }
}

fn told(
    code: Code,
    mut message: String,
    leaves: &[&Leaf],
    statement: impl Fn(&Leaf) -> String,
) -> Condition {
    if leaves.len() > 1 {
        message = format!("{message}; so it is with {} more", leaves.len() - 1);
    }
    let statements = leaves.iter().take(TOLD_MAX).map(|leaf| statement(leaf));
    let mut remedy = statements.collect::<Vec<_>>().join("; ");
    if leaves.len() > TOLD_MAX {
        remedy.push_str("; the others are shown then");
    }
    Condition::new(code, message, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(name: &str, columns: &[&str], primary: bool, identity: bool) -> UniqueIndex {
        UniqueIndex {
            name: name.to_owned(),
            primary,
            identity,
            immediate: true,
            columns: columns.iter().map(|name| (*name).to_owned()).collect(),
            not_null: true,
        }
    }

    fn leaf(name: &str, identity: &str, indexes: &[UniqueIndex]) -> Leaf {
        Leaf {
            name: TableName::new("public", name),
            identity: identity.to_owned(),
            logged: true,
            indexes: indexes.to_vec(),
        }
    }

    fn checked(leaves: &[Leaf]) -> Result<(), Condition> {
        check_leaves(&TableName::new("public", "t"), &["id".to_owned()], leaves)
    }

    #[test]
    fn every_partition_must_log_the_key() {
        let primary = || index("t_1_pkey", &["id", "at"], true, false);
        let other = |identity| index("t_1_v_key", &["v"], false, identity);
        let unique = |identity| index("t_1_id_key", &["id"], false, identity);
        let fit = leaf("t_0", "d", &[primary()]);
        let alter = "ALTER TABLE \"public\".\"t_1\" REPLICA IDENTITY";
        let default = format!("{alter} DEFAULT, or FULL");
        let using = format!("{alter} USING INDEX \"t_1_id_key\", or FULL");
        let full = format!("{alter} FULL");
        for (identity, indexes, remedy, logs) in [
            ("d", vec![primary()], None, true),
            ("f", vec![], None, true),
            ("i", vec![unique(true)], None, true),
            ("n", vec![primary()], Some(&default), false),
            // The index was dropped.
            ("i", vec![primary()], Some(&default), false),
            ("i", vec![other(true), unique(false)], Some(&using), true),
            ("d", vec![unique(false)], Some(&using), false),
            ("d", vec![], Some(&full), false),
        ] {
            let found = leaf("t_1", identity, &indexes);
            assert_eq!(found.logs_old_rows(), logs, "{found:?}");
            let refused = checked(&[fit.clone(), found.clone()]).err();
            assert_eq!(
                refused.as_ref().map(|condition| &condition.remedy),
                remedy,
                "{found:?}"
            );
            let Some(condition) = refused else { continue };
            assert_eq!(condition.code, Code::NoReplicaIdentity);
            let said = "table public.t: its partition public.t_1 has no replica identity";
            assert!(condition.message.starts_with(said), "{condition}");
            let breaks = condition.message.contains("would break the application");
            assert_eq!(breaks, !logs, "{condition}");
        }
        assert_eq!(checked(&[]), Ok(()), "no partition yet");
    }

    #[test]
    fn an_unlogged_partition_is_not_captured() {
        let mut unlogged = leaf("t_1", "n", &[]);
        unlogged.logged = false;
        assert!(unlogged.logs_old_rows(), "Postgres lets it be changed");
        let condition = checked(&[unlogged]).expect_err("unlogged");
        assert_eq!(condition.code, Code::TableMissing);
        assert_eq!(
            condition.remedy,
            "ALTER TABLE \"public\".\"t_1\" SET LOGGED"
        );
    }

    #[test]
    fn of_many_partitions_the_first_are_told() {
        let many: Vec<_> = (0..30)
            .map(|at| leaf(&format!("t_{at:02}"), "n", &[]))
            .collect();
        let condition = checked(&many).expect_err("none");
        assert!(
            condition.message.ends_with("so it is with 29 more"),
            "{condition}"
        );
        assert_eq!(condition.remedy.matches("ALTER TABLE").count(), TOLD_MAX);
        assert!(condition.remedy.ends_with("shown then"), "{condition}");
    }
}
