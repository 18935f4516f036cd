//! How long a request has brought nothing. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// A request whose keys others wait for is given so long without bringing anything before it is replaced.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for one with a load that is under way, and of which capture has no trouble to tell: its snapshot waits for
/// transactions of the source, and the first of its rows for the sink's stream. All of that would begin anew.
const PATIENCE_WITH_LOAD: Duration = Duration::from_secs(600);

/// What has come for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Brought {
    /// So many tables are on the copy stream as far as they were asked for.
    pub(super) tables: usize,
    /// The sequence of the copy stream up to which the keys' rows are committed in the target.
    pub(super) applied_seq: u64,
    /// Whether a load is under way.
    pub(super) loads: bool,
}

/// How a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// It brings something from time to time, or nothing was asked for.
    Brings,
    /// A load of it is under way, whose beginning would be lost with the request.
    Loads,
    /// It has brought nothing for a while.
    Quiet,
}

/// Watches the request that is being answered.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// The request's id, what it had brought, and since when that is all.
    last: Option<(String, Brought, Instant)>,
}

impl Quiet {
    /// How the request goes on, of which so much has come by `now`. One that capture has not taken up is not quiet:
    /// another one would fare no better.
    pub(super) fn pace(&mut self, request: &str, brought: Option<Brought>, now: Instant) -> Pace {
        let Some(brought) = brought else {
            self.last = None;
            return Pace::Brings;
        };
        let since = match &self.last {
            Some((id, last, since)) if id == request && *last == brought => *since,
            _ => {
                self.last = Some((request.to_owned(), brought, now));
                now
            }
        };
        match brought.loads {
            true if now - since < PATIENCE_WITH_LOAD => Pace::Loads,
            false if now - since < PATIENCE => Pace::Brings,
            _ => Pace::Quiet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_quiet_once_nothing_has_come_for_a_while() {
        let (mut quiet, begin) = (Quiet::default(), Instant::now());
        let mut at = |second, request, tables, applied_seq| {
            let brought = Brought {
                tables,
                applied_seq,
                loads: false,
            };
            let now = begin + Duration::from_secs(second);
            quiet.pace(request, Some(brought), now) == Pace::Quiet
        };
        assert!(!at(0, "a", 0, 0));
        assert!(!at(9, "a", 0, 0));
        assert!(at(10, "a", 0, 0));
        // Rows that come, tables that are through, and another request begin it anew.
        for (second, request, tables, applied_seq) in
            [(11, "a", 0, 1), (22, "a", 1, 1), (33, "b", 1, 1)]
        {
            assert!(!at(second, request, tables, applied_seq));
            assert!(!at(second + 9, request, tables, applied_seq));
            assert!(at(second + 10, request, tables, applied_seq));
        }
        let now = begin + Duration::from_secs(99);
        assert_eq!(quiet.pace("b", None, now), Pace::Brings);
    }

    #[test]
    fn a_load_under_way_is_given_longer_and_one_in_trouble_is_not() {
        let (mut quiet, begin) = (Quiet::default(), Instant::now());
        let mut at = |second, loads| {
            let brought = Brought {
                tables: 0,
                applied_seq: 0,
                loads,
            };
            quiet.pace("a", Some(brought), begin + Duration::from_secs(second))
        };
        assert_eq!(at(0, true), Pace::Loads);
        assert_eq!(at(599, true), Pace::Loads);
        assert_eq!(at(600, true), Pace::Quiet);
        assert_eq!(at(601, false), Pace::Brings);
        assert_eq!(at(611, false), Pace::Quiet);
        assert_eq!(at(612, true), Pace::Loads);
    }
}
