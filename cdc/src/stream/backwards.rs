//! A stream's messages from one of them back to its beginning, over sequences that have none.

use async_nats::jetstream::Context;

use super::tail::{message, next};
use super::{StoredMessage, StreamError};

/// Every message of a stream.
const ALL: &str = ">";

/// The newest message below a sequence; `None` where there is none. A broker that lost its end may count on where it was
/// and leave any number of sequences without a message: the one before them is found by bisection.
async fn before(
    jetstream: &Context,
    name: &str,
    stream_seq: u64,
) -> Result<Option<StoredMessage>, StreamError> {
    let Some(mut high) = stream_seq.checked_sub(1).filter(|high| *high > 0) else {
        return Ok(None);
    };
    if let Some(found) = message(jetstream, name, high).await? {
        return Ok(Some(found));
    }
    // From `high` on there is nothing below `stream_seq`, and `found` is the newest message that is known to be there.
    let mut found = None;
    let mut low = 0;
    while high - low > 1 {
        let middle = match found {
            Some(_) => low + (high - low) / 2,
            None => 1,
        };
        match next(jetstream, name, ALL, middle).await? {
            Some(message) if message.stream_seq < stream_seq => {
                low = message.stream_seq;
                found = Some(message);
            }
            _ => high = middle,
        }
    }
    Ok(found)
}

/// Goes back from a message, one by one.
pub(super) struct Backwards<'s> {
    jetstream: &'s Context,
    name: &'s str,
    at: u64,
}

impl<'s> Backwards<'s> {
    /// Before the message at `stream_seq`.
    pub(super) fn from(jetstream: &'s Context, name: &'s str, stream_seq: u64) -> Self {
        Self {
            jetstream,
            name,
            at: stream_seq,
        }
    }

    /// The next older message; `None` where the stream begins.
    pub(super) async fn next(&mut self) -> Result<Option<StoredMessage>, StreamError> {
        let found = before(self.jetstream, self.name, self.at).await?;
        if let Some(found) = &found {
            self.at = found.stream_seq;
        }
        Ok(found)
    }
}
