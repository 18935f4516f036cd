//! Labels that an enum got at the source after the target's was made.
//!
//! A label that a table's schema already has gets its place among the others. No message tells of one that is
//! added while rows stream: the first row with it does, and then it goes behind all others.

use std::collections::{BTreeSet, HashMap, HashSet};

use millrace_event::{TableName, quote_literal};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::fault::{self, general};
use super::parameters::cells;
use super::session::Connect;
use crate::batch::{MoveRow, RowOp};
use crate::row::{Cell, Row, TableLayout};
use crate::sink::SinkError;

/// How long the target may take to add a label: it waits for others that change the same type.
const STATEMENT_TIMEOUT_MS: u32 = 10_000;

/// What a type is made of, down to an enum: whether arrays are between, the enum's name, its labels.
const ENUM: &str = "WITH RECURSIVE under (oid, is_array) AS ( \
    SELECT to_regtype($1)::oid, false \
    UNION ALL \
    SELECT CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END, u.is_array OR t.typtype <> 'd' \
    FROM under u JOIN pg_type t ON t.oid = u.oid \
    WHERE t.typtype = 'd' OR (t.typtype = 'b' AND t.typcategory = 'A')) \
    SELECT u.is_array, n.nspname::text, t.typname::text, \
    ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid) \
    FROM under u JOIN pg_type t ON t.oid = u.oid JOIN pg_namespace n ON n.oid = t.typnamespace \
    WHERE t.typtype = 'e'";

/// The distinct elements of array literals.
const ELEMENTS: &str =
    "SELECT DISTINCT e FROM unnest($1::text[]) a, unnest(a::text[]) e WHERE e IS NOT NULL";

const LABELS: &str =
    "SELECT enumlabel::text FROM pg_enum WHERE enumtypid = to_regtype($1) ORDER BY enumsortorder";

/// The statements that add what the target's enum lacks, each label behind the one that precedes it at the source.
fn additions(name: &TableName, labels: &[String], has: &[String]) -> Vec<String> {
    let mut has: HashSet<&str> = has.iter().map(String::as_str).collect();
    let mut statements = Vec::new();
    for (index, label) in labels.iter().enumerate() {
        if !has.insert(label) {
            continue;
        }
        let place = match index.checked_sub(1).map(|before| &labels[before]) {
            Some(before) => format!(" AFTER {}", quote_literal(before)),
            // The first at the source: before the first that the target has of the others.
            None => match labels[1..]
                .iter()
                .find(|label| has.contains(label.as_str()))
            {
                Some(after) => format!(" BEFORE {}", quote_literal(after)),
                None => String::new(),
            },
        };
        statements.push(add(name, label, &place));
    }
    statements
}

fn add(name: &TableName, label: &str, place: &str) -> String {
    let (name, label) = (name.quoted(), quote_literal(label));
    format!("ALTER TYPE {name} ADD VALUE IF NOT EXISTS {label}{place}")
}

/// Adds the labels that the target's enum lacks, in the open transaction: they can be used once it is committed.
/// The server's word where it does not let us.
pub(super) async fn complete(
    client: &Client,
    name: &TableName,
    labels: &[String],
) -> Result<Option<String>, Error> {
    let rows = client.query(LABELS, &[&name.quoted()]).await?;
    let has = rows.iter().map(|row| row.try_get(0));
    let has: Vec<String> = has.collect::<Result<_, _>>()?;
    let statements = additions(name, labels, &has);
    // A type of this name that is no enum has no labels; it is another's.
    if has.is_empty() || statements.is_empty() {
        return Ok(None);
    }
    let sql = format!(
        "SAVEPOINT millrace_labels; {}; RELEASE SAVEPOINT millrace_labels",
        statements.join("; ")
    );
    match client.batch_execute(&sql).await {
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            let undo = "ROLLBACK TO SAVEPOINT millrace_labels";
            client.batch_execute(undo).await?;
            Ok(Some(fault::message(&error)))
        }
        result => result.map(|()| None),
    }
}

/// An enum of the target that a column's type is, or is made of.
struct Enum {
    name: TableName,
    is_array: bool,
    has: HashSet<String>,
}

/// Adds labels that rows have and the target's enums lack.
///
/// On a connection of its own: a label can be used only after the transaction that added it, and the worker's
/// transaction goes on.
pub(super) struct Labels {
    client: Client,
    /// The enum of each type that was looked up.
    enums: HashMap<String, Option<Enum>>,
}

impl Labels {
    pub(super) async fn open(connect: &Connect) -> Result<Self, SinkError> {
        let client = connect().await?;
        let settings =
            format!("SET search_path = ''; SET statement_timeout = {STATEMENT_TIMEOUT_MS}");
        let set = client.batch_execute(&settings).await;
        set.map_err(|error| general("opening a session for labels", error))?;
        Ok(Self {
            client,
            enums: HashMap::new(),
        })
    }

