//! Chunks of tables, each read under a snapshot of its own, with the version that the rule gives it.

use std::pin::pin;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use millrace_connect::clock::now_us;
use millrace_connect::postgres::connect;
use millrace_event::{Lsn, Relation};
use tokio_postgres::Client;

use super::Copier;
use super::failure::Failure;
use super::keyset::{KeyColumn, Keyset};
use super::pack::Packer;
use super::rule::{self, Snapshot, Wait};
use super::session::session;
pub(super) use super::span::Rows;
use super::span::{End, Reached};
use super::throttle::{CHUNK_BYTES_MAX, Taken};
use crate::capture::HEARTBEAT_PREFIX;
use crate::commits::{Recording, mark_content};
use crate::source::{self, SourceTable};
use crate::{Error, heartbeat};

/// How long a table's lock may be waited for, in milliseconds: the request's other tables wait behind it.
const LOCK_TIMEOUT_MS: u32 = 30_000;

/// The snapshot, and the files that hold the rows: a rewrite of the table makes new ones.
const SNAPSHOT: &str = "SELECT pg_current_snapshot()::text, coalesce((SELECT \
    string_agg(l.relid::oid::text || ':' || coalesce(pg_relation_filenode(l.relid)::text, ''), ',' ORDER BY l.relid::oid) \
    FROM pg_partition_tree(c.oid) l WHERE l.isleaf), pg_relation_filenode(c.oid)::text, '') \
    FROM pg_class c WHERE c.oid = $1::text::regclass";

/// The columns, with their types as SQL without modifiers.
const COLUMNS: &str = "SELECT attnum, attname::text, atttypid, atttypmod, format_type(atttypid, -1) FROM pg_attribute \
    WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum";

/// Takes a transaction id and leaves a mark in the WAL. The message makes the transaction one that the reader sees.
const MARK: &str =
    "SELECT pg_current_xact_id()::text, pg_logical_emit_message(true, $1, $2::text)::text";

/// Rows that are ready to be published, once the reader of the WAL has passed what their snapshot shows.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) messages: Vec<Bytes>,
    /// Behind which key the next one begins; `None` where this one has no row.
    pub(super) last_key: Option<Vec<String>>,
    /// Whether there is no row behind it.
    pub(super) is_last: bool,
    pub(super) version: Lsn,
    pub(super) rows: u64,
    /// What it cost: of a part of the table also the rows that do not belong to it.
    pub(super) taken: Taken,
}

/// What trying to read a chunk led to.
#[derive(Debug)]
pub(super) enum Tried {
    Read(Chunk),
    /// Nothing was read: this must pass first.
    Wait(Wait),
    /// The table was rewritten since the chunk before: this one must be read again.
    Rewritten,
    /// The rows of so many keys are too large to be held at once.
    TooLarge,
}

/// What was found of a table when its newest chunk was read.
#[derive(Debug, Default)]
pub(super) struct Looks {
    files: Option<String>,
    columns: Option<Vec<Column>>,
}

/// A column of a table as a snapshot shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Column {
    number: i16,
    name: String,
    type_oid: u32,
    typmod: i32,
    /// The type as SQL.
    type_name: String,
}

async fn columns(client: &Client, table: &SourceTable) -> Result<Vec<Column>, Failure> {
    let rows = client.query(COLUMNS, &[&table.name.quoted()]).await;
    let rows = rows.map_err(|error| Failure::of_table(&table.name, error))?;
    let column = |row: &tokio_postgres::Row| Column {
        number: row.get(0),
        name: row.get(1),
        type_oid: row.get(2),
        typmod: row.get(3),
        type_name: row.get(4),
    };
    Ok(rows.iter().map(column).collect())
}

/// Checks that a table has the columns that capture knows, and no others. What is read of it lacks a column that capture
/// does not know, and the sink takes changes that its snapshot shows for read.
fn are_known(table: &SourceTable, found: &[Column]) -> bool {
    let found_names = found
        .iter()
        .map(|column| (column.number, column.name.as_str()));
    let known_names = table
        .known
        .iter()
        .map(|(number, name)| (*number, name.as_str()));
    let are_same = table.columns.iter().all(|(name, type_oid, typmod)| {
        // A masked column travels with another type than it has.
        let column = found.iter().find(|column| column.name == *name);
        column.is_some_and(|column| {
            !table.selection.leaves(name)
                || (column.type_oid, column.typmod) == (*type_oid, *typmod)
        })
    });
    are_same && found_names.eq(known_names)
}

/// Checks the same of the table that a transaction's snapshot shows.
///
/// # Errors
/// [`Failure::Life`]: capture must look at the table anew.
pub(super) async fn check_columns(client: &Client, table: &SourceTable) -> Result<(), Failure> {
    match are_known(table, &columns(client, table).await?) {
        true => Ok(()),
        false => Err(has_changed(table)),
    }
}

fn has_changed(table: &SourceTable) -> Failure {
    Failure::Life(Error::retry_because(format!(
        "table {} has changed since capture began",
        table.name
    )))
}

