//! Whether sequences without messages hide anything from a reader of a source's stream. Pure.

use millrace_event::Position;

/// The message behind the hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    /// Its stream sequence.
    pub(crate) stream_seq: u64,
    /// `None` for a message that is not ours.
    pub(crate) position: Option<Position>,
    /// Where its publisher knew the stream to end: on the first message of a batch.
    pub(crate) expected_last: Option<u64>,
}

/// Whether a reader that has read up to `own` misses nothing in the hole.
///
/// A broker that lost its unwritten end with its machine may keep counting where it was: the sequences of what it lost
/// stay empty, its publishers are gone, and the next one writes again what follows the newest message that is left. Its
/// first message opens a batch, which the server takes only where the stream ends as the publisher has seen it. So
/// whatever it has not seen in the stream it writes from there on, in order; and if that begins at or below `own`,
/// everything above `own` comes behind the hole.
///
/// Nothing weaker will do. A message above `own` may be the next one or not: positions do not tell. And one inside a
/// batch may be a late repetition of a publisher that was overtaken: behind it its successor goes on, above what the
/// hole swallowed.
#[must_use]
pub(crate) fn is_harmless(own: Position, behind: Behind) -> bool {
    let opens_batch = behind.expected_last == Some(behind.stream_seq - 1);
    opens_batch && behind.position.is_some_and(|position| position <= own)
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
}
