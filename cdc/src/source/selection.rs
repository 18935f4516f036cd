//! What a table's file selects of its columns and rows, against what the source's catalog has.

use std::collections::BTreeSet;

use millrace_config::{Code, Condition, Filter, Mask as MaskKind, Table};
use millrace_event::{ColumnShape, quote_identifier};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::Error;
use crate::selection::{Mask, Salt, Selection};

/// The oldest server whose publications have column lists and row filters: 15.
pub(super) const CLAUSES_VERSION_MIN: i32 = 150_000;

/// A column as the catalog has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CatalogColumn {
    /// Its number, which a change of its name leaves alone.
    pub(super) number: i16,
    pub(super) name: String,
    pub(super) type_oid: u32,
    pub(super) typmod: i32,
    /// With modifiers.
    pub(super) type_name: String,
    /// Whether it or its domain forbids NULL.
    pub(super) not_null: bool,
    /// Whether its values are texts of any length and content but for what a domain or a modifier demands.
    pub(super) is_text: bool,
    /// Whether it is generated: such a column is never published.
    pub(super) generated: bool,
}

/// A table's columns as its file selects them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) selection: Selection,
    /// What is published: name, type OID, type modifier.
    pub(super) columns: Vec<(String, u32, i32)>,
    /// Columns that the table's own file names and the table does not have.
    pub(super) absent: Vec<String>,
}

/// Selects columns. `salt` is there where a column is hashed.
pub(super) fn select(
    table: &Table,
    columns: &[CatalogColumn],
    key: &[String],
    salt: Option<&Salt>,
) -> Result<Selected, Condition> {
    let settings = &table.columns;
    let find = |name: &String| columns.iter().find(|column| column.name == *name);
    let mut selection = Selection::default();
    for name in &settings.exclude {
        if key.contains(name) {
            return Err(refused(
                table,
                format!("key column {name:?} cannot be excluded"),
                format!("remove {name:?} from columns.exclude"),
            ));
        }
        selection.exclude(name);
    }
    // Since Postgres 18 a publication can have stored ones, which a copy would not: they are no part of a row.
    for column in columns.iter().filter(|column| column.generated) {
        selection.exclude(&column.name);
    }
    for (name, kind) in &settings.mask {
        if key.contains(name) {
            return Err(refused(
                table,
                format!("key column {name:?} cannot be masked"),
                format!("remove {name:?} from columns.mask, or choose another key"),
            ));
        }
        selection.mask(
            name,
            match (find(name), kind, salt) {
                (Some(column), ..) => mask(table, column, *kind, salt)?,
                // It may come before this life ends: its values must not go out as they are.
                (None, MaskKind::Hash, Some(salt)) => Mask::Hash(salt.clone()),
                (None, ..) => Mask::Null,
            },
        );
    }
    check_renames(table, columns)?;
    let published = columns.iter().filter(|column| !column.generated);
    let columns = published.filter_map(|column| {
        let shape = selection.published(ColumnShape {
            name: &column.name,
            type_oid: column.type_oid,
            typmod: column.typmod,
        })?;
        Some((column.name.clone(), shape.type_oid, shape.typmod))
    });
    let columns = columns.collect();
    let masked = settings.mask.iter().map(|(name, _)| name);
    let renamed = settings.rename.iter().map(|(name, _)| name);
    let named = settings.exclude.iter().chain(masked).chain(renamed);
    let own = named.filter(|name| !settings.from_defaults.contains(name));
    let absent = own.filter(|name| find(name).is_none()).cloned().collect();
    Ok(Selected {
        selection,
        columns,
        absent,
    })
}

