//! How large tables are, as far as the source knows without counting.

use std::collections::BTreeMap;

use millrace_event::TableName;
use tokio_postgres::Client;

use super::partitions::partition_tree;

/// How many rows the source thinks that these tables have; without those of which it does not know. It waits for
/// nobody's lock.
///
/// # Errors
/// The connection failed.
pub async fn estimate_rows(
    client: &Client,
    tables: impl IntoIterator<Item = &TableName>,
) -> Result<BTreeMap<TableName, u64>, tokio_postgres::Error> {
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables
        .into_iter()
        .map(|table| (table.schema.as_str(), table.table.as_str()))
        .unzip();
    if names.is_empty() {
        return Ok(BTreeMap::new());
    }
    let sql = format!(
        "SELECT w.schema, w.name, coalesce((SELECT sum(greatest(l.reltuples, 0)) FROM {} p \
         JOIN pg_class l ON l.oid = p.relid WHERE p.isleaf), 0)::bigint \
         FROM unnest($1::text[], $2::text[]) w(schema, name) \
         JOIN pg_namespace n ON n.nspname = w.schema \
         JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name",
        partition_tree("c.oid")
    );
    let rows = client.query(&sql, &[&schemas, &names]).await?;
    let estimates = rows.iter().filter_map(|row| {
        let table = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        let rows = u64::try_from(row.get::<_, i64>(2)).ok()?;
        (rows > 0).then_some((table, rows))
    });
    Ok(estimates.collect())
}
