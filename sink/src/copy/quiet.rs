//! How long a request has brought nothing. Pure.

use std::time::Duration;

use tokio::time::Instant;

use crate::asking::Load;

/// A request whose keys others wait for is given so long without bringing anything before it is replaced.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for one with a load that is under way, and of which capture has no trouble to tell: its snapshot waits for
/// transactions of the source. All of that would begin anew. Each time that the same load has begun anew all the same,
/// it is given twice as long.
const PATIENCE_WITH_LOAD: Duration = Duration::from_secs(600);
const PATIENCE_WITH_LOAD_MAX: Duration = Duration::from_secs(4 * 3600);

/// What has come for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Brought {
    /// So many tables are on the copy stream as far as they were asked for.
    pub(super) tables: usize,
    /// The sequence of the copy stream up to which the keys' rows are committed in the target.
    pub(super) applied_seq: u64,
    /// How far its load is.
    pub(super) load: Load,
}

/// How a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// It brings something from time to time, or nothing was asked for.
    Brings,
    /// A load of it is under way, of which what there is would be lost with the request.
    Loads,
    /// It has brought nothing for a while.
    Quiet,
}

/// Watches the request that is being answered.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// The request's id, what it had brought, and since when that is all.
    last: Option<(String, Brought, Instant)>,
    patience: Option<Patience>,
}

/// How long a load is waited for.
#[derive(Debug)]
struct Patience {
    load: Load,
    wait: Duration,
    /// The request that has brought nothing for so long.
    spent_by: Option<String>,
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
                self.last = Some((request.to_owned(), brought.clone(), now));
                now
            }
        };
        let waited = now - since;
        match brought.load {
            Load::Comes => Pace::Loads,
            load @ Load::Begins { .. } => self.pace_with(load, request, waited),
            Load::None if waited < PATIENCE => Pace::Brings,
            Load::None => Pace::Quiet,
        }
    }

    /// How a request goes on that has brought nothing for so long, and of which this load begins.
    fn pace_with(&mut self, load: Load, request: &str, waited: Duration) -> Pace {
        let known = self.patience.take().filter(|known| known.load == load);
        let patience = self.patience.insert(known.unwrap_or(Patience {
            load,
            wait: PATIENCE_WITH_LOAD,
            spent_by: None,
        }));
        if patience.spent_by.as_ref().is_some_and(|by| by != request) {
            patience.spent_by = None;
            patience.wait = (patience.wait * 2).min(PATIENCE_WITH_LOAD_MAX);
        }
        if waited < patience.wait {
            return Pace::Loads;
        }
        patience.spent_by = Some(request.to_owned());
        Pace::Quiet
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
                load: Load::None,
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

    fn begins(began_us: i64) -> Load {
        Load::Begins {
            table: millrace_event::TableName::new("public", "t"),
            began_us,
        }
    }

    /// What is told, second by second, of requests that bring nothing.
    fn watching(begin: Instant) -> impl FnMut(u64, &str, Load) -> Pace {
        let mut quiet = Quiet::default();
        move |second, request, load| {
            let brought = Brought {
                tables: 0,
                applied_seq: 0,
                load,
            };
            quiet.pace(request, Some(brought), begin + Duration::from_secs(second))
        }
    }

    #[test]
    fn a_load_under_way_is_given_longer_and_one_in_trouble_is_not() {
        let mut at = watching(Instant::now());
        assert_eq!(at(0, "a", begins(1)), Pace::Loads);
        assert_eq!(at(599, "a", begins(1)), Pace::Loads);
        assert_eq!(at(600, "a", begins(1)), Pace::Quiet);
        assert_eq!(at(601, "a", Load::None), Pace::Brings);
        assert_eq!(at(611, "a", Load::None), Pace::Quiet);
        assert_eq!(at(612, "a", begins(1)), Pace::Loads);
    }

    #[test]
    fn a_load_with_rows_on_the_stream_is_waited_for_without_a_limit() {
        let mut at = watching(Instant::now());
        for hour in 0..100 {
            assert_eq!(at(hour * 3600, "a", Load::Comes), Pace::Loads);
        }
    }

    #[test]
    fn a_load_that_has_begun_anew_is_given_twice_as_long() {
        let mut at = watching(Instant::now());
        let mut since = 0;
        for (request, minutes) in [("a", 10), ("b", 20), ("c", 40), ("d", 80), ("e", 160)] {
            let until = since + minutes * 60;
            assert_eq!(at(since, request, begins(1)), Pace::Loads);
            assert_eq!(at(until - 1, request, begins(1)), Pace::Loads);
            assert_eq!(at(until, request, begins(1)), Pace::Quiet);
            assert_eq!(at(until + 1, request, begins(1)), Pace::Quiet);
            since = until + 2;
        }
        assert_eq!(at(since, "f", begins(1)), Pace::Loads);
        assert_eq!(at(since + 4 * 3600, "f", begins(1)), Pace::Quiet);
        // Another copy of the table has had no time yet.
        assert_eq!(at(since + 4 * 3600 + 1, "g", begins(2)), Pace::Loads);
        assert_eq!(at(since + 4 * 3600 + 601, "g", begins(2)), Pace::Quiet);
    }
}
