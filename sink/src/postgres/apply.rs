//! Applies a batch: all its statements in one flush, the compare-and-set first and the commit last.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;

use futures_util::poll;
use millrace_event::{TableName, Version};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, Statement};

use super::commands::{Command, Commands, Counts, Group, Sorted, is_above_floor};
use super::fault::{self, Cause};
use super::isolate;
use super::keys::{self, Pure};
use super::load::{self, Refused};
use super::parameters::{Parameter, Uuid};
use super::session::{PARTITION, Session, Transaction};
use crate::batch::{Batch, RowOp, Step, TableRows};
use crate::progress::CopyState;
use crate::row::TableLayout;
use crate::sink::{Applied, CopyTooOld, SinkError};

/// What a failed flush failed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// Opening the transaction.
    Begin,
    /// The compare-and-set.
    Fence,
    /// The statement of this number.
    Command(usize),
    /// The load of this number, which the target did not take.
    Load(usize),
    /// The load of this number: a value has no binary form.
    Form(usize),
    /// Closing the transaction or the savepoint.
    End,
}

/// What a flush consists of, around its commands.
pub(super) struct Flush<'a> {
    pub(super) begin: &'static str,
    pub(super) fence: Option<(Statement, Vec<Parameter<'a>>)>,
    pub(super) end: Option<&'static str>,
}

/// Applies a batch.
pub(super) async fn apply(
    session: &mut Session,
    sink: &str,
    batch: &Batch,
    halt_on: &(dyn Fn(&millrace_event::TableName) -> bool + Sync),
) -> Result<Applied, SinkError> {
    if let Some(too_old) = copied_too_old(session, batch) {
        return Err(read_again(too_old));
    }
    let laid_out;
    let mut batch = batch;
    if batch.has_load() && !load::may_copy(session, batch) {
        laid_out = batch.laid_out().map_err(load::unreadable)?;
        batch = &laid_out;
    }
    session.pure = keys::make(session, batch).await?;
    session.keyless.take(batch);
    // Until this call has ended, an abandoned one leaves a transaction in an unknown state.
    let before = std::mem::replace(&mut session.transaction, Transaction::Broken);
    let (fresh, floors) = match before {
        Transaction::Closed => (true, session.floors.clone()),
        Transaction::Open(floors) => (false, floors),
        Transaction::Broken => return Err(broken()),
    };
    let mut applied = Applied::default();
    let mut inserted = Vec::new();
    let mut result = pipelined(session, sink, batch, fresh, &mut inserted, &mut applied).await;
    if result.is_ok() {
        for relation in &inserted {
            session.inserts.taken(relation);
        }
    }
    if let Err(Failure::Row { at_end }) = result {
        for relation in inserted {
            session.inserts.refused(relation);
        }
        session.floors.clone_from(&floors);
        applied = Applied::default();
        result = isolated(session, sink, batch, (fresh, at_end), halt_on, &mut applied)
            .await
            .map_err(Failure::Sink);
    }
    match result {
        Ok(()) if batch.commit => session.transaction = Transaction::Closed,
        Ok(()) => session.transaction = Transaction::Open(floors),
        Err(failure) => {
            session.floors = floors;
            if session.client.batch_execute("ROLLBACK").await.is_ok() {
                session.transaction = Transaction::Closed;
            }
            let Failure::Sink(error) = failure else {
                return Err(broken());
            };
            return Err(error);
        }
    }
    for (table, _) in &applied.dead_letters {
        let layouts = batch.steps.iter().flat_map(Step::layouts);
        let relation = layouts
            .filter(|layout| layout.source == *table)
            .map(|l| l.relation())
            .next();
        session.letters.extend(relation);
    }
    if let Some(copy) = &batch.copy {
        session.copied.clone_from(copy);
    }
    Ok(applied)
}

