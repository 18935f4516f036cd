//! How long a request has brought nothing. Pure.

use std::time::Duration;

use tokio::time::Instant;

/// A request whose keys others wait for is given so long without bringing anything before it is replaced.
const PATIENCE: Duration = Duration::from_secs(10);

/// What has come for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Brought {
    /// So many tables are on the copy stream as far as they were asked for.
    pub(super) tables: usize,
    /// The sequence of the copy stream up to which the keys' rows are committed in the target.
    pub(super) applied_seq: u64,
}

/// Watches the request that is being answered.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// The request's id, what it had brought, and since when that is all.
    last: Option<(String, Brought, Instant)>,
}

impl Quiet {
    /// Whether the request, of which so much has come by `now`, has brought nothing for a while. One that capture has
    /// not taken up is not quiet: another one would fare no better.
    pub(super) fn is_quiet(
        &mut self,
        request: &str,
        brought: Option<Brought>,
        now: Instant,
    ) -> bool {
        let Some(brought) = brought else {
            self.last = None;
            return false;
        };
        match &self.last {
            Some((id, last, since)) if id == request && *last == brought => {
                now - *since >= PATIENCE
            }
            _ => {
                self.last = Some((request.to_owned(), brought, now));
                false
            }
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
            };
            let now = begin + Duration::from_secs(second);
            quiet.is_quiet(request, Some(brought), now)
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
        assert!(!quiet.is_quiet("b", None, now));
    }
}
