//! Tables that get their key behind the rows of their load.
//!
//! An index over rows that are there is built in a third of the time that it takes to enter them one by one, and in far
//! less where they do not come in the key's order. So a table that is created for a load has no key at first. It gets
//! it before anything but rows of that one load is written: the end of the load, another attempt's rows, a chunk, a
//! change. A process that finds a table of its own without a key (`tables/checks.rs`) makes it at once, so a crash at
//! any moment leaves nothing to remember.

use std::collections::HashMap;

use millrace_config::{Code, Condition};
use millrace_event::{TableName, Version};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error};

use super::apply::broken;
use super::fault::{self, Cause};
use super::session::{Session, Transaction};
use crate::batch::{Batch, Step};
use crate::load::Load;
use crate::row::TableLayout;
use crate::sink::SinkError;
use crate::sql;

/// A table of more rows or bytes gets its key before the others come: while an index is built, the sink's other tables
/// wait.
const ROWS_MAX: u64 = 4_000_000;
const BYTES_MAX: u64 = 2 * 1024 * 1024 * 1024;

/// The tables without a key, by relation.
#[derive(Debug, Default)]
pub(super) struct Keyless(HashMap<String, Taken>);

/// Tables that hold nothing but the rows of their load, by relation, and the version of those rows; `None` where there
/// are no rows at all. Good for the batch for which they were given their key.
#[derive(Debug, Default)]
pub(super) struct Pure(HashMap<String, Option<Version>>);

impl Pure {
    /// Whether a table has no row below a version: a sweep would read all of it to find none.
    pub(super) fn has_none_below(&self, relation: &str, version: Version) -> bool {
        let rows = self.0.get(relation);
        rows.is_some_and(|rows| rows.is_none_or(|rows| rows >= version))
    }
}

/// What such a table may have.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// The version of its rows: that of one snapshot, in which no key is there twice. `None` before the first.
    version: Option<Version>,
    rows: u64,
    bytes: u64,
}

impl Keyless {
    /// A table was created without its key.
    pub(super) fn created(&mut self, relation: String) {
        self.0.insert(relation, Taken::default());
    }

    /// Whether a table has no key.
    pub(super) fn has(&self, relation: &str) -> bool {
        self.0.contains_key(relation)
    }

    /// The tables that must have their key before a batch is applied.
    pub(super) fn due<'b>(&self, batch: &'b Batch) -> Vec<&'b TableLayout> {
        let mut taken = self.0.clone();
        let mut due: Vec<&TableLayout> = Vec::new();
        if taken.is_empty() {
            return due;
        }
        for step in &batch.steps {
            let layouts: Vec<&TableLayout> = match step {
                Step::Load(load) if take(&mut taken, load) => Vec::new(),
                Step::Load(load) => vec![&load.layout],
                Step::Rows(tables) => tables.iter().map(|table| &*table.layout).collect(),
                Step::Move(moves) => moves.iter().map(|moved| &*moved.layout).collect(),
                Step::Truncate(tables) => tables.iter().map(|(layout, _)| &**layout).collect(),
                Step::Sweep { table, .. } => vec![table],
            };
            for layout in layouts {
                let is_known = due.iter().any(|known| known.target == layout.target);
                if !is_known && self.has(&layout.relation()) {
                    due.push(layout);
                }
            }
        }
        due
    }

    /// A batch is going to be applied: nothing of it is due.
    pub(super) fn take(&mut self, batch: &Batch) {
        for step in &batch.steps {
            if let Step::Load(load) = step {
                take(&mut self.0, load);
            }
        }
    }
}

/// Takes rows of a load, if their table needs no key for them.
fn take(keyless: &mut HashMap<String, Taken>, load: &Load) -> bool {
    let Some(taken) = keyless.get_mut(&load.layout.relation()) else {
        return true;
    };
    let rows = taken.rows + load.rows() as u64;
    let bytes = taken.bytes + load.bytes() as u64;
    let is_same = taken.version.is_none_or(|version| version == load.version);
    if !is_same || rows > ROWS_MAX || bytes > BYTES_MAX {
        return false;
    }
    *taken = Taken {
        version: Some(load.version),
        rows,
        bytes,
    };
    true
}

