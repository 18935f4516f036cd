//! How much lies on a copy stream before its sink. Pure.

use std::collections::VecDeque;

use crate::stream::COPY_BYTES_MAX;

/// What the stream counts for a message beside its payload, roughly: subject, headers and its own record.
const RECORD_BYTES: u64 = 256;

/// The part of a copy stream's limit that may lie before the sink. The rest is room for one message more,
/// which may be a large row in many chunks: a stream that refuses messages ends the attempt.
const PART_OF_LIMIT: u64 = 4;

/// So many bytes may lie before the sink at most. What is read sooner than it is applied costs the source, the broker and
/// us processors that the target may need: where they share a machine, a load is as fast as its target.
const BYTES_MAX: u64 = 48 * 1024 * 1024;

/// Counts what is on its way or on the stream, and not known to be applied.
#[derive(Debug)]
pub(super) struct Ahead {
    bytes_max: u64,
    bytes: u64,
    /// Sequence and bytes of what is stored, in the order of the stream.
    stored: VecDeque<(u64, u64)>,
}

impl Ahead {
    /// Begins on a stream of this limit that holds `found` bytes: earlier attempts were cut off, and what they
    /// left counts until the sink has passed `stream_seq`, the sequence behind it.
    pub(super) fn new(limit: u64, found: u64, stream_seq: u64) -> Self {
        Self {
            bytes_max: (limit.min(COPY_BYTES_MAX) / PART_OF_LIMIT).min(BYTES_MAX),
            bytes: found,
            stored: VecDeque::from([(stream_seq, found)]),
        }
    }

    /// What a message of this payload counts.
    pub(super) fn weight(payload: usize) -> u64 {
        payload as u64 + RECORD_BYTES
    }

    /// A message was sent.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// A message that was sent is stored.
    pub(super) fn stored(&mut self, stream_seq: u64, bytes: u64) {
        self.stored.push_back((stream_seq, bytes));
    }

    /// The sink has applied everything up to this sequence.
    pub(super) fn applied(&mut self, stream_seq: u64) {
        while let Some((_, bytes)) = self.stored.front().filter(|(seq, _)| *seq <= stream_seq) {
            self.bytes -= bytes;
            self.stored.pop_front();
        }
    }

    /// Whether the next message has to wait for the sink.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= self.bytes_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 4_000;

    #[test]
    fn what_is_sent_counts_until_the_sink_has_applied_it() {
        let mut ahead = Ahead::new(LIMIT, 0, 1);
        ahead.sent(600);
        assert!(!ahead.is_full());
        ahead.sent(400);
        assert!(ahead.is_full(), "on its way counts too");
        ahead.stored(2, 600);
        ahead.stored(3, 400);
        ahead.applied(1);
        assert!(ahead.is_full());
        ahead.applied(2);
        assert!(!ahead.is_full());
        ahead.applied(9);
        ahead.sent(999);
        assert!(!ahead.is_full());
    }

    #[test]
    fn what_earlier_attempts_left_counts_until_the_sink_is_behind_it() {
        let mut ahead = Ahead::new(LIMIT, 1_000, 17);
        assert!(ahead.is_full());
        ahead.applied(16);
        assert!(ahead.is_full(), "a part of it may still be unread");
        ahead.applied(17);
        assert!(!ahead.is_full());
    }

    #[test]
    fn attempts_that_are_cut_off_never_fill_the_stream() {
        let message = Ahead::weight(200);
        let mut held = 0;
        for attempt in 1..1_000 {
            let mut ahead = Ahead::new(LIMIT, held, attempt);
            while !ahead.is_full() {
                ahead.sent(message);
                held += message;
            }
        }
        assert!(held < LIMIT / PART_OF_LIMIT + message, "{held}");
    }

    #[test]
    fn a_stream_without_a_limit_is_filled_no_further_than_ours() {
        let mut ahead = Ahead::new(u64::MAX, 0, 1);
        ahead.sent(BYTES_MAX - 1);
        assert!(!ahead.is_full());
        ahead.sent(1);
        assert!(ahead.is_full());
    }
}
