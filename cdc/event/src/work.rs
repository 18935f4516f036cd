//! What sinks and capture tell one another beside the stream, in KV buckets.

use serde::{Deserialize, Serialize};

use crate::{Lsn, Position, TableName};

/// The bucket of table schemas: latest by [`schema_key`], each version by [`schema_version_key`].
pub const SCHEMAS: &str = "schemas";
/// The bucket of sink reports, by sink.
pub const SINKS: &str = "sinks";
/// The bucket of copy requests and their progress: `request.<sink>`, `status.<sink>`, `applied.<sink>`.
pub const COPIES: &str = "copies";
/// The bucket of what the source was when the stream was written: the key `origin`.
pub const STATE: &str = "state";

/// The key of a table's latest schema.
#[must_use]
pub fn schema_key(table: &TableName) -> String {
    format!(
        "{}.{}",
        crate::subject::escape(&table.schema),
        crate::subject::escape(&table.table)
    )
}

/// The key of one version of a table's schema.
#[must_use]
pub fn schema_version_key(table: &TableName, version: &str) -> String {
    format!("{}.{version}", schema_key(table))
}

/// What a sink has applied: its word on what the stream must keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkReport {
    /// The newest stream sequence that is committed in the target.
    pub stream_seq: u64,
    /// Its position.
    pub position: Position,
    /// The sink's clock, microseconds since 1970.
    pub at_us: i64,
    /// What parked tables still hope to read again, each from behind a sequence of its own. Unlike
    /// `stream_seq` it holds nothing back: it says whom to warn.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parked: Vec<ParkedClaim>,
}

/// How far a parked table is: the stream keeps what follows up to its limits, and not beyond.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParkedClaim {
    /// The table.
    pub table: TableName,
    /// The newest stream sequence that was applied to it.
    pub stream_seq: u64,
}

/// A sink asks for rows of tables. One request at a time: a new one, with another id, replaces it, and asks again
/// for what it had not brought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRequest {
    /// Names this request.
    pub id: String,
    /// The tables, in the order in which they shall come; each at most once.
    pub tables: Vec<TableRequest>,
    /// Rows of loads may come in COPY's binary format where every column is of one of these types, by OID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub binary: Vec<u32>,
}

/// What a sink asks of one table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRequest {
    /// The table.
    #[serde(flatten)]
    pub table: TableName,
    /// Which copy of the table the rows are for: when it began, by the sink's clock, microseconds since 1970. 0 for
    /// single keys, which are for none.
    #[serde(default)]
    pub began_us: i64,
    /// Which rows, and how they are read.
    #[serde(flatten)]
    pub rows: Wanted,
}

/// Which rows of a table a sink asks for, and how they are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rows", rename_all = "lowercase")]
pub enum Wanted {
    /// All rows, under one exported snapshot, by ranges of blocks. The sink applies no streamed change of the
    /// table before they are all there.
    Load,
    /// All rows, in chunks in the order of the key, each under a snapshot of its own. The sink applies the
    /// table's streamed changes meanwhile.
    Chunks {
        /// Only rows behind this key: a text for each key column. `None`: from the first one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<Vec<String>>,
        /// Only rows for which this SQL condition on the source's table holds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        filter: Option<String>,
        /// At most so many rows a second.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rows_per_second: Option<u32>,
        /// Nothing is read until another request says otherwise.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        paused: bool,
    },
    /// The rows of these keys, as one chunk, which heals rows of which some columns are not known.
    Keys {
        /// A text for each key column of each key.
        keys: Vec<Vec<String>>,
    },
}

/// An operator wants a table's rows to be read again, for one sink. All of a sink's orders are under one key of the
/// bucket of copies: [`orders_key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackfillOrder {
    /// Names this order.
    pub id: String,
    /// The table.
    pub table: TableName,
    /// Only rows for which this SQL condition on the source's table holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// At most so many rows a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows_per_second: Option<u32>,
    /// Nothing is read until it is resumed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// It is to end where it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cancelled: bool,
    /// Only for chunks that began by themselves: it paces them and pauses them. Without them it does nothing, and
    /// it cannot be cancelled, because the table must become whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adopts: bool,
    /// Without it the replica would stay wrong: capture has seen why. It may be paced and paused, and its end is that of
    /// the table.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub owed: bool,
}

