//! Which tables' new rows may be written by a plain insert.
//!
//! A guarded upsert looks each key up first and then inserts it provisionally, which costs the target a
//! quarter more than an insert. For keys that the target does not have, both do the same. Whether it has one
//! is only guessed, from the source having made the row; if it has, the insert fails as a whole, the batch is
//! applied again with guards, and the guess is not made for a while.

use std::collections::HashMap;

/// Fewer new rows are not worth a statement of their own: it saves about 1.2 us a row and costs about 50.
pub(super) const ROWS_MIN: usize = 100;

/// After the first wrong guess, so many batches of the table are guarded.
const PAUSE_MIN: u32 = 16;

/// After several in a row, at most so many.
const PAUSE_MAX: u32 = 4_096;

/// What is known about each relation's guesses.
#[derive(Debug)]
pub(super) struct Inserts {
    /// Fewer new rows of a batch are always guarded.
    rows_min: usize,
    paused: HashMap<String, Pause>,
}

#[derive(Debug)]
struct Pause {
    /// Batches that are still to be guarded.
    left: u32,
    /// How many it were from the beginning.
    length: u32,
}

impl Default for Inserts {
    fn default() -> Self {
        Self::of_at_least(ROWS_MIN)
    }
}

impl Inserts {
    /// Guesses for batches with so many new rows of a table.
    pub(super) fn of_at_least(rows_min: usize) -> Self {
        Self {
            rows_min: rows_min.max(1),
            paused: HashMap::new(),
        }
    }

    /// Whether this many new rows of one batch may be written by a plain insert.
    pub(super) fn may(&mut self, relation: &str, rows: usize) -> bool {
        if rows < self.rows_min {
            return false;
        }
        let Some(pause) = self.paused.get_mut(relation) else {
            return true;
        };
        let waited = pause.left == 0;
        pause.left = pause.left.saturating_sub(1);
        waited
    }

    /// The target took a plain insert.
    pub(super) fn taken(&mut self, relation: &str) {
        self.paused.remove(relation);
    }

    /// The target refused a batch with a plain insert.
    pub(super) fn refused(&mut self, relation: String) {
        let length = self.paused.get(&relation).map_or(PAUSE_MIN, |pause| {
            pause.length.saturating_mul(2).min(PAUSE_MAX)
        });
        let left = length;
        self.paused.insert(relation, Pause { left, length });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many batches pass until the next plain insert, that one included.
    fn until_next(inserts: &mut Inserts) -> u32 {
        let next = (1..).find(|_| inserts.may("t", ROWS_MIN));
        next.expect("the range has no end")
    }

    #[test]
    fn wrong_guesses_in_a_row_make_longer_and_longer_pauses() {
        let mut inserts = Inserts::default();
        assert!(inserts.may("t", ROWS_MIN));
        assert!(!inserts.may("t", ROWS_MIN - 1));
        inserts.refused("t".to_owned());
        assert!(inserts.may("other", ROWS_MIN));
        assert_eq!(until_next(&mut inserts), PAUSE_MIN + 1);
        inserts.refused("t".to_owned());
        assert_eq!(until_next(&mut inserts), 2 * PAUSE_MIN + 1);
        for _ in 0..40 {
            inserts.refused("t".to_owned());
        }
        assert_eq!(until_next(&mut inserts), PAUSE_MAX + 1);
        inserts.taken("t");
        assert_eq!(until_next(&mut inserts), 1);
        inserts.refused("t".to_owned());
        assert_eq!(until_next(&mut inserts), PAUSE_MIN + 1);
    }
}
