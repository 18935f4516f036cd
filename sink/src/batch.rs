//! What a sink is given to apply, and where it stands.

use std::collections::BTreeMap;
use std::sync::Arc;

use millrace_event::{Lsn, Position, TableName, Version};
use serde::{Deserialize, Serialize};

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

/// Which stream a sink is on, and how far each table's initial copy is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct CopyProgress {
    /// When the stream was created, as its server writes it: positions on another stream of that name mean
    /// nothing. Empty before the sink was ever on one.
    pub stream: String,
    /// The newest version that a copy's rows ever had here: it may lie above everything that the stream brought.
    pub copied_to: Version,
    /// Each table's copy.
    pub tables: BTreeMap<TableName, CopyState>,
}

impl CopyProgress {
    /// Whether no table's copy is awaited.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.tables.values().all(CopyState::is_copied)
    }

    /// Whether a streamed change of this table is already part of its copy: its transaction committed below
    /// the consistent point of the snapshot that the copy read.
    #[must_use]
    pub fn covers(&self, table: &TableName, version: Version) -> bool {
        version.commit_lsn < self.copied_below(table)
    }

    /// The consistent point of the snapshot that the table's copy read; zero where there is no such copy.
    #[must_use]
    pub fn copied_below(&self, table: &TableName) -> Lsn {
        match self.tables.get(table) {
            Some(CopyState::Copied { lsn }) => *lsn,
            _ => Lsn::ZERO,
        }
    }

    /// The parked tables that may still catch up: the last message that was applied to each, and its position.
    pub fn claims(&self) -> impl Iterator<Item = (&TableName, (u64, Position))> {
        self.tables.iter().filter_map(|(table, state)| match state {
            CopyState::Parked {
                stream_seq,
                position,
                ..
            } => Some((table, (*stream_seq, *position))),
            _ => None,
        })
    }

    /// The tables that are parked, with or without a claim on the stream.
    #[must_use]
    pub fn parked(&self) -> Vec<TableName> {
        let parked = |state: &CopyState| {
            matches!(state, CopyState::Parked { .. } | CopyState::Lapsed { .. })
        };
        self.tables
            .iter()
            .filter(|(_, state)| parked(state))
            .map(|(table, _)| table.clone())
            .collect()
    }
}

/// After the target refused a copy, the next one is asked for this much later at the earliest: each costs the
/// source a snapshot.
const COPY_AGAIN_INTERVAL_US: i64 = 30_000_000;

impl CopyState {
    /// A table of ours that must be copied anew, over its old rows.
    #[must_use]
    pub fn again() -> Self {
        Self::Copying {
            request: String::new(),
            attempt: 0,
            number: 0,
            lsn: Lsn::ZERO,
        }
    }

    /// Whether no copy of the table is awaited: its existing rows were all applied, or the target refuses it.
    #[must_use]
    pub fn is_copied(&self) -> bool {
        matches!(
            self,
            Self::Copied { .. } | Self::Parked { .. } | Self::Lapsed { .. }
        )
    }

    /// Whether a copy may be asked for, now that the target takes the table. Of tables whose claim has lapsed.
    #[must_use]
    pub fn may_copy_again(&self, now_us: i64) -> bool {
        match self {
            // A clock that was set back must not make it wait longer.
            Self::Lapsed { refused_at_us } => {
                !(0..COPY_AGAIN_INTERVAL_US).contains(&now_us.saturating_sub(*refused_at_us))
            }
            _ => false,
        }
    }
}

