//! Orders that were carried out stay on their list for a moment: whoever follows one sees there whether it was cancelled.
//!
//! Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

/// How long one stays. `millrace backfill start --wait` looks twice in that time.
const KEPT: Duration = Duration::from_secs(1);

/// Orders that the target says are carried out, and since when this life knows.
#[derive(Debug, Default)]
pub(super) struct CarriedOut(BTreeMap<String, Instant>);

impl CarriedOut {
    /// Those of `finished` that may be struck off their list.
    pub(super) fn ripe(&mut self, finished: &BTreeSet<String>, now: Instant) -> BTreeSet<String> {
        self.0.retain(|id, _| finished.contains(id));
        let ripe = finished.iter().filter(|id| {
            let since = *self.0.entry((*id).clone()).or_insert(now);
            now - since >= KEPT
        });
        ripe.cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_stays_for_a_moment_behind_its_end() {
        let of = |ids: &[&str]| {
            ids.iter()
                .map(|id| (*id).to_owned())
                .collect::<BTreeSet<_>>()
        };
        let mut carried_out = CarriedOut::default();
        let at = Instant::now();
        assert_eq!(carried_out.ripe(&of(&["a"]), at), of(&[]));
        assert_eq!(carried_out.ripe(&of(&["a", "b"]), at + KEPT / 2), of(&[]));
        assert_eq!(carried_out.ripe(&of(&["a", "b"]), at + KEPT), of(&["a"]));
        assert_eq!(carried_out.ripe(&of(&["b"]), at + KEPT * 3 / 2), of(&["b"]));
        // Its name is not given again; but who is gone is forgotten.
        assert_eq!(carried_out.ripe(&of(&["a"]), at + KEPT * 2), of(&[]));
    }
}