/// Gives tables their key where a batch cannot do without. Returns those of them of which is proven that they hold
/// their load's rows alone.
pub(super) async fn make(session: &mut Session, batch: &Batch) -> Result<Pure, SinkError> {
    let mut pure = Pure::default();
    for layout in session.keyless.due(batch) {
        // What an open transaction makes may be rolled back. A new session makes it before it opens one.
        if !matches!(session.transaction, Transaction::Closed) {
            return Err(broken());
        }
        // Until this has ended, an abandoned call leaves a transaction in an unknown state.
        session.transaction = Transaction::Broken;
        let client = &session.client;
        let key = layout.key.iter();
        let key: Vec<_> = key
            .map(|column| layout.columns[*column].target.clone())
            .collect();
        let failed = |error| fault::general("giving a table its key", error);
        client.batch_execute("BEGIN").await.map_err(failed)?;
        let added = add(client, &layout.source, &layout.target, &key).await;
        let rows = match added {
            Ok(()) => rows_of(client, &layout.target).await.map_err(failed)?,
            Err(_) => None,
        };
        let end = if added.is_ok() { "COMMIT" } else { "ROLLBACK" };
        client.batch_execute(end).await.map_err(failed)?;
        session.transaction = Transaction::Closed;
        // Also where it cannot be made: whoever asks for the table next is told, and it is not tried for every batch.
        let taken = session.keyless.0.remove(&layout.relation());
        added?;
        if let Some(taken) = taken.filter(|taken| rows == Some(taken.rows)) {
            pure.0.insert(layout.relation(), taken.version);
        }
    }
    Ok(pure)
}

/// How many rows a table had when its newest index was built, which counts them. The catalog keeps the count as a
/// four-byte float: exact up to 2^24.
async fn rows_of(client: &Client, target: &TableName) -> Result<Option<u64>, Error> {
    const { assert!(ROWS_MAX < 1 << 24) };
    let row = client
        .query_opt(sql::ROWS_INDEXED, &[&target.quoted()])
        .await?;
    let rows = row.map(|row| row.get::<_, f32>(0));
    // -1 is a table that was never counted.
    Ok(rows.filter(|rows| *rows >= 0.0).map(|rows| rows as u64))
}

/// Gives a table its key within the transaction that is open.
///
/// The index comes first, beside everybody who reads the table. Only the word that it is the primary key needs the table
/// alone for a moment; where somebody reads for long, a unique index does as well.
pub(super) async fn add(
    client: &Client,
    source: &TableName,
    target: &TableName,
    key: &[String],
) -> Result<(), SinkError> {
    let Err(error) = index(client, target, key).await else {
        return Ok(());
    };
    let is_locked = error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE);
    if !is_locked && matches!(fault::cause(&error), Cause::World | Cause::Aborted) {
        return Err(fault::general("giving a table its key", error));
    }
    let message = fault::message(&error);
    let condition = Condition::new(
        Code::TargetKey,
        format!("target table {target} cannot be given its key: {message}"),
        format!(
            "end what writes to it, remove rows that stand in the way, then: {};",
            sql::add_key(target, key)
        ),
    );
    Err(SinkError::Table {
        table: source.clone(),
        condition: Box::new(condition),
        source: Some(error.into()),
    })
}

