//! The look at the source's catalog.

use std::sync::LazyLock;

use millrace_config::Table;
use millrace_event::Lsn;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row, SimpleQueryMessage};

use super::judgement::{Column, Entry, Look, Seen};
use crate::Error;
use crate::source::{partition_tree, wal_position};

/// How long a partition's lock may be waited for before it is looked into, in milliseconds. What else is asked on the
/// session waits too.
const SIZE_LOCK_TIMEOUT_MS: u32 = 200;

/// All tables at once, and all of a table as one snapshot shows it: what one statement changed is seen together. No
/// table and no partition is locked for it, so a look waits for nobody. What partitions log of old rows is taken without
/// their number: one more that is like the others ends no life.
static LOOK: LazyLock<String> = LazyLock::new(|| {
    format!(
        "SELECT w.place, c.oid, \
    md5(coalesce(p.files, nullif(c.relfilenode, 0)::text, '')), coalesce(p.leaves, '{{}}'), coalesce(p.filed, '{{}}'), \
    coalesce(p.members, '{{}}'), coalesce(p.attached, '{{}}'), \
    a.numbers, a.names, a.types, a.typmods, a.told, a.written, a.missing, a.defaults, \
    coalesce(m.names, '{{}}'), \
    md5(c.relreplident::text || coalesce((SELECT string_agg(concat_ws(' ', i.indisprimary, i.indisreplident, \
    i.indimmediate, i.indkey, ARRAY(SELECT attnum FROM pg_attribute WHERE attrelid = c.oid AND attnotnull \
    AND attnum = ANY (i.indkey::int2[]) ORDER BY attnum)), ',' ORDER BY i.indexrelid) \
    FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indisunique \
    AND (i.indisprimary OR i.indisreplident OR w.keyed)), '') || coalesce((SELECT string_agg(DISTINCT d.logged, ',' \
    ORDER BY d.logged) FROM (SELECT concat_ws(' ', l.relreplident, l.relpersistence, (SELECT string_agg(concat(\
    i.indimmediate, ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = l.oid \
    AND attnum = ANY (i.indkey::int2[]) ORDER BY 1)), ',' ORDER BY i.indexrelid) \
    FROM pg_index i WHERE i.indrelid = l.oid AND i.indisvalid AND CASE l.relreplident WHEN 'd' THEN i.indisprimary \
    WHEN 'i' THEN i.indisreplident ELSE false END)) AS logged FROM {tree} t \
    JOIN pg_class l ON l.oid = t.relid WHERE c.relkind = 'p' AND t.isleaf AND l.relkind = 'r') d), '')), \
    (SELECT ARRAY(SELECT unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) ORDER BY 1) FROM pg_index i \
    WHERE i.indrelid = c.oid AND i.indisprimary AND NOT w.keyed) \
    FROM unnest($1::text[], $2::bool[]) WITH ORDINALITY w(name, keyed, place) \
    JOIN pg_class c ON c.oid = to_regclass(w.name) \
    CROSS JOIN LATERAL (SELECT string_agg(l.oid::text || ':' || coalesce(nullif(l.relfilenode, 0)::text, ''), ',' \
    ORDER BY l.oid) FILTER (WHERE t.isleaf) AS files, \
    array_agg(l.oid ORDER BY l.oid) FILTER (WHERE t.isleaf) AS leaves, \
    array_agg(l.relfilenode ORDER BY l.oid) FILTER (WHERE t.isleaf) AS filed, \
    array_agg(l.oid ORDER BY l.oid) FILTER (WHERE t.attached IS NOT NULL) AS members, \
    array_agg(t.attached::text::bigint ORDER BY l.oid) FILTER (WHERE t.attached IS NOT NULL) AS attached \
    FROM {tree} t JOIN pg_class l ON l.oid = t.relid WHERE c.relkind = 'p') p \
    CROSS JOIN LATERAL (SELECT array_agg(DISTINCT attname::text) AS names FROM pg_attribute \
    WHERE attrelid = ANY (p.leaves) AND attnum > 0 AND atthasmissing) m \
    CROSS JOIN LATERAL (SELECT coalesce(array_agg(attnum ORDER BY attnum), '{{}}') AS numbers, \
    coalesce(array_agg(attname::text ORDER BY attnum), '{{}}') AS names, \
    coalesce(array_agg(atttypid ORDER BY attnum), '{{}}') AS types, \
    coalesce(array_agg(atttypmod ORDER BY attnum), '{{}}') AS typmods, \
    coalesce(array_agg(t.typdelim = ',' ORDER BY attnum), '{{}}') AS told, \
    coalesce(array_agg(pg_attribute.xmin::text::bigint ORDER BY attnum), '{{}}') AS written, \
    coalesce(array_agg(atthasmissing ORDER BY attnum), '{{}}') AS missing, \
    coalesce(array_agg(coalesce(d.oid, 0::oid) ORDER BY attnum), '{{}}') AS defaults \
    FROM pg_attribute JOIN pg_type t ON t.oid = atttypid \
    LEFT JOIN pg_attrdef d ON d.adrelid = attrelid AND d.adnum = attnum \
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '') a",
        tree = partition_tree("c.oid")
    )
});

