//! A table with so many rows that nothing heals that they are not remembered one by one. Pure.
//!
//! They are asked for in rounds. In each round every row is asked for once, and a row that is new at once. The round
//! after it begins ever later, so that rows that stay incomplete for good cost the source ever less.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use super::healing::KeyTexts;

/// How long a round lasts behind its last request, at least. Each time it is twice as long.
const WAIT_FIRST: Duration = Duration::from_secs(60);
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// A round lasts for so long for each row that was asked for in it: at most 50 of these rows are asked for a second, taken
/// over some rounds, however many there are.
const WAIT_PER_ROW: Duration = Duration::from_millis(20);

/// A table's rows of one round are remembered in so many bits for each, so that few are taken for others.
const BITS_PER_ROW: usize = 16;

/// The bits of a table: 128 KiB. Rows that are taken for others wait for a round in which they are not.
const BITS_MAX: usize = 1 << 20;
const BITS_MIN: usize = 1 << 12;

/// The rows of one table.
#[derive(Debug)]
pub(super) struct Crowd {
    /// Which rows were asked for in this round, by their hash. Another hash in each round: no two rows stand for one
    /// another for ever.
    bits: Vec<u64>,
    hashes: RandomState,
    round: Round,
    /// How many rows were asked for in this round.
    asked: usize,
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
        let rows = asked.len();
        let mut crowd = Self {
            bits: bits_for(rows),
            hashes: RandomState::new(),
            round: Round::Asking,
            asked: 0,
            formed_with: rows,
            wait: WAIT_FIRST,
        };
        asked.for_each(|key| crowd.note(key));
        crowd
    }

    /// Whether a row is to be asked for in this round.
    pub(super) fn is_due(&self, key: &KeyTexts) -> bool {
        let (word, bit) = self.place(key);
        self.bits[word] & bit == 0
    }

    /// A row is asked for.
    pub(super) fn note(&mut self, key: &KeyTexts) {
        let (word, bit) = self.place(key);
        self.bits[word] |= bit;
        self.asked += 1;
    }

    /// All incomplete rows of the table were gone through once more, of which so many had been asked for in this round
    /// `again`.
    pub(super) fn gone_through(&mut self, again: usize, now: Instant) -> Then {
        match self.round {
            Round::Asking => {
                let rows = u32::try_from(self.asked).unwrap_or(u32::MAX);
                let wait = self.wait.max(WAIT_PER_ROW.saturating_mul(rows));
                self.round = Round::Asked { until: now + wait };
                self.wait = (self.wait * 2).min(WAIT_MAX);
            }
            Round::Asked { .. } if again < self.formed_with.div_ceil(2) => return Then::Leaves,
            Round::Asked { until } if now >= until => {
                self.bits = bits_for(again);
                self.hashes = RandomState::new();
                (self.round, self.asked) = (Round::Asking, 0);
            }
            Round::Asked { .. } => {}
        }
        Then::Stays
    }

    fn place(&self, key: &KeyTexts) -> (usize, u64) {
        // The remainder is below the number of bits, which fits.
        let bit = (self.hashes.hash_one(key) % (self.bits.len() as u64 * 64)) as usize;
        (bit / 64, 1 << (bit % 64))
    }
}

fn bits_for(rows: usize) -> Vec<u64> {
    let bits = rows.saturating_mul(BITS_PER_ROW);
    vec![0; bits.clamp(BITS_MIN, BITS_MAX).div_ceil(64)]
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
    fn a_round_lasts_the_longer_the_more_rows_it_has() {
        let (keys, begin) = (keys(100_000), Instant::now());
        let mut crowd = Crowd::form(keys[..5_000].iter());
        let (asked, _) = go_through(&mut crowd, &keys, begin);
        // The first round began in few bits.
        assert!(asked > 50_000, "{asked}");
        let rows = u32::try_from(crowd.asked).expect("few");
        let until = begin + rows * WAIT_PER_ROW;
        assert_eq!(crowd.round, Round::Asked { until });
        go_through(&mut crowd, &keys, until);
        let (asked, _) = go_through(&mut crowd, &keys, until);
        assert!(asked > 90_000, "{asked}");
        assert_eq!(crowd.bits.len() * 64, BITS_MAX);
    }

    #[test]
    fn a_table_that_is_healed_is_remembered_row_by_row_again() {
        let (keys, now) = (keys(1_000), Instant::now());
        let mut crowd = Crowd::form(keys[..600].iter());
        assert_eq!(go_through(&mut crowd, &keys, now).1, Then::Stays);
        assert_eq!(crowd.gone_through(300, now), Then::Stays);
        assert_eq!(crowd.gone_through(299, now), Then::Leaves);
    }
}
