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

/// A sink asks for the existing rows of tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRequest {
    /// Names this request: a new one, with another id, replaces it.
    pub id: String,
    /// The tables, in the order in which they shall come.
    pub tables: Vec<TableName>,
}

/// What has been put on the copy stream for a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// The request's id.
    pub request: String,
    /// Rises with each snapshot that the request needed.
    pub attempt: u32,
    /// The tables whose rows are all on the copy stream.
    pub copied: Vec<TableName>,
    /// The copy stream's last sequence after them.
    pub last_seq: u64,
}

/// How far a sink has applied its copy stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyApplied {
    /// The request's id.
    pub request: String,
    /// The newest sequence of the copy stream that is committed in the target.
    pub stream_seq: u64,
}

/// On the copy stream: all rows of a table came before this message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// The table.
    pub table: TableName,
    /// The epoch of the rows' versions.
    pub epoch: u32,
    /// The snapshot's consistent point: the rows show exactly the commits below it.
    #[serde(with = "crate::lsn::as_number")]
    pub lsn: Lsn,
    /// How many rows there were.
    pub rows: u64,
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