impl BackfillOrder {
    /// An order for all rows of a table.
    #[must_use]
    pub fn new(id: String, table: TableName) -> Self {
        Self {
            id,
            table,
            filter: None,
            rows_per_second: None,
            paused: false,
            cancelled: false,
            adopts: false,
            owed: false,
        }
    }

    /// Whether it is to end where it is, and may.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled && !self.owed
    }
}

/// The key of a sink's orders: a list of [`BackfillOrder`].
#[must_use]
pub fn orders_key(sink: &str) -> String {
    format!("orders.{sink}")
}

/// What has been put on the copy stream for a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// The request's id.
    pub request: String,
    /// Rises with each attempt that the request needed, also where the broker has lost this status meanwhile: when the
    /// attempt began, by capture's clock, microseconds since 1970, or one more than the last.
    pub attempt: u64,
    /// The tables whose rows are all on the copy stream.
    pub copied: Vec<TableName>,
    /// The copy stream's last sequence after them.
    pub last_seq: u64,
    /// Tables whose load was cut off behind its first rows: its snapshot is gone, and the sink must ask for the
    /// table in another way.
    #[serde(default)]
    pub cut: Vec<TableName>,
    /// The table whose load has rows on the copy stream, and not all of them.
    #[serde(default)]
    pub loading: Option<TableName>,
    /// How many rows each table is thought to have: the source's own estimate.
    #[serde(default)]
    pub estimates: Vec<(TableName, u64)>,
    /// Why nothing of a table comes for now.
    #[serde(default)]
    pub troubles: Vec<(TableName, String)>,
}

impl CopyStatus {
    /// Nothing of a request is on the copy stream yet.
    #[must_use]
    pub fn new(request: String) -> Self {
        Self {
            request,
            attempt: 0,
            copied: Vec::new(),
            last_seq: 0,
            cut: Vec::new(),
            loading: None,
            estimates: Vec::new(),
            troubles: Vec::new(),
        }
    }
}

/// How far a sink has applied its copy stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyApplied {
    /// The request's id.
    pub request: String,
    /// The newest sequence of the copy stream that is committed in the target.
    pub stream_seq: u64,
    /// The last key of the newest whole chunk that is committed in the target, of each table that comes in chunks.
    #[serde(default)]
    pub after: Vec<(TableName, Vec<String>)>,
}

/// On the copy stream: what came before this message is a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// The table.
    pub table: TableName,
    /// The epoch of the rows' versions.
    pub epoch: u32,
    /// Every row at the source had a row on the copy stream with at least this version, or a change that is
    /// newer: of a load its snapshot's consistent point, of chunks where the request began.
    #[serde(with = "crate::lsn::as_number")]
    pub lsn: Lsn,
    /// How many rows there were.
    pub rows: u64,
    /// What is whole.
    #[serde(flatten)]
    pub part: Part,
}

/// What a [`Copied`] ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "lowercase")]
pub enum Part {
    /// A table under one snapshot: its rows show exactly the commits below `lsn`.
    Load,
    /// A chunk.
    Chunk {
        /// The key of its last row; `None` where it has no row.
        after: Option<Vec<String>>,
        /// Whether no row of the table follows.
        last: bool,
    },
    /// The keys that were asked for.
    Keys,
}

/// Which source the stream's newest epoch comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The epoch.
    pub epoch: u32,
    /// The source cluster's system identifier.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_different_tables_differ() {
        let key = |schema: &str, table: &str| schema_key(&TableName::new(schema, table));
        assert_ne!(key("a.b", "c"), key("a", "b.c"));
        assert_eq!(
            schema_version_key(&TableName::new("a", "b"), "0f"),
            "a.b.0f"
        );
    }
}
