//! Behind which message a stream that ends within a row goes on. Pure.
//!
//! A row that is too large for one message is a set of chunks. Where the broker lost the set's end, its publisher's
//! successor writes the row again. Readers have nothing of the row yet: what they have is the highest whole message below
//! it, and by that one they know that nothing is missing between.
//!
//! Each time a position appears in a stream for the first time, everything below it has appeared before (ARCHITECTURE.md,
//! the fence), and the publisher of the set wrote the row's predecessor right before it. Between the two lie the other
//! chunks, and what publishers that were overtaken sent late. So of the messages before the set the highest one below the
//! row is its predecessor, or stands between the two. One that is merely the nearest may be late, and lower than what
//! nobody writes again.
//!
//! What overtaken publishers sent late is bounded in messages and in bytes. Whoever has walked past more has met the
//! predecessor, or what stands between.

use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use millrace_config::limits::PUBLISH_WINDOW_BYTES_MAX;
use millrace_event::{Position, header};

use super::StoredMessage;
use super::tail::{STRAGGLERS_MAX, end, unfinished_row};

/// Publishers that were overtaken, and may have a window under way each: as [`STRAGGLERS_MAX`] counts them.
const OVERTAKEN_MAX: usize = 2;

/// Whether an older message may tell more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    /// The next older one is wanted.
    Older,
    /// Nothing of the source lies between this position and the row.
    Found(Position),
}

/// The search back from a chunk that does not complete its row.
#[derive(Debug)]
pub(super) struct Whole {
    row: Position,
    /// The highest whole message below the row so far.
    highest: Option<Position>,
    /// The sequence of the message before, and whether it opened its publisher's batch.
    newer: Option<(u64, bool)>,
    /// Messages that were no chunks of the row.
    others: u64,
    /// Their bytes.
    others_bytes: usize,
    /// The bytes of the largest one.
    largest_bytes: usize,
}

impl Whole {
    /// Of an unfinished set of the row at this position.
    pub(super) fn below(row: Position) -> Self {
        Self {
            row,
            highest: None,
            newer: None,
            others: 0,
            others_bytes: 0,
            largest_bytes: 0,
        }
    }

    /// Takes in the next older message, the unfinished set's last chunk first.
    pub(super) fn on_message(&mut self, message: &StoredMessage) -> Search {
        let Self { row, newer, .. } = *self;
        if newer.is_some_and(|(newer, _)| newer != message.stream_seq + 1) {
            // A hole. Behind one that the broker left, somebody began anew.
            return match newer {
                Some((_, true)) => self.end(),
                _ => Search::Found(row.just_below()),
            };
        }
        let header = |name: &str| message.headers.get(name).map(|value| value.as_str());
        let expected = header(NATS_EXPECTED_LAST_SEQUENCE.as_ref());
        let opens = expected.and_then(|expected| expected.parse().ok());
        let opens = opens.is_some_and(|expected: u64| expected + 1 == message.stream_seq);
        self.newer = Some((message.stream_seq, opens));
        let unfinished = unfinished_row(&message.headers);
        if unfinished == Some(row) {
            // Whoever begins with the row has named what lies below it.
            let after = header(header::AFTER).and_then(|after| after.parse().ok());
            return match after {
                Some(after) if after < row => Search::Found(after),
                _ => Search::Older,
            };
        }
        let position = end(message).map(|end| end.position);
        let below = position.filter(|position| unfinished.is_none() && *position < row);
        self.highest = self.highest.max(below);
        self.others += 1;
        self.others_bytes += message.payload.len();
        self.largest_bytes = self.largest_bytes.max(message.payload.len());
        match self.others >= STRAGGLERS_MAX || self.is_past_stragglers() {
            true => self.end(),
            false => Search::Older,
        }
    }

    /// Whether there is a position to name, and what was walked past is more than what overtaken publishers may have
    /// had under way: their windows, which each may exceed by one message.
    fn is_past_stragglers(&self) -> bool {
        let window = PUBLISH_WINDOW_BYTES_MAX + self.largest_bytes;
        self.highest.is_some() && self.others_bytes > OVERTAKEN_MAX * window
    }

    /// Where there is no older message that may tell.
    pub(super) fn end(&self) -> Search {
        Search::Found(self.highest.unwrap_or(self.row.just_below()))
    }
}

#[cfg(test)]
mod tests;
