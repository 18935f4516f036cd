//! Which incomplete rows are asked for, and when again. Pure.

use std::collections::HashMap;
use std::time::Duration;

use millrace_event::TableName;
use tokio::time::Instant;

use crate::asking::Debts;

/// So many incomplete rows of a table are asked for at once.
pub(super) const ROWS_MAX: usize = 500;

/// Their keys have so many bytes in all tables together: a request is one message, whose size the broker bounds.
pub(super) const KEYS_BYTES_MAX: usize = 128 * 1024;

/// A row that was asked for and is still incomplete, because it was changed again meanwhile, is asked for again after
/// this. Each time it takes twice as long, since a row that is gone stays incomplete where deletes are ignored.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// So many rows are remembered as asked for; beyond, all are forgotten, and asked for again.
const ASKED_MAX: usize = 10_000;

/// What of [`KEYS_BYTES_MAX`] is left beside keys that stay asked for.
pub(super) fn room_beside(debts: &Debts) -> usize {
    let keys = debts.iter().flat_map(|(_, keys)| keys).flatten();
    let bytes = keys.map(String::len).sum();
    KEYS_BYTES_MAX.saturating_sub(bytes)
}

/// A row's key, as texts.
type KeyTexts = Vec<String>;

/// The rows that were asked for, and how far each table was searched.
#[derive(Default)]
pub(super) struct Healing {
    asked: HashMap<(TableName, KeyTexts), Asked>,
    searched: HashMap<TableName, String>,
}

/// A row that was asked for.
struct Asked {
    at: Instant,
    /// How long its answer may take before it is asked for again.
    wait: Duration,
}

impl Healing {
    /// Forgets what was asked for long ago.
    pub(super) fn forget_old(&mut self, now: Instant) {
        self.asked.retain(|_, asked| now - asked.at < WAIT_MAX * 2);
        if self.asked.len() > ASKED_MAX {
            self.asked.clear();
        }
    }

    /// Behind which key a table's incomplete rows are looked for.
    pub(super) fn place(&self, table: &TableName) -> &str {
        self.searched.get(table).map_or("", String::as_str)
    }

    /// Up to [`ROWS_MAX`] keys were found there; those that `room` has bytes for stay. Rows that nothing heals must not
    /// keep those behind them from it.
    pub(super) fn found(&mut self, table: &TableName, keys: &mut Vec<String>, room: &mut usize) {
        let found = keys.len();
        let fits = keys.iter().take_while(|key| {
            let left = room.checked_sub(key.len());
            *room = left.unwrap_or(0);
            left.is_some()
        });
        let fits = fits.count();
        keys.truncate(fits);
        if found < ROWS_MAX && fits == found {
            self.searched.remove(table);
        } else if let Some(last) = keys.last() {
            self.searched.insert(table.clone(), last.clone());
        }
    }

    /// Those that are to be asked for now.
    pub(super) fn ask(
        &mut self,
        table: &TableName,
        keys: Vec<KeyTexts>,
        now: Instant,
    ) -> Vec<KeyTexts> {
        let asks = keys.into_iter().filter(|key| {
            let asked = self.asked.entry((table.clone(), key.clone()));
            let mut asks = true;
            asked
                .and_modify(|asked| {
                    asks = now - asked.at >= asked.wait;
                    if asks {
                        asked.at = now;
                        asked.wait = (asked.wait * 2).min(WAIT_MAX);
                    }
                })
                .or_insert(Asked {
                    at: now,
                    wait: WAIT_FIRST,
                });
            asks
        });
        asks.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_asked_for_again_ever_more_rarely() {
        let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
        let begin = Instant::now();
        let mut asked = Vec::new();
        for second in 0..400 {
            let now = begin + Duration::from_secs(second);
            healing.forget_old(now);
            let key = vec!["1".to_owned()];
            if !healing.ask(&table, vec![key], now).is_empty() {
                asked.push(second);
            }
        }
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363]);
    }

    #[test]
    fn every_row_has_its_turn_also_behind_those_that_stay() {
        let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
        let keys: Vec<String> = (0..ROWS_MAX).map(|key| format!("{key:04}")).collect();
        assert_eq!(healing.place(&table), "");
        healing.found(&table, &mut keys.clone(), &mut { usize::MAX });
        assert_eq!(healing.place(&table), "0499");
        healing.found(&table, &mut keys[..7].to_vec(), &mut { usize::MAX });
        assert_eq!(healing.place(&table), "");
    }

    #[test]
    fn long_keys_are_asked_for_in_turns() {
        let mut healing = Healing::default();
        let (a, b) = (TableName::new("public", "a"), TableName::new("public", "b"));
        let all = ["x1", "x2", "x3"].map(|key| key.repeat(10)).to_vec();
        let mut room = 50;
        let mut now = all.clone();
        healing.found(&a, &mut now, &mut room);
        assert_eq!(now, all[..2]);
        assert_eq!(healing.place(&a), all[1]);
        let mut other = all.clone();
        healing.found(&b, &mut other, &mut room);
        assert!(other.is_empty());
        assert_eq!(healing.place(&b), "");
        let mut rest = all[2..].to_vec();
        healing.found(&a, &mut rest, &mut 50);
        assert_eq!(rest, all[2..]);
        assert_eq!(healing.place(&a), "");
    }

    #[test]
    fn keys_that_stay_asked_for_take_their_room() {
        let table = TableName::new("public", "t");
        let key = |bytes| vec!["x".repeat(bytes), "y".to_owned()];
        assert_eq!(room_beside(&Vec::new()), KEYS_BYTES_MAX);
        let debts = vec![
            (table.clone(), vec![key(9), key(19)]),
            (table.clone(), vec![key(29)]),
        ];
        assert_eq!(room_beside(&debts), KEYS_BYTES_MAX - 60);
        assert_eq!(room_beside(&vec![(table, vec![key(KEYS_BYTES_MAX)])]), 0);
    }
}
