//! Applies a batch again whose rows the target refused, so that only the refused ones are set aside.
//!
//! Every group of rows runs under a savepoint; one that fails is halved until the row is alone.

use millrace_config::{Code, Condition};
use millrace_event::TableName;
use tokio_postgres::Error;
use tokio_postgres::error::SqlState;

use super::apply::{At, Flush, fence, run};
use super::commands::{Command, Commands, Group, Sorted, event, is_above_floor};
use super::fault::{self, Cause, general};
use super::labels::Labels;
use super::parameters::{Parameter, Uuid};
use super::session::Session;
use crate::batch::{Action, Batch, Move, RowOp, Step, TableRows};
use crate::row::TableLayout;
use crate::sink::{Applied, SinkError};

const LETTER: &str = "INSERT INTO millrace.dead_letter \
    (sink, relation, key, version, op, reason, sqlstate, event) \
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::jsonb)";

/// Checks what was deferred so far.
const CHECK_DEFERRED: &str = "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED";

/// Which tables halt on a refused row instead of setting it aside.
pub(super) type HaltOn<'h> = &'h (dyn Fn(&TableName) -> bool + Sync);

struct Isolation<'a, 's> {
    session: &'s mut Session,
    sink: &'a str,
    /// Whether deferred constraints are checked after every group, because one failed at the commit.
    immediate: bool,
    halt_on: HaltOn<'s>,
    applied: &'s mut Applied,
    /// Open since a text was refused by its type.
    labels: Option<Labels>,
}

/// A row that was refused, alone.
struct Refused<'a> {
    layout: &'a TableLayout,
    op: &'a RowOp,
    error: Error,
}

/// Why a batch was not isolated to its end.
enum Stopped {
    /// A deferred constraint refused something when the transaction was to end.
    AtEnd(Error),
    /// Anything else.
    Sink(SinkError),
}

impl From<SinkError> for Stopped {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

/// Applies the batch in small pieces, and commits it if it says so.
pub(super) async fn apply(
    session: &mut Session,
    sink: &str,
    batch: &Batch,
    fresh: bool,
    immediate: bool,
    halt_on: HaltOn<'_>,
    applied: &mut Applied,
) -> Result<(), SinkError> {
    let floors = session.floors.clone();
    let mut isolation = Isolation {
        session,
        sink,
        immediate,
        halt_on,
        applied,
        labels: None,
    };
    let mut ended = isolation.batch(batch, fresh).await;
    if let (Err(Stopped::AtEnd(_)), false) = (&ended, immediate) {
        // A row, or a wrong guess about the keys that the target has, was refused at once, and hid another
        // one that is refused at the end.
        isolation.immediate = true;
        isolation.session.floors = floors;
        *isolation.applied = Applied::default();
        ended = isolation.batch(batch, fresh).await;
    }
    ended.map_err(|stopped| match stopped {
        Stopped::AtEnd(error) => general("committing", error),
        Stopped::Sink(error) => error,
    })
}

impl<'a> Isolation<'a, '_> {
    async fn batch(&mut self, batch: &'a Batch, fresh: bool) -> Result<(), Stopped> {
        let begin = if fresh {
            "ROLLBACK; BEGIN"
        } else {
            "ROLLBACK TO SAVEPOINT millrace_batch"
        };
        let cas = (
            self.session.cas.clone(),
            fence(self.session, self.sink, batch),
        );
        let flush = Flush {
            begin,
            fence: Some(cas),
            end: None,
        };
        run(&self.session.client, flush, &[], self.applied)
            .await
            .map_err(|(at, error)| match at {
                At::Fence if error.code() == Some(&SqlState::DIVISION_BY_ZERO) => SinkError::Fenced,
                _ => general("isolating a refused row", error),
            })?;
        if self.immediate && !fresh {
            // What the transaction's earlier batches left to be checked must not be held against this one's
            // rows. If it does not hold by now, nobody can tell which row would be the one to set aside.
            self.check(CHECK_DEFERRED).await?;
        }
        for step in &batch.steps {
            match step {
                Step::Rows(tables) => self.rows(tables).await?,
                // The caller has laid them out.
                Step::Load(_) => return Err(super::apply::broken().into()),
                Step::Move(moves) => self.moves(moves).await?,
                Step::Truncate(_) | Step::Sweep { .. } => self.whole(step).await?,
            }
        }
        if batch.commit {
            // Apart from the commit, after whose failure the transaction's earlier batches would be gone.
            self.check("SET CONSTRAINTS ALL IMMEDIATE").await?;
            self.check("COMMIT").await?;
        }
        Ok(())
    }

