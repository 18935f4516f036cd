//! Decides whether a replica equals its source: every row of every table, both ways.

mod rows;

use std::cmp::Ordering;
use std::fmt;

use millrace_event::{TableName, quote_identifier};
use tokio_postgres::Client;

use crate::error::LabError;
use crate::postgres::connect;
use rows::{Line, Rows};

/// So many examples are kept in a [`Comparison`].
const EXAMPLES_MAX: usize = 10;
/// So many bytes of a row are shown in an example.
const EXAMPLE_BYTES_MAX: usize = 300;

/// Both sessions print values alike, whatever their servers' defaults.
const PINNED: &str = "SET datestyle = 'ISO'; SET intervalstyle = 'postgres'; SET timezone = 'UTC';
    SET extra_float_digits = 3; SET bytea_output = 'hex'; SET client_encoding = 'UTF8';
    SET lc_monetary = 'C'; SET search_path = ''";

/// One table and its replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compared {
    /// The table at the source.
    pub source: TableName,
    /// The table at the target.
    pub target: TableName,
}

impl Compared {
    /// A table (`schema.table`) whose replica has the same name.
    #[must_use]
    pub fn same(name: &str) -> Self {
        let (schema, table) = name.split_once('.').unwrap_or(("public", name));
        let table = TableName::new(schema, table);
        Self {
            source: table.clone(),
            target: table,
        }
    }
}

/// What a full comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Tables compared.
    pub tables: u64,
    /// Rows of the source.
    pub rows: u64,
    /// Rows of the source that the target lacks.
    pub missing: u64,
    /// Rows of the target that the source lacks.
    pub extra: u64,
    /// Rows with the same key and another content.
    pub different: u64,
    /// The first few findings, one line each.
    pub examples: Vec<String>,
}

impl Comparison {
    /// Whether nothing is missing, extra or different.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.missing == 0 && self.extra == 0 && self.different == 0
    }

    fn note(&mut self, table: &TableName, what: &str, row: &str) {
        if self.examples.len() < EXAMPLES_MAX {
            let mut end = row.len().min(EXAMPLE_BYTES_MAX);
            while !row.is_char_boundary(end) {
                end -= 1;
            }
            self.examples.push(format!(
                "{table}: {what}: {}",
                row[..end].replace('\t', " | ")
            ));
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            tables,
            rows,
            missing,
            extra,
            different,
            ..
        } = self;
        write!(
            f,
            "verified: {rows} rows in {tables} tables, {missing} missing, {extra} extra, \
             {different} different"
        )
    }
}

/// Compares tables in full. Reads both sides ordered by the source's key, so that memory holds a
/// few rows only. The target's columns beyond the source's (`_millrace_version`) do not count; a
/// table that the target lacks counts as all its rows missing.
///
/// # Errors
///
/// Fails when a server is lost, a table has no primary key, or the replica lacks a column.
pub async fn compare(
    source_url: &str,
    target_url: &str,
    tables: &[Compared],
) -> Result<Comparison, LabError> {
    let source = pinned(source_url).await?;
    let target = pinned(target_url).await?;
    let mut found = Comparison::default();
    for table in tables {
        compare_table(&source, &target, table, &mut found).await?;
        found.tables += 1;
    }
    Ok(found)
}

/// Every ordinary table of a database outside the system's schemas and `millrace`, by name.
///
/// # Errors
///
/// Fails when the server is lost.
pub async fn every_table(url: &str) -> Result<Vec<Compared>, LabError> {
    let rows = pinned(url)
        .await?
        .query(
            "SELECT n.nspname, c.relname FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'r' AND n.nspname NOT IN ('information_schema', 'millrace')
               AND n.nspname NOT LIKE 'pg\\_%'
             ORDER BY 1, 2",
            &[],
        )
        .await
        .map_err(LabError::postgres("list the tables"))?;
    Ok(rows
        .iter()
        .map(|row| TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)))
        .map(|name| Compared {
            source: name.clone(),
            target: name,
        })
        .collect())
}

async fn pinned(url: &str) -> Result<Client, LabError> {
    let client = connect(url).await?;
    client
        .batch_execute(PINNED)
        .await
        .map_err(LabError::postgres("pin the session"))?;
    Ok(client)
}

