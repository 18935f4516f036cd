//! Whether the slot would outlive a read of whole tables.

use bytesize::ByteSize;
use millrace_config::{Code, Condition};
use millrace_event::{TableName, quote_literal};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::partitions::partition_tree;
use super::slot_name;
use crate::Error;

/// How long a table's lock may be waited for before its size is asked for, in milliseconds. What else is asked on the
/// session waits too.
const SIZE_LOCK_TIMEOUT_MS: u32 = 200;

/// Warns where these tables have more bytes than WAL may be written before the source's slot is lost: while they are
/// read, the slot may have to keep as much.
///
/// # Errors
/// The connection failed.
pub async fn room_for(
    client: &Client,
    source: &str,
    tables: &[&TableName],
) -> Result<Option<Condition>, Error> {
    let slot = slot_name(source);
    let row = client
        .query_opt(
            "SELECT safe_wal_size, current_setting('max_slot_wal_keep_size') FROM pg_replication_slots \
             WHERE slot_name = $1",
            &[&slot],
        )
        .await?;
    let Some((safe, limit)) = row.and_then(|row| {
        // NULL: nothing limits it.
        let safe = row.get::<_, Option<i64>>(0)?;
        Some((u64::try_from(safe).unwrap_or(0), row.get::<_, String>(1)))
    }) else {
        return Ok(None);
    };
    let names = tables.iter().map(|table| quote_literal(&table.quoted()));
    let names: Vec<_> = names.collect();
    // Sent together they are one transaction, beside what others send on this connection.
    let sql = format!(
        "SET LOCAL lock_timeout = {SIZE_LOCK_TIMEOUT_MS}; \
         SELECT coalesce(sum(pg_total_relation_size(relid)), 0) FROM unnest(ARRAY[{}]::text[]) name, \
         LATERAL {} tree",
        names.join(", "),
        partition_tree("to_regclass(name)")
    );
    let answer = match client.simple_query(&sql).await {
        Ok(answer) => answer,
        // Nobody knows its size now, and nobody can read it either.
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let size = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
        _ => None,
    });
    let size = size.unwrap_or(0_u64);
    Ok((size > safe).then(|| outgrown(tables, size, &slot, safe, &limit)))
}

fn outgrown(tables: &[&TableName], size: u64, slot: &str, safe: u64, limit: &str) -> Condition {
    let what = match tables {
        [table] => format!("table {table} has"),
        tables => format!("{} tables have", tables.len()),
    };
    Condition::new(
        Code::BackfillWal,
        format!(
            "{what} {}, and slot {slot} is lost after {} more of WAL: max_slot_wal_keep_size is {limit}",
            ByteSize::b(size),
            ByteSize::b(safe)
        ),
        "ALTER SYSTEM SET max_slot_wal_keep_size to more than that, then SELECT pg_reload_conf(); \
         or watch the slot in `millrace status`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_has_the_numbers() {
        let table = TableName::new("public", "t");
        let warning = |tables: &[&TableName]| {
            outgrown(tables, 3 << 30, "millrace_shop", 1 << 30, "1GB").to_string()
        };
        let text = warning(&[&table]);
        for part in [
            "E1141",
            "public.t",
            "3.0 GiB",
            "1.0 GiB",
            "millrace_shop",
            "1GB",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(warning(&[&table, &table]).contains("2 tables have 3.0 GiB"));
    }
}