    /// Whether any label was added; then the rows may be taken now.
    pub(super) async fn of_rows(
        &mut self,
        layout: &TableLayout,
        ops: &[&RowOp],
    ) -> Result<bool, SinkError> {
        let rows: Vec<&Row> = ops.iter().map(|op| cells(op)).collect();
        self.of(layout, &rows).await
    }

    /// The same for a row that moves to another key.
    pub(super) async fn of_move(
        &mut self,
        layout: &TableLayout,
        moved: &MoveRow,
    ) -> Result<bool, SinkError> {
        self.of(layout, &[&moved.old, &moved.row]).await
    }

    async fn of(&mut self, layout: &TableLayout, rows: &[&Row]) -> Result<bool, SinkError> {
        let mut added = false;
        for (at, column) in layout.columns.iter().enumerate() {
            let texts = rows.iter().filter_map(|row| match &row[at] {
                Cell::Text(text) => std::str::from_utf8(text).ok(),
                Cell::Null | Cell::Missing => None,
            });
            let texts: BTreeSet<&str> = texts.collect();
            added |= self.of_column(layout, &column.cast, texts).await?;
        }
        Ok(added)
    }

    async fn of_column(
        &mut self,
        layout: &TableLayout,
        cast: &str,
        texts: BTreeSet<&str>,
    ) -> Result<bool, SinkError> {
        if !self.enums.contains_key(cast) {
            let found = self.look_up(cast).await;
            let found = found.map_err(|error| general("looking for an enum", error))?;
            self.enums.insert(cast.to_owned(), found);
        }
        let Some(Some(found)) = self.enums.get_mut(cast) else {
            return Ok(false);
        };
        let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
        let labels = if found.is_array {
            let elements = self.client.query(ELEMENTS, &[&texts]).await;
            // Not a text of an array: the row is refused for that.
            let Ok(elements) = elements else {
                return Ok(false);
            };
            elements.iter().map(|row| row.get(0)).collect()
        } else {
            texts
        };
        let mut added = false;
        for label in labels {
            if found.has.contains(&label) {
                continue;
            }
            let sql = add(&found.name, &label, "");
            if let Err(error) = self.client.batch_execute(&sql).await {
                if fault::cause(&error) == fault::Cause::World {
                    return Err(general("adding a label to an enum", error));
                }
                tracing::warn!(
                    table = %layout.source, r#type = %found.name, label, reason = fault::message(&error),
                    "a label that the source's enum has cannot be added to the target's; add it there: {sql}"
                );
                continue;
            }
            tracing::warn!(
                table = %layout.source, r#type = %found.name, label,
                "the target's enum lacked a label of the source's; it was added behind all others, wherever the \
                 source has it"
            );
            found.has.insert(label);
            added = true;
        }
        Ok(added)
    }

    async fn look_up(&self, cast: &str) -> Result<Option<Enum>, Error> {
        let row = self.client.query_opt(ENUM, &[&cast]).await?;
        row.map(|row| {
            Ok(Enum {
                is_array: row.try_get(0)?,
                name: TableName::new(row.try_get::<_, String>(1)?, row.try_get::<_, String>(2)?),
                has: row.try_get::<_, Vec<String>>(3)?.into_iter().collect(),
            })
        })
        .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(labels: &[&str], has: &[&str]) -> Vec<String> {
        let owned = |labels: &[&str]| labels.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        let statements = additions(&TableName::new("s", "Mood"), &owned(labels), &owned(has));
        let start = "ALTER TYPE \"s\".\"Mood\" ADD VALUE IF NOT EXISTS ";
        let rest = statements
            .iter()
            .map(|s| s.strip_prefix(start).unwrap().to_owned());
        rest.collect()
    }

    #[test]
    fn a_label_gets_the_place_that_it_has_at_the_source() {
        assert_eq!(added(&["a", "b"], &["a", "b"]), [""; 0]);
        assert_eq!(added(&["a", "b", "c"], &["a", "c"]), ["'b' AFTER 'a'"]);
        assert_eq!(
            added(&["a", "b", "c", "d"], &["a", "d"]),
            ["'b' AFTER 'a'", "'c' AFTER 'b'"]
        );
        assert_eq!(
            added(&["new", "it's", "old"], &["old"]),
            ["'new' BEFORE 'old'", "'it''s' AFTER 'new'"]
        );
        // The target's own labels stay.
        assert_eq!(added(&["a", "b"], &["own", "a"]), ["'b' AFTER 'a'"]);
    }
}
