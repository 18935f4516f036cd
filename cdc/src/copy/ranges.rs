//! Which blocks of a table are read together. Pure.

/// So many blocks are one range: large enough that beginning one costs little beside reading it (4 MiB with Postgres'
/// usual blocks of 8 KiB), and small enough that it can be read before its turn to be published has come.
pub(super) const RANGE_BLOCKS: u32 = 512;

/// Blocks of one table of the source that holds rows: a whole table, or a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// The table, quoted.
    pub(super) relation: String,
    /// The first block.
    first: u32,
    /// The block behind the last one; `None` for all that follow: a table may have grown since it was looked at.
    end: Option<u32>,
}

impl Range {
    /// The condition that a row lies there, if it is one.
    pub(super) fn condition(&self) -> Option<String> {
        let from = (self.first > 0).then(|| format!("ctid >= '({},0)'", self.first));
        let to = self.end.map(|end| format!("ctid < '({end},0)'"));
        match (from, to) {
            (None, None) => None,
            (Some(from), Some(to)) => Some(format!("{from} AND {to}")),
            (one, other) => one.or(other),
        }
    }
}

/// The ranges of a table with so many blocks, in their order: every block in exactly one.
pub(super) fn ranges(relation: &str, blocks: u32) -> impl Iterator<Item = Range> {
    let count = blocks.div_ceil(RANGE_BLOCKS).max(1);
    let relation = relation.to_owned();
    (0..count).map(move |number| Range {
        relation: relation.clone(),
        first: number * RANGE_BLOCKS,
        end: (number + 1 < count).then(|| (number + 1) * RANGE_BLOCKS),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn conditions(blocks: u32) -> Vec<Option<String>> {
        ranges("t", blocks).map(|range| range.condition()).collect()
    }

    #[test]
    fn a_small_table_is_one_range_without_a_condition() {
        assert_eq!(conditions(0), [None]);
        assert_eq!(conditions(RANGE_BLOCKS), [None]);
    }

    #[test]
    fn the_last_range_has_no_end() {
        let expected = [
            Some("ctid < '(512,0)'".to_owned()),
            Some("ctid >= '(512,0)' AND ctid < '(1024,0)'".to_owned()),
            Some("ctid >= '(1024,0)'".to_owned()),
        ];
        assert_eq!(conditions(2 * RANGE_BLOCKS + 1), expected);
        assert_eq!(conditions(2 * RANGE_BLOCKS).len(), 2);
    }

    proptest! {
        #[test]
        fn every_block_is_in_exactly_one_range(blocks in 0..100_000_u32, block in 0..u32::MAX) {
            let holds = |range: &Range| {
                range.first <= block && range.end.is_none_or(|end| block < end)
            };
            prop_assert_eq!(ranges("t", blocks).filter(holds).count(), 1);
        }
    }

    #[test]
    fn the_largest_table_has_its_ranges() {
        assert_eq!(
            ranges("t", u32::MAX).last().map(|range| range.end),
            Some(None)
        );
    }
}
