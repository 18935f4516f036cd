//! What a sink is given to apply, and where it stands.

use std::sync::Arc;

use millrace_event::{Position, Version};

use crate::load::Load;
use crate::progress::CopyProgress;
use crate::row::{Key, Row, TableLayout};

/// How far a sink has applied its stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// The stream sequence of the last message applied. Never trusted without `position`.
    pub stream_seq: u64,
    /// That message's position.
    pub position: Position,
    /// When the source committed or wrote it, microseconds since 1970.
    pub source_ts_us: i64,
}

/// Everything that a sink's position row holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PositionRow {
    /// How far the stream was applied.
    pub checkpoint: Checkpoint,
    /// The highest epoch applied.
    pub epoch: u32,
    /// Rises with every election: a worker whose fence is no longer stored writes nothing more.
    pub fence: i64,
    /// How far each table's initial copy is.
    pub copy: CopyProgress,
}

/// Changes that a sink applies in one go.
///
/// A target transaction is one batch, or several of which only the last has `commit`: a source transaction
/// larger than a batch keeps the target's open, so that memory stays flat and no reader sees half of it.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Where the sink must stand: the checkpoint of the batch before, committed or not.
    pub from: Checkpoint,
    /// Where it stands afterwards. The same as `from` for the rows of a copy.
    pub to: Checkpoint,
    /// The copies' progress to store with it; `None` leaves it as it is.
    pub copy: Option<CopyProgress>,
    /// What to do, in this order.
    pub steps: Vec<Step>,
    /// Whether the target transaction ends with this batch.
    pub commit: bool,
}

/// One step of a batch.
#[derive(Clone, Debug)]
pub enum Step {
    /// Rows of several tables, each key at most once per table; their order does not matter.
    Rows(Vec<TableRows>),
    /// Rows of a load: none of their keys in another step of the batch.
    Load(Load),
    /// Rows that changed their key without bringing all their columns, in this order.
    Move(Vec<Move>),
    /// Everything of these tables below a version is gone.
    Truncate(Vec<(Arc<TableLayout>, Version)>),
    /// The end of a table's copy: rows below `below` are not at the source any more, and its tombstones below
    /// it can no longer meet an older row.
    Sweep {
        /// The table.
        table: Arc<TableLayout>,
        /// The copy's version.
        below: Version,
        /// Whether the rows stay all the same: those that the source has deleted or truncated are kept.
        keeps_rows: bool,
    },
}

impl Step {
    /// The layouts of its tables, of each as often as it comes.
    pub(crate) fn layouts(&self) -> Vec<&Arc<TableLayout>> {
        match self {
            Self::Rows(tables) => tables.iter().map(|table| &table.layout).collect(),
            Self::Load(load) => vec![&load.layout],
            Self::Move(moves) => moves.iter().map(|moved| &moved.layout).collect(),
            Self::Truncate(tables) => tables.iter().map(|(layout, _)| layout).collect(),
            Self::Sweep { table, .. } => vec![table],
        }
    }
}

/// One table's rows of a step.
#[derive(Clone, Debug)]
pub struct TableRows {
    /// The table.
    pub layout: Arc<TableLayout>,
    /// At most one for each key.
    pub rows: Vec<RowOp>,
}

/// The newest change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowOp {
    /// The key.
    pub key: Key,
    /// The version of the newest change.
    pub version: Version,
    /// Whether the first change of this key here made the row: then a target that has all that came before has
    /// no row of it. A hint: only the target knows.
    pub created: bool,
    /// What it does.
    pub action: Action,
}

impl RowOp {
    /// Whether it removes its row.
    #[must_use]
    pub fn is_delete(&self) -> bool {
        matches!(self.action, Action::Delete { .. })
    }
}

/// What a change does to its key's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The row has these cells. With missing ones it must exist, and keeps those of its own.
    Put(Row),
    /// The row is gone.
    Delete {
        /// A row of which only the key's cells are set.
        key: Row,
        /// The row before it was deleted, as far as this batch knows it.
        last: Option<Row>,
    },
}

/// A row under a new key, whose missing cells are those of the row under its old key. The delete of the old
/// key follows in a later step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveRow {
    /// A row of which only the old key's cells are set.
    pub old: Row,
    /// The old key.
    pub old_key: Key,
    /// The new key.
    pub key: Key,
    /// The new row; at least one cell is missing.
    pub row: Row,
    /// Its version.
    pub version: Version,
}

/// One [`MoveRow`] and its table.
#[derive(Clone, Debug)]
pub struct Move {
    /// The table.
    pub layout: Arc<TableLayout>,
    /// The row.
    pub row: MoveRow,
}
