//! What the source's catalog says about tables.

use std::sync::Arc;

use millrace_config::{Code, Condition, Table};
use millrace_event::{ColumnShape, Datum, TableName, quote_identifier};
use tokio_postgres::Client;

use super::SourceFacts;
use super::generated::check_generated;
use super::key::{UniqueIndex, key_of, logs_old_rows};
use super::leaves::{Leaf, check_leaves, leaves};
use super::membership::{Clause, Member};
use super::selection::{self, CatalogColumn};
use crate::Error;
use crate::selection::{Binding, Salt, Selection};

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
fn numbers(list: &[(i16, String)]) -> Vec<i16> {
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
        match inspect_table(client, facts, table, salt).await {
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

async fn inspect_table(
    client: &Client,
    facts: &SourceFacts,
    table: &Table,
    salt: Option<&Salt>,
) -> Result<SourceTable, Obstacle> {
    let name = &table.name;
    let refuse =
        |code, message: String, remedy: String| Err(Condition::new(code, message, remedy).into());
    let quoted = name.quoted();
    let row = client
        .query_opt(TABLE, &[&name.schema, &name.table])
        .await?;
    let Some(row) = row.filter(|row| matches!(row.get(1), "r" | "p")) else {
        return refuse(
            Code::TableMissing,
            format!("table {name} does not exist in the source, or is no table"),
            format!("create it, or remove tables/{name}.toml"),
        );
    };
    let (oid, identity): (u32, String) = (row.get(0), row.get(2));
    let partitioned = row.get::<_, &str>(1) == "p";
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
    let catalog = catalog_columns(client, oid).await?;
    let sql = format!("SELECT k.* FROM pg_class c CROSS JOIN LATERAL ({KEYS}) k WHERE c.oid = $1");
    let indexes = client.query(&sql, &[&oid]).await?;
    let indexes: Vec<_> = indexes.iter().map(|row| unique_index(row, 0)).collect();
    // Postgres writes to the partitions, and looks at their identities alone.
    let leaves = match row.get(1) {
        "p" => Some(leaves(client, oid).await?),
        _ => None,
    };
    let logs = match &leaves {
        Some(leaves) => leaves.iter().all(Leaf::logs_old_rows),
        None => logs_old_rows(&identity, &indexes),
    };
    let harm = match logs {
        true => Harm::None,
        false => Harm::Published,
    };
    let key = key_of(table, &identity, &indexes).and_then(|key| {
        check_leaves(name, &key, leaves.as_deref().unwrap_or_default())?;
        Ok(key)
    });
    let key = key.map_err(|condition| Obstacle::Refused(condition, harm))?;
    let generated = catalog.iter().filter(|column| column.generated);
    let generated: Vec<_> = generated.map(|column| column.name.clone()).collect();
    if !generated.is_empty() {
        let identities = selection::identities(client, oid).await?;
        let checked = check_generated(name, facts.version, &generated, &key, &identities);
        checked.map_err(|condition| {
            let harm = match condition.code {
                Code::NoReplicaIdentity => Harm::Published,
                _ => Harm::None,
            };
            Obstacle::Refused(condition, harm)
        })?;
    }
    let selected = selection::select(table, &catalog, &key, salt)?;
    selection::require_filters(facts.version, table)?;
    let filter = match &table.filter {
        None => None,
        // A standby makes no temporary table: there the filter that is published is taken for this one.
        Some(filter) if facts.in_recovery => Some(selection::unread(filter)),
        Some(filter) => Some(selection::read_filter(client, table, filter).await?),
    };
    let (list, excluded): (Vec<_>, Vec<_>) = catalog
        .iter()
        .filter(|column| !column.generated)
        .map(|column| (column.number, column.name.clone()))
        .partition(|(_, name)| !selected.selection.excludes(name));
    let lists = facts.version >= selection::CLAUSES_VERSION_MIN && !excluded.is_empty();
    let list = lists.then_some(list);
    if lists || filter.is_some() {
        let excluded: Vec<_> = excluded.into_iter().map(|(_, name)| name).collect();
        let read = filter.as_ref().map_or(&[][..], |filter| &filter.columns);
        let identities = selection::identities(client, oid).await?;
        let checked = selection::check_identity(table, &excluded, read, &identities);
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
        name: name.clone(),
        partitioned,
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