/// Applies a batch of which the target refuses a row, so that only such rows are left out. It begins a transaction, if
/// `fresh`, and the refusal came when that was to end, if `at_end`.
async fn isolated(
    session: &mut Session,
    sink: &str,
    batch: &Batch,
    (fresh, at_end): (bool, bool),
    halt_on: &(dyn Fn(&TableName) -> bool + Sync),
    applied: &mut Applied,
) -> Result<(), SinkError> {
    tracing::debug!(at_end, "isolating the rows that the target refuses");
    let rows;
    let mut batch = batch;
    if batch.has_load() {
        rows = batch.laid_out().map_err(load::unreadable)?;
        batch = &rows;
        if fresh && !session.keyless.due(batch).is_empty() {
            // What was refused ends here; its rows are written with guards, which need the key.
            let ended = session.client.batch_execute("ROLLBACK").await;
            ended.map_err(|error| fault::general("rolling back", error))?;
            session.transaction = Transaction::Closed;
        }
        keys::make(session, batch).await?;
        session.pure = Pure::default();
        session.transaction = Transaction::Broken;
    }
    isolate::apply(session, sink, batch, fresh, at_end, halt_on, applied).await
}

fn read_again(too_old: CopyTooOld) -> SinkError {
    SinkError::Transient {
        what: "applying the rows of a copy",
        condition: None,
        source: too_old.into(),
    }
}

/// A row of a copy, of a table not copied yet, that a forgotten delete may have removed. One worker at a time
/// makes the clean-up floors in memory true, and the fence is checked with the rows.
fn copied_too_old(session: &Session, batch: &Batch) -> Option<CopyTooOld> {
    batch.copy.as_ref()?;
    let oldest = |step: &Step| -> Vec<(TableName, String, Version)> {
        let of =
            |layout: &TableLayout, version| (layout.source.clone(), layout.relation(), version);
        match step {
            Step::Rows(tables) => {
                let oldest = |table: &TableRows| table.rows.iter().map(|op| op.version).min();
                let tables = tables.iter();
                tables
                    .filter_map(|table| Some(of(&table.layout, oldest(table)?)))
                    .collect()
            }
            Step::Load(load) => vec![of(&load.layout, load.version)],
            _ => Vec::new(),
        }
    };
    let rows = batch.steps.iter().flat_map(oldest);
    rows.into_iter().find_map(|(table, relation, version)| {
        let state = session.copied.tables.get(&table);
        // The rows of a table that catches up come from the stream: what they could meet was kept.
        if let Some(CopyState::Loaded { .. } | CopyState::Parked { .. }) = state {
            return None;
        }
        let forgotten = *session.forgotten.get(&relation)?;
        (version <= forgotten).then_some(CopyTooOld {
            table,
            version,
            forgotten,
        })
    })
}

pub(super) fn broken() -> SinkError {
    SinkError::Transient {
        what: "the session is in an unknown state",
        condition: None,
        source: "open the sink again".into(),
    }
}

enum Failure {
    /// A row's values were refused, perhaps only when the transaction was to end.
    Row { at_end: bool },
    /// Anything else.
    Sink(SinkError),
}

impl From<SinkError> for Failure {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

/// Applies a batch in one flush, and commits it if it says so. `inserted` gets the relations of which new rows
/// were sent as plain inserts.
async fn pipelined(
    session: &mut Session,
    sink: &str,
    batch: &Batch,
    fresh: bool,
    inserted: &mut Vec<String>,
    applied: &mut Applied,
) -> Result<(), Failure> {
    let sorted = sort(session, batch, inserted);
    let groups: Vec<Vec<_>> = sorted
        .iter()
        .map(|tables| tables.iter().map(Sorted::groups).collect())
        .collect();
    let mut commands = Commands::new(session, sink);
    let offered = write(&mut commands, batch, (&sorted, &groups), applied).await?;
    let list = std::mem::take(&mut commands.list);
    // A failed commit would end the earlier batches of a transaction too, so there it waits for its turn.
    let flush = Flush {
        begin: if fresh {
            "BEGIN"
        } else {
            "SAVEPOINT millrace_batch"
        },
        fence: Some((session.cas.clone(), fence(session, sink, batch))),
        end: end(fresh, batch.commit),
    };
    let ran = run(&session.client, flush, &list, applied).await;
    if let Err((At::Form(index), _)) = &ran {
        let relation = list[*index].layout.relation();
        session.load_texts.insert(relation.clone());
        inserted.retain(|inserted| *inserted != relation);
    }
    ran.map_err(|(at, error)| failure(at, error, &list))?;
    applied.stale += offered - (applied.written + applied.dead()).min(offered);
    if !fresh && batch.commit {
        let committed = session.client.batch_execute("COMMIT").await;
        committed.map_err(|error| Failure::Sink(fault::general("committing", error)))?;
    }
    Ok(())
}

/// The rows of each step, sorted by how they are written. `inserted` gets the relations of which new rows are to be sent
/// as plain inserts.
fn sort<'b>(
    session: &mut Session,
    batch: &'b Batch,
    inserted: &mut Vec<String>,
) -> Vec<Vec<Sorted<'b>>> {
    // Rows are sorted lazily per step because a truncate raises the floor for the steps behind it.
    let mut floors = session.floors.clone();
    let mut sorted = Vec::with_capacity(batch.steps.len());
    for step in &batch.steps {
        match step {
            Step::Rows(tables) => {
                sorted.push(
                    tables
                        .iter()
                        .map(|table| {
                            let sorted = Sorted::new(table, &floors)
                                .with_inserts(&table.layout, &mut session.inserts);
                            if !sorted.new.is_empty() {
                                inserted.push(table.layout.relation());
                            }
                            sorted
                        })
                        .collect(),
                );
            }
            Step::Truncate(tables) => {
                for (layout, version) in tables {
                    let floor = floors.entry(layout.relation()).or_default();
                    *floor = (*floor).max(*version);
                }
                sorted.push(Vec::new());
            }
            Step::Load(load) => {
                inserted.push(load.layout.relation());
                sorted.push(Vec::new());
            }
            Step::Move(_) | Step::Sweep { .. } => sorted.push(Vec::<Sorted<'_>>::new()),
        }
    }
    sorted
}

