//! The tables of a publication: which it has, and how one is taken out of it or waited for.

use std::collections::HashMap;

use millrace_config::{Code, Condition, Create};
use millrace_event::{TableName, quote_identifier};
use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::selection::CLAUSES_VERSION_MIN;
use super::{Refused, SourceTable};
use crate::Error;

/// How long a table's lock may be waited for before it is put into the publication or taken out, in milliseconds:
/// capture of all tables waits, and long enough for an autovacuum to be sent away.
const MEMBER_LOCK_TIMEOUT_MS: u32 = 2_000;

/// A table's membership of a publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The OID of what publishes it, the table's own membership or that of its schema or of a table that it is a
    /// partition of: a table that left and came back has another one, and so has one whose columns or rows were
    /// changed. Zero in a publication of all tables, which has no members.
    pub oid: u32,
    /// Whether the membership is the table's own: only then it can be changed or taken out.
    pub own: bool,
    /// Which of the table's columns and rows are published.
    pub clause: Clause,
}

/// Which of a table's columns and rows a publication publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clause {
    /// The numbers of the columns, ascending; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Vec<i16>>,
    /// The condition on the rows, as Postgres spells it; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

/// The tables that a publication publishes.
///
/// # Errors
/// The connection failed.
pub async fn published_tables(
    client: &Client,
    version: i32,
    name: &str,
) -> Result<HashMap<TableName, Member>, Error> {
    let clause = match version >= CLAUSES_VERSION_MIN {
        true => "r.prattrs::int2[], pg_get_expr(r.prqual, r.prrelid)",
        false => "NULL::int2[], NULL::text",
    };
    let schemas = match version >= CLAUSES_VERSION_MIN {
        true => {
            "UNION ALL SELECT s.oid FROM pg_publication_namespace s JOIN pg_class k ON k.relnamespace = s.pnnspid \
             WHERE s.pnpubid = p.oid AND k.oid = a.relid"
        }
        false => "",
    };
    let sql = format!(
        "SELECT t.schemaname::text, t.tablename::text, coalesce(r.oid, (SELECT min(m.oid) \
         FROM (SELECT c.oid AS relid UNION SELECT relid::oid FROM pg_partition_ancestors(c.oid)) a \
         CROSS JOIN LATERAL (SELECT i.oid FROM pg_publication_rel i WHERE i.prpubid = p.oid AND i.prrelid = a.relid \
         {schemas}) m), 0::oid), r.oid IS NOT NULL, {clause} \
         FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname \
         JOIN pg_namespace n ON n.nspname = t.schemaname \
         JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
         LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid \
         WHERE t.pubname = $1"
    );
    let rows = client.query(&sql, &[&name]).await?;
    let member = |row: &tokio_postgres::Row| {
        let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        let mut columns: Option<Vec<i16>> = row.get(4);
        columns
            .iter_mut()
            .for_each(|columns| columns.sort_unstable());
        let clause = Clause {
            columns,
            filter: row.get(5),
        };
        let (oid, own) = (row.get(2), row.get(3));
        (table, Member { oid, own, clause })
    };
    Ok(rows.iter().map(member).collect())
}

/// A statement, or several, in one transaction, which does not wait for a table's lock for long.
pub(super) fn within_lock_timeout(sql: &str) -> String {
    // Statements that are sent together are one transaction.
    format!("SET LOCAL lock_timeout = {MEMBER_LOCK_TIMEOUT_MS}; {sql}")
}

/// What came of putting tables into a publication, or taking them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alteration {
    /// It is done; or it is not ours to take them out: what is published of them is dropped by capture.
    Settled,
    /// One of them is locked: it is to be tried again.
    Locked,
}