async fn index(client: &Client, target: &TableName, key: &[String]) -> Result<(), Error> {
    // However large the table is; but others wait behind a statement that waits for its lock.
    client.execute(sql::UNBOUNDED, &[]).await?;
    client.batch_execute(sql::LOCK_BOUNDED).await?;
    client
        .batch_execute(&sql::create_unique(target, key))
        .await?;
    let newest = client
        .query_one(sql::NEWEST_UNIQUE, &[&target.quoted()])
        .await?;
    let sql = sql::use_as_key(target, newest.get(0));
    client.batch_execute("SAVEPOINT millrace_key").await?;
    if let Err(error) = client.batch_execute(&sql).await {
        let undo = "ROLLBACK TO SAVEPOINT millrace_key";
        client.batch_execute(undo).await?;
        tracing::warn!(
            table = %target, remedy = %sql,
            "a unique index is the table's key, and no primary key yet: {}", fault::message(&error)
        );
    }
    client
        .batch_execute("RELEASE SAVEPOINT millrace_key")
        .await?;
    client.batch_execute(sql::LOCK_AS_BEFORE).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millrace_event::{LoadColumn, LoadFormat, LoadHead, Lsn};

    use super::*;
    use crate::batch::Checkpoint;
    use crate::row::LayoutColumn;

    fn layout() -> Arc<TableLayout> {
        let column = LayoutColumn {
            source: "id".to_owned(),
            target: "id".to_owned(),
            cast: "bigint".to_owned(),
        };
        Arc::new(TableLayout {
            source: TableName::new("public", "orders"),
            target: TableName::new("public", "orders"),
            columns: vec![column],
            key: vec![0],
            shape: "1".to_owned(),
        })
    }

    fn load(lsn: u64, rows: usize) -> Step {
        let head = LoadHead {
            load: TableName::new("public", "orders"),
            version: Version::new(1, Lsn(lsn), 0),
            table_version: "1".to_owned(),
            format: LoadFormat::Text,
            columns: vec![LoadColumn {
                name: "id".to_owned(),
                type_oid: 20,
            }],
        };
        let mut load = Load::new(layout(), &head);
        load.push("1\n".repeat(rows).into(), rows);
        Step::Load(load)
    }

    fn batch(steps: Vec<Step>) -> Batch {
        Batch {
            from: Checkpoint::default(),
            to: Checkpoint::default(),
            copy: None,
            steps,
            commit: true,
        }
    }

    fn is_due(keyless: &Keyless, steps: Vec<Step>) -> bool {
        !keyless.due(&batch(steps)).is_empty()
    }

    #[test]
    fn rows_of_one_load_need_no_key_and_everything_else_does() {
        let mut keyless = Keyless::default();
        keyless.created("public.orders".to_owned());
        assert!(!is_due(&keyless, vec![load(5, 3)]));
        keyless.take(&batch(vec![load(5, 3)]));
        assert!(!is_due(&keyless, vec![load(5, 3)]));
        let another = vec![load(6, 1)];
        assert!(
            is_due(&keyless, another),
            "another snapshot may have the same keys"
        );
        let sweep = Step::Sweep {
            table: layout(),
            below: Version::new(1, Lsn(5), 0),
            keeps_rows: false,
        };
        assert!(is_due(&keyless, vec![load(5, 3), sweep]));
        let truncate = Step::Truncate(vec![(layout(), Version::new(1, Lsn(9), 0))]);
        assert!(is_due(&keyless, vec![truncate]));
        let Step::Load(rows) = load(5, 1) else {
            unreachable!("it is one")
        };
        let laid_out = Step::Rows(vec![rows.laid_out().unwrap()]);
        assert!(is_due(&keyless, vec![laid_out]));
    }

    #[test]
    fn the_rows_of_a_batch_count_together() {
        let mut keyless = Keyless::default();
        keyless.created("public.orders".to_owned());
        assert!(is_due(&keyless, vec![load(5, 1), load(6, 1)]));
        keyless.0.get_mut("public.orders").unwrap().rows = ROWS_MAX - 3;
        assert!(is_due(&keyless, vec![load(5, 2), load(5, 2)]));
    }

    #[test]
    fn a_large_table_gets_its_key_on_the_way() {
        let mut keyless = Keyless::default();
        keyless.created("public.orders".to_owned());
        keyless.0.get_mut("public.orders").unwrap().rows = ROWS_MAX - 3;
        assert!(!is_due(&keyless, vec![load(5, 3)]));
        assert!(is_due(&keyless, vec![load(5, 4)]));
        keyless.0.get_mut("public.orders").unwrap().rows = 0;
        keyless.0.get_mut("public.orders").unwrap().bytes = BYTES_MAX - 5;
        assert!(!is_due(&keyless, vec![load(5, 2)]));
        assert!(is_due(&keyless, vec![load(5, 3)]));
    }

    #[test]
    fn tables_with_a_key_are_never_due() {
        assert!(!is_due(&Keyless::default(), vec![load(5, 3), load(6, 1)]));
    }
}