fn mask(
    table: &Table,
    column: &CatalogColumn,
    kind: MaskKind,
    salt: Option<&Salt>,
) -> Result<Mask, Condition> {
    let CatalogColumn {
        name, type_name, ..
    } = column;
    match kind {
        MaskKind::Hash => salt.cloned().map(Mask::Hash).ok_or_else(|| {
            let message = format!("column {name:?} cannot be hashed without a salt");
            refused(table, message, "set source.mask_salt".to_owned())
        }),
        MaskKind::Redact if column.is_text => Ok(Mask::Text),
        MaskKind::Redact if !column.not_null => Ok(Mask::Null),
        MaskKind::Redact => Err(refused(
            table,
            format!(
                "column {name:?} is {type_name} and NOT NULL: \"redact\" has neither a text nor NULL for it"
            ),
            format!("mask {name:?} with \"hash\", or exclude it"),
        )),
        MaskKind::Truncate(characters) if column.is_text => Ok(Mask::Truncate(characters)),
        MaskKind::Truncate(_) => Err(refused(
            table,
            format!("column {name:?} is {type_name}, and \"truncate\" is for texts"),
            format!("mask {name:?} with \"hash\" or \"redact\", or exclude it"),
        )),
    }
}

/// Two columns must not share a name in the targets.
fn check_renames(table: &Table, columns: &[CatalogColumn]) -> Result<(), Condition> {
    let settings = &table.columns;
    let published = columns
        .iter()
        .filter(|column| !column.generated && !settings.exclude.contains(&column.name));
    let mut names = BTreeSet::new();
    for column in published {
        let renamed = settings
            .rename
            .iter()
            .find(|(from, _)| *from == column.name);
        let target = renamed.map_or(&column.name, |(_, to)| to);
        if !names.insert(target) {
            return Err(refused(
                table,
                format!("two columns have the name {target:?} in the targets"),
                format!("change columns.rename so that {target:?} is given once"),
            ));
        }
    }
    Ok(())
}

/// A name of the file that the table does not have: a misspelt one would let values through.
pub(crate) fn unknown_columns(table: &Table, absent: &[String]) -> Condition {
    let list: Vec<_> = absent.iter().map(|name| format!("{name:?}")).collect();
    let list = list.join(", ");
    refused(
        table,
        format!("it has no column {list}"),
        format!("correct or remove {list} under columns"),
    )
}

/// A withheld column that has another name now, under which nothing is said of it.
pub(crate) fn renamed_column(table: &Table, old: &str, new: &str) -> Condition {
    refused(
        table,
        format!("column {old:?}, which is excluded or masked, was renamed to {new:?}"),
        format!("name {new:?} in place of {old:?} under columns; nothing is captured until then"),
    )
}

fn refused(table: &Table, message: String, remedy: String) -> Condition {
    let name = &table.name;
    Condition::new(
        Code::ColumnSelection,
        format!("table {name}: {message}"),
        format!("in tables/{name}.toml: {remedy}"),
    )
}

/// A row filter as Postgres spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RowFilter {
    /// The condition.
    pub(super) sql: String,
    /// The columns that it reads.
    pub(super) columns: Vec<String>,
}

/// Refuses a row filter where the server has none.
pub(super) fn require_filters(version: i32, table: &Table) -> Result<(), Condition> {
    if table.filter.is_none() || version >= CLAUSES_VERSION_MIN {
        return Ok(());
    }
    Err(Condition::new(
        Code::FilterUnsupported,
        format!(
            "table {} has a `where`, and the source is Postgres {}, whose publications have no row filters",
            table.name,
            version / 10_000
        ),
        format!(
            "upgrade the source to Postgres 15 or later, or remove `where` from tables/{}.toml",
            table.name
        ),
    ))
}

/// A row filter that nobody could read.
pub(super) fn unread(filter: &Filter) -> RowFilter {
    RowFilter {
        sql: filter.sql.clone(),
        columns: Vec::new(),
    }
}

/// How long a lock may be waited for while a filter is read, in milliseconds: that of a table which only the filter
/// names.
const FILTER_LOCK_TIMEOUT_MS: u32 = 2_000;

/// The columns of a table as those of another one. A type that may not be used by name is none of Postgres' own, of
/// which no row filter may be.
const COLUMNS_AGAIN: &str = "SELECT string_agg(format('%I %s%s', a.attname, \
    CASE WHEN has_schema_privilege(t.typnamespace, 'USAGE') AND has_type_privilege(t.oid, 'USAGE') \
    THEN format_type(a.atttypid, a.atttypmod) ELSE 'pg_catalog.text' END, \
    ' COLLATE pg_catalog.' || quote_ident(c.collname)), ', ' ORDER BY a.attnum) \
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation c ON c.oid = a.attcollation \
    AND c.collnamespace = 'pg_catalog'::regnamespace AND a.attcollation <> t.typcollation \
    WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";

