//! Up to where of the WAL it is settled that rows are read again. The same WAL is read again after each start, as far
//! as the slot keeps it: what is settled is not ordered a second time, and what the broker has forgotten is.

use millrace_event::Lsn;
use serde::{Deserialize, Serialize};

/// The rows that were ordered have every change that committed below a place of the WAL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settled {
    #[serde(with = "millrace_event::as_text")]
    below: Lsn,
    /// The timeline that the place is on: after a promotion another history may have the same place.
    timeline: u32,
}

impl Settled {
    pub(crate) fn new(below: Lsn, timeline: u32) -> Self {
        Self { below, timeline }
    }

    /// Whether a commit of a timeline is among them.
    pub(crate) fn has(&self, commit_lsn: Lsn, timeline: u32) -> bool {
        self.timeline == timeline && commit_lsn < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_committed_below_the_place_is_settled_on_the_same_timeline() {
        let settled = Settled::new(Lsn(0x1_0000_0010), 2);
        assert!(settled.has(Lsn(0x1_0000_000f), 2));
        assert!(!settled.has(Lsn(0x1_0000_0010), 2));
        assert!(!settled.has(Lsn(0x10), 3));
        let text = serde_json::to_string(&settled).expect("plain JSON");
        assert_eq!(text, r#"{"below":"1/10","timeline":2}"#);
        assert_eq!(serde_json::from_str::<Settled>(&text).ok(), Some(settled));
    }
}
