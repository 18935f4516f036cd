//! The tables of a publication: which it has, and how one is taken out of it or waited for.

use std::collections::HashMap;

use millrace_config::{Code, Condition, Create};
use millrace_event::{TableName, quote_identifier};
use serde::{Deserialize, Serialize};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::selection::CLAUSES_VERSION_MIN;
use super::{Refused, SourceTable};
use crate::Error;

/// How long a table's lock may be waited for before it is put into the publication or taken out, in milliseconds:
/// capture of all tables waits, and long enough for an autovacuum to be sent away.
const MEMBER_LOCK_TIMEOUT_MS: u32 = 2_000;

/// How long a table's lock may be waited for before its condition is read, in milliseconds. What else is asked on the
/// session waits too.
const FILTER_LOCK_TIMEOUT_MS: u32 = 200;

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
    /// Whether only some of the rows are, and `clause` does not tell which: Postgres reads no condition of a table that
    /// somebody has locked.
    pub unread: bool,
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
    let clauses = version >= CLAUSES_VERSION_MIN;
    let clause = match clauses {
        true => "r.prattrs::int2[], r.prqual IS NOT NULL",
        false => "NULL::int2[], false",
    };
    let (schemas, of_schemas) = match clauses {
        true => (
            "UNION ALL SELECT s.oid FROM pg_publication_namespace s JOIN pg_class k ON k.relnamespace = s.pnnspid \
             WHERE s.pnpubid = p.oid AND k.oid = a.relid",
            "OR EXISTS (SELECT FROM pg_publication_namespace s WHERE s.pnpubid = p.oid AND s.pnnspid = k.relnamespace)",
        ),
        false => ("", ""),
    };
    // What pg_publication_tables tells. Since Postgres 16 that locks the tables, and waits for whoever rewrites one.
    let sql = format!(
        "WITH RECURSIVE p AS (SELECT * FROM pg_publication WHERE pubname = $1), \
         named AS (SELECT k.oid AS relid, k.relkind FROM p CROSS JOIN pg_class k \
         JOIN pg_namespace kn ON kn.oid = k.relnamespace WHERE k.relkind IN ('r', 'p') AND k.relpersistence = 'p' \
         AND (EXISTS (SELECT FROM pg_publication_rel i WHERE i.prpubid = p.oid AND i.prrelid = k.oid) \
         OR (p.puballtables AND k.oid >= 16384 AND kn.nspname <> 'information_schema') {of_schemas})), \
         parts AS (SELECT relid, relkind FROM named UNION SELECT k.oid, k.relkind FROM parts \
         JOIN pg_inherits i ON i.inhparent = parts.relid JOIN pg_class k ON k.oid = i.inhrelid \
         WHERE parts.relkind = 'p') \
         SELECT n.nspname::text, c.relname::text, coalesce(r.oid, (SELECT min(m.oid) \
         FROM (SELECT c.oid AS relid UNION SELECT relid::oid FROM pg_partition_ancestors(c.oid)) a \
         CROSS JOIN LATERAL (SELECT i.oid FROM pg_publication_rel i WHERE i.prpubid = p.oid AND i.prrelid = a.relid \
         {schemas}) m), 0::oid), r.oid IS NOT NULL, {clause} \
         FROM p CROSS JOIN parts t JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace \
         LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid \
         WHERE CASE WHEN p.pubviaroot THEN t.relid IN (SELECT relid FROM named) \
         AND NOT EXISTS (SELECT FROM pg_partition_ancestors(t.relid) a WHERE a.relid <> t.relid \
         AND a.relid IN (SELECT relid FROM named)) ELSE t.relkind = 'r' END"
    );
    let rows = client.query(&sql, &[&name]).await?;
    let filtered = rows.iter().filter(|row| row.get(5));
    let filtered: Vec<u32> = filtered.map(|row| row.get(2)).collect();
    let mut filters = HashMap::with_capacity(filtered.len());
    for oid in filtered {
        let filter = published_filter(client, oid).await?;
        filters.extend(filter.map(|filter| (oid, filter)));
    }
    let member = |row: &tokio_postgres::Row| {
        let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        let mut columns: Option<Vec<i16>> = row.get(4);
        columns
            .iter_mut()
            .for_each(|columns| columns.sort_unstable());
        let (oid, own) = (row.get(2), row.get(3));
        let filter = filters.get(&oid).cloned();
        let unread = row.get(5) && filter.is_none();
        let clause = Clause { columns, filter };
        let member = Member {
            oid,
            own,
            clause,
            unread,
        };
        (table, member)
    };
    Ok(rows.iter().map(member).collect())
}

