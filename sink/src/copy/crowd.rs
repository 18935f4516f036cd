//! A table with so many incomplete rows that they are not remembered one by one. Pure.
//!
//! They are asked for in rounds. In each round every row is asked for once, and a row that is new at once. The pass
//! behind a round shows how many of them were not healed. Where most were, the next round begins at once; else ever
//! later, so that rows that stay incomplete for good cost the source ever less.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use super::healing::KeyTexts;

/// How long nothing is asked for behind a round that has healed few of its rows, at least. Each time it is twice as
/// long.
const WAIT_FIRST: Duration = Duration::from_secs(60);
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// That wait has so long for each row that was asked for and not healed: at most 50 of these rows are asked for a
/// second, taken over some rounds, however many there are.
const WAIT_PER_ROW: Duration = Duration::from_millis(20);

/// A table's rows of one round are remembered in so many bits for each, so that few are taken for others.
const BITS_PER_ROW: usize = 16;

/// The bits of a table: 128 KiB while nobody knows how many rows it has. Rows that are taken for others wait for a round
/// in which they are not. Both are powers of two.
const BITS_MAX: usize = 1 << 20;
const BITS_MIN: usize = 1 << 12;

/// The rows of one table.
#[derive(Debug)]
pub(super) struct Crowd {
    /// Which rows were asked for in this round, by their hash. Another hash in each round: no two rows stand for one
    /// another for ever. A power of two of words.
    bits: Vec<u64>,
    /// How many bits are set.
    set: usize,
    hashes: RandomState,
    round: Round,
    /// How many rows were asked for in this round.
    asked: usize,
    /// Whether the bits were too few for the round's rows, and now know its last ones only.
    has_overflown: bool,
    /// With so many rows the table became one of these.
    formed_with: usize,
    wait: Duration,
}

/// How far a round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// The table's rows are gone through, and each is asked for.
    Asking,
    /// All were asked for. Those that are found once more were not healed.
    Asked {
        /// So many were.
        rows: usize,
        /// Since then.
        at: Instant,
    },
    /// Few of them were healed.
    Waiting {
        /// When the next round may begin.
        until: Instant,
    },
}

/// What becomes of the table once all its rows were gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It stays one of these.
    Stays,
    /// Most of its rows were healed: those that are left are remembered one by one again.
    Leaves,
}

