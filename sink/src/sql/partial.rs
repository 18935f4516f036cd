//! Rows of which some columns are not known: they build on the row that the target has, or are set aside.

use std::fmt::Write as _;

use millrace_event::quote_literal;

use super::{
    INCOMPLETE, Present, VERSION, as_text, cast, entombed, insert_into, join, name, on_conflict,
    relation, same_key, source,
};
use crate::row::TableLayout;

/// An open dead letter of `key` exists.
fn has_letter(layout: &TableLayout, key: &str) -> String {
    format!(
        "EXISTS (SELECT 1 FROM millrace.dead_letter d WHERE d.relation = {} AND d.key = {key} \
         AND d.resolved_at IS NULL)",
        relation(layout)
    )
}

/// Updates rows of which some columns are not known. Parameters: a text array for each present column,
/// versions, key texts, the version below which the target's rows may be outdated. A row that is missing or may be
/// outdated, or whose key has an open dead letter, is not touched: [`partial_letters`], run before, has set it
/// aside.
#[must_use]
pub fn partial(layout: &TableLayout, present: &Present) -> String {
    let columns: Vec<_> = present.iter().copied().collect();
    let mut set = String::new();
    for column in columns.iter().filter(|column| !layout.is_key(**column)) {
        let _ = write!(
            set,
            "{} = {}, ",
            name(layout, *column),
            cast(layout, *column)
        );
    }
    format!(
        "UPDATE {} AS t SET {set}{VERSION} = s.v FROM {} WHERE {} AND t.{VERSION} < s.v \
         AND t.{VERSION} >= ${}::uuid AND NOT {}",
        layout.target.quoted(),
        source(&as_text(&columns), true),
        same_key(layout),
        columns.len() + 3,
        has_letter(layout, "s.k")
    )
}

/// The present columns as a JSON object of texts.
fn event(
    layout: &TableLayout,
    columns: &[usize],
    value: impl Fn(usize, usize) -> String,
) -> String {
    let names = join(
        columns.iter().map(|column| {
            quote_literal(&layout.columns[*column].target)
                .trim()
                .to_owned()
        }),
        ", ",
    );
    let values = join(
        columns
            .iter()
            .enumerate()
            .map(|(at, column)| value(at, *column)),
        ", ",
    );
    format!("jsonb_object(ARRAY[{names}], ARRAY[{values}]::text[])")
}

/// Sets the rows of a query aside: their keys, versions and known columns as `k`, `v` and `e`. Gives the key of each
/// that was.
///
/// A row has one open letter for that, with the version of its newest change and all columns that its changes brought:
/// a row may be changed very often before its other columns come. One worker at a time writes a relation, so there is
/// none between the look and the insert.
fn set_aside(layout: &TableLayout, rows: &str, op: char, sink: usize) -> String {
    let relation = relation(layout);
    let is_open = format!(
        "d.relation = {relation} AND d.key = a.k AND d.resolved_at IS NULL AND d.reason = '{INCOMPLETE}'"
    );
    format!(
        "WITH a AS ({rows}), \
         raised AS (UPDATE millrace.dead_letter d SET version = a.v, event = d.event || a.e FROM a \
         WHERE {is_open} AND d.version < a.v RETURNING d.key), \
         added AS (INSERT INTO millrace.dead_letter (sink, relation, key, version, op, reason, event) \
         SELECT ${sink}::text, {relation}, a.k, a.v, '{op}', '{INCOMPLETE}', a.e FROM a \
         WHERE NOT EXISTS (SELECT 1 FROM millrace.dead_letter d WHERE {is_open}) RETURNING key) \
         SELECT key FROM raised UNION SELECT key FROM added"
    )
}

/// Sets partial rows aside that [`partial`] cannot complete: not stale, and the row is missing or its columns
/// may not be what the source had. Parameters: as [`partial`], then the sink.
#[must_use]
pub fn partial_letters(layout: &TableLayout, present: &Present) -> String {
    let columns: Vec<_> = present.iter().copied().collect();
    let (table, same) = (layout.target.quoted(), same_key(layout));
    let rows = format!(
        "SELECT s.k, s.v, {} AS e FROM {} \
         WHERE NOT EXISTS (SELECT 1 FROM {table} AS t WHERE {same} AND t.{VERSION} >= s.v) \
         AND NOT {} \
         AND (NOT EXISTS (SELECT 1 FROM {table} AS t WHERE {same} AND t.{VERSION} >= ${}::uuid) OR {})",
        event(layout, &columns, |_, column| format!("s.c{column}")),
        source(&as_text(&columns), true),
        entombed(layout, "s.k", "s.v"),
        columns.len() + 3,
        has_letter(layout, "s.k")
    );
    set_aside(layout, &rows, 'u', columns.len() + 4)
}