/// Every configured table that is there, and a place in the WAL behind everything that was found.
pub(super) async fn look(client: &Client, tables: &[Table]) -> Result<(Vec<Look>, Lsn), Error> {
    let names: Vec<_> = tables.iter().map(|table| table.name.quoted()).collect();
    let keyed: Vec<_> = tables.iter().map(|table| table.key.is_some()).collect();
    let rows = client.query(LOOK.as_str(), &[&names, &keyed]).await?;
    let found = |row: &Row| {
        let place = usize::try_from(row.get::<_, i64>(0)).ok()?;
        Some(found(row, tables.get(place.checked_sub(1)?)?))
    };
    let looks = rows.iter().filter_map(found).collect();
    // Asked for afterwards: what was found committed below it.
    let lsn = wal_position(client).await?;
    Ok((looks, lsn))
}

/// Finds out which of the partitions that came since are empty. One that cannot be looked into, because somebody has
/// locked it, has not come yet as far as this look goes: the next one judges it.
pub(super) async fn look_into(
    client: &Client,
    before: Option<&Seen>,
    look: &mut Look,
) -> Result<(), Error> {
    let came = before.map_or_else(Vec::new, |before| look.came(before));
    let texts: Vec<_> = came.iter().map(ToString::to_string).collect();
    if texts.is_empty() {
        return Ok(());
    }
    // Sent together they are one transaction, beside what others send on this connection.
    let sql = format!(
        "SET LOCAL lock_timeout = {SIZE_LOCK_TIMEOUT_MS}; \
         SELECT oid FROM unnest('{{{}}}'::oid[]) oid WHERE pg_relation_size(oid) = 0",
        texts.join(",")
    );
    match client.simple_query(&sql).await {
        Ok(answer) => {
            let empty = answer.iter().filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
                _ => None,
            });
            look.empty = empty.collect();
        }
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => look.leave(&came),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn found(row: &Row, table: &Table) -> Look {
    let (leaves, files): (Vec<u32>, Vec<u32>) = (row.get(3), row.get(4));
    let (members, attached): (Vec<u32>, Vec<i64>) = (row.get(5), row.get(6));
    let attached = members.into_iter().zip(attached.into_iter().map(xid));
    Look {
        seen: Seen {
            table: table.name.clone(),
            oid: row.get(1),
            files: row.get(2),
            leaf_files: Some(leaves.iter().copied().zip(files).collect()),
            leaves,
            attached: Some(attached.collect()),
            columns: columns(row, table),
            names: Vec::new(),
            keys: row.get(16),
            primary: row.get(17),
            due: None,
        },
        empty: Vec::new(),
    }
}

fn columns(row: &Row, table: &Table) -> Vec<Column> {
    let (numbers, names): (Vec<i16>, Vec<String>) = (row.get(7), row.get(8));
    let (types, typmods): (Vec<u32>, Vec<i32>) = (row.get(9), row.get(10));
    let (told, written): (Vec<bool>, Vec<i64>) = (row.get(11), row.get(12));
    let (missing, defaults): (Vec<bool>, Vec<u32>) = (row.get(13), row.get(14));
    let untold: Vec<String> = row.get(15);
    let columns = numbers.into_iter().zip(names).enumerate();
    let columns = columns.filter(|(_, (_, name))| !table.columns.exclude.contains(name));
    let column = |(at, (number, name)): (usize, (i16, String))| {
        let masked = table.columns.mask.iter().any(|(column, _)| *column == name);
        // A partitioned table has no rows, and its partitions' older rows may differ.
        let hidden = (missing[at] && (masked || !told[at])) || untold.contains(&name);
        Column {
            number,
            name,
            type_oid: types[at],
            typmod: typmods[at],
            hidden,
            entry: Some(Entry {
                xid: xid(written[at]),
                missing: missing[at],
                default: defaults[at],
            }),
        }
    };
    columns.map(column).collect()
}

/// A transaction id as Postgres prints it.
fn xid(printed: i64) -> u32 {
    u32::try_from(printed).unwrap_or_default()
}