/// Has Postgres read a row filter, as the check of a temporary table that is rolled back: that needs no right on
/// the publication, touches nothing of the source's, and waits for nobody who has locked the table.
pub(super) async fn read_filter(
    client: &Client,
    table: &Table,
    filter: &Filter,
) -> Result<RowFilter, Error> {
    let begin = format!("BEGIN; SET LOCAL lock_timeout = {FILTER_LOCK_TIMEOUT_MS}");
    client.batch_execute(&begin).await?;
    let read = read_in_transaction(client, table, filter).await;
    client.batch_execute("ROLLBACK").await?;
    read
}

async fn read_in_transaction(
    client: &Client,
    table: &Table,
    filter: &Filter,
) -> Result<RowFilter, Error> {
    // Of the same name: a column may be written behind it.
    let copy = format!("pg_temp.{}", quote_identifier(&table.name.table));
    let quoted = table.name.quoted();
    let row = client.query_one(COLUMNS_AGAIN, &[&quoted]).await?;
    let columns: Option<String> = row.get(0);
    let columns = columns.unwrap_or_default();
    let create = format!("CREATE TEMPORARY TABLE {copy} ({columns})");
    if let Err(error) = client.batch_execute(&create).await {
        if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
            return Err(error.into());
        }
        return Err(Error::halt(Condition::new(
            Code::SourcePrivilege,
            format!(
                "the `where` of table {} cannot be read without temporary tables",
                table.name
            ),
            "GRANT TEMPORARY ON DATABASE the source's TO the user of source.url (see `millrace init-sql`)",
        )));
    }
    // Alone in a statement, so that its parentheses are its own. The newline ends a comment.
    let alone = format!("SELECT FROM {copy} WHERE ({}\n)", filter.sql);
    let prepared = client.prepare(&alone).await;
    let prepared = prepared.map_err(|error| filter_refused(table, filter, error))?;
    if !prepared.params().is_empty() {
        return Err(Error::halt(invalid(table, filter, "it has parameters")));
    }
    let check = format!("ALTER TABLE {copy} ADD CHECK ({}\n)", filter.sql);
    let added = client.execute(&check, &[]).await;
    added.map_err(|error| filter_refused(table, filter, error))?;
    let rows = client
        .query(
            "SELECT pg_get_expr(conbin, conrelid), ARRAY(SELECT attname::text FROM pg_attribute \
             WHERE attrelid = conrelid AND attnum = ANY (conkey)) FROM pg_constraint \
             WHERE conrelid = to_regclass($1) AND contype = 'c'",
            &[&copy],
        )
        .await?;
    let [row] = rows.as_slice() else {
        return Err(Error::halt(invalid(
            table,
            filter,
            "it is not one condition",
        )));
    };
    Ok(RowFilter {
        sql: row.get(0),
        columns: row.get(1),
    })
}

/// What Postgres says of a filter, where it is the filter's fault.
pub(super) fn filter_refused(
    table: &Table,
    filter: &Filter,
    error: tokio_postgres::Error,
) -> Error {
    let Some(server) = error.as_db_error() else {
        return error.into();
    };
    // Syntax and access rules, features, data: what a session or a server can fail of is in other classes.
    let of_the_filter = ["42", "0A", "22", "2B"]
        .iter()
        .any(|class| server.code().code().starts_with(class));
    if !of_the_filter || server.code() == &SqlState::INSUFFICIENT_PRIVILEGE {
        return error.into();
    }
    let said = match server.detail() {
        Some(detail) => format!("{} ({})", server.message(), detail),
        None => server.message().to_owned(),
    };
    Error::halt(invalid(table, filter, &said))
}

fn invalid(table: &Table, filter: &Filter, said: &str) -> Condition {
    Condition::new(
        Code::FilterInvalid,
        format!("table {}: its `where` is not valid: {said}", table.name),
        format!("correct {}: {}", filter.place, filter.sql),
    )
}

#[cfg(test)]
mod tests;
