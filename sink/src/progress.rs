//! How far a sink's tables are: which have their rows, which wait for them, and which the target refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use millrace_event::work::BackfillOrder;
use millrace_event::{Lsn, Position, TableName, Version};
use serde::{Deserialize, Serialize};

use crate::batch::Checkpoint;

/// Which stream a sink is on, and how far each table is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct CopyProgress {
    /// When the stream was created, as its server writes it: positions on another stream of that name mean
    /// nothing. Empty before the sink was ever on one.
    pub stream: String,
    /// The newest version that a copy's rows ever had here: it may lie above everything that the stream brought.
    pub copied_to: Version,
    /// The last message of the copy stream that was applied.
    pub reading: Option<Reading>,
    /// The orders that were carried out, by their ids, until they are off the list.
    pub finished: BTreeSet<String>,
    /// Each table.
    pub tables: BTreeMap<TableName, CopyState>,
    /// Tables that are not configured any more, and whose rows are still in the target: they are ours when the
    /// table comes back. As many as were ever configured.
    pub left: BTreeSet<TableName>,
    /// The version of each table's schema that the target was last made to fit. It may be older than that, never
    /// newer.
    pub shapes: BTreeMap<TableName, String>,
}

/// A place on the copy stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The request that is being answered.
    pub request: String,
    /// The attempt at it; another one counts its messages anew.
    pub attempt: u64,
    /// The number of the last message applied, from 1.
    pub number: u64,
}

/// What a table needs of the stream begins behind this message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The message's stream sequence.
    pub stream_seq: u64,
    /// Its position.
    pub position: Position,
}

impl From<Checkpoint> for Claim {
    fn from(checkpoint: Checkpoint) -> Self {
        Self {
            stream_seq: checkpoint.stream_seq,
            position: checkpoint.position,
        }
    }
}

impl CopyProgress {
    /// Whether no rows of any table are awaited on the copy stream.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.tables.values().all(CopyState::is_copied)
    }

    /// Whether every table has all its rows and all its changes, as far as the target takes them.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        let behind = |state: &CopyState| matches!(state, CopyState::Loaded { .. });
        self.is_complete() && !self.tables.values().any(behind)
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

    /// What the tables claim of the stream that are not where the sink is.
    pub fn claims(&self) -> impl Iterator<Item = (&TableName, Claim)> {
        let claims = self.tables.iter();
        claims.filter_map(|(table, state)| Some((table, state.claim()?)))
    }

    /// The tables that are parked, with or without a claim on the stream.
    #[must_use]
    pub fn parked(&self) -> Vec<TableName> {
        self.those(CopyState::is_parked)
    }

    /// The tables in a state of that kind.
    #[must_use]
    pub fn those(&self, kind: impl Fn(&CopyState) -> bool) -> Vec<TableName> {
        let tables = self.tables.iter().filter(|(_, state)| kind(state));
        tables.map(|(table, _)| table.clone()).collect()
    }

    /// Up to which version deletes of a table may be forgotten once its sink has passed `passed`: what comes of it then
    /// is newer.
    #[must_use]
    pub fn forgettable(&self, table: &TableName, passed: Version) -> Version {
        let comes_above = match self.tables.get(table) {
            // Each chunk's rows are newer than what was there when the chunks began.
            Some(CopyState::Chunks(chunks)) => Some(chunks.lower),
            state => state
                .and_then(CopyState::claim)
                .map(|claim| claim.position.0),
        };
        comes_above.map_or(passed, |bound| bound.min(passed))
    }

    /// Below which version the target's rows of a table may be wrong in columns that a change did not touch:
    /// its chunks have not all come. Zero where every row is right.
    ///
    /// What the ends of its chunks warrant says nothing here: a row that a streamed change brought in full above this
    /// bound is right, whether its chunk has come or not.
    #[must_use]
    pub fn uncovered_below(&self, table: &TableName) -> Version {
        match self.tables.get(table) {
            Some(CopyState::Chunks(chunks)) => chunks.lower.max(chunks.doubted),
            _ => Version::ZERO,
        }
    }
}

