//! Tables as they are described to those who create them elsewhere.

use std::collections::BTreeSet;
use std::time::Duration;

use millrace_event::{ColumnSchema, ColumnShape, TableName, TableSchema, TypeSchema, fingerprint};
use tokio_postgres::Client;

use super::catalog::SourceTable;
use super::inspect::catalog_columns;
use super::selection::CatalogColumn;
use crate::Error;

/// Describes a table's columns for those who create it elsewhere: types as SQL, and the enums and domains
/// that they use.
///
/// # Errors
/// The connection failed.
pub async fn describe(
    client: &Client,
    name: &TableName,
    shapes: &[ColumnShape<'_>],
    key: &[String],
) -> Result<TableSchema, Error> {
    let oids: Vec<u32> = shapes.iter().map(|shape| shape.type_oid).collect();
    let typmods: Vec<i32> = shapes.iter().map(|shape| shape.typmod).collect();
    let names: Vec<&str> = shapes.iter().map(|shape| shape.name).collect();
    let rows = client
        .query(
            "SELECT format_type(u.oid, u.typmod), coalesce(a.attnotnull, false) \
             AND NOT EXISTS (SELECT FROM pg_constraint n WHERE n.conrelid = a.attrelid AND n.contype = 'n' \
             AND NOT n.convalidated AND n.conkey = ARRAY[a.attnum]), \
             coalesce(a.attnum, 0::int2), \
             CASE WHEN a.atthasmissing AND a.atttypid = u.oid AND t.typdelim = ',' \
             THEN (a.attmissingval::text::text[])[1] END, \
             coalesce(to_regclass($4)::oid, 0::oid) \
             FROM unnest($1::oid[], $2::int4[], $3::text[]) WITH ORDINALITY u(oid, typmod, name, place) \
             LEFT JOIN pg_attribute a ON a.attrelid = to_regclass($4) AND a.attname = u.name \
             AND NOT a.attisdropped LEFT JOIN pg_type t ON t.oid = a.atttypid ORDER BY u.place",
            &[&oids, &typmods, &names, &name.quoted()],
        )
        .await?;
    let columns = shapes
        .iter()
        .zip(&rows)
        .map(|(shape, row)| ColumnSchema {
            name: shape.name.to_owned(),
            type_name: row.get(0),
            type_oid: shape.type_oid,
            typmod: shape.typmod,
            not_null: row.get(1),
            number: row.get(2),
            missing: row.get(3),
            former: Vec::new(),
        })
        .collect();
    Ok(TableSchema {
        name: name.clone(),
        version: fingerprint(shapes.iter().copied(), key.iter().map(String::as_str)),
        columns,
        key: key.to_vec(),
        types: types_of(client, oids).await?,
        oid: rows.first().map_or(0, |row| row.get(4)),
        dropped: Vec::new(),
    })
}

/// Whether the catalog has a table as the WAL announces it. Then it has what the WAL has told, whoever holds the table,
/// as VACUUM FULL does.
///
/// # Errors
/// The connection failed.
pub(crate) async fn is_as_announced(
    client: &Client,
    table: &SourceTable,
    announced: &[ColumnShape<'_>],
) -> Result<bool, Error> {
    let row = client
        .query_one("SELECT to_regclass($1)::oid", &[&table.name.quoted()])
        .await?;
    let Some(oid) = row.get::<_, Option<u32>>(0) else {
        return Ok(false);
    };
    let columns = catalog_columns(client, oid).await?;
    Ok(shapes_now(table, &columns).eq(announced.iter().copied()))
}

/// The columns of the catalog as they are published.
fn shapes_now<'c>(
    table: &'c SourceTable,
    columns: &'c [CatalogColumn],
) -> impl Iterator<Item = ColumnShape<'c>> {
    let columns = columns.iter().filter(|column| !column.generated);
    columns.filter_map(|column| {
        table.selection.published(ColumnShape {
            name: &column.name,
            type_oid: column.type_oid,
            typmod: column.typmod,
        })
    })
}

/// How long a change of a table's shape may hold streaming up before the next life looks again.
pub(crate) const SETTLING_MAX: Duration = Duration::from_secs(10);

/// How often it is looked at meanwhile.
const SETTLING_PAUSE: Duration = Duration::from_millis(50);

/// Who holds a table against everybody, as those do who change its shape.
const HOLDERS: &str = "SELECT string_agg(DISTINCT coalesce(l.pid::text, 'a prepared transaction'), ', ') FROM pg_locks l \
    JOIN pg_database d ON d.oid = l.database WHERE d.datname = current_database() \
    AND l.relation = to_regclass($1) AND l.mode = 'AccessExclusiveLock' AND l.granted";

