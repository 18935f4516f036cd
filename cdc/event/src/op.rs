//! What a change did to its row.

use serde::{Deserialize, Serialize};

/// What a change did to its row, with the letter that Debezium gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Op {
    /// A row was inserted, or got this key by a key change.
    #[serde(rename = "c")]
    Create,
    /// A row was updated under the same key.
    #[serde(rename = "u")]
    Update,
    /// A row was deleted, or lost this key by a key change.
    #[serde(rename = "d")]
    Delete,
    /// A row was read by a backfill.
    #[serde(rename = "r")]
    Read,
    /// The table was truncated.
    #[serde(rename = "t")]
    Truncate,
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 5] = [
        Self::Create,
        Self::Update,
        Self::Delete,
        Self::Read,
        Self::Truncate,
    ];

    /// The operation as the last token of its subject and as `op` in the payload.
    #[must_use]
    pub const fn letter(self) -> &'static str {
        match self {
            Self::Create => "c",
            Self::Update => "u",
            Self::Delete => "d",
            Self::Read => "r",
            Self::Truncate => "t",
        }
    }
}
