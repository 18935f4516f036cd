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
use tokio_postgres::{Client, Error};

use super::apply::broken;
use super::fault::{self, Cause};
use super::session::{Session, Transaction};
use crate::batch::{Batch, Step};
use crate::load::Load;
use crate::row::TableLayout;
use crate::sink::SinkError;
use crate::sql;

/// A table of more rows gets its key before the others come: while an index is built, the sink's other tables wait.
const ROWS_MAX: u64 = 4_000_000;

/// The tables without a key, by relation.
#[derive(Debug, Default)]
pub(super) struct Keyless(HashMap<String, Taken>);

/// What such a table may have.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// The version of its rows: that of one snapshot, in which no key is there twice. `None` before the first.
    version: Option<Version>,
    rows: u64,
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
        if self.0.is_empty() {
            return Vec::new();
        }
        let layouts = batch.steps.iter().flat_map(|step| match step {
            Step::Load(load) if self.may_take(load) => Vec::new(),
            Step::Load(load) => vec![&*load.layout],
            Step::Rows(tables) => tables.iter().map(|table| &*table.layout).collect(),
            Step::Move(moves) => moves.iter().map(|moved| &*moved.layout).collect(),
            Step::Truncate(tables) => tables.iter().map(|(layout, _)| &**layout).collect(),
            Step::Sweep { table, .. } => vec![&**table],
        });
        let mut due: Vec<&TableLayout> = Vec::new();
        for layout in layouts.filter(|layout| self.has(&layout.relation())) {
            if !due.iter().any(|known| known.target == layout.target) {
                due.push(layout);
            }
        }
        due
    }

    fn may_take(&self, load: &Load) -> bool {
        self.0.get(&load.layout.relation()).is_none_or(|taken| {
            let is_same = taken.version.is_none_or(|version| version == load.version);
            is_same && taken.rows + load.rows() as u64 <= ROWS_MAX
        })
    }

    /// A batch is going to be applied.
    pub(super) fn take(&mut self, batch: &Batch) {
        for step in &batch.steps {
            if let Step::Load(load) = step
                && let Some(taken) = self.0.get_mut(&load.layout.relation())
            {
                taken.version = Some(load.version);
                taken.rows += load.rows() as u64;
            }
        }
    }
}

/// Gives tables their key where a batch cannot do without.
pub(super) async fn make(session: &mut Session, batch: &Batch) -> Result<(), SinkError> {
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
        let begun = client.batch_execute("BEGIN").await;
        begun.map_err(|error| fault::general("giving a table its key", error))?;
        let added = add(client, &layout.source, &layout.target, &key).await;
        let end = if added.is_ok() { "COMMIT" } else { "ROLLBACK" };
        let ended = client.batch_execute(end).await;
        added?;
        ended.map_err(|error| fault::general("giving a table its key", error))?;
        session.transaction = Transaction::Closed;
        session.keyless.0.remove(&layout.relation());
    }
    Ok(())
}

/// Gives a table its key within the transaction that is open.
pub(super) async fn add(
    client: &Client,
    source: &TableName,
    target: &TableName,
    key: &[String],
) -> Result<(), SinkError> {
    let sql = sql::add_key(target, key);
    let Err(error) = bounded(client, &sql).await else {
        return Ok(());
    };
    if matches!(fault::cause(&error), Cause::World | Cause::Aborted) {
        return Err(fault::general("giving a table its key", error));
    }
    let message = fault::message(&error);
    let condition = Condition::new(
        Code::TargetKey,
        format!("target table {target} cannot be given its key: {message}"),
        format!("remove the rows that stand in the way, then: {sql};"),
    );
    Err(SinkError::Table {
        table: source.clone(),
        condition: Box::new(condition),
        source: Some(error.into()),
    })
}

/// However large the table is; but whoever reads it waits behind a statement that waits for its lock.
async fn bounded(client: &Client, sql: &str) -> Result<(), Error> {
    client.execute(sql::UNBOUNDED, &[]).await?;
    client.batch_execute(sql::LOCK_BOUNDED).await?;
    client.batch_execute(sql).await?;
    client.batch_execute(sql::LOCK_AS_BEFORE).await
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use millrace_event::{LoadColumn, LoadHead, Lsn};

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
            columns: vec![LoadColumn {
                name: "id".to_owned(),
                type_oid: 20,
            }],
        };
        let mut load = Load::new(layout(), &head);
        load.push("1\n".repeat(rows).into());
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
    fn a_large_table_gets_its_key_on_the_way() {
        let mut keyless = Keyless::default();
        keyless.created("public.orders".to_owned());
        keyless.0.get_mut("public.orders").unwrap().rows = ROWS_MAX - 3;
        assert!(!is_due(&keyless, vec![load(5, 3)]));
        assert!(is_due(&keyless, vec![load(5, 4)]));
    }

    #[test]
    fn tables_with_a_key_are_never_due() {
        assert!(!is_due(&Keyless::default(), vec![load(5, 3), load(6, 1)]));
    }
}
