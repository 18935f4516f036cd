//! Looks configured tables up in the source, and checks that they can be captured.

use std::sync::Arc;

use millrace_config::{Code, Condition, Table};
use tokio_postgres::Client;

use super::SourceFacts;
use super::catalog::{Harm, Inspected, Refused, SourceTable, numbers};
use super::generated::check_generated;
use super::key::{UniqueIndex, key_of, logs_old_rows};
use super::leaves::{Leaf, check_leaves, leaves};
use super::logged::{check_identity, identities};
use super::membership::Clause;
use super::selection::{self, CatalogColumn, RowFilter};
use crate::Error;
use crate::selection::{Salt, Selection};

/// Looks every configured table up and checks that it can be published: it exists, has a key, logs that key
/// for old rows, may be read, and can be published with its columns and rows selected as configured. What keeps
/// one table from it keeps no other. `salt` is there where a column is hashed.
///
/// # Errors
/// The connection failed.
pub async fn inspect_tables(
    client: &Client,
    facts: &SourceFacts,
    tables: &[Table],
    salt: Option<&Salt>,
) -> Result<Inspected, Error> {
    let mut inspected = Inspected {
        tables: Vec::with_capacity(tables.len()),
        refused: Vec::new(),
    };
    for table in tables {
        let inspection = Inspection {
            client,
            facts,
            table,
        };
        match inspection.look(salt).await {
            Ok(table) => inspected.tables.push(table),
            Err(Obstacle::Failed(error)) => return Err(error),
            Err(Obstacle::Refused(condition, harm)) => inspected.refused.push(Refused {
                name: table.name.clone(),
                condition,
                harm,
            }),
        }
    }
    Ok(inspected)
}

/// What keeps a table from being captured.
enum Obstacle {
    /// The table, or its settings.
    Refused(Condition, Harm),
    /// The source did not answer.
    Failed(Error),
}

impl From<Condition> for Obstacle {
    fn from(condition: Condition) -> Self {
        Self::Refused(condition, Harm::None)
    }
}

impl From<Error> for Obstacle {
    fn from(error: Error) -> Self {
        match error {
            Error::Halt(condition) => condition.into(),
            other => Self::Failed(other),
        }
    }
}

impl From<tokio_postgres::Error> for Obstacle {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Failed(error.into())
    }
}

const TABLE: &str = "SELECT c.oid, c.relkind::text, c.relreplident::text, \
    has_table_privilege(c.oid, 'SELECT'), c.relpersistence::text \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1 AND c.relname = $2";

const COLUMNS: &str = "SELECT a.attnum, a.attname::text, a.atttypid, a.atttypmod, \
    format_type(a.atttypid, a.atttypmod), a.attnotnull OR t.typnotnull, t.typcategory = 'S', \
    a.attgenerated <> '' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";

/// The unique indexes of relation `c` that can identify rows, with their columns in the index's order. Since Postgres 18
/// a column may be NOT NULL for new rows only.
pub(super) const KEYS: &str = "SELECT i.indisprimary, i.indisreplident, \
    array_agg(a.attname::text ORDER BY k.place) AS columns, bool_and(a.attnotnull AND NOT EXISTS (SELECT \
    FROM pg_constraint n WHERE n.conrelid = a.attrelid AND n.contype = 'n' AND NOT n.convalidated \
    AND n.conkey = ARRAY[a.attnum])) AS not_null, x.relname::text, i.indimmediate \
    FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid \
    CROSS JOIN unnest(i.indkey::smallint[]) WITH ORDINALITY k(attnum, place) \
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL \
    AND k.place <= i.indnkeyatts AND i.indexprs IS NULL \
    GROUP BY i.indexrelid, i.indisprimary, i.indisreplident, x.relname, i.indimmediate \
    ORDER BY i.indexrelid";

/// A row of [`KEYS`], whose columns begin at `first`.
pub(super) fn unique_index(row: &tokio_postgres::Row, first: usize) -> UniqueIndex {
    UniqueIndex {
        primary: row.get(first),
        identity: row.get(first + 1),
        columns: row.get(first + 2),
        not_null: row.get(first + 3),
        name: row.get(first + 4),
        immediate: row.get(first + 5),
    }
}

/// A table as it was found.
struct Found {
    oid: u32,
    partitioned: bool,
    /// Its `relreplident`.
    identity: String,
}

/// The columns that the publication names, because there are others.
struct Listed {
    /// By number and name; `None`: it names none.
    list: Option<Vec<(i16, String)>>,
    /// The others.
    excluded: Vec<String>,
}

/// Tells the columns that are published from those that are excluded. Generated ones are neither. Publications of old
/// servers name none.
fn listed(catalog: &[CatalogColumn], selection: &Selection, version: i32) -> Listed {
    let (list, excluded): (Vec<_>, Vec<_>) = catalog
        .iter()
        .filter(|column| !column.generated)
        .map(|column| (column.number, column.name.clone()))
        .partition(|(_, name)| !selection.excludes(name));
    let lists = version >= selection::CLAUSES_VERSION_MIN && !excluded.is_empty();
    Listed {
        list: lists.then_some(list),
        excluded: excluded.into_iter().map(|(_, name)| name).collect(),
    }
}

/// The inspection of one table.
struct Inspection<'i> {
    client: &'i Client,
    facts: &'i SourceFacts,
    table: &'i Table,
}

