//! Whether sequences without messages hide anything from a reader of a source's stream. Pure.

use async_nats::HeaderMap;
use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use millrace_event::{Position, header};

use crate::position::of_message;

/// The message behind the hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    /// Its stream sequence.
    pub(crate) stream_seq: u64,
    /// `None` for a message that is not ours.
    pub(crate) position: Option<Position>,
    /// Where its publisher knew the stream to end: on the first message of a batch.
    pub(crate) expected_last: Option<u64>,
    /// Above which position its publisher writes everything from here on: on the first one that it sent.
    pub(crate) after: Option<Position>,
}

impl Behind {
    /// What a message tells of a hole before it.
    pub(crate) fn of(stream_seq: u64, headers: Option<&HeaderMap>, payload: &[u8]) -> Self {
        let value = |name| {
            let value = headers.and_then(|headers| headers.get(name));
            value.map(async_nats::HeaderValue::as_str)
        };
        let expected = value(NATS_EXPECTED_LAST_SEQUENCE.as_ref());
        Self {
            stream_seq,
            position: of_message(headers, payload),
            expected_last: expected.and_then(|expected| expected.parse().ok()),
            after: value(header::AFTER).and_then(|after| after.parse().ok()),
        }
    }

    /// Whether its publisher saw the stream end right before it.
    pub(crate) fn opens_batch(self) -> bool {
        self.expected_last == Some(self.stream_seq - 1)
    }
}

/// Whether a reader that has read up to `own` misses nothing in the hole.
///
/// A broker that lost its unwritten end with its machine may keep counting where it was: the sequences of what it lost
/// stay empty, its publishers are gone, and the next one writes again what follows the newest message that is left. Its
/// first message opens a batch, which the server takes only where the stream ends as the publisher has seen it. So
/// whatever it has not seen in the stream it writes from there on, in order; and if that begins at or below `own`,
/// everything above `own` comes behind the hole. The message says above which position that is.
///
/// Nothing weaker will do. A message above `own` may be the next one or not: positions alone do not tell. And one inside
/// a batch may be a late repetition of a publisher that was overtaken: behind it its successor goes on, above what the
/// hole swallowed.
#[must_use]
pub(crate) fn is_harmless(own: Position, behind: Behind) -> bool {
    // Of a publisher that does not say it, what it writes first shows that it is no higher.
    let after = behind.after.or(behind.position);
    behind.opens_batch() && after.is_some_and(|after| after <= own)
}

/// The way back from a hole, of a reader of some tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// Where the stream began when the holes were listed.
    pub(crate) first: u64,
    /// Whether the tables begin with whatever is the oldest, and nothing of them was handed on yet.
    pub(crate) begins: bool,
}

impl Way {
    /// Whether a purge took the message at `before`, of a stream that begins at `first` by now. The hole may be purged as
    /// well, and is then no hole any more.
    pub(crate) fn is_purged(self, before: u64, first: u64) -> bool {
        before >= self.first && before < first
    }

    /// Whether a hole lies before everything that the tables begin with: between the stream's beginning, which the way
    /// has met at `before`, and the hole was no whole message that `own` would be of.
    pub(crate) fn has_nothing_before(self, before: u64, own: Position) -> bool {
        self.begins && before < self.first && own == Position::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;

    #[test]
    fn only_what_begins_again_at_or_below_the_own_position_leaves_nothing_out() {
        let at = |n| Position::new(1, Lsn(n), 1);
        let behind = |position, expected_last| Behind {
            stream_seq: 101,
            position,
            expected_last,
            after: None,
        };
        assert!(is_harmless(at(9), behind(Some(at(9)), Some(100))));
        assert!(is_harmless(at(9), behind(Some(at(8)), Some(100))));
        // Perhaps the next one, perhaps not.
        assert!(!is_harmless(at(9), behind(Some(at(10)), Some(100))));
        // In a batch, or before a hole within a batch.
        assert!(!is_harmless(at(9), behind(Some(at(9)), None)));
        assert!(!is_harmless(at(9), behind(Some(at(9)), Some(90))));
        // Somebody else's.
        assert!(!is_harmless(at(9), behind(None, Some(100))));
    }

    #[test]
    fn a_publisher_that_begins_at_or_below_the_own_position_leaves_nothing_out() {
        let at = |n| Position::new(1, Lsn(n), 1);
        let behind = |after, expected_last| Behind {
            stream_seq: 101,
            position: Some(at(20)),
            expected_last,
            after: Some(at(after)),
        };
        assert!(is_harmless(at(9), behind(9, Some(100))));
        assert!(is_harmless(at(9), behind(8, Some(100))));
        assert!(!is_harmless(at(9), behind(10, Some(100))));
        assert!(!is_harmless(at(9), behind(9, Some(90))));
        assert!(!is_harmless(at(9), behind(9, None)));
    }

    #[test]
    fn a_way_back_meets_the_beginning_or_a_purge() {
        let way = |begins| Way { first: 11, begins };
        assert!(way(false).is_purged(11, 12));
        // It had met the beginning already, or the message is gone by itself.
        assert!(!way(false).is_purged(10, 12));
        assert!(!way(false).is_purged(11, 11));

        let own = Position::new(1, Lsn(9), 1);
        assert!(way(true).has_nothing_before(10, Position::ZERO));
        assert!(!way(true).has_nothing_before(10, own));
        assert!(!way(true).has_nothing_before(11, Position::ZERO));
        assert!(!way(false).has_nothing_before(10, Position::ZERO));
    }

    #[test]
    fn what_a_message_tells_is_in_its_headers() {
        let position = Position::new(1, Lsn(9), 1);
        let mut headers = HeaderMap::new();
        headers.insert(header::POSITION, position.to_string());
        let none = Behind::of(101, Some(&headers), b"");
        let expected = Behind {
            stream_seq: 101,
            position: Some(position),
            expected_last: None,
            after: None,
        };
        assert_eq!(none, expected);
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, "100");
        headers.insert(header::AFTER, Position::new(1, Lsn(8), 1).to_string());
        let all = Behind {
            expected_last: Some(100),
            after: Some(Position::new(1, Lsn(8), 1)),
            ..expected
        };
        assert_eq!(Behind::of(101, Some(&headers), b""), all);
    }
}
