//! Where a reader goes on in a stream whose sequences may have been used again. Pure.

use millrace_event::Position;

use crate::{Ordering, Token};

/// What was seen of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// The oldest message, or where it would be.
    pub(crate) first: u64,
    /// The newest message.
    pub(crate) last: u64,
}

/// Where to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// After this sequence.
    After(u64),
    /// What the reader needs is gone, or may be.
    Gone,
    /// The stream ends before the reader's place and has nothing to compare with: look again.
    Wait,
    /// The broker lost the stream's end: the newest heartbeat that is not above the reader's position tells.
    Search,
}

/// Whether the position at the token's sequence decides.
#[must_use]
pub(crate) fn is_checked(ordering: Ordering, token: Token, stream: Extent) -> bool {
    let known = ordering == Ordering::ByPosition && token.position > Position::ZERO;
    known && (stream.first..=stream.last).contains(&token.stream_seq)
}

/// Where to go on after `token`, at whose sequence the stream has the position `found`.
///
/// A stream that ends before the token's sequence was rolled back as surely as one with another position there. The
/// reader does not wait until it is as long again: it may hold what is above the reader's position long before, where
/// the slot's changes are packed otherwise or repetitions were lost. The search is right for a shorter stream too, also
/// for one that has nothing above the reader's position yet: the heartbeat it finds is in the stream, so whatever is
/// above the reader's position appears behind it for the first time, today or later (see `ResumeSearch`). From there on
/// the reader sees each message that is stored, and drops those that it knows.
#[must_use]
pub(crate) fn place(
    ordering: Ordering,
    token: Token,
    stream: Extent,
    found: Option<Position>,
) -> Place {
    if stream.first > token.stream_seq + 1 {
        return Place::Gone;
    }
    if ordering == Ordering::ByStream || token.position == Position::ZERO {
        // There is no position to search for.
        return if stream.last < token.stream_seq {
            Place::Wait
        } else {
            Place::After(token.stream_seq)
        };
    }
    // Behind what was purged nothing can be compared, and no message of the reader's is in the stream.
    let unchecked = stream.first == token.stream_seq + 1;
    if unchecked || found == Some(token.position) {
        Place::After(token.stream_seq)
    } else {
        Place::Search
    }
}

/// Where to go on where the search found no heartbeat: with the oldest message, if even that was read. `oldest` is the
/// first position that the stream has.
#[must_use]
pub(crate) fn from_the_oldest(token: Token, stream: Extent, oldest: Option<Position>) -> Place {
    match oldest {
        Some(oldest) if oldest <= token.position => Place::After(stream.first - 1),
        // It was rolled back to nothing; what follows tells.
        None if stream.last < token.stream_seq => Place::Wait,
        // What lies between may be missing.
        _ => Place::Gone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;

    const FIRST: u64 = 5;

    fn at(n: u64) -> Position {
        Position::new(1, Lsn(n), 1)
    }

    fn token(stream_seq: u64, n: u64) -> Token {
        Token {
            stream_seq,
            position: at(n),
        }
    }

    fn to(last: u64) -> Extent {
        Extent { first: FIRST, last }
    }

    fn decide(token: Token, last: u64, found: Option<Position>) -> Place {
        place(Ordering::ByPosition, token, to(last), found)
    }

    #[test]
    fn the_own_position_at_the_own_sequence_is_where_it_was() {
        assert_eq!(decide(token(7, 70), 7, Some(at(70))), Place::After(7));
        assert_eq!(decide(token(7, 70), 9, Some(at(70))), Place::After(7));
        assert_eq!(decide(token(7, 70), 9, Some(at(71))), Place::Search);
        assert_eq!(decide(token(7, 70), 9, None), Place::Search);
    }

    #[test]
    fn a_shorter_stream_is_searched_at_once() {
        assert_eq!(decide(token(9, 70), 8, None), Place::Search);
        assert_eq!(decide(token(9, 70), FIRST - 1, None), Place::Search);
    }

    #[test]
    fn what_was_purged_is_gone_and_what_follows_it_is_not() {
        assert_eq!(decide(token(3, 70), 9, None), Place::Gone);
        assert_eq!(decide(token(4, 70), 9, None), Place::After(4));
        assert_eq!(decide(token(4, 70), 4, None), Place::After(4));
    }

    #[test]
    fn without_a_position_a_shorter_stream_is_waited_for() {
        for (ordering, token) in [
            (Ordering::ByStream, token(9, 70)),
            (
                Ordering::ByPosition,
                Token {
                    stream_seq: 9,
                    position: Position::ZERO,
                },
            ),
        ] {
            assert_eq!(place(ordering, token, to(8), None), Place::Wait);
            assert_eq!(place(ordering, token, to(9), None), Place::After(9));
            assert!(!is_checked(ordering, token, to(9)));
        }
        assert!(is_checked(Ordering::ByPosition, token(9, 70), to(9)));
        assert!(!is_checked(Ordering::ByPosition, token(9, 70), to(8)));
    }

    #[test]
    fn without_a_heartbeat_only_a_message_that_was_read_proves_that_nothing_is_missing() {
        let begin = Place::After(FIRST - 1);
        assert_eq!(from_the_oldest(token(9, 70), to(8), Some(at(70))), begin);
        assert_eq!(from_the_oldest(token(9, 70), to(20), Some(at(69))), begin);
        assert_eq!(
            from_the_oldest(token(9, 70), to(8), Some(at(71))),
            Place::Gone
        );
        assert_eq!(from_the_oldest(token(9, 70), to(8), None), Place::Wait);
        assert_eq!(from_the_oldest(token(9, 70), to(9), None), Place::Gone);
    }
}
