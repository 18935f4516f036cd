//! The SQL text that the Postgres sink applies rows with, made from a table's layout. Pure.
//!
//! Values travel as text and are cast by the server to the column's type *without* its modifier, so that the
//! assignment then checks lengths: an explicit cast to `varchar(3)` would silently cut the value. Where many full
//! rows are written, values of a few plain types travel in their binary [`Form`].

mod form;
mod partial;
mod wire;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use millrace_event::{TableName, quote_identifier, quote_literal};

pub use self::form::Form;
pub use self::partial::{move_letter, move_row, partial, partial_letters};
pub use self::wire::Wire;
use crate::row::TableLayout;

/// The column that holds a row's version.
pub const VERSION_COLUMN: &str = "_millrace_version";

/// The reason that a row whose unchanged columns nobody knows is set aside with.
pub const INCOMPLETE: &str = "incomplete: unchanged columns unknown";

/// The keys of a relation's rows that are set aside for that. Parameters: relation, [`INCOMPLETE`], the key that they
/// are behind, how many.
pub const INCOMPLETE_KEYS: &str = "SELECT DISTINCT key FROM millrace.dead_letter \
    WHERE relation = $1::text AND reason = $2::text AND resolved_at IS NULL AND key > $3::text \
    ORDER BY key LIMIT $4::bigint";

/// Forgets a relation's tombstones below a version. Parameters: relation, version.
pub const TOMBSTONES_BELOW: &str =
    "DELETE FROM millrace.tombstone WHERE relation = $1::text AND version < $2::uuid";

/// Resolves a relation's dead letters below a version. Parameters: relation, version.
pub const LETTERS_BELOW: &str = "UPDATE millrace.dead_letter SET resolved_at = now() \
    WHERE relation = $1::text AND version < $2::uuid AND resolved_at IS NULL";

/// Drops dead letters that were resolved a while ago. Parameters: sink, that while in seconds, how many at most.
pub const DROP_LETTERS: &str = "DELETE FROM millrace.dead_letter WHERE id = ANY (ARRAY( \
    SELECT id FROM millrace.dead_letter WHERE sink = $1::text \
    AND resolved_at < now() - $2::float8 * interval '1 second' LIMIT $3::bigint))";

/// Forgets old tombstones, and remembers how far: relation, clean-up floor and how many, of each relation that had some.
/// Parameters: relations, a version each, seconds that a tombstone is kept, how many at most.
pub const FORGET_DELETES: &str = "WITH dropped AS (DELETE FROM millrace.tombstone WHERE ctid = ANY (ARRAY( \
    SELECT t.ctid FROM unnest($1::text[], $2::uuid[]) AS u (relation, version) \
    JOIN millrace.tombstone t ON t.relation = u.relation AND t.version <= u.version \
    AND t.deleted_at <= now() - $3::float8 * interval '1 second' LIMIT $4::bigint)) \
    RETURNING relation, version), \
    of AS (SELECT relation, max(version::text COLLATE \"C\")::uuid AS version, count(*) AS deletes \
    FROM dropped GROUP BY relation), \
    raised AS (INSERT INTO millrace.table_floor AS f (relation, cleanup_floor) SELECT relation, version FROM of \
    ON CONFLICT (relation) DO UPDATE SET \
    cleanup_floor = greatest(f.cleanup_floor, excluded.cleanup_floor) RETURNING relation, cleanup_floor) \
    SELECT r.relation, r.cleanup_floor, o.deletes FROM raised r JOIN of o USING (relation)";

/// Raises a relation's truncate floor. Parameters: relation, version.
pub const TRUNCATE_FLOOR: &str = "INSERT INTO millrace.table_floor AS f (relation, truncate_floor) \
    VALUES ($1::text, $2::uuid) ON CONFLICT (relation) DO UPDATE SET \
    truncate_floor = greatest(f.truncate_floor, excluded.truncate_floor)";

const VERSION: &str = "\"_millrace_version\"";

/// Which columns of a layout a statement writes, as indexes.
pub type Present = BTreeSet<usize>;

/// All columns of a layout.
#[must_use]
pub fn all(layout: &TableLayout) -> Present {
    (0..layout.columns.len()).collect()
}

fn name(layout: &TableLayout, column: usize) -> String {
    quote_identifier(&layout.columns[column].target)
}

fn join(items: impl IntoIterator<Item = String>, separator: &str) -> String {
    items.into_iter().collect::<Vec<_>>().join(separator)
}

fn as_text(columns: &[usize]) -> Vec<(usize, Form)> {
    columns.iter().map(|column| (*column, Form::Text)).collect()
}

