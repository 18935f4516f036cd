//! What the source's catalog says about tables and types.

use std::collections::BTreeSet;

use millrace_config::{Code, Condition, Table};
use millrace_event::{ColumnSchema, ColumnShape, TableName, TableSchema, TypeSchema, fingerprint};
use tokio_postgres::Client;

use super::key::{UniqueIndex, key_of};
use crate::Error;

/// A configured table as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTable {
    /// The table.
    pub name: TableName,
    /// Its key columns, in the key's order.
    pub key: Vec<String>,
    /// Its published columns: name, type OID, type modifier.
    pub columns: Vec<(String, u32, i32)>,
}

impl SourceTable {
    /// The columns' shapes, as a relation message tells them.
    #[must_use]
    pub fn shapes(&self) -> Vec<ColumnShape<'_>> {
        self.columns
            .iter()
            .map(|(name, type_oid, typmod)| ColumnShape {
                name,
                type_oid: *type_oid,
                typmod: *typmod,
            })
            .collect()
    }

    /// The indexes of the key columns.
    ///
    /// # Panics
    /// Never: a key column was found among the columns.
    #[must_use]
    pub fn key_indexes(&self) -> Vec<usize> {
        let index = |name: &String| self.columns.iter().position(|(column, ..)| column == name);
        self.key
            .iter()
            .map(|name| index(name).expect("a key column is a column"))
            .collect()
    }
}

/// Looks every configured table up and checks that it can be published: it exists, has a key, logs that key
/// for old rows, and may be read. All failures come at once.
///
/// # Errors
/// The first condition, with every failing table in its text; or the connection failed.
pub async fn inspect_tables(client: &Client, tables: &[Table]) -> Result<Vec<SourceTable>, Error> {
    let mut found = Vec::with_capacity(tables.len());
    let mut failed: Vec<Condition> = Vec::new();
    for table in tables {
        match inspect_table(client, table).await {
            Ok(table) => found.push(table),
            Err(Error::Halt(condition)) => failed.push(condition),
            Err(other) => return Err(other),
        }
    }
    match failed.len() {
        0 => Ok(found),
        1 => Err(Error::halt(failed.remove(0))),
        _ => {
            let join = |part: fn(&Condition) -> &str| {
                failed.iter().map(part).collect::<Vec<_>>().join("; ")
            };
            let (message, remedy) = (join(|c| &c.message), join(|c| &c.remedy));
            Err(Error::halt(Condition::new(
                failed.remove(0).code,
                message,
                remedy,
            )))
        }
    }
}

const TABLE: &str = "SELECT c.oid, c.relkind::text, c.relreplident::text, \
    has_table_privilege(c.oid, 'SELECT'), c.relpersistence::text \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname = $1 AND c.relname = $2";

const COLUMNS: &str = "SELECT attname::text, atttypid, atttypmod, attnotnull FROM pg_attribute \
    WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum";

/// The unique indexes that can identify rows, with their columns in the index's order.
const KEYS: &str = "SELECT i.indisprimary, i.indisreplident, \
    array_agg(a.attname::text ORDER BY k.place), bool_and(a.attnotnull), c.relname::text, i.indimmediate \
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid \
    CROSS JOIN unnest(i.indkey::smallint[]) WITH ORDINALITY k(attnum, place) \
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum \
    WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indpred IS NULL \
    AND k.place <= i.indnkeyatts AND i.indexprs IS NULL \
    GROUP BY i.indexrelid, i.indisprimary, i.indisreplident, c.relname, i.indimmediate \
    ORDER BY i.indexrelid";

async fn inspect_table(client: &Client, table: &Table) -> Result<SourceTable, Error> {
    let name = &table.name;
    let halt = |code, message: String, remedy: String| {
        Err(Error::halt(Condition::new(code, message, remedy)))
    };
    let quoted = name.quoted();
    let row = client
        .query_opt(TABLE, &[&name.schema, &name.table])
        .await?;
    let Some(row) = row.filter(|row| matches!(row.get(1), "r" | "p")) else {
        return halt(
            Code::TableMissing,
            format!("table {name} does not exist in the source, or is no table"),
            format!("create it, or remove tables/{name}.toml"),
        );
    };
    let (oid, identity): (u32, String) = (row.get(0), row.get(2));
    if row.get::<_, &str>(4) != "p" {
        return halt(
            Code::TableMissing,
            format!("table {name} is unlogged or temporary: its changes are not in the WAL"),
            format!("ALTER TABLE {quoted} SET LOGGED"),
        );
    }
    if !row.get::<_, bool>(3) {
        return halt(
            Code::SourcePrivilege,
            format!("table {name} may not be read by this user"),
            format!("GRANT SELECT ON {quoted} TO this user (see `millrace init-sql`)"),
        );
    }
    let columns: Vec<(String, u32, i32)> = client
        .query(COLUMNS, &[&oid])
        .await?
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect();
    let indexes: Vec<UniqueIndex> = client
        .query(KEYS, &[&oid])
        .await?
        .iter()
        .map(|row| UniqueIndex {
            primary: row.get(0),
            identity: row.get(1),
            columns: row.get(2),
            not_null: row.get(3),
            name: row.get(4),
            immediate: row.get(5),
        })
        .collect();
    let key = key_of(table, &identity, &indexes).map_err(Error::halt)?;
    Ok(SourceTable {
        name: name.clone(),
        key,
        columns,
    })
}

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
             FROM unnest($1::oid[], $2::int4[], $3::text[]) WITH ORDINALITY u(oid, typmod, name, place) \
             LEFT JOIN pg_attribute a ON a.attrelid = to_regclass($4) AND a.attname = u.name \
             AND NOT a.attisdropped ORDER BY u.place",
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
        })
        .collect();
    Ok(TableSchema {
        name: name.clone(),
        version: fingerprint(shapes.iter().copied(), key.iter().map(String::as_str)),
        columns,
        key: key.to_vec(),
        types: types_of(client, oids).await?,
    })
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