impl Crowd {
    /// Of rows that were asked for.
    pub(super) fn form<'k>(asked: impl ExactSizeIterator<Item = &'k KeyTexts>) -> Self {
        let mut crowd = Self {
            bits: vec![0; BITS_MAX / 64],
            set: 0,
            hashes: RandomState::new(),
            round: Round::Asking,
            asked: 0,
            has_overflown: false,
            formed_with: asked.len(),
            wait: WAIT_FIRST,
        };
        asked.for_each(|key| crowd.note(key));
        crowd
    }

    /// Whether a row is to be asked for in this round.
    pub(super) fn is_due(&self, key: &KeyTexts) -> bool {
        if self.has_overflown && self.round != Round::Asking {
            // Nobody knows whether it is new.
            return false;
        }
        let (word, bit) = self.place(key);
        self.bits[word] & bit == 0
    }

    /// A row is asked for.
    pub(super) fn note(&mut self, key: &KeyTexts) {
        let bits = self.bits.len() * 64;
        if self.round == Round::Asking && self.set > bits / 2 {
            // Too many of those to come would be taken for others. Those that were asked for lie behind.
            self.forget(BITS_MAX);
            self.has_overflown = true;
        }
        let (word, bit) = self.place(key);
        self.set += usize::from(self.bits[word] & bit == 0);
        self.bits[word] |= bit;
        self.asked += 1;
    }

    /// All incomplete rows of the table were gone through once more, of which so many were not asked for `again`: they
    /// had been in this round.
    pub(super) fn gone_through(&mut self, again: usize, now: Instant) -> Then {
        match self.round {
            Round::Asking => {
                self.fold();
                let rows = self.asked;
                self.round = Round::Asked { rows, at: now };
            }
            _ if again < self.formed_with.div_ceil(2) => return Then::Leaves,
            Round::Asked { rows, .. } if again < rows.div_ceil(2) => self.begin_round(again),
            Round::Asked { rows, at } => {
                // Rows that were taken for others were found too, and never asked for.
                let rows = u32::try_from(again.min(rows)).unwrap_or(u32::MAX);
                let wait = self.wait.max(WAIT_PER_ROW.saturating_mul(rows));
                self.wait = (self.wait * 2).min(WAIT_MAX);
                self.round = Round::Waiting { until: at + wait };
            }
            Round::Waiting { until } if now >= until => self.begin_round(again),
            Round::Waiting { .. } => {}
        }
        Then::Stays
    }

    /// Begins a round of about so many rows.
    fn begin_round(&mut self, rows: usize) {
        self.forget(bits_for(rows));
        (self.round, self.asked, self.has_overflown) = (Round::Asking, 0, false);
    }

    /// Has no row in the bits, of which there are so many from here on.
    fn forget(&mut self, bits: usize) {
        self.bits = vec![0; bits / 64];
        (self.hashes, self.set) = (RandomState::new(), 0);
    }

    /// Keeps no more bits than the rows need. Where the upper half is laid over the lower one, each row's place is the
    /// remainder of what it was.
    fn fold(&mut self) {
        let words = bits_for(self.asked) / 64;
        while self.bits.len() > words {
            let upper = self.bits.split_off(self.bits.len() / 2);
            for (lower, upper) in self.bits.iter_mut().zip(upper) {
                *lower |= upper;
            }
        }
        self.bits.shrink_to_fit();
        let set = self.bits.iter().map(|word| word.count_ones() as usize);
        self.set = set.sum();
    }

    fn place(&self, key: &KeyTexts) -> (usize, u64) {
        // The remainder is below the number of bits, which fits.
        let bit = (self.hashes.hash_one(key) % (self.bits.len() as u64 * 64)) as usize;
        (bit / 64, 1 << (bit % 64))
    }
}