/// After the target refused a copy, the next one is asked for this much later at the earliest: each costs the
/// source a snapshot.
const COPY_AGAIN_INTERVAL_US: i64 = 30_000_000;

impl CopyState {
    /// Whether no rows of the table are awaited on the copy stream: all were applied, or the target refuses it.
    #[must_use]
    pub fn is_copied(&self) -> bool {
        match self {
            Self::Copied { .. }
            | Self::Loaded { .. }
            | Self::Parked { .. }
            | Self::Lapsed { .. }
            | Self::Refused { .. } => true,
            Self::Pending { .. } | Self::Loading { .. } | Self::Chunks(_) => false,
        }
    }

    /// Whether the table's streamed changes are applied as they come.
    #[must_use]
    pub fn is_followed(&self) -> bool {
        matches!(self, Self::Copied { .. } | Self::Chunks(_))
    }

    /// Whether the target refuses the table.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        matches!(
            self,
            Self::Parked { .. } | Self::Lapsed { .. } | Self::Refused { .. }
        )
    }

    /// What the table needs of the stream, where that is not what its sink needs.
    #[must_use]
    pub fn claim(&self) -> Option<Claim> {
        match self {
            Self::Pending { claim, .. }
            | Self::Loading { claim, .. }
            | Self::Loaded { claim, .. }
            | Self::Parked { claim, .. } => Some(*claim),
            Self::Chunks(_) | Self::Copied { .. } | Self::Lapsed { .. } | Self::Refused { .. } => {
                None
            }
        }
    }

    /// Which copy of the table is awaited: when it began. `None` where none is.
    #[must_use]
    pub fn copy_began_us(&self) -> Option<i64> {
        match self {
            Self::Pending { began_us, .. } | Self::Loading { began_us, .. } => Some(*began_us),
            Self::Chunks(chunks) => Some(chunks.began_us),
            Self::Loaded { .. }
            | Self::Copied { .. }
            | Self::Parked { .. }
            | Self::Lapsed { .. }
            | Self::Refused { .. } => None,
        }
    }

    /// Whether the target has anything of the table that this sink has put there.
    #[must_use]
    pub fn is_begun(&self) -> bool {
        !matches!(self, Self::Pending { .. } | Self::Refused { .. })
    }

    /// Whether the target has rows of the table that will not come again by themselves.
    #[must_use]
    pub fn holds_rows(&self) -> bool {
        self.is_begun() && !matches!(self, Self::Lapsed { .. })
    }

    /// Whether a copy may be asked for, now that the target takes the table. Of tables that claim nothing.
    #[must_use]
    pub fn may_copy_again(&self, now_us: i64) -> bool {
        match self {
            // A clock that was set back must not make it wait longer.
            Self::Lapsed { refused_at_us } | Self::Refused { refused_at_us } => {
                !(0..COPY_AGAIN_INTERVAL_US).contains(&now_us.saturating_sub(*refused_at_us))
            }
            _ => false,
        }
    }
}