async fn compare_table(
    source: &Client,
    target: &Client,
    table: &Compared,
    found: &mut Comparison,
) -> Result<(), LabError> {
    let shape = Shape::read(source, &table.source).await?;
    let mut left = Rows::open(source, &shape.query(&table.source), shape.key.len()).await?;
    let exists: bool = target
        .query_one(
            "SELECT to_regclass($1) IS NOT NULL",
            &[&table.target.quoted()],
        )
        .await
        .map_err(LabError::postgres("look for the replica"))?
        .get(0);
    let mut right = match exists {
        true => Some(Rows::open(target, &shape.query(&table.target), shape.key.len()).await?),
        false => None,
    };
    let mut ours = left.next().await?;
    let mut theirs = next(&mut right).await?;
    loop {
        let order = match (&ours, &theirs) {
            (None, None) => return Ok(()),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => a.key.cmp(&b.key),
        };
        if order.is_lt() || order.is_eq() {
            found.rows += 1;
        }
        judge(found, &table.source, order, ours.as_ref(), theirs.as_ref());
        if order.is_le() {
            ours = advance(ours, left.next().await?)?;
        }
        if order.is_ge() {
            theirs = advance(theirs, next(&mut right).await?)?;
        }
    }
}

fn judge(
    found: &mut Comparison,
    table: &TableName,
    order: Ordering,
    ours: Option<&Line>,
    theirs: Option<&Line>,
) {
    let text = |line: Option<&Line>| line.map(Line::text).unwrap_or_default();
    match order {
        Ordering::Less => {
            found.missing += 1;
            found.note(table, "missing in the target", &text(ours));
        }
        Ordering::Greater => {
            found.extra += 1;
            found.note(table, "extra in the target", &text(theirs));
        }
        Ordering::Equal => {
            if ours.map(|line| &line.row) != theirs.map(|line| &line.row) {
                found.different += 1;
                found.note(table, "different, source", &text(ours));
                found.note(table, "different, target", &text(theirs));
            }
        }
    }
}

/// The merge is right only while each side rises; equal keys are rows of a replica without a key.
fn advance(before: Option<Line>, after: Option<Line>) -> Result<Option<Line>, LabError> {
    match (&before, &after) {
        (Some(before), Some(after)) if after.key < before.key => Err(LabError::Unexpected(
            format!("rows out of order at `{}`", after.text()),
        )),
        _ => Ok(after),
    }
}

async fn next(rows: &mut Option<Rows>) -> Result<Option<Line>, LabError> {
    match rows {
        Some(rows) => rows.next().await,
        None => Ok(None),
    }
}

/// The source's columns, and which of them are the key, in its order.
struct Shape {
    columns: Vec<String>,
    key: Vec<String>,
}

impl Shape {
    async fn read(client: &Client, table: &TableName) -> Result<Self, LabError> {
        // A generated column is computed by the target itself, or absent there.
        let columns = names(
            client,
            "SELECT attname FROM pg_catalog.pg_attribute
             WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped
               AND attgenerated = '' ORDER BY attnum",
            table,
        )
        .await?;
        let key = names(
            client,
            "SELECT a.attname FROM pg_catalog.pg_index i
             CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, place)
             JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
             WHERE i.indrelid = $1::text::regclass AND i.indisprimary
               AND k.place <= i.indnkeyatts
             ORDER BY k.place",
            table,
        )
        .await?;
        if key.is_empty() {
            return Err(LabError::Unexpected(format!(
                "{table} has no primary key to compare by"
            )));
        }
        Ok(Self { columns, key })
    }

    /// The key's texts first: `format` prints a value as COPY does, and the collation is bytes'.
    fn query(&self, table: &TableName) -> String {
        let keys: Vec<String> = self
            .key
            .iter()
            .map(|name| format!("format('%s', {}) COLLATE \"C\"", quote_identifier(name)))
            .collect();
        let columns: Vec<String> = self
            .columns
            .iter()
            .map(|name| quote_identifier(name))
            .collect();
        let order: Vec<String> = (1..=keys.len()).map(|place| place.to_string()).collect();
        format!(
            "COPY (SELECT {}, {} FROM {} ORDER BY {}) TO STDOUT",
            keys.join(", "),
            columns.join(", "),
            table.quoted(),
            order.join(", ")
        )
    }
}

async fn names(client: &Client, query: &str, table: &TableName) -> Result<Vec<String>, LabError> {
    let rows = client
        .query(query, &[&table.quoted()])
        .await
        .map_err(LabError::postgres(format!("read the shape of {table}")))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests;
