//! The publication.

use std::collections::HashMap;

use millrace_config::{Code, Condition, Create};
use millrace_event::{TableName, quote_identifier};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::Error;

/// The publication of a source: `millrace_<source>`.
#[must_use]
pub fn publication_name(source: &str) -> String {
    format!("millrace_{source}")
}

/// Creates the publication, and adds to it what it lacks. Never removes a table: that is the operator's call.
///
/// # Errors
/// Something is missing that may not be created, a privilege is missing, or the connection failed.
pub async fn ensure_publication(
    client: &Client,
    name: &str,
    tables: &[TableName],
    create: Create,
) -> Result<(), Error> {
    let row = client
        .query_opt(
            "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_publication WHERE pubname = $1",
            &[&name],
        )
        .await?;
    let list = |tables: &[TableName]| {
        tables
            .iter()
            .map(TableName::quoted)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let quoted = quote_identifier(name);
    let (code, message, sql) = match row.map(|row| row.get::<_, bool>(0)) {
        None => (
            Code::PublicationMissing,
            format!("publication \"{name}\" does not exist"),
            format!(
                "CREATE PUBLICATION {quoted} FOR TABLE {} WITH (publish_via_partition_root = true)",
                list(tables)
            ),
        ),
        Some(false) => {
            return Err(Error::halt(Condition::new(
                Code::PublicationDrift,
                format!("publication \"{name}\" does not publish every kind of change"),
                format!(
                    "ALTER PUBLICATION {quoted} SET (publish = 'insert, update, delete, truncate'); \
                     what was changed meanwhile is missing: then run `millrace drop` and `millrace run`"
                ),
            )));
        }
        Some(true) => {
            let missing = missing_tables(client, name, tables).await?;
            if missing.is_empty() {
                return Ok(());
            }
            (
                Code::PublicationDrift,
                format!("publication \"{name}\" lacks {}", list(&missing)),
                format!("ALTER PUBLICATION {quoted} ADD TABLE {}", list(&missing)),
            )
        }
    };
    if create == Create::Never {
        return Err(Error::halt(Condition::new(code, message, sql)));
    }
    tracing::info!(publication = name, %sql, "changing the publication");
    match client.batch_execute(&sql).await {
        Ok(()) => Ok(()),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            Err(Error::halt(Condition::new(
                Code::SourcePrivilege,
                format!("publication \"{name}\" cannot be created or changed by this user"),
                format!("as the tables' owner, with CREATE on the database: {sql}"),
            )))
        }
        Err(error) => Err(error.into()),
    }
}

/// The tables that a publication does not publish.
///
/// # Errors
/// The connection failed.
pub async fn missing_tables(
    client: &Client,
    name: &str,
    tables: &[TableName],
) -> Result<Vec<TableName>, Error> {
    let published = published_tables(client, name).await?;
    let missing = tables.iter().filter(|table| !published.contains_key(table));
    Ok(missing.cloned().collect())
}

/// The tables that a publication publishes, each with the OID of its membership: a table that left and came
/// back has another one. Zero for a publication of all tables or of a schema, which has no members.
///
/// # Errors
/// The connection failed.
pub async fn published_tables(
    client: &Client,
    name: &str,
) -> Result<HashMap<TableName, u32>, Error> {
    let rows = client
        .query(
            "SELECT t.schemaname::text, t.tablename::text, coalesce(r.oid, 0::oid) \
             FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname \
             JOIN pg_namespace n ON n.nspname = t.schemaname \
             JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
             LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid \
             WHERE t.pubname = $1",
            &[&name],
        )
        .await?;
    let member = |row: &tokio_postgres::Row| {
        let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        (table, row.get::<_, u32>(2))
    };
    Ok(rows.iter().map(member).collect())
}