    /// Runs SQL that checks what was deferred.
    async fn check(&self, sql: &str) -> Result<(), Stopped> {
        let checked = self.session.client.batch_execute(sql).await;
        checked.map_err(|error| match fault::cause(&error) {
            Cause::Row => Stopped::AtEnd(error),
            _ => Stopped::Sink(general("committing", error)),
        })
    }

    async fn rows(&mut self, tables: &'a [TableRows]) -> Result<(), SinkError> {
        let mut refused = Vec::new();
        for table in tables {
            let sorted = Sorted::new(table, &self.session.floors);
            self.applied.stale += sorted.stale;
            for (group, ops) in sorted.groups() {
                self.bisect(&table.layout, group, ops, &mut refused).await?;
            }
        }
        // A row may have been refused only because of another that came after it: a unique value that was
        // not free yet, a parent that was not there yet. So try again while that helps.
        loop {
            let before = refused.len();
            for Refused { layout, op, .. } in std::mem::take(&mut refused) {
                let present;
                let group = match &op.action {
                    Action::Delete { .. } => Group::Delete,
                    Action::Put(row) if crate::row::is_full(row) => Group::Full,
                    Action::Put(row) => {
                        present = super::commands::present(row);
                        Group::Partial(&present)
                    }
                };
                if let Some(error) = self.attempt(layout, group, &[op]).await? {
                    refused.push(Refused { layout, op, error });
                }
            }
            if refused.is_empty() || refused.len() == before {
                break;
            }
        }
        for refused in refused {
            let event = event(refused.layout, refused.op).to_string();
            let op = match &refused.op.action {
                Action::Delete { .. } => "d",
                Action::Put(_) => "u",
            };
            let key = refused.op.key.text();
            let letter = Letter {
                key: &key,
                version: refused.op.version,
                op,
                event,
            };
            self.letter(refused.layout, letter, refused.error).await?;
        }
        Ok(())
    }

