//! What Postgres logs of old rows, and whether that is enough for a publication to leave columns or rows out.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Client;

use super::key::list;
use super::partitions::partition_tree;
use crate::Error;

/// The columns that are logged of a relation's old rows: of the table, or of one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// The relation, quoted where needed.
    pub(super) relation: String,
    /// Whether whole rows are logged.
    pub(super) full: bool,
    pub(super) columns: Vec<String>,
}

impl Identity {
    fn logs(&self, column: &String) -> bool {
        self.columns.contains(column)
    }
}

const IDENTITIES: &str = "SELECT c.oid::regclass::text, c.relreplident = 'f', \
    ARRAY(SELECT DISTINCT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid \
    AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]::int2[]) WHERE i.indrelid = c.oid AND i.indisvalid \
    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary AND i.indimmediate \
    WHEN 'i' THEN i.indisreplident ELSE false END) FROM pg_class c";

/// What is logged of old rows, of each relation that holds rows of the table.
pub(super) async fn identities(client: &Client, oid: u32) -> Result<Vec<Identity>, Error> {
    let tree = partition_tree("$1::oid");
    let sql = format!(
        "{IDENTITIES} WHERE c.oid IN (SELECT relid FROM {tree} tree WHERE isleaf) ORDER BY 1"
    );
    let rows = client.query(&sql, &[&oid]).await?;
    let identity = |row: &tokio_postgres::Row| Identity {
        relation: row.get(0),
        full: row.get(1),
        columns: row.get(2),
    };
    Ok(rows.iter().map(identity).collect())
}

/// What keeps Postgres from telling an old row by what a relation logs of it.
struct Clash {
    message: String,
    remedy: String,
}

/// Checks that Postgres will take the application's updates and deletes once the table is published with this
/// column list and row filter. It checks that itself only when the application writes.
pub(super) fn check_identity(
    name: &TableName,
    excluded: &[String],
    filtered_by: &[String],
    identities: &[Identity],
) -> Result<(), Condition> {
    let clash = identities.iter().find_map(|identity| match identity.full {
        true => excluded_of_whole_rows(name, identity, excluded),
        false => excluded_of_key(name, identity, excluded)
            .or_else(|| unlogged(identity, filtered_by, !excluded.is_empty())),
    });
    match clash {
        None => Ok(()),
        Some(Clash { message, remedy }) => Err(Condition::new(
            Code::SelectionIdentity,
            format!(
                "table {name}: {message}: publishing it so would break the application's own updates and deletes"
            ),
            remedy,
        )),
    }
}

/// Whole rows are logged: no column may be left out.
fn excluded_of_whole_rows(
    name: &TableName,
    identity: &Identity,
    excluded: &[String],
) -> Option<Clash> {
    let relation = &identity.relation;
    (!excluded.is_empty()).then(|| Clash {
        message: format!(
            "{relation} has REPLICA IDENTITY FULL, and columns.exclude leaves out ({})",
            list(excluded)
        ),
        remedy: format!(
            "ALTER TABLE {relation} REPLICA IDENTITY DEFAULT, or USING INDEX a unique one; or mask the columns \
             in tables/{name}.toml instead of excluding them"
        ),
    })
}

/// The columns of an index are logged: none of them may be left out.
fn excluded_of_key(name: &TableName, identity: &Identity, excluded: &[String]) -> Option<Clash> {
    let relation = &identity.relation;
    let lost = excluded.iter().filter(|column| identity.logs(column));
    let lost: Vec<String> = lost.cloned().collect();
    (!lost.is_empty()).then(|| Clash {
        message: format!(
            "columns.exclude leaves out ({}), which is in the replica identity of {relation}",
            list(&lost)
        ),
        remedy: format!(
            "in tables/{name}.toml: mask ({0}) instead of excluding it; or ALTER TABLE {relation} \
             REPLICA IDENTITY USING INDEX one that is without ({0})",
            list(&lost)
        ),
    })
}

/// The columns of an index are logged: a filter may read no others. Logging whole rows is no way out where the column
/// list `excludes` some.
fn unlogged(identity: &Identity, filtered_by: &[String], excludes: bool) -> Option<Clash> {
    let relation = &identity.relation;
    let unlogged = filtered_by.iter().filter(|column| !identity.logs(column));
    let unlogged: Vec<String> = unlogged.cloned().collect();
    if unlogged.is_empty() {
        return None;
    }
    let full = match excludes {
        false => format!("ALTER TABLE {relation} REPLICA IDENTITY FULL; or "),
        true => String::new(),
    };
    let mut indexed = identity.columns.clone();
    indexed.extend(unlogged.iter().cloned());
    Some(Clash {
        message: format!(
            "its `where` reads ({}), which is not in the replica identity of {relation}",
            list(&unlogged)
        ),
        remedy: format!(
            "{full}CREATE UNIQUE INDEX .. ON {relation} ({}) over columns that are NOT NULL, and ALTER TABLE \
             {relation} REPLICA IDENTITY USING INDEX that index",
            list(&indexed)
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn identity(full: bool, columns: &[&str]) -> Identity {
        Identity {
            relation: "public.t".to_owned(),
            full,
            columns: owned(columns),
        }
    }

    #[test]
    fn a_selection_that_would_break_the_applications_writes_is_refused() {
        let name = TableName::new("public", "t");
        let check = |excluded: &[&str], read: &[&str], identities: &[Identity]| {
            check_identity(&name, &owned(excluded), &owned(read), identities)
        };
        let key = identity(false, &["id"]);
        let full = identity(true, &[]);
        assert!(check(&["name"], &["id"], std::slice::from_ref(&key)).is_ok());
        assert!(check(&[], &["name"], std::slice::from_ref(&full)).is_ok());
        assert!(check(&[], &["id", "state"], &[identity(false, &["id", "state"])]).is_ok());
        for (excluded, read, identities, remedy) in [
            (
                &[][..],
                &["state"][..],
                vec![key.clone()],
                "ALTER TABLE public.t REPLICA IDENTITY FULL; or CREATE UNIQUE INDEX .. ON public.t (\"id\", \"state\")",
            ),
            (
                &["name"],
                &["state"],
                vec![key.clone()],
                "CREATE UNIQUE INDEX .. ON public.t (\"id\", \"state\")",
            ),
            (
                &["name"],
                &[],
                vec![full.clone()],
                "ALTER TABLE public.t REPLICA IDENTITY DEFAULT",
            ),
            (
                &["state"],
                &[],
                vec![identity(false, &["id", "state"])],
                "mask (\"state\") instead",
            ),
            // Each partition is checked: Postgres does so too.
            (
                &["name"],
                &[],
                vec![key.clone(), full.clone()],
                "REPLICA IDENTITY DEFAULT",
            ),
        ] {
            let condition = check(excluded, read, &identities).expect_err(remedy);
            assert_eq!(condition.code, Code::SelectionIdentity);
            assert!(condition.remedy.contains(remedy), "{}", condition.remedy);
            assert!(
                condition
                    .message
                    .contains("break the application's own updates"),
                "{condition}"
            );
        }
        let condition = check(&["name"], &["state"], &[key]).expect_err("not logged");
        assert!(!condition.remedy.contains("FULL"), "{}", condition.remedy);
    }
}