/// The condition of a membership; `None` where its table is locked, or it is gone.
async fn published_filter(client: &Client, oid: u32) -> Result<Option<String>, Error> {
    // Sent together they are one transaction, beside what others send on this connection.
    let sql = format!(
        "SET LOCAL lock_timeout = {FILTER_LOCK_TIMEOUT_MS}; \
         SELECT pg_get_expr(prqual, prrelid) FROM pg_publication_rel WHERE oid = {oid}"
    );
    match client.simple_query(&sql).await {
        Ok(answer) => Ok(answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })),
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(None),
        Err(error) => Err(error.into()),
    }
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

/// Children by inheritance of these tables that a publication has as members, though they are none of these tables, and
/// that log nothing to tell old rows by: Postgres refuses to update and delete their rows, through their parent too. A
/// statement without `ONLY` makes them members.
///
/// # Errors
/// The connection failed.
pub async fn harmed_children(
    client: &Client,
    name: &str,
    tables: &[TableName],
) -> Result<Vec<TableName>, Error> {
    let names: Vec<_> = tables.iter().map(TableName::quoted).collect();
    let rows = client
        .query(
            "WITH RECURSIVE own AS (SELECT to_regclass(name)::oid AS oid FROM unnest($2::text[]) name), \
             kin AS (SELECT c.oid FROM own JOIN pg_class c USING (oid) WHERE c.relkind = 'r' \
             UNION SELECT i.inhrelid FROM kin JOIN pg_inherits i ON i.inhparent = kin.oid) \
             SELECT n.nspname::text, c.relname::text FROM kin JOIN pg_class c USING (oid) \
             JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_publication_rel r ON r.prrelid = c.oid \
             JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1 \
             AND NOT EXISTS (SELECT FROM own WHERE own.oid = c.oid) AND c.relreplident <> 'f' \
             AND NOT EXISTS (SELECT FROM pg_index x WHERE x.indrelid = c.oid AND x.indisvalid AND x.indimmediate \
             AND CASE c.relreplident WHEN 'd' THEN x.indisprimary WHEN 'i' THEN x.indisreplident ELSE false END)",
            &[&name, &names],
        )
        .await?;
    let child = |row: &tokio_postgres::Row| {
        TableName::new(row.get::<_, String>(0), row.get::<_, String>(1))
    };
    Ok(rows.iter().map(child).collect())
}

/// The statement that takes tables out of a publication.
fn drop_statement(name: &str, tables: &[TableName]) -> String {
    let names: Vec<_> = tables.iter().map(only).collect();
    let (publication, names) = (quote_identifier(name), names.join(", "));
    format!("ALTER PUBLICATION {publication} DROP TABLE {names}")
}

/// A table as a publication's statement names it. Without `ONLY` its children by inheritance are meant too: they are
/// tables of their own, mostly without a key, and Postgres refuses the updates of a published table without one.
/// Partitions are no such children: theirs is no membership, with `ONLY` and without.
pub(super) fn only(table: &TableName) -> String {
    format!("ONLY {}", table.quoted())
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
    let (quoted, publication) = (only(&table.name), quote_identifier(name));
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
    let sql = format!("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE", only(table));
    match client.batch_execute(&within_lock_timeout(&sql)).await {
        Ok(()) => Ok(true),
        Err(error) => match error.code() {
            Some(code) => Ok(*code != SqlState::LOCK_NOT_AVAILABLE),
            None => Err(error.into()),
        },
    }
}