/// The state of one table: its initial copy, and whether it keeps up with the sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum CopyState {
    /// Not begun: entered when the sink first sees the table.
    Pending,
    /// Chunks are being applied: entered with the first of them. A crash resumes after `number`.
    Copying {
        /// The copy's request; empty for a table of ours that must be copied again.
        request: String,
        /// Which attempt of the request the rows belong to; another attempt starts over.
        attempt: u32,
        /// The number of the last message applied, from 1.
        number: u64,
        /// The consistent point of the snapshot that is being read.
        #[serde(with = "lsn_text")]
        lsn: Lsn,
    },
    /// All rows applied: entered with the sweep at the copy's end.
    Copied {
        /// The consistent point: changes committed below it are part of the copy.
        #[serde(with = "lsn_text")]
        lsn: Lsn,
    },
    /// The target refuses the table: entered from `Copied`, and left to it once the table has caught up, or to
    /// `Lapsed` when the stream no longer holds what it has not applied. A crash goes on from the table's own
    /// position.
    Parked {
        /// The consistent point of its copy.
        #[serde(with = "lsn_text")]
        lsn: Lsn,
        /// The last message of the stream that was applied to it.
        stream_seq: u64,
        /// That message's position.
        position: Position,
    },
    /// The target refuses the table, and nothing is kept for it: entered from `Parked` when the stream has let
    /// its changes go, and from `Copying` when the target refuses the copy. Left to `Copying` once the target
    /// takes the table. A crash changes nothing.
    Lapsed {
        /// When the target last refused a copy of it: the sink's clock, microseconds since 1970; 0 for never.
        refused_at_us: i64,
    },
}

/// The progress as it is stored: names are no keys of a JSON object, because they have two parts.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    stream: String,
    #[serde(default)]
    copied_to: Version,
    tables: Vec<StoredTable>,
}

#[derive(Clone, Serialize, Deserialize)]
struct StoredTable {
    #[serde(flatten)]
    table: TableName,
    #[serde(flatten)]
    state: CopyState,
}

impl From<Stored> for CopyProgress {
    fn from(stored: Stored) -> Self {
        let tables = stored.tables.into_iter();
        Self {
            stream: stored.stream,
            copied_to: stored.copied_to,
            tables: tables.map(|entry| (entry.table, entry.state)).collect(),
        }
    }
}

impl From<CopyProgress> for Stored {
    fn from(progress: CopyProgress) -> Self {
        let tables = progress.tables.into_iter();
        Self {
            stream: progress.stream,
            copied_to: progress.copied_to,
            tables: tables
                .map(|(table, state)| StoredTable { table, state })
                .collect(),
        }
    }
}

mod lsn_text {
    use millrace_event::Lsn;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(lsn: &Lsn, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(lsn)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Lsn, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
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
    },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_progress_round_trips_as_json() {
        let stream = "2026-11-21T00:00:00Z".to_owned();
        let tables = BTreeMap::from([
            (TableName::new("a", "b"), CopyState::Pending),
            (
                TableName::new("a", "c"),
                CopyState::Copying {
                    request: "r".into(),
                    attempt: 2,
                    number: 9,
                    lsn: Lsn(17),
                },
            ),
            (
                TableName::new("a", "d"),
                CopyState::Copied {
                    lsn: Lsn(0x1_0000_0001),
                },
            ),
            (
                TableName::new("a", "e"),
                CopyState::Lapsed { refused_at_us: 7 },
            ),
        ]);
        let progress = CopyProgress {
            stream,
            copied_to: Version::new(1, Lsn(0x1_0000_0001), 0),
            tables,
        };
        let json = serde_json::to_string(&progress).expect("is well formed");
        assert!(
            json.contains(r#"{"schema":"a","table":"d","state":"copied","lsn":"1/1"}"#),
            "{json}"
        );
        assert_eq!(
            serde_json::from_str::<CopyProgress>(&json).expect("is well formed"),
            progress
        );
        assert!(!progress.is_complete());
        let covers =
            |table, lsn| progress.covers(&TableName::new("a", table), Version::new(1, Lsn(lsn), 1));
        assert!(covers("d", 0x1_0000_0000));
        assert!(!covers("d", 0x1_0000_0001));
        assert!(!covers("c", 1));
    }

    #[test]
    fn a_table_waits_in_peace_after_the_target_refused_its_copy() {
        let (refused_at_us, wait) = (1_000_000_000, COPY_AGAIN_INTERVAL_US);
        let lapsed = CopyState::Lapsed { refused_at_us };
        assert!(!lapsed.may_copy_again(refused_at_us));
        assert!(!lapsed.may_copy_again(refused_at_us + wait - 1));
        assert!(lapsed.may_copy_again(refused_at_us + wait));
        assert!(lapsed.may_copy_again(refused_at_us - 1));
        assert!(CopyState::Lapsed { refused_at_us: 0 }.may_copy_again(refused_at_us));
        assert!(!CopyState::again().may_copy_again(refused_at_us));
        assert!(lapsed.is_copied() && !CopyState::again().is_copied());
    }
}