/// The reading of a sink's tables in chunks, one request after another: what is known of commits, and the barrier that
/// was passed, hold for as long as they are recorded. A barrier outlasts whatever is open when it is taken, so a
/// request that comes every second must not need one of its own.
pub(super) struct Reading<'c> {
    copier: &'c Copier<'c>,
    request: String,
    recording: Recording<'c>,
    session: Option<(Client, i32)>,
    /// Where the request began: the commit LSN of its first mark. Zero before.
    begun: Lsn,
}

impl<'c> Reading<'c> {
    /// Begins to record. [`Reading::begin`] must follow.
    pub(super) fn new(copier: &'c Copier<'c>) -> Self {
        Self {
            copier,
            request: String::new(),
            // Before any transaction id is taken: the rule's barrier builds on it.
            recording: copier.commits.record(),
            session: None,
            begun: Lsn::ZERO,
        }
    }

    /// Takes up a request, if it is another one: where that begins, a mark says.
    pub(super) fn answer(&mut self, request: &str) {
        if self.request != request {
            request.clone_into(&mut self.request);
            self.begun = Lsn::ZERO;
        }
    }

    /// Where the request began.
    pub(super) fn begun(&self) -> Lsn {
        self.begun
    }

    /// What the reader of the WAL tells.
    pub(super) fn recording(&self) -> &Recording<'c> {
        &self.recording
    }

    /// The session, for other questions about the source.
    pub(super) async fn client(&mut self) -> Result<&Client, Failure> {
        if self
            .session
            .as_ref()
            .is_some_and(|(client, _)| client.is_closed())
        {
            self.session = None;
        }
        if self.session.is_none() {
            self.session = Some(self.connect().await?);
        }
        let (client, _) = self.session.as_ref().expect("just made");
        Ok(client)
    }

    /// Ends the session, and with it whatever its transaction holds.
    pub(super) fn end_session(&mut self) {
        self.session = None;
    }

    async fn connect(&self) -> Result<(Client, i32), Failure> {
        let dsn = source::dsn(&self.copier.config.source)?;
        let client = connect(&dsn, session()).await.map_err(Error::from)?;
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).await?;
        let pid = pid.get(0);
        Ok((client, pid))
    }

    /// Leaves a mark in the WAL, which [`Recording::seen`] waits for; returns it and its transaction's id.
    pub(super) async fn mark(&mut self) -> Result<(u64, u64), Failure> {
        let mark = rand::random();
        self.recording.expect(mark);
        let client = self.client().await?;
        let answer = client
            .query_one(MARK, &[&HEARTBEAT_PREFIX, &mark_content(mark)])
            .await;
        let row = match answer {
            Ok(row) => row,
            Err(error) if heartbeat::cannot_be_written(&error) => {
                return Err(Failure::heartbeat_refused(&error));
            }
            Err(error) => return Err(error.into()),
        };
        let xid = row.get::<_, String>(0);
        let xid = xid.parse().map_err(|error| {
            Error::retry("the source printed a transaction id that is none", error)
        })?;
        Ok((mark, xid))
    }

    /// Takes the barrier: its transaction's id, while commits are recorded. Returns its mark.
    pub(super) async fn take_barrier(&mut self) -> Result<u64, Failure> {
        self.recording.with(|recent| recent.take_barrier());
        let (mark, xid) = self.mark().await?;
        self.recording.with(|recent| recent.barrier_taken(xid));
        Ok(mark)
    }

    /// Takes the mark where the request begins: the barrier's, where there is none.
    pub(super) async fn begin(&mut self) -> Result<u64, Failure> {
        if self.recording.with(|recent| recent.lacks_barrier()) {
            return self.take_barrier().await;
        }
        let (mark, _) = self.mark().await?;
        Ok(mark)
    }

    /// The reader has seen the commit of the barrier, or of the request's mark. The first one is where it begins.
    pub(super) fn mark_seen(&mut self, commit_lsn: Lsn) {
        if self.begun == Lsn::ZERO {
            self.begun = commit_lsn;
        }
    }

    /// Reads a chunk. After an error the session must end.
    pub(super) async fn read(
        &mut self,
        table: &SourceTable,
        relation: &Relation,
        looks: &mut Looks,
        rows: Rows<'_>,
    ) -> Result<Tried, Failure> {
        self.client().await?;
        let (client, pid) = self.session.as_ref().expect("just made");
        let began = Instant::now();
        // First of all: see `rule::version`.
        let m = self.recording.with(|recent| recent.position());
        let Shown { snapshot, files } = take_snapshot(client, table).await?;
        let judged = self.recording.with(|recent| {
            let judged = rule::version(m, &snapshot, recent, self.begun);
            recent.shown(&snapshot);
            judged
        });
        let rewritten = looks.rewritten(files);
        let version = match judged {
            Ok(version) if !rewritten => version,
            judged => {
                client.batch_execute("ROLLBACK").await?;
                return Ok(judged.map_or_else(Tried::Wait, |_| Tried::Rewritten));
            }
        };
        looks.columns(table, columns(client, table).await?)?;
        let (sql, end) = statement(client, table, &looks.keyset(table), rows).await?;
        let epoch = self.copier.source.epoch;
        let mut packer = Packer::new(relation, table.binding.as_ref(), epoch, version, now_us());
        let refused = |error| Failure::of_chunk(&table.name, rows.filter(), error);
        let is_full = fill(&mut packer, client, &sql, refused).await?;
        let reached = if is_full && end.may_follow(packer.rows()) {
            // The source would go on sending: the statement ends with a word on another session.
            let other = &self.copier.source.client;
            other.query("SELECT pg_cancel_backend($1)", &[pid]).await?;
            self.session = None;
            if matches!(rows, Rows::Of(_)) {
                return Ok(Tried::TooLarge);
            }
            Reached::cut_off(packer.rows(), packer.last_key())
        } else {
            client.batch_execute("COMMIT").await?;
            end.reached(packer.rows(), packer.last_key())
        };
        Ok(Tried::Read(Chunk {
            last_key: reached.last_key,
            is_last: reached.is_last,
            version,
            rows: packer.rows(),
            taken: Taken {
                rows: reached.looked_at,
                bytes: packer.bytes(),
                time: began.elapsed(),
            },
            messages: packer.finish(),
        }))
    }
}