/// Waits, for so long at `most`, until the catalog has what the WAL has told of a table. A commit is in the WAL before
/// it is visible, for as long as a synchronous standby takes; whoever changed the table's shape holds its lock until it
/// is. The lock is looked at instead of asked for: nobody queues behind it, nor behind those who wait for it, and the
/// session's other questions are answered meanwhile.
///
/// # Errors
/// The table is held for longer: look again later. Or the connection failed.
pub(crate) async fn settled(
    client: &Client,
    name: &TableName,
    most: Duration,
) -> Result<(), Error> {
    let quoted = name.quoted();
    let began = tokio::time::Instant::now();
    loop {
        let row = client.query_one(HOLDERS, &[&quoted]).await?;
        let Some(holders) = row.get::<_, Option<String>>(0) else {
            return Ok(());
        };
        if began.elapsed() >= most {
            return Err(Error::retry_because(format!(
                "table {name} is being changed at the source (process {holders}), and cannot be described until then"
            )));
        }
        tokio::time::sleep(SETTLING_PAUSE).await;
    }
}

/// Describes a table as it is now, with what is done about its columns. `None`: it is gone.
///
/// # Errors
/// The table was changed meanwhile: the next life describes it. Or the connection failed.
pub(crate) async fn describe_now(
    client: &Client,
    table: &SourceTable,
) -> Result<Option<TableSchema>, Error> {
    let quoted = table.name.quoted();
    let oid = client
        .query_one("SELECT to_regclass($1)::oid", &[&quoted])
        .await?;
    let Some(oid) = oid.get::<_, Option<u32>>(0) else {
        return Ok(None);
    };
    let columns = catalog_columns(client, oid).await?;
    let shapes: Vec<_> = shapes_now(table, &columns).collect();
    let schema = describe_selected(client, table, &shapes, &table.key).await?;
    // Looked at twice: a column that was renamed in between would count as dropped.
    let is_same = |described: &ColumnSchema| {
        let mut columns = columns.iter();
        columns.any(|column| (column.number, &column.name) == (described.number, &described.name))
    };
    if schema.oid != oid || !schema.columns.iter().all(is_same) {
        let reason = format!("table {} was changed while it was described", table.name);
        return Err(Error::retry_because(reason));
    }
    Ok(Some(schema))
}

/// Describes a table's columns; of those that do not travel as they are, no value is told.
///
/// # Errors
/// The connection failed.
pub(crate) async fn describe_selected(
    client: &Client,
    table: &SourceTable,
    shapes: &[ColumnShape<'_>],
    key: &[String],
) -> Result<TableSchema, Error> {
    let mut schema = describe(client, &table.name, shapes, key).await?;
    for column in &mut schema.columns {
        if !table.selection.leaves(&column.name) {
            column.missing = None;
        }
    }
    Ok(schema)
}

const TYPE: &str = "SELECT n.nspname::text, t.typname::text, t.typtype::text, t.typelem, t.typbasetype, \
    format_type(t.typbasetype, t.typtypmod), t.typnotnull, \
    ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid ORDER BY enumsortorder), \
    ARRAY(SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE contypid = t.oid AND contype = 'c' \
    ORDER BY conname), t.typcategory::text \
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace WHERE t.oid = $1";

/// What remains to be done about a type.
enum Ahead {
    Look(u32),
    /// What it is made of was looked at.
    Take(TypeSchema),
}

/// The enums and domains among these types and under them, those first that others are made of.
async fn types_of(client: &Client, oids: Vec<u32>) -> Result<Vec<TypeSchema>, Error> {
    let mut ahead: Vec<Ahead> = oids.into_iter().map(Ahead::Look).collect();
    let mut seen = BTreeSet::new();
    let mut types = Vec::new();
    while let Some(next) = ahead.pop() {
        let oid = match next {
            Ahead::Look(oid) => oid,
            Ahead::Take(schema) => {
                types.push(schema);
                continue;
            }
        };
        // Types below this OID are built in everywhere.
        if oid < 16_384 || !seen.insert(oid) {
            continue;
        }
        let Some(row) = client.query_opt(TYPE, &[&oid]).await? else {
            continue;
        };
        let name = TableName::new(row.get::<_, String>(0), row.get::<_, String>(1));
        match row.get(2) {
            "e" => types.push(TypeSchema::Enum {
                name,
                labels: row.get(7),
            }),
            "d" => {
                let (base, not_null, checks) = (row.get(5), row.get(6), row.get(8));
                ahead.push(Ahead::Take(TypeSchema::Domain {
                    name,
                    base,
                    not_null,
                    checks,
                }));
                ahead.push(Ahead::Look(row.get(4)));
            }
            "b" if row.get::<_, &str>(9) == "A" => ahead.push(Ahead::Look(row.get(3))),
            _ => {}
        }
    }
    Ok(types)
}
