//! The version guard: the one rule that makes any delivery, in any order, any number of times, end the same.

use millrace_event::Version;

/// Whether an incoming full row or delete applies: it must be strictly above everything the target remembers
/// of its key.
///
/// `stored` is the row's version, `tombstone` the version at which the key was deleted, `floor` the version of
/// the table's last truncate. Equal is stale: the same change came again. Because the outcome is the maximum
/// of all versions that ever came, it depends neither on their order nor on repetitions. Partial rows are not
/// covered by that argument (an older full row that comes late would be stale although it alone has the
/// missing columns), which is why they need each key's changes in order.
#[must_use]
pub fn applies(
    stored: Option<Version>,
    tombstone: Option<Version>,
    floor: Version,
    incoming: Version,
) -> bool {
    stored.is_none_or(|version| version < incoming)
        && tombstone.is_none_or(|version| version < incoming)
        && floor < incoming
}

#[cfg(test)]
mod tests {
    use millrace_event::Lsn;

    use super::*;

    #[test]
    fn only_what_is_strictly_above_everything_applies() {
        let at = |lsn| Version::new(1, Lsn(lsn), 1);
        assert!(applies(None, None, Version::ZERO, at(1)));
        assert!(applies(Some(at(1)), Some(at(1)), at(1), at(2)));
        for (stored, tombstone, floor) in [
            (Some(at(2)), None, Version::ZERO),
            (None, Some(at(2)), Version::ZERO),
            (None, None, at(2)),
            (Some(at(3)), Some(at(1)), at(1)),
        ] {
            assert!(!applies(stored, tombstone, floor, at(2)));
        }
    }
}