/// A table's rows by how they are written.
type Groups<'a> = Vec<(Group<'a>, &'a [&'a RowOp])>;

/// Adds the commands that write a batch, whose rows are sorted and grouped so. Returns how many rows they offer.
async fn write<'a>(
    commands: &mut Commands<'a, '_>,
    batch: &'a Batch,
    (sorted, groups): (&[Vec<Sorted<'a>>], &'a [Vec<Groups<'a>>]),
    applied: &mut Applied,
) -> Result<u64, SinkError> {
    let mut offered = 0;
    for ((step, sorted), groups) in batch.steps.iter().zip(sorted).zip(groups) {
        if let Step::Rows(tables) = step {
            for ((table, sorted), groups) in tables.iter().zip(sorted).zip(groups) {
                applied.stale += sorted.stale;
                for (group, ops) in groups {
                    offered += ops.len() as u64;
                    commands.group(&table.layout, *group, ops).await?;
                }
            }
        } else if let Step::Load(load) = step {
            offered += load.rows() as u64;
            commands.load(load).await?;
        } else if let Step::Move(moves) = step {
            for moved in moves {
                if is_above_floor(&commands.session.floors, moved) {
                    offered += 1;
                    commands.move_row(moved).await?;
                } else {
                    applied.stale += 1;
                }
            }
        } else {
            commands.whole(step).await?;
        }
        commands.session.end_step();
    }
    Ok(offered)
}

/// What ends a batch that begins a transaction, or does not, and commits it, or does not.
fn end(fresh: bool, commit: bool) -> Option<&'static str> {
    match (fresh, commit) {
        (true, true) => Some("COMMIT"),
        (true, false) => None,
        (false, false) => Some("RELEASE SAVEPOINT millrace_batch"),
        // What was deferred is checked while this batch can still be taken back alone.
        (false, true) => Some("SET CONSTRAINTS ALL IMMEDIATE; RELEASE SAVEPOINT millrace_batch"),
    }
}

fn failure(at: At, error: Error, list: &[Command<'_>]) -> Failure {
    let row = fault::cause(&error) == Cause::Row;
    match at {
        At::Fence if error.code() == Some(&SqlState::DIVISION_BY_ZERO) => {
            Failure::Sink(SinkError::Fenced)
        }
        At::Command(_) if row => Failure::Row { at_end: false },
        // With guards the target says what it has against the table, or has nothing against it.
        At::Load(_) if fault::cause(&error) != Cause::World => Failure::Row { at_end: false },
        At::Form(_) if fault::cause(&error) == Cause::Aborted => Failure::Row { at_end: false },
        At::End if row => Failure::Row { at_end: true },
        At::Command(index) | At::Load(index) | At::Form(index) => {
            let table = super::commands::table(&list[index]);
            Failure::Sink(fault::of_table("applying rows", table, error))
        }
        At::Begin | At::Fence | At::End => Failure::Sink(fault::general("applying a batch", error)),
    }
}

/// The parameters of the compare-and-set.
pub(super) fn fence<'a>(session: &Session, sink: &'a str, batch: &Batch) -> Vec<Parameter<'a>> {
    let copy = batch.copy.as_ref().map(|copy| {
        serde_json::to_string(copy).expect("copy progress has string keys only, so it is JSON")
    });
    vec![
        // JetStream numbers from 1 and never comes near 2^63.
        Box::new(batch.to.stream_seq as i64),
        Box::new(Uuid(batch.to.position.0)),
        Box::new(i64::from(batch.to.position.epoch())),
        Box::new(batch.to.source_ts_us),
        Box::new(copy),
        Box::new(sink),
        Box::new(PARTITION),
        Box::new(session.fence),
        Box::new(batch.from.stream_seq as i64),
        Box::new(Uuid(batch.from.position.0)),
    ]
}