/// Takes tables out of a publication; `what` they are. Where that is not allowed it says so.
///
/// # Errors
/// The connection failed.
pub async fn withdraw(
    client: &Client,
    name: &str,
    tables: &[TableName],
    create: Create,
    what: &str,
) -> Result<Alteration, Error> {
    let sql = drop_statement(name, tables);
    if create == Create::Never {
        tracing::info!(publication = name, remedy = %sql, "{what} are still published");
        return Ok(Alteration::Settled);
    }
    let Err(error) = client.batch_execute(&within_lock_timeout(&sql)).await else {
        tracing::info!(publication = name, %sql, "the publication was changed");
        return Ok(Alteration::Settled);
    };
    match error.as_db_error() {
        Some(server) if server.code() == &SqlState::INSUFFICIENT_PRIVILEGE => {
            tracing::warn!(
                publication = name, code = Code::SourcePrivilege.as_str(), remedy = %sql,
                "{what} cannot be taken out of the publication: {}", server.message()
            );
            Ok(Alteration::Settled)
        }
        Some(server) if server.code() == &SqlState::LOCK_NOT_AVAILABLE => Ok(Alteration::Locked),
        // A standby changes nothing: its primary must.
        Some(server) if server.code() == &SqlState::READ_ONLY_SQL_TRANSACTION => {
            tracing::warn!(
                publication = name, code = Code::SourcePrivilege.as_str(), remedy = %sql,
                "{what} must be taken out of the publication at the primary: {}", server.message()
            );
            Ok(Alteration::Settled)
        }
        _ => Err(error.into()),
    }
}

/// The statement that takes tables out of a publication.
fn drop_statement(name: &str, tables: &[TableName]) -> String {
    let names: Vec<_> = tables.iter().map(TableName::quoted).collect();
    let (publication, names) = (quote_identifier(name), names.join(", "));
    format!("ALTER PUBLICATION {publication} DROP TABLE {names}")
}

/// Why tables are parked that cannot be captured as they are, though they were. `members` is what the publication
/// has now.
#[must_use]
pub fn parked_refused(
    name: &str,
    refused: &[Refused],
    members: &HashMap<TableName, Member>,
) -> Vec<(TableName, Condition)> {
    let parked = refused.iter().map(|table| {
        let condition = unfit(name, table, members.get(&table.name));
        (table.name.clone(), condition)
    });
    parked.collect()
}

fn unfit(name: &str, table: &Refused, member: Option<&Member>) -> Condition {
    let Refused { condition, .. } = table;
    let (mut message, mut remedy) = (condition.message.clone(), condition.remedy.clone());
    message.push_str("; its changes are not captured, and its replicas are not verified");
    remedy.push_str("; the table is read again by itself then");
    if let Some(member) = member.filter(|member| table.harms(member)) {
        message.push_str("; it is still published, and Postgres refuses its updates and deletes");
        if member.own {
            let out = drop_statement(name, std::slice::from_ref(&table.name));
            remedy = format!("for the application, at once: {out}; then {remedy}");
        }
    }
    Condition::new(condition.code, message, remedy)
}

/// Why a table is parked that a publication does not publish, or not as it must.
#[must_use]
pub fn left_publication(name: &str, table: &SourceTable, published: bool) -> Condition {
    let (quoted, publication) = (table.name.quoted(), quote_identifier(name));
    let add = format!(
        "ALTER PUBLICATION {publication} ADD TABLE {}",
        table.published_as()
    );
    let (said, sql) = match published {
        false => (format!("does not have {} any more", table.name), add),
        true => (
            format!(
                "has {} with other columns or rows than are configured",
                table.name
            ),
            format!("BEGIN; ALTER PUBLICATION {publication} DROP TABLE {quoted}; {add}; COMMIT"),
        ),
    };
    Condition::new(
        Code::PublicationDrift,
        format!(
            "publication \"{name}\" {said}: its changes are lost, and its replicas are not verified"
        ),
        format!("{sql}; the table is read again by itself then"),
    )
}

/// Why a table is not captured that a publication is to have, and cannot be given for now.
pub(crate) fn locked_out(name: &str, table: &TableName) -> Condition {
    Condition::new(
        Code::PublicationDrift,
        format!(
            "table {table} is locked, as by VACUUM or CREATE INDEX: publication \"{name}\" cannot take it as \
             configured"
        ),
        "wait until that is done, or end it; the table is then published and read by itself",
    )
}

/// Whether a table can be put into a publication now, or what keeps it out is for the statement to tell.
///
/// # Errors
/// The connection failed.
pub async fn is_free(client: &Client, table: &TableName) -> Result<bool, Error> {
    let sql = format!(
        "LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE",
        table.quoted()
    );
    match client.batch_execute(&within_lock_timeout(&sql)).await {
        Ok(()) => Ok(true),
        Err(error) => match error.code() {
            Some(code) => Ok(*code != SqlState::LOCK_NOT_AVAILABLE),
            None => Err(error.into()),
        },
    }
}