/// The rows of the arrays `$1..` of these columns, then the versions and, where asked for, the key texts.
///
/// The arrays are unnested in a SELECT list, where the server hands on row by row. In a FROM it would first
/// store every array as a table of its own, which costs a fifth of the whole statement.
fn source(columns: &[(usize, Form)], with_key: bool) -> String {
    let arrays = columns
        .iter()
        .zip(1..)
        .map(|((column, form), n)| format!("unnest(${n}::{}[]) AS c{column}", form.type_name()));
    let version = columns.len() + 1;
    let key = format!("unnest(${}::text[]) AS k", version + 1);
    let last = [format!("unnest(${version}::uuid[]) AS v"), key];
    let last = last.into_iter().take(1 + usize::from(with_key));
    format!("(SELECT {}) AS s", join(arrays.chain(last), ", "))
}

/// Versions and key texts alone.
const KEYS: &str = "(SELECT unnest($1::uuid[]) AS v, unnest($2::text[]) AS k) AS s";

fn cast(layout: &TableLayout, column: usize) -> String {
    match layout.columns[column].cast.as_str() {
        // The one cast from text that does not take all that the type prints: neither `-` nor a number.
        "regclass" => format!("regclassin(textout(s.c{column}))"),
        name => format!("s.c{column}::{name}"),
    }
}

/// `t.key = s.key and ..`, with casts.
fn same_key(layout: &TableLayout) -> String {
    join(
        layout
            .key
            .iter()
            .map(|column| format!("t.{} = {}", name(layout, *column), cast(layout, *column))),
        " AND ",
    )
}

fn relation(layout: &TableLayout) -> String {
    quote_literal(&layout.relation()).trim_start().to_owned()
}

/// A tombstone of `key` at or above `version` exists.
fn entombed(layout: &TableLayout, key: &str, version: &str) -> String {
    format!(
        "EXISTS (SELECT 1 FROM millrace.tombstone x WHERE x.relation = {} AND x.key = {key} \
         AND x.version >= {version})",
        relation(layout)
    )
}

/// The guarded `ON CONFLICT` clause that writes all columns but the key.
fn on_conflict(layout: &TableLayout) -> String {
    let key = join(layout.key.iter().map(|column| name(layout, *column)), ", ");
    let mut set = String::new();
    for column in (0..layout.columns.len()).filter(|column| !layout.is_key(*column)) {
        let name = name(layout, column);
        let _ = write!(set, "{name} = excluded.{name}, ");
    }
    format!(
        "ON CONFLICT ({key}) DO UPDATE SET {set}{VERSION} = excluded.{VERSION} \
         WHERE t.{VERSION} < excluded.{VERSION}"
    )
}

fn insert_into(layout: &TableLayout) -> String {
    let columns = join(
        (0..layout.columns.len()).map(|column| name(layout, column)),
        ", ",
    );
    format!(
        "INSERT INTO {} AS t ({columns}, {VERSION}) OVERRIDING SYSTEM VALUE",
        layout.target.quoted()
    )
}

/// Lifts the statement timeout until the transaction ends.
pub const UNBOUNDED: &str = "SELECT set_config('statement_timeout', '0', true)";

/// Bounds how long a statement waits for a lock, until [`LOCK_AS_BEFORE`].
pub const LOCK_BOUNDED: &str = "SET LOCAL lock_timeout = '2s'";

/// Lets statements wait for locks as they did.
pub const LOCK_AS_BEFORE: &str = "SET LOCAL lock_timeout TO DEFAULT";

/// Writes full rows. Parameters: an array of its form for each column, versions, key texts.
#[must_use]
pub fn upsert(layout: &TableLayout, forms: &[Form]) -> String {
    format!(
        "{} WHERE NOT {} {}",
        insert_from(layout, forms, true),
        entombed(layout, "s.k", "s.v"),
        on_conflict(layout)
    )
}

/// Writes full rows that are newer than every tombstone of their table. Parameters: an array of its form for
/// each column, versions.
#[must_use]
pub fn upsert_newest(layout: &TableLayout, forms: &[Form]) -> String {
    format!("{} {}", insert(layout, forms), on_conflict(layout))
}

/// Writes full rows that are newer than every tombstone of their table and whose keys the target does not
/// have; it fails as a whole if it has one. Parameters: as [`upsert_newest`].
#[must_use]
pub fn insert(layout: &TableLayout, forms: &[Form]) -> String {
    insert_from(layout, forms, false)
}

/// Takes full rows whose keys the target does not have; it fails as a whole if it has one. Behind each row's
/// columns comes its version.
#[must_use]
pub fn copy(layout: &TableLayout, binary: bool) -> String {
    let columns = join(
        (0..layout.columns.len()).map(|column| name(layout, column)),
        ", ",
    );
    let format = if binary { " (FORMAT binary)" } else { "" };
    format!(
        "COPY {} ({columns}, {VERSION}) FROM STDIN{format}",
        layout.target.quoted()
    )
}

fn insert_from(layout: &TableLayout, forms: &[Form], with_key: bool) -> String {
    let columns: Vec<_> = (0..layout.columns.len())
        .zip(forms.iter().copied())
        .collect();
    let values = columns.iter().map(|(column, form)| match form {
        Form::Text => cast(layout, *column),
        _ => format!("s.c{column}"),
    });
    format!(
        "{} SELECT {}, s.v FROM {}",
        insert_into(layout),
        join(values, ", "),
        source(&columns, with_key)
    )
}