fn bits_for(rows: usize) -> usize {
    let bits = rows.saturating_mul(BITS_PER_ROW).min(BITS_MAX);
    bits.next_power_of_two().max(BITS_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(rows: usize) -> Vec<KeyTexts> {
        (0..rows).map(|row| vec![row.to_string()]).collect()
    }

    /// Goes through all rows, asks for those that are due, and returns how many that are, and what becomes of the table.
    fn go_through(crowd: &mut Crowd, keys: &[KeyTexts], now: Instant) -> (usize, Then) {
        let due: Vec<_> = keys.iter().filter(|key| crowd.is_due(key)).collect();
        due.iter().for_each(|key| crowd.note(key));
        let then = crowd.gone_through(keys.len() - due.len(), now);
        (due.len(), then)
    }

    #[test]
    fn rows_that_nothing_heals_are_asked_for_in_rounds_ever_further_apart() {
        let (keys, begin) = (keys(2_000), Instant::now());
        let mut crowd = Crowd::form(keys[..500].iter());
        let mut rounds = Vec::new();
        for second in (0..20_000).step_by(10) {
            let now = begin + Duration::from_secs(second);
            let (asked, then) = go_through(&mut crowd, &keys, now);
            assert_eq!(then, Then::Stays);
            if asked > 1_000 {
                rounds.push(second);
            } else {
                // What was taken for another row before has its turn with another hash.
                assert_eq!(asked, 0);
            }
        }
        // Behind 60, 120, 240 .. seconds, and never more than an hour; a pass finds that it is time.
        assert_eq!(
            rounds,
            [
                0, 70, 200, 450, 940, 1910, 3840, 7450, 11_060, 14_670, 18_280
            ]
        );
        // A row that is new does not wait for the next round.
        let new = (0..).map(|row| vec![format!("new {row}")]);
        let due = new.take(100).filter(|key| crowd.is_due(key)).count();
        assert!(due > 80, "{due} of 100");
    }

    #[test]
    fn a_wait_is_the_longer_the_more_rows_were_not_healed() {
        let (keys, begin) = (keys(100_000), Instant::now());
        let mut crowd = Crowd::form(keys[..5_000].iter());
        let (asked, _) = go_through(&mut crowd, &keys, begin);
        assert!(asked > 85_000, "{asked}");
        let rows = crowd.asked;
        assert_eq!(crowd.round, Round::Asked { rows, at: begin });
        go_through(&mut crowd, &keys, begin + Duration::from_secs(200));
        let until = begin + WAIT_PER_ROW * u32::try_from(rows).expect("few");
        assert_eq!(crowd.round, Round::Waiting { until });
        go_through(&mut crowd, &keys, until - Duration::from_secs(1));
        assert_eq!(crowd.round, Round::Waiting { until });
        go_through(&mut crowd, &keys, until);
        let (asked, _) = go_through(&mut crowd, &keys, until);
        assert!(asked > 90_000, "{asked}");
    }

    #[test]
    fn a_round_that_heals_most_is_followed_at_once() {
        let (keys, now) = (keys(20_000), Instant::now());
        let mut crowd = Crowd::form(keys[..5_000].iter());
        go_through(&mut crowd, &keys, now);
        go_through(&mut crowd, &keys[11_000..], now);
        assert_eq!((crowd.round, crowd.wait), (Round::Asking, WAIT_FIRST));
        // Then nothing heals the others.
        let (asked, _) = go_through(&mut crowd, &keys[11_000..], now);
        assert!(asked > 8_000, "{asked}");
        go_through(&mut crowd, &keys[11_000..], now);
        assert!(matches!(crowd.round, Round::Waiting { .. }));
        assert_eq!(crowd.wait, WAIT_FIRST * 2);
    }

    #[test]
    fn more_rows_than_the_bits_know_are_asked_for_all_the_same_and_no_faster() {
        let (keys, now) = (keys(1_500_000), Instant::now());
        let mut crowd = Crowd::form(keys[..5_000].iter());
        let (asked, _) = go_through(&mut crowd, &keys, now);
        assert!(asked > 1_000_000, "{asked}");
        assert!(crowd.set <= BITS_MAX / 2 + 1);
        let rows = crowd.asked;
        // Nobody knows which these were.
        assert_eq!(go_through(&mut crowd, &keys, now).0, 0);
        let until = now + WAIT_PER_ROW * u32::try_from(rows).expect("few");
        assert_eq!(crowd.round, Round::Waiting { until });
    }

    #[test]
    fn few_rows_keep_few_bits_and_are_still_known() {
        let (keys, now) = (keys(700), Instant::now());
        let mut crowd = Crowd::form(keys.iter());
        assert_eq!(crowd.bits.len() * 64, BITS_MAX);
        crowd.gone_through(0, now);
        assert_eq!(crowd.bits.len() * 64, 1 << 14);
        assert!(!keys.iter().any(|key| crowd.is_due(key)));
        assert!(crowd.set > 600 && crowd.set <= 700, "{}", crowd.set);
    }

    #[test]
    fn a_table_that_is_healed_is_remembered_row_by_row_again() {
        let (keys, now) = (keys(1_000), Instant::now());
        let mut crowd = Crowd::form(keys[..600].iter());
        assert_eq!(go_through(&mut crowd, &keys, now).1, Then::Stays);
        assert_eq!(crowd.gone_through(600, now), Then::Stays);
        assert_eq!(crowd.gone_through(300, now), Then::Stays);
        assert_eq!(crowd.gone_through(299, now), Then::Leaves);
    }
}