/// What a transaction sees of a table that it has locked.
struct Shown {
    snapshot: Snapshot,
    /// The files that hold the rows.
    files: String,
}

/// Begins a transaction that keeps out whoever changes the table's shape, and takes its snapshot.
async fn take_snapshot(client: &Client, table: &SourceTable) -> Result<Shown, Failure> {
    let refused = |error| Failure::of_table(&table.name, error);
    let begin = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}; {}",
        Keyset::lock(&table.name)
    );
    client.batch_execute(&begin).await.map_err(refused)?;
    // The transaction's first query takes its snapshot, with the lock held.
    let row = client.query_one(SNAPSHOT, &[&table.name.quoted()]).await;
    let row = row.map_err(refused)?;
    let (snapshot, files): (String, String) = (row.get(0), row.get(1));
    let snapshot = snapshot
        .parse()
        .map_err(|error| Error::retry("the source printed a snapshot that is none", error))?;
    Ok(Shown { snapshot, files })
}

/// The statement that reads these rows, and where they end.
async fn statement(
    client: &Client,
    table: &SourceTable,
    keyset: &Keyset,
    rows: Rows<'_>,
) -> Result<(String, End), Failure> {
    let of_key = |error| Failure::of_key(&table.name, &error);
    let (sql, end) = match rows {
        Rows::Behind {
            after,
            filter,
            limit,
        } if keyset.is_filtered(filter) => {
            let sql = keyset.key_behind(after, limit).map_err(of_key)?;
            let row = client.query_opt(&sql, &[]).await;
            let row = row.map_err(|error| Failure::of_table(&table.name, error))?;
            let to: Option<Vec<String>> =
                row.map(|row| (0..row.len()).map(|at| row.get(at)).collect());
            let sql = keyset.range(after, to.as_deref(), filter);
            let end = to.map_or(End::Table, |key| End::Key(key, u64::from(limit)));
            (sql, end)
        }
        Rows::Behind { after, limit, .. } => {
            (keyset.chunk(after, limit), End::Count(u64::from(limit)))
        }
        Rows::Of(keys) => (keyset.rows_of(keys), End::Count(keys.len() as u64)),
    };
    Ok((sql.map_err(of_key)?, end))
}

/// Packs what a statement sends, until it ends or a chunk is full. Returns whether it is full.
async fn fill(
    packer: &mut Packer<'_>,
    client: &Client,
    sql: &str,
    refused: impl Fn(tokio_postgres::Error) -> Failure,
) -> Result<bool, Failure> {
    let mut lines = pin!(client.copy_out(sql).await.map_err(&refused)?);
    while let Some(line) = lines.next().await {
        packer.take(&line.map_err(&refused)?)?;
        if packer.bytes() >= CHUNK_BYTES_MAX {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Looks {
    /// Whether the table has other files than at the chunk before.
    fn rewritten(&mut self, files: String) -> bool {
        let rewritten = self.files.as_ref().is_some_and(|before| *before != files);
        self.files = Some(files);
        rewritten
    }

    /// Checks that the table has the columns that capture knows, as it had them at the chunk before.
    fn columns(&mut self, table: &SourceTable, found: Vec<Column>) -> Result<(), Failure> {
        let changed = self.columns.as_ref().is_some_and(|before| *before != found);
        let known = are_known(table, &found);
        self.columns = Some(found);
        match known && !changed {
            true => Ok(()),
            false => Err(has_changed(table)),
        }
    }

    fn keyset(&self, table: &SourceTable) -> Keyset {
        let columns = self.columns.as_deref().unwrap_or_default();
        let key = table.key.iter().map(|name| {
            let column = columns.iter().find(|column| column.name == *name);
            KeyColumn {
                name: name.clone(),
                type_name: column.expect("checked to be there").type_name.clone(),
            }
        });
        Keyset::new(
            table.in_from(),
            table.select_list(),
            table.filter.clone(),
            key.collect(),
        )
    }
}