/// The state of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum CopyState {
    /// Nothing of it is here: entered when the sink first sees the table. Left to `Loading` with the first rows
    /// of its load.
    Pending {
        /// Where its changes begin.
        claim: Claim,
        /// When it was entered: the sink's clock, microseconds since 1970. It names this copy of the table, which the
        /// rows of an earlier one do not complete.
        #[serde(default)]
        began_us: i64,
    },
    /// Rows of its load are being applied, and no changes. Left to `Loaded` with the last of them, or to `Chunks`
    /// when the load was cut off: by a crash of capture, say. A crash of the sink goes on with the next message.
    Loading {
        /// The consistent point of the snapshot that is being read.
        #[serde(with = "millrace_event::as_text")]
        lsn: Lsn,
        /// Rows applied.
        rows: u64,
        /// Where its changes begin.
        claim: Claim,
        /// When the copy began, as in `Pending`.
        #[serde(default)]
        began_us: i64,
    },
    /// All rows of its load are here, and its changes up to the claim. It catches up beside the others, and is
    /// left to `Copied` once it is where its sink is. When the stream no longer holds what it needs, to `Chunks`.
    Loaded {
        /// The consistent point: changes committed below it are part of the load.
        #[serde(with = "millrace_event::as_text")]
        lsn: Lsn,
        /// How far it is.
        claim: Claim,
    },
    /// Its rows come in chunks, and its changes are applied as they come. Left to `Copied` with the last chunk. A
    /// crash of either side goes on with the next chunk.
    Chunks(Chunks),
    /// It has everything and is where its sink is.
    Copied {
        /// Changes committed below it are part of the load.
        #[serde(with = "millrace_event::as_text")]
        lsn: Lsn,
    },
    /// The target refuses the table: entered from `Copied`, and left to `Loaded` once the target takes it, or to
    /// `Lapsed` when the stream no longer holds what it has not applied. A crash goes on from the claim.
    Parked {
        /// The consistent point of its copy.
        #[serde(with = "millrace_event::as_text")]
        lsn: Lsn,
        /// How far it is.
        claim: Claim,
    },
    /// The target refuses the table, and nothing is kept for it: entered from `Parked` when the stream has let
    /// its changes go, from `Chunks` when the target refuses the copy, and from all when the target has lost what
    /// it had. Left to `Chunks` once the target takes the table. A crash changes nothing.
    Lapsed {
        /// When the target last refused a copy of it: the sink's clock, microseconds since 1970; 0 for never.
        refused_at_us: i64,
    },
    /// The target refuses the table before anything of it is here: entered from `Pending`, and left to it once the
    /// target takes the table. A crash changes nothing.
    Refused {
        /// When the target refused it: the sink's clock, microseconds since 1970.
        refused_at_us: i64,
    },
}

/// A table whose rows come in chunks beside its changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// The last key of the newest chunk that was applied: a text for each key column.
    pub after: Option<Vec<String>>,
    /// Rows below this version were here before: they may be outdated, and what is still there at the end is not
    /// at the source any more.
    pub lower: Version,
    /// Rows below this version may be outdated although a streamed change brought them after the chunks began: see
    /// [`Chunks::doubt`]. Zero where that cannot be.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub doubted: Version,
    /// The smallest version that the ends of its chunks warrant: every row of theirs that the source had got at
    /// least this one. `None` before the first end, and for good where chunks came without one being noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warranted: Option<Version>,
    /// Rows of chunks that came.
    pub rows: u64,
    /// When it began: the sink's clock, microseconds since 1970. It names this copy of the table, which the rows of
    /// an earlier one do not complete.
    pub began_us: i64,
    /// Since when its order holds it: the sink's clock, microseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_at_us: Option<i64>,
    /// How long it was held before that, microseconds.
    #[serde(default)]
    pub paused_us: i64,
    /// Who wanted it.
    pub order: Option<BackfillOrder>,
}

impl Chunks {
    /// Begins chunks of a table of a sink whose changes are applied, or left out, up to `position`.
    #[must_use]
    pub fn begin(position: Position, order: Option<BackfillOrder>, now_us: i64) -> Self {
        Self {
            after: None,
            // Above everything that was applied, below everything that will be read.
            lower: just_above(position),
            doubted: Version::ZERO,
            warranted: None,
            rows: 0,
            began_us: now_us,
            paused_at_us: None,
            paused_us: 0,
            order: None,
        }
        .ordered(order, now_us)
    }

