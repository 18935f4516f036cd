//! What every target does.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Condition, Fault, Table};
use millrace_event::{TableName, TableSchema, Version};

use crate::batch::{Batch, PositionRow};
use crate::row::{LayoutColumn, TableLayout};

/// A target that changes are applied to. Implementations pass the suite in `conformance`.
///
/// One worker at a time: [`Sink::open`] elects it, and every transaction checks that it still is. After any
/// error the open target transaction is rolled back, and after a transient one the sink is opened again.
pub trait Sink: Send {
    /// Connects, brings the bookkeeping up to date and tries to become the worker.
    fn open(&mut self) -> impl Future<Output = Result<Elected, SinkError>> + Send;

    /// Makes sure that a table can take this schema's rows, and how they are laid out for it. `before` is what the
    /// table was when this was last asked, where that is known.
    fn ensure_table(
        &mut self,
        schema: &TableSchema,
        before: Option<&TableSchema>,
        settings: &Table,
    ) -> impl Future<Output = Result<Ensured, SinkError>> + Send;

    /// Applies a batch, in one target transaction with its checkpoint.
    fn apply(&mut self, batch: &Batch) -> impl Future<Output = Result<Applied, SinkError>> + Send;

    /// Ends the open target transaction without a trace.
    fn roll_back(&mut self) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// The keys of rows of which columns are missing, because a change did not bring them and the target did not
    /// have them: those whose dead letter says so and is open. In byte order, as [`crate::row::Key`] writes them: the
    /// first `max` behind `after`, the empty text for all.
    fn incomplete(
        &mut self,
        target: &TableName,
        after: &str,
        max: usize,
    ) -> impl Future<Output = Result<Vec<String>, SinkError>> + Send;

    /// Forgets deletes of these target tables at or below a version each, which no older row can follow any more, and
    /// that were applied longer ago than `kept`: `max` of them at most. The tables are this sink's own: versions of others
    /// cannot be compared with its. Returns how many.
    fn clean_up(
        &mut self,
        up_to: &BTreeMap<TableName, Version>,
        kept: Duration,
        max: u32,
    ) -> impl Future<Output = Result<u64, SinkError>> + Send;
}

/// Whether this process is the sink's worker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, for the moment of an election"
)]
pub enum Elected {
    /// It is, and continues from here.
    Yes(PositionRow),
    /// Another one is: stand by and try again.
    No,
}

/// A table that is ready.
#[derive(Clone, Debug)]
pub struct Ensured {
    /// How its rows are laid out.
    pub layout: Arc<TableLayout>,
    /// What an operator should know and nothing depends on.
    pub warnings: Vec<String>,
    /// Whether the table was made just now.
    pub created: bool,
    /// Columns of the target that the schema does not have, by their names there.
    pub others: Vec<LayoutColumn>,
}

/// What became of a batch's rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Rows written, deletes included; rows that a truncate or sweep removed are not counted.
    pub written: u64,
    /// Rows that the guard rejected, and deletes of rows that were not there.
    pub stale: u64,
    /// Rows set aside: the tables and how many of each.
    pub dead_letters: Vec<(TableName, u64)>,
    /// What `written` consists of, where the target tells.
    pub tables: Vec<Written>,
}

/// Rows of one table that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The table at the source.
    pub table: TableName,
    /// Rows inserted, updated or moved.
    pub upserts: u64,
    /// Rows deleted.
    pub deletes: u64,
}

impl Applied {
    /// Rows set aside, of all tables.
    #[must_use]
    pub fn dead(&self) -> u64 {
        self.dead_letters.iter().map(|(_, rows)| rows).sum()
    }

    /// Counts what a statement wrote.
    pub(crate) fn wrote(&mut self, table: &TableName, upserts: u64, deletes: u64) {
        let rows = upserts + deletes;
        if rows == 0 {
            return;
        }
        self.written += rows;
        match self
            .tables
            .iter_mut()
            .find(|written| written.table == *table)
        {
            Some(written) => {
                written.upserts += upserts;
                written.deletes += deletes;
            }
            None => self.tables.push(Written {
                table: table.clone(),
                upserts,
                deletes,
            }),
        }
    }

    pub(crate) fn dead_letter(&mut self, table: &TableName, rows: u64) {
        if rows == 0 {
            return;
        }
        match self.dead_letters.iter_mut().find(|(name, _)| name == table) {
            Some((_, count)) => *count += rows,
            None => self.dead_letters.push((table.clone(), rows)),
        }
    }
}

/// The reason below a [`SinkError`].
pub type Cause = Box<dyn Error + Send + Sync>;

/// A copy's row is as old as deletes that the sink has forgotten: whether it was deleted since, nobody can tell.
/// The table must be copied again, from a snapshot of now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "copied row of table {table} has version {version}, and deletes up to {forgotten} are forgotten"
)]
pub struct CopyTooOld {
    /// The table at the source.
    pub table: TableName,
    /// The row's version.
    pub version: Version,
    /// The newest version up to which deletes were forgotten.
    pub forgotten: Version,
}

/// Why a sink could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The target did not answer as it should; open it again, later.
    #[error("target failed: {what}")]
    Transient {
        /// What was being done.
        what: &'static str,
        /// What to tell the operator meanwhile, if it is more than the reason.
        condition: Option<Box<Condition>>,
        /// Why it failed.
        #[source]
        source: Cause,
    },
    /// Another worker has the sink: stand by.
    #[error("another worker has taken over the sink")]
    Fenced,
    /// The target refuses everything of one table; the others can go on.
    #[error("target refuses table {table}: {condition}")]
    Table {
        /// The table at the source.
        table: TableName,
        /// What to tell the operator.
        condition: Box<Condition>,
        /// The target's own words, if it said any.
        #[source]
        source: Option<Cause>,
    },
    /// Going on is of no use.
    #[error("{condition}")]
    Fatal {
        /// What to tell the operator.
        condition: Box<Condition>,
        /// The target's own words, if it said any.
        #[source]
        source: Option<Cause>,
    },
}

impl SinkError {
    /// What a caller does about it. Losing the sink to another worker is transient: stand by, then try again.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Transient { .. } | Self::Fenced => Fault::Transient,
            Self::Table { .. } => Fault::Poison,
            Self::Fatal { .. } => Fault::Fatal,
        }
    }

    /// What to tell the operator, if it is more than a retry.
    #[must_use]
    pub fn condition(&self) -> Option<&Condition> {
        match self {
            Self::Table { condition, .. } | Self::Fatal { condition, .. } => Some(condition),
            Self::Transient { condition, .. } => condition.as_deref(),
            Self::Fenced => None,
        }
    }
}
