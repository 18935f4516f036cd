//! Up to where a reader of some tables has everything of them. Pure.

use crate::ReadError;

/// What a look at the stream has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    /// Whether the consumer had nothing more to send just before, and everything that it sent had arrived.
    pub(crate) is_drained: bool,
    /// The oldest message.
    pub(crate) first: u64,
    /// The newest message.
    pub(crate) last: u64,
}

/// Up to where every message of the tables has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coverage {
    covered: u64,
    /// Where the stream ended at the look before.
    last: u64,
    /// Whether the tables begin with whatever is the oldest, and nothing of them was handed on yet.
    begins: bool,
}

impl Coverage {
    /// Of a consumer that begins after `after`, on a stream that ended at `last` before. Where it `begins` with whatever
    /// is the oldest message, it misses nothing before anything is handed on.
    #[must_use]
    pub(crate) fn new(after: u64, last: u64, begins: bool) -> Self {
        Self {
            covered: after,
            last,
            begins,
        }
    }

    /// Whether the tables begin with whatever is the oldest, and nothing was handed on yet.
    #[must_use]
    pub(crate) fn begins(&self) -> bool {
        self.begins
    }

    /// Takes in a look that was begun after `newest` had arrived. Returns the first sequence that may be handed on: what
    /// arrived before it is no part of the stream any more that the tables begin with.
    ///
    /// A stream that begins at or before the sequence behind `covered` has purged nothing behind it, so the consumer
    /// had every message there when it searched on to `newest`. And where it had nothing left to send, nothing of the
    /// tables lies between `newest` and where the stream ended at a look before that: nothing was purged there then.
    ///
    /// # Errors
    /// [`ReadError::Gap`] where something of the tables may have been purged unread.
    pub(crate) fn on_look(&mut self, look: Look, newest: Option<u64>) -> Result<u64, ReadError> {
        let wanted = self.covered + 1;
        if look.first > wanted && self.begins {
            self.covered = look.first - 1;
        } else if look.first > wanted {
            return Err(ReadError::Gap {
                wanted,
                found: look.first,
            });
        }
        if look.is_drained {
            self.covered = self.covered.max(self.last);
        }
        let begin = match self.begins {
            true => look.first,
            false => 0,
        };
        self.begins &= newest.is_none_or(|newest| newest < begin);
        self.covered = self.covered.max(newest.unwrap_or(0));
        self.last = look.last;
        Ok(begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(first: u64, last: u64) -> Look {
        Look {
            is_drained: false,
            first,
            last,
        }
    }

    #[test]
    fn a_purge_behind_what_arrived_is_a_gap() {
        let mut coverage = Coverage::new(10, 20, false);
        assert_eq!(coverage.on_look(look(11, 50), Some(40)), Ok(0));
        assert_eq!(coverage.on_look(look(41, 60), Some(55)), Ok(0));
        let gap = ReadError::Gap {
            wanted: 56,
            found: 57,
        };
        assert_eq!(coverage.on_look(look(57, 90), Some(80)), Err(gap));
    }

    #[test]
    fn what_other_tables_wrote_may_be_purged_behind_it() {
        let mut coverage = Coverage::new(10, 20, false);
        let drained = |first, last| Look {
            is_drained: true,
            ..look(first, last)
        };
        // It ended at 20 before the consumer had nothing left; what came until 30 may be ours.
        assert_eq!(coverage.on_look(drained(1, 30), None), Ok(0));
        let gap = ReadError::Gap {
            wanted: 21,
            found: 22,
        };
        assert_eq!(coverage.on_look(drained(22, 40), None), Err(gap));
        assert_eq!(coverage.on_look(drained(21, 40), None), Ok(0));
        assert_eq!(coverage.on_look(drained(31, 40), None), Ok(0));
    }

    #[test]
    fn while_messages_are_on_their_way_only_what_arrived_counts() {
        let mut coverage = Coverage::new(10, 20, false);
        assert_eq!(coverage.on_look(look(1, 30), None), Ok(0));
        let gap = ReadError::Gap {
            wanted: 11,
            found: 12,
        };
        assert_eq!(coverage.on_look(look(12, 40), None), Err(gap));
    }

    #[test]
    fn what_is_purged_before_anything_is_handed_on_is_no_gap_of_who_begins_with_the_oldest() {
        let mut coverage = Coverage::new(10, 20, true);
        assert_eq!(coverage.on_look(look(31, 40), None), Ok(31));
        // What arrived may have lost what came between.
        assert_eq!(coverage.on_look(look(51, 60), Some(45)), Ok(51));
        assert_eq!(coverage.on_look(look(56, 90), Some(80)), Ok(56));
        let gap = ReadError::Gap {
            wanted: 81,
            found: 82,
        };
        assert_eq!(coverage.on_look(look(82, 100), Some(95)), Err(gap));
        assert_eq!(coverage.on_look(look(81, 100), Some(95)), Ok(0));
    }
}
