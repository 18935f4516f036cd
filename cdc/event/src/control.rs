//! Control messages: what the stream says about itself.

use serde::{Deserialize, Serialize};

use crate::{Lsn, Position};

/// What a control message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlKind {
    /// The first message of a stream: changes follow from the slot's consistent point on.
    Start,
    /// A heartbeat that was written at the source came through the WAL.
    Heartbeat,
    /// The source's WAL advanced without changes of ours.
    Progress,
}

impl ControlKind {
    /// The kind as the last token of its subject.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Heartbeat => "heartbeat",
            Self::Progress => "progress",
        }
    }
}

/// The payload of a control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// What it says.
    pub kind: ControlKind,
    /// Where it stands in the decoded change sequence.
    pub position: Position,
    /// Everything of the source whose commit ends at or below this LSN is in the stream before this message.
    #[serde(with = "crate::lsn::as_number")]
    pub end_lsn: Lsn,
    /// The source's clock when it wrote the WAL that this message stands for, microseconds since 1970.
    pub ts_us: i64,
    /// On `start`: the source that this stream began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<StreamOrigin>,
}

/// Which source, and which slot on it, an epoch of a stream comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOrigin {
    /// The source cluster's system identifier.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// The slot.
    pub slot: String,
}
