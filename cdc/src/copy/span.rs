//! What a statement reads of a table, and how far it has come when it is over. Pure.

/// What is read of a table at once.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows<'a> {
    /// At most `limit` rows behind a key, or from the first one, for which the condition holds.
    Behind {
        after: Option<&'a [String]>,
        filter: Option<&'a str>,
        limit: u32,
    },
    /// The rows of these keys.
    Of(&'a [Vec<String>]),
}

impl<'a> Rows<'a> {
    /// The condition of whoever asks.
    pub(super) fn filter(self) -> Option<&'a str> {
        match self {
            Self::Behind { filter, .. } => filter,
            Self::Of(_) => None,
        }
    }
}

/// Where the rows of a statement end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Once there are so many. Where there are fewer, nothing is behind them.
    Count(u64),
    /// At this key, so many rows of the table further. Some of these are read, perhaps none: a condition decides.
    Key(Vec<String>, u64),
    /// At the table's last row. A condition decides which are read.
    Table,
}

/// How far a chunk has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reached {
    /// Behind which key the next one begins; `None` where this one has no row.
    pub(super) last_key: Option<Vec<String>>,
    /// Whether there is no row behind it.
    pub(super) is_last: bool,
    /// How many rows of the table the source had to look at.
    pub(super) looked_at: u64,
}

impl End {
    /// Whether the source may send more behind the first `rows`. The last row that was asked for may be the one that
    /// fills a chunk. Of a part nobody knows which is the last.
    pub(super) fn may_follow(&self, rows: u64) -> bool {
        match self {
            Self::Count(most) => rows < *most,
            Self::Key(..) | Self::Table => true,
        }
    }

    /// How far a statement has come that has sent all of its `rows`, of which the last one has this key.
    pub(super) fn reached(self, rows: u64, last_key: Option<Vec<String>>) -> Reached {
        let (last_key, is_last, looked_at) = match self {
            Self::Count(most) => (last_key, rows < most, rows),
            Self::Key(key, number) => (Some(key), false, number),
            Self::Table => (last_key, true, rows),
        };
        Reached {
            last_key,
            is_last,
            looked_at,
        }
    }
}

impl Reached {
    /// How far a statement has come that was cut off behind its first `rows`, of which the last one has this key.
    pub(super) fn cut_off(rows: u64, last_key: Option<Vec<String>>) -> Self {
        Self {
            last_key,
            is_last: false,
            looked_at: rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Option<Vec<String>> {
        Some(vec![id.to_owned()])
    }

    #[test]
    fn fewer_rows_than_were_asked_for_are_the_last() {
        assert!(!End::Count(3).reached(3, key("c")).is_last);
        assert!(End::Count(3).reached(2, key("b")).is_last);
        assert!(End::Count(3).may_follow(2) && !End::Count(3).may_follow(3));
    }

    #[test]
    fn a_part_goes_on_behind_the_rows_that_were_looked_at() {
        let end = End::Key(vec!["z".to_owned()], 100);
        assert!(end.may_follow(100));
        let reached = end.reached(1, key("b"));
        assert_eq!(reached.last_key, key("z"));
        assert_eq!((reached.is_last, reached.looked_at), (false, 100));
        let reached = End::Table.reached(0, None);
        assert_eq!((reached.last_key, reached.is_last), (None, true));
    }

    #[test]
    fn a_chunk_that_was_cut_off_is_never_the_last() {
        let reached = Reached::cut_off(7, key("g"));
        assert_eq!(reached.last_key, key("g"));
        assert_eq!((reached.is_last, reached.looked_at), (false, 7));
    }
}