    /// Doubts every row that the stream tells of up to `newest`, its newest position when the order was found.
    ///
    /// An order may be there because rows have changed without an event: while a partition was away, or another
    /// selection left them out. That was before the order, and the stream held everything up to there when it was
    /// given; but a sink that is behind has yet to apply what came before it. Take such a row: a change above
    /// [`Chunks::lower`] brings it, another one without an event changes it, and an update that does not bring all
    /// columns commits while its chunk is read, which does not show it. The chunk waits for the update and is older, so
    /// it does not mend what the update has kept: the row would stay wrong.
    pub fn doubt(&mut self, newest: Position) {
        self.doubted = just_above(newest);
    }

    /// The same chunks under this order from now on.
    #[must_use]
    pub fn ordered(mut self, order: Option<BackfillOrder>, now_us: i64) -> Self {
        let paused = order.as_ref().is_some_and(|order| order.paused);
        match (self.paused_at_us, paused) {
            (None, true) => self.paused_at_us = Some(now_us),
            (Some(since), false) => {
                self.paused_us += now_us.saturating_sub(since).max(0);
                self.paused_at_us = None;
            }
            (None, false) | (Some(_), true) => {}
        }
        self.order = order;
        self
    }

    /// How long it has taken, without pauses, at `now_us`: microseconds since 1970.
    #[must_use]
    pub fn took(&self, now_us: i64) -> Duration {
        // A clock that was set back takes no time.
        let until = self.paused_at_us.unwrap_or(now_us);
        let took = until
            .saturating_sub(self.began_us)
            .saturating_sub(self.paused_us);
        Duration::from_micros(u64::try_from(took).unwrap_or(0))
    }

    /// Takes the end of a chunk up to the key `after`, `None` where it has no row. Its rows have at least the version
    /// `warranted`.
    pub fn chunk_ended(&mut self, after: Option<&Vec<String>>, warranted: Version) {
        self.warranted = match (self.warranted, &self.after) {
            (Some(smallest), _) => Some(smallest.min(warranted)),
            (None, None) => Some(warranted),
            // What an older release has taken of this copy warrants nothing.
            (None, Some(_)) => None,
        };
        if let Some(after) = after {
            self.after = Some(after.clone());
        }
    }

    /// Below which version a row is one too many, once the last chunk has ended and the stream is applied as far as it
    /// reaches.
    ///
    /// Take a row that the source has. The chunk whose part of the keys it lies in either read it, at a version that
    /// is at least `warranted`; or did not see it yet: then a change that committed at or above that version made it.
    /// Either is applied by now, unless a newer change was. So a row of the target below it is none of the source's,
    /// also where a change above `lower` wrote it: one that came while the table had another filter, or a partition
    /// more, leaves no delete behind. What lies below `lower` was here before and goes in any case.
    #[must_use]
    pub fn sweeps_below(&self) -> Version {
        self.warranted
            .map_or(self.lower, |warranted| warranted.max(self.lower))
    }
}

/// Above everything of this position's transaction, below everything that comes behind it.
fn just_above(position: Position) -> Version {
    Version::new(position.epoch(), position.commit_lsn(), u32::MAX)
}

fn is_zero(version: &Version) -> bool {
    *version == Version::ZERO
}

/// The progress as it is stored: names are no keys of a JSON object, because they have two parts.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    stream: String,
    #[serde(default)]
    copied_to: Version,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reading: Option<Reading>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    finished: BTreeSet<String>,
    tables: Vec<StoredTable>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    left: BTreeSet<TableName>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    shapes: Vec<(TableName, String)>,
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
            reading: stored.reading,
            finished: stored.finished,
            tables: tables.map(|entry| (entry.table, entry.state)).collect(),
            left: stored.left,
            shapes: stored.shapes.into_iter().collect(),
        }
    }
}

impl From<CopyProgress> for Stored {
    fn from(progress: CopyProgress) -> Self {
        let tables = progress.tables.into_iter();
        Self {
            stream: progress.stream,
            copied_to: progress.copied_to,
            reading: progress.reading,
            finished: progress.finished,
            tables: tables
                .map(|(table, state)| StoredTable { table, state })
                .collect(),
            left: progress.left,
            shapes: progress.shapes.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests;