    async fn bisect(
        &mut self,
        layout: &'a TableLayout,
        group: Group<'_>,
        ops: &[&'a RowOp],
        refused: &mut Vec<Refused<'a>>,
    ) -> Result<(), SinkError> {
        let mut pieces = vec![ops];
        while let Some(piece) = pieces.pop() {
            let Some(error) = self.attempt(layout, group, piece).await? else {
                continue;
            };
            if self.may_lack_labels(layout, &error).await?
                && let Some(labels) = &mut self.labels
                && labels.of_rows(layout, piece).await?
            {
                pieces.push(piece);
                continue;
            }
            if let [op] = piece {
                refused.push(Refused { layout, op, error });
            } else {
                let (first, second) = piece.split_at(piece.len() / 2);
                pieces.extend([second, first]);
            }
        }
        Ok(())
    }

    /// Whether a row was refused for what may be a label that the target's enum can be given. Then `labels` is
    /// open.
    async fn may_lack_labels(
        &mut self,
        layout: &TableLayout,
        error: &Error,
    ) -> Result<bool, SinkError> {
        if error.code() != Some(&SqlState::INVALID_TEXT_REPRESENTATION)
            || !self.session.evolving.contains(&layout.source)
        {
            return Ok(false);
        }
        if self.labels.is_none() {
            self.labels = Some(Labels::open(&self.session.connect).await?);
        }
        Ok(true)
    }

    /// Writes a group under a savepoint; gives back the error of a refused row.
    async fn attempt(
        &mut self,
        layout: &TableLayout,
        group: Group<'_>,
        ops: &[&RowOp],
    ) -> Result<Option<Error>, SinkError> {
        let sink = self.sink;
        let mut commands = Commands::new(self.session, sink);
        // Letters of this very batch are not in the session's list yet.
        commands.touched.insert(layout.relation());
        commands.group(layout, group, ops).await?;
        let list = std::mem::take(&mut commands.list);
        self.savepoint(&list, ops.len() as u64).await
    }

    async fn savepoint(
        &mut self,
        list: &[Command<'_>],
        rows: u64,
    ) -> Result<Option<Error>, SinkError> {
        let end = if self.immediate {
            "SET CONSTRAINTS ALL IMMEDIATE; SET CONSTRAINTS ALL DEFERRED; RELEASE SAVEPOINT millrace_row"
        } else {
            "RELEASE SAVEPOINT millrace_row"
        };
        let flush = Flush {
            begin: "SAVEPOINT millrace_row",
            fence: None,
            end: Some(end),
        };
        let mut counted = Applied::default();
        match run(&self.session.client, flush, list, &mut counted).await {
            Ok(()) => {
                self.applied.stale += rows - (counted.written + counted.dead()).min(rows);
                for written in counted.tables {
                    let (upserts, deletes) = (written.upserts, written.deletes);
                    self.applied.wrote(&written.table, upserts, deletes);
                }
                for (table, rows) in counted.dead_letters {
                    self.applied.dead_letter(&table, rows);
                }
                Ok(None)
            }
            Err((at, error)) if fault::cause(&error) == Cause::Row => {
                let back = "ROLLBACK TO SAVEPOINT millrace_row; RELEASE SAVEPOINT millrace_row";
                let undone = self.session.client.batch_execute(back).await;
                undone.map_err(|error| general("undoing a refused row", error))?;
                debug_assert_ne!(at, At::Begin);
                Ok(Some(error))
            }
            Err((At::Command(index), error)) => {
                let table = super::commands::table(&list[index]);
                Err(fault::of_table("applying rows", table, error))
            }
            Err((_, error)) => Err(general("applying rows", error)),
        }
    }

    async fn moves(&mut self, moves: &'a [Move]) -> Result<(), SinkError> {
        for moved in moves {
            if !is_above_floor(&self.session.floors, moved) {
                self.applied.stale += 1;
                continue;
            }
            let mut refused = self.move_row(moved).await?;
            if let Some(error) = &refused
                && self.may_lack_labels(&moved.layout, error).await?
                && let Some(labels) = &mut self.labels
                && labels.of_move(&moved.layout, &moved.row).await?
            {
                refused = self.move_row(moved).await?;
            }
            if let Some(error) = refused {
                let row = &moved.row;
                let op = RowOp {
                    key: row.key.clone(),
                    version: row.version,
                    created: true,
                    action: Action::Put(row.row.clone()),
                };
                let event = event(&moved.layout, &op).to_string();
                let key = row.key.text();
                let letter = Letter {
                    key: &key,
                    version: row.version,
                    op: "c",
                    event,
                };
                self.letter(&moved.layout, letter, error).await?;
            }
        }
        Ok(())
    }

    async fn move_row(&mut self, moved: &'a Move) -> Result<Option<Error>, SinkError> {
        let sink = self.sink;
        let mut commands = Commands::new(self.session, sink);
        commands.move_row(moved).await?;
        let list = std::mem::take(&mut commands.list);
        self.savepoint(&list, 1).await
    }

    async fn whole(&mut self, step: &'a Step) -> Result<(), SinkError> {
        let sink = self.sink;
        let mut commands = Commands::new(self.session, sink);
        commands.whole(step).await?;
        let list = std::mem::take(&mut commands.list);
        match self.savepoint(&list, 0).await? {
            None => Ok(()),
            Some(error) => Err(refusal("the target refuses to empty a table", error)),
        }
    }

    async fn letter(
        &mut self,
        layout: &TableLayout,
        letter: Letter<'_>,
        error: Error,
    ) -> Result<(), SinkError> {
        let reason = fault::message(&error);
        if (self.halt_on)(&layout.source) {
            let what = format!(
                "table {} refuses the row of key {}",
                layout.source, letter.key
            );
            return Err(refusal(&what, error));
        }
        let relation = layout.relation();
        let state = error.code().map(|state| state.code().to_owned());
        let parameters: [Parameter<'_>; 8] = [
            Box::new(self.sink),
            Box::new(relation.as_str()),
            Box::new(letter.key),
            Box::new(Uuid(letter.version)),
            Box::new(letter.op),
            Box::new(reason),
            Box::new(state),
            Box::new(letter.event),
        ];
        let parameters: Vec<_> = parameters
            .iter()
            .map(|parameter| &**parameter as &(dyn tokio_postgres::types::ToSql + Sync))
            .collect();
        let inserted = self.session.client.execute(LETTER, &parameters).await;
        inserted.map_err(|error| general("setting a row aside", error))?;
        self.applied.dead_letter(&layout.source, 1);
        Ok(())
    }
}

struct Letter<'l> {
    key: &'l str,
    version: millrace_event::Version,
    op: &'static str,
    event: String,
}

fn refusal(what: &str, error: Error) -> SinkError {
    let condition = Condition::new(
        Code::RowRefused,
        format!("{what}: {}", fault::message(&error)),
        "mend the constraint or the row, or set `on_row_error = \"dead_letter\"` for the table",
    );
    SinkError::Fatal {
        condition: Box::new(condition),
        source: Some(error.into()),
    }
}