impl Inspection<'_> {
    async fn look(&self, salt: Option<&Salt>) -> Result<SourceTable, Obstacle> {
        let table = self.table;
        let found = self.find().await?;
        let catalog = catalog_columns(self.client, found.oid).await?;
        let key = self.key(&found).await?;
        self.check_generated(found.oid, &catalog, &key).await?;
        let selected = selection::select(table, &catalog, &key, salt)?;
        let filter = self.filter().await?;
        let Listed { list, excluded } = listed(&catalog, &selected.selection, self.facts.version);
        if list.is_some() || filter.is_some() {
            let logged = identities(self.client, found.oid).await?;
            let read = filter.as_ref().map_or(&[][..], |filter| &filter.columns);
            let checked = check_identity(&table.name, &excluded, read, &logged);
            checked.map_err(|condition| {
                let clause = Clause {
                    columns: list.as_deref().map(numbers),
                    filter: filter.as_ref().map(|filter| filter.sql.clone()),
                };
                Obstacle::Refused(condition, Harm::PublishedAs(clause))
            })?;
        }
        let names = selected.columns.iter().map(|(name, ..)| name.as_str());
        let binding = selected.selection.bind(names);
        let known = catalog
            .into_iter()
            .map(|column| (column.number, column.name));
        Ok(SourceTable {
            name: table.name.clone(),
            partitioned: found.partitioned,
            key,
            columns: selected.columns,
            filter: filter.map(|filter| filter.sql),
            list,
            selection: Arc::new(selected.selection),
            binding,
            published: None,
            known: known.collect(),
            absent: selected.absent,
            settings: table.clone(),
        })
    }

    /// Finds the table, whose changes must be in the WAL and whose rows must be there to read.
    async fn find(&self) -> Result<Found, Obstacle> {
        let name = &self.table.name;
        let refuse = |code, message: String, remedy: String| {
            Err(Condition::new(code, message, remedy).into())
        };
        let quoted = name.quoted();
        let row = self
            .client
            .query_opt(TABLE, &[&name.schema, &name.table])
            .await?;
        let Some(row) = row.filter(|row| matches!(row.get(1), "r" | "p")) else {
            return refuse(
                Code::TableMissing,
                format!("table {name} does not exist in the source, or is no table"),
                format!("create it, or remove tables/{name}.toml"),
            );
        };
        if row.get::<_, &str>(4) != "p" {
            return refuse(
                Code::TableMissing,
                format!("table {name} is unlogged or temporary: its changes are not in the WAL"),
                format!("ALTER TABLE {quoted} SET LOGGED"),
            );
        }
        if !row.get::<_, bool>(3) {
            return refuse(
                Code::SourcePrivilege,
                format!("table {name} may not be read by this user"),
                format!("GRANT SELECT ON {quoted} TO this user (see `millrace init-sql`)"),
            );
        }
        Ok(Found {
            oid: row.get(0),
            partitioned: row.get::<_, &str>(1) == "p",
            identity: row.get(2),
        })
    }

    /// The table's key, which must be logged of old rows.
    async fn key(&self, found: &Found) -> Result<Vec<String>, Obstacle> {
        let sql =
            format!("SELECT k.* FROM pg_class c CROSS JOIN LATERAL ({KEYS}) k WHERE c.oid = $1");
        let indexes = self.client.query(&sql, &[&found.oid]).await?;
        let indexes: Vec<_> = indexes.iter().map(|row| unique_index(row, 0)).collect();
        // Postgres writes to the partitions, and looks at their identities alone.
        let leaves = match found.partitioned {
            true => Some(leaves(self.client, found.oid).await?),
            false => None,
        };
        let logs = match &leaves {
            Some(leaves) => leaves.iter().all(Leaf::logs_old_rows),
            None => logs_old_rows(&found.identity, &indexes),
        };
        let harm = match logs {
            true => Harm::None,
            false => Harm::Published,
        };
        let key = key_of(self.table, &found.identity, &indexes).and_then(|key| {
            let leaves = leaves.as_deref().unwrap_or_default();
            check_leaves(&self.table.name, &key, leaves)?;
            Ok(key)
        });
        key.map_err(|condition| Obstacle::Refused(condition, harm))
    }

    /// Checks that nothing depends on generated columns, which are not published.
    async fn check_generated(
        &self,
        oid: u32,
        catalog: &[CatalogColumn],
        key: &[String],
    ) -> Result<(), Obstacle> {
        let generated = catalog.iter().filter(|column| column.generated);
        let generated: Vec<_> = generated.map(|column| column.name.clone()).collect();
        if generated.is_empty() {
            return Ok(());
        }
        let logged = identities(self.client, oid).await?;
        let (name, version) = (&self.table.name, self.facts.version);
        let checked = check_generated(name, version, &generated, key, &logged);
        checked.map_err(|condition| {
            let harm = match condition.code {
                Code::NoReplicaIdentity => Harm::Published,
                _ => Harm::None,
            };
            Obstacle::Refused(condition, harm)
        })
    }

    /// The table's row filter as the source spells it.
    async fn filter(&self) -> Result<Option<RowFilter>, Obstacle> {
        selection::require_filters(self.facts.version, self.table)?;
        Ok(match &self.table.filter {
            None => None,
            // A standby makes no temporary table: there the filter that is published is taken for this one.
            Some(filter) if self.facts.in_recovery => Some(selection::unread(filter)),
            Some(filter) => Some(selection::read_filter(self.client, self.table, filter).await?),
        })
    }
}

/// A table's columns as they are now.
pub(super) async fn catalog_columns(
    client: &Client,
    oid: u32,
) -> Result<Vec<CatalogColumn>, Error> {
    let rows = client.query(COLUMNS, &[&oid]).await?;
    let column = |row: &tokio_postgres::Row| CatalogColumn {
        number: row.get(0),
        name: row.get(1),
        type_oid: row.get(2),
        typmod: row.get(3),
        type_name: row.get(4),
        not_null: row.get(5),
        is_text: row.get(6),
        generated: row.get(7),
    };
    Ok(rows.iter().map(column).collect())
}