/// Sends everything in one flush and waits for all of it. The first error is the cause of all that follow.
pub(super) async fn run(
    client: &Client,
    flush: Flush<'_>,
    commands: &[Command<'_>],
    applied: &mut Applied,
) -> Result<(), (At, Error)> {
    let mut sent = Vec::with_capacity(commands.len());
    // A request is on its way once its future was polled, so polling in this order is sending in this order.
    let mut begin = Sent::new(client.batch_execute(flush.begin)).await;
    let mut fence = match &flush.fence {
        Some((statement, parameters)) => {
            let parameters = parameters.iter().map(AsRef::as_ref).map(shared);
            Some(Sent::new(execute(client, statement, parameters.collect())).await)
        }
        None => None,
    };
    for (index, command) in commands.iter().enumerate() {
        if let Some((load, format)) = &command.load {
            let copied = load::copy(client, &command.statement, load, format).await;
            sent.push(Sent::Answered(Some(copied.map_err(
                |refused| match refused {
                    Refused::Target(error) => (At::Load(index), error),
                    Refused::Form(error) => (At::Form(index), error),
                },
            ))));
            continue;
        }
        let parameters = command
            .parameters
            .iter()
            .map(AsRef::as_ref)
            .map(shared)
            .collect();
        let executed = execute(client, &command.statement, parameters);
        let executed = async move { executed.await.map_err(|error| (At::Command(index), error)) };
        sent.push(Sent::new(executed).await);
    }
    let mut end = match flush.end {
        Some(sql) => Some(Sent::new(client.batch_execute(sql)).await),
        None => None,
    };
    begin.wait().await.map_err(|error| (At::Begin, error))?;
    if let Some(fence) = &mut fence {
        fence.wait().await.map_err(|error| (At::Fence, error))?;
    }
    for (sent, command) in sent.iter_mut().zip(commands) {
        let rows = sent.wait().await?;
        match command.counts {
            Counts::Upserted => applied.wrote(&command.layout.source, rows, 0),
            Counts::Deleted => applied.wrote(&command.layout.source, 0, rows),
            Counts::Letters => applied.dead_letter(&command.layout.source, rows),
            Counts::Nothing => {}
        }
    }
    if let Some(end) = &mut end {
        end.wait().await.map_err(|error| (At::End, error))?;
    }
    Ok(())
}

type Shared<'a> = &'a (dyn tokio_postgres::types::ToSql + Sync);

fn shared<'a>(parameter: &'a (dyn tokio_postgres::types::ToSql + Sync + Send + 'a)) -> Shared<'a> {
    parameter
}

async fn execute(
    client: &Client,
    statement: &Statement,
    parameters: Vec<Shared<'_>>,
) -> Result<u64, Error> {
    client.execute(statement, &parameters).await
}

/// A request that was sent, or its answer.
enum Sent<'f, T, E> {
    Waiting(Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'f>>),
    Answered(Option<Result<T, E>>),
}

impl<'f, T, E> Sent<'f, T, E> {
    async fn new(request: impl Future<Output = Result<T, E>> + Send + 'f) -> Self {
        let mut request: Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'f>> =
            Box::pin(request);
        match poll!(pin!(&mut request)) {
            Poll::Ready(answer) => Self::Answered(Some(answer)),
            Poll::Pending => Self::Waiting(request),
        }
    }

    async fn wait(&mut self) -> Result<T, E> {
        match self {
            Self::Waiting(request) => request.await,
            Self::Answered(answer) => answer.take().expect("each answer is waited for once"),
        }
    }
}