/// Deletes rows. Parameters: a text array for each key column, versions.
#[must_use]
pub fn delete(layout: &TableLayout) -> String {
    format!(
        "DELETE FROM {} AS t USING {} WHERE {} AND t.{VERSION} < s.v",
        layout.target.quoted(),
        source(&as_text(&layout.key), false),
        same_key(layout)
    )
}

/// Remembers deleted keys. Parameters: versions, key texts.
#[must_use]
pub fn tombstone(layout: &TableLayout) -> String {
    format!(
        "INSERT INTO millrace.tombstone AS x (relation, key, version) \
         SELECT {}, s.k, s.v FROM {KEYS} \
         ON CONFLICT (relation, key) DO UPDATE SET version = excluded.version, deleted_at = now() \
         WHERE x.version < excluded.version",
        relation(layout)
    )
}

/// Marks dead letters that newer full versions of their keys supersede. Parameters: versions, key texts.
#[must_use]
pub fn resolve(layout: &TableLayout) -> String {
    format!(
        "UPDATE millrace.dead_letter d SET resolved_at = now() \
         FROM {KEYS} \
         WHERE d.relation = {} AND d.key = s.k AND d.version < s.v AND d.resolved_at IS NULL",
        relation(layout)
    )
}

/// Deletes every row below a version. Parameter: the version.
#[must_use]
pub fn delete_below(layout: &TableLayout) -> String {
    format!(
        "DELETE FROM {} WHERE {VERSION} < $1::uuid",
        layout.target.quoted()
    )
}

/// `CREATE TABLE` with the given columns (name, type and modifiers, not null) and key; without columns of it, without a
/// key.
#[must_use]
pub fn create_table(
    target: &TableName,
    columns: &[(String, String, bool)],
    key: &[String],
) -> String {
    let mut lines: Vec<_> = columns
        .iter()
        .map(|(column, type_name, not_null)| {
            let not_null = if *not_null { " NOT NULL" } else { "" };
            format!("{} {type_name}{not_null}", quote_identifier(column))
        })
        .collect();
    lines.push(version_definition());
    if !key.is_empty() {
        lines.push(primary_key(key));
    }
    format!(
        "CREATE TABLE {} (\n    {}\n)",
        target.quoted(),
        lines.join(",\n    ")
    )
}

/// `ALTER TABLE .. ADD PRIMARY KEY`.
#[must_use]
pub fn add_key(target: &TableName, key: &[String]) -> String {
    format!("ALTER TABLE {} ADD {}", target.quoted(), primary_key(key))
}

/// `CREATE UNIQUE INDEX` over the key, under a name that the server chooses.
#[must_use]
pub fn create_unique(target: &TableName, key: &[String]) -> String {
    let key = join(key.iter().map(|column| quote_identifier(column)), ", ");
    format!("CREATE UNIQUE INDEX ON {} ({key})", target.quoted())
}

/// The newest unique index of a table.
pub const NEWEST_UNIQUE: &str = "SELECT c.relname::text FROM pg_catalog.pg_index i \
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid \
    WHERE i.indrelid = to_regclass($1::text) AND i.indisunique ORDER BY c.oid DESC LIMIT 1";

/// How many rows a table had when its newest index was built.
pub const ROWS_INDEXED: &str =
    "SELECT reltuples FROM pg_catalog.pg_class WHERE oid = to_regclass($1::text)";

/// Makes a unique index the primary key. The index gets the name that a key would have, unless that is too long.
#[must_use]
pub fn use_as_key(target: &TableName, index: &str) -> String {
    let usual = format!("{}_pkey", target.table);
    let name = if usual.len() <= NAME_BYTES_MAX {
        &usual
    } else {
        index
    };
    format!(
        "ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY USING INDEX {}",
        target.quoted(),
        quote_identifier(name),
        quote_identifier(index)
    )
}

/// What a name of Postgres has room for.
const NAME_BYTES_MAX: usize = 63;

fn primary_key(key: &[String]) -> String {
    let key = join(key.iter().map(|column| quote_identifier(column)), ", ");
    format!("PRIMARY KEY ({key})")
}

/// `ALTER TABLE .. ADD COLUMN`. Without NOT NULL: the rows that are there have no value.
#[must_use]
pub fn add_column(target: &TableName, column: &str, type_name: &str) -> String {
    format!(
        "ALTER TABLE {} ADD COLUMN {} {type_name}",
        target.quoted(),
        quote_identifier(column)
    )
}

/// `ALTER TABLE .. ADD COLUMN` for the version. Its default makes rows that were there older than every
/// change; NULL would make them newer, because NULL compares as neither.
#[must_use]
pub fn add_version(target: &TableName) -> String {
    format!(
        "ALTER TABLE {} ADD COLUMN {}",
        target.quoted(),
        version_definition()
    )
}

fn version_definition() -> String {
    format!("{VERSION} uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000'")
}

#[cfg(test)]
mod tests;
