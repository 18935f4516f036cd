//! What a reader hands on.

use std::time::SystemTime;

use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use millrace_event::{ChangeEvent, Control, DecodeError, Position, decode};

/// Where to resume: store it with what was made of the delivery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// The stream sequence that was read. Never trusted alone: a broker may lose the end of its stream and use its
    /// sequences again.
    pub stream_seq: u64,
    /// The highest position that was read.
    pub position: Position,
}

/// One message of the stream that the reader has not seen before.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Its stream sequence; its last chunk's where it came in chunks.
    pub stream_seq: u64,
    /// When the server stored it, by the server's clock.
    pub stored_at: SystemTime,
    /// Where it stands in the decoded change sequence; zero on a copy stream.
    pub position: Position,
    /// Its subject.
    pub subject: Subject,
    /// Its headers; most messages have none.
    pub headers: Option<HeaderMap>,
    /// What it says.
    pub body: Body,
    pub(crate) token: Token,
    /// The highest position seen before: lines at or below it were delivered already.
    pub(crate) floor: Option<Position>,
}

/// What a message says.
#[derive(Clone, Debug)]
pub enum Body {
    /// Changes, one a line.
    Changes(Bytes),
    /// Something about the stream itself.
    Control(Control),
}

impl Delivery {
    /// Where to resume once this delivery has been dealt with.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// The changes that were not delivered before; none for a control message.
    ///
    /// # Errors
    /// Each line that is not a change event of this format, in its place.
    pub fn changes(&self) -> impl Iterator<Item = Result<ChangeEvent<'_>, DecodeError>> {
        let payload: &[u8] = match &self.body {
            Body::Changes(payload) => payload,
            Body::Control(_) => &[],
        };
        decode(payload).filter(move |event| match (event, self.floor) {
            (Ok(event), Some(floor)) => Position::from(event.source.version) > floor,
            _ => true,
        })
    }
}