/// The parameter numbers of a move: the present columns, the old key's columns, then these.
struct MoveParameters {
    columns: Vec<usize>,
    version: usize,
    key: usize,
    old_key: usize,
    lower: usize,
    sink: usize,
}

impl MoveParameters {
    fn new(layout: &TableLayout, present: &Present) -> Self {
        let columns: Vec<_> = present.iter().copied().collect();
        let first = columns.len() + layout.key.len() + 1;
        Self {
            columns,
            version: first,
            key: first + 1,
            old_key: first + 2,
            lower: first + 3,
            sink: first + 4,
        }
    }

    fn value(&self, layout: &TableLayout, column: usize) -> Option<String> {
        let at = self.columns.iter().position(|present| *present == column)?;
        Some(format!(
            "${}::text::{}",
            at + 1,
            layout.columns[column].cast
        ))
    }

    /// The row of the old key, as far as it may be relied on.
    fn is_old(&self, layout: &TableLayout) -> String {
        let first = self.columns.len() + 1;
        let key = layout.key.iter().enumerate().map(|(at, column)| {
            let cast = &layout.columns[*column].cast;
            format!(
                "o.{} = ${}::text::{cast}",
                name(layout, *column),
                first + at
            )
        });
        let right = format!("o.{VERSION} >= ${}::uuid", self.lower);
        join(key.chain([right]), " AND ")
    }

    fn is_new(&self, layout: &TableLayout) -> String {
        join(
            layout.key.iter().map(|column| {
                let value = self
                    .value(layout, *column)
                    .unwrap_or_else(|| "NULL".to_owned());
                format!("t.{} = {value}", name(layout, *column))
            }),
            " AND ",
        )
    }
}

/// Writes one row under its new key, the columns that are not present copied from the row of its old key.
/// Parameters: a text for each present column, one for each key column of the old key, version, key text, old
/// key text, the version below which the target's rows may be outdated. [`move_letter`], run before, has set the row aside where the old row is not to be had.
#[must_use]
pub fn move_row(layout: &TableLayout, present: &Present) -> String {
    let parameters = MoveParameters::new(layout, present);
    let values = join(
        (0..layout.columns.len()).map(|column| {
            parameters
                .value(layout, column)
                .unwrap_or_else(|| format!("o.{}", name(layout, column)))
        }),
        ", ",
    );
    let version = format!("${}::uuid", parameters.version);
    format!(
        "{} SELECT {values}, {version} FROM {} AS o WHERE {} AND o.{VERSION} < {version} \
         AND NOT {} AND NOT {} {}",
        insert_into(layout),
        layout.target.quoted(),
        parameters.is_old(layout),
        entombed(layout, &format!("${}::text", parameters.key), &version),
        has_letter(layout, &format!("${}::text", parameters.old_key)),
        on_conflict(layout)
    )
}

/// Sets one moved row aside whose old row is missing or not what the source had. Parameters: as
/// [`move_row`], then the sink.
#[must_use]
pub fn move_letter(layout: &TableLayout, present: &Present) -> String {
    let parameters = MoveParameters::new(layout, present);
    let table = layout.target.quoted();
    let version = format!("${}::uuid", parameters.version);
    let key = format!("${}::text", parameters.key);
    let rows = format!(
        "SELECT {key} AS k, {version} AS v, {} AS e \
         WHERE NOT EXISTS (SELECT 1 FROM {table} AS t WHERE {} AND t.{VERSION} >= {version}) \
         AND NOT {} \
         AND (NOT EXISTS (SELECT 1 FROM {table} AS o WHERE {} AND o.{VERSION} < {version}) OR {})",
        event(layout, &parameters.columns, |at, _| format!(
            "${}::text",
            at + 1
        )),
        parameters.is_new(layout),
        entombed(layout, &key, &version),
        parameters.is_old(layout),
        has_letter(layout, &format!("${}::text", parameters.old_key))
    );
    set_aside(layout, &rows, 'c', parameters.sink)
}
