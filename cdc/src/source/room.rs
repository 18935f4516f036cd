//! Whether the slot would outlive a read of whole tables.

use bytesize::ByteSize;
use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Client;

use super::slot_name;
use crate::Error;

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
    let names: Vec<_> = tables.iter().map(|table| table.quoted()).collect();
    let row = client
        .query_one(
            "SELECT coalesce(sum(pg_total_relation_size(part)), 0)::bigint FROM \
             (SELECT to_regclass(name) AS part FROM unnest($1::text[]) name \
             UNION SELECT relid FROM unnest($1::text[]) name, pg_partition_tree(to_regclass(name))) parts",
            &[&names],
        )
        .await?;
    let size = u64::try_from(row.get::<_, i64>(0)).unwrap_or(0);
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
