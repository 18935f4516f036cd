//! Values of the buckets that are not understood: each is told once.

use std::sync::atomic::{AtomicU64, Ordering};

use millrace_config::Condition;

/// The value of one key that was not understood last.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    /// Its revision in the bucket; revisions begin with 1.
    told: AtomicU64,
}

impl Unread {
    /// Whether a value of this revision was not told of yet. From now on it was.
    fn is_news(&self, revision: u64) -> bool {
        self.told.swap(revision, Ordering::Relaxed) != revision
    }

    /// Warns of a value that is not understood, once.
    pub(crate) fn warn(&self, revision: u64, condition: &Condition) {
        if self.is_news(revision) {
            tracing::warn!(
                code = condition.code.as_str(), remedy = %condition.remedy,
                "{}; it is left as it is", condition.message
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_news_once() {
        let unread = Unread::default();
        let news = [1, 1, 2, 2, 1].map(|revision| unread.is_news(revision));
        assert_eq!(news, [true, false, true, false, true]);
    }
}
