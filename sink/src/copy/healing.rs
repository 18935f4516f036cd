//! Which incomplete rows are asked for, and when again. Pure.

use std::collections::HashMap;
use std::time::Duration;

use millrace_event::TableName;
use tokio::time::Instant;

use crate::asking::Debts;

/// So many incomplete rows of a table are asked for at once.
pub(super) const ROWS_MAX: usize = 500;

/// The keys of all tables together have so many bytes, of which each table gets half of what the others leave.
const KEYS_BYTES_MAX: usize = 128 * 1024;

/// So much a table gets in any case, while [`REQUEST_BYTES_MAX`] has it.
const SHARE_MIN: usize = 2 * 1024;

/// The keys never have more bytes than this: a request is one message, whose size the broker bounds.
const REQUEST_BYTES_MAX: usize = 384 * 1024;

/// A row that was asked for and is still incomplete, because it was changed again meanwhile, is asked for again after
/// this. Each time it takes twice as long, since a row that is gone stays incomplete where deletes are ignored.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// So many rows are remembered as asked for; beyond, all are forgotten, and asked for again.
const ASKED_MAX: usize = 10_000;

/// What a request has room for, in bytes of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    taken: usize,
}

impl Room {
    /// Beside keys that stay asked for.
    pub(super) fn beside(debts: &Debts) -> Self {
        let mut room = Self { taken: 0 };
        debts.iter().for_each(|(_, keys)| room.take(keys));
        room
    }

    /// Takes what these keys need.
    pub(super) fn take(&mut self, keys: &[KeyTexts]) {
        self.taken += keys.iter().flatten().map(String::len).sum::<usize>();
    }

    /// What the next table may take. Those that get no answer keep their keys in the requests to come, so the others'
    /// shares become small, and never nothing.
    fn share(self) -> usize {
        let half = KEYS_BYTES_MAX.saturating_sub(self.taken) / 2;
        half.max(SHARE_MIN).min(self.left())
    }

    /// What the first key of a table may take.
    fn left(self) -> usize {
        REQUEST_BYTES_MAX.saturating_sub(self.taken)
    }
}

/// Whether a table's keys have their place in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// As many as its share holds, and the first one in any case.
    Fits,
    /// The others leave no room for the first one, so all are still there. Those that were asked for before give way to
    /// it; where that does not do, it waits: see [`Healing::waits`].
    Squeezed,
}

/// A row's key, as texts.
type KeyTexts = Vec<String>;

/// The rows that were asked for, and how far each table was searched.
#[derive(Default)]
pub(super) struct Healing {
    asked: HashMap<(TableName, KeyTexts), Asked>,
    searched: HashMap<TableName, String>,
    /// The first table that had no room the last time.
    waiting: Option<TableName>,
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

    /// These tables, in the order in which they get room: one that had none comes first.
    pub(super) fn in_turn(&mut self, mut tables: Vec<TableName>) -> Vec<TableName> {
        let waiting = self.waiting.take();
        let first = waiting.and_then(|first| tables.iter().position(|table| *table == first));
        tables.rotate_left(first.unwrap_or(0));
        tables
    }

    /// A table has no room this time.
    pub(super) fn waits(&mut self, table: TableName) {
        self.waiting.get_or_insert(table);
    }

    /// Up to [`ROWS_MAX`] keys were found there; those that there is room for stay. Rows that nothing heals must not
    /// keep those behind them from it.
    pub(super) fn found(&mut self, table: &TableName, keys: &mut Vec<String>, room: Room) -> Found {
        let found = keys.len();
        let mut share = room.share();
        let fits = keys.iter().take_while(|key| {
            let left = share.checked_sub(key.len());
            share = left.unwrap_or(0);
            left.is_some()
        });
        let mut fits = fits.count();
        if let (0, Some(first)) = (fits, keys.first()) {
            if first.len() > REQUEST_BYTES_MAX {
                // No request ever holds it, and those behind it are looked for all the same.
                self.searched.insert(table.clone(), first.clone());
                keys.clear();
                return Found::Fits;
            }
            if first.len() > room.left() {
                return Found::Squeezed;
            }
            fits = 1;
        }
        keys.truncate(fits);
        if found < ROWS_MAX && fits == found {
            self.searched.remove(table);
        } else if let Some(last) = keys.last() {
            self.searched.insert(table.clone(), last.clone());
        }
        Found::Fits
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
        let room = Room { taken: 0 };
        let keys: Vec<String> = (0..ROWS_MAX).map(|key| format!("{key:04}")).collect();
        assert_eq!(healing.place(&table), "");
        healing.found(&table, &mut keys.clone(), room);
        assert_eq!(healing.place(&table), "0499");
        healing.found(&table, &mut keys[..7].to_vec(), room);
        assert_eq!(healing.place(&table), "");
    }

    #[test]
    fn long_keys_are_asked_for_in_turns() {
        let mut healing = Healing::default();
        let table = TableName::new("public", "a");
        let all = ["1", "2", "3"].map(|key| key.repeat(30 * 1024)).to_vec();
        let mut now = all.clone();
        assert_eq!(
            healing.found(&table, &mut now, Room { taken: 0 }),
            Found::Fits
        );
        assert_eq!(now, all[..2]);
        assert_eq!(healing.place(&table), all[1]);
        let mut rest = all[2..].to_vec();
        healing.found(&table, &mut rest, Room { taken: 0 });
        assert_eq!(rest, all[2..]);
        assert_eq!(healing.place(&table), "");
        // What no request holds keeps nothing else back.
        let long = "4".repeat(REQUEST_BYTES_MAX + 1);
        let mut found = vec![long.clone(), "5".to_owned()];
        let fits = healing.found(&table, &mut found, Room { taken: 0 });
        assert_eq!((fits, found.len()), (Found::Fits, 0));
        assert_eq!(healing.place(&table), long);
    }

    #[test]
    fn keys_that_stay_asked_for_take_their_room() {
        let table = TableName::new("public", "t");
        let key = |bytes| vec!["x".repeat(bytes), "y".to_owned()];
        assert_eq!(Room::beside(&Vec::new()).share(), KEYS_BYTES_MAX / 2);
        let debts = vec![
            (table.clone(), vec![key(9), key(19)]),
            (table.clone(), vec![key(29)]),
        ];
        let room = Room::beside(&debts);
        assert_eq!(room.share(), KEYS_BYTES_MAX / 2 - 30);
        assert_eq!(room.left(), REQUEST_BYTES_MAX - 60);
        let full = Room::beside(&vec![(table, vec![key(REQUEST_BYTES_MAX)])]);
        assert_eq!((full.share(), full.left()), (0, 0));
    }

    /// Looks once, as a sink does: what is asked for of each table stays, because nothing answers.
    fn look(healing: &mut Healing, debts: &mut Debts, tables: &[TableName], bytes: usize) {
        let awaited: Vec<_> = debts.iter().map(|(table, _)| table.clone()).collect();
        let mut tables = tables.to_vec();
        tables.retain(|table| !awaited.contains(table));
        let mut room = Room::beside(debts);
        for table in healing.in_turn(tables) {
            let found = ROWS_MAX.min(KEYS_BYTES_MAX / bytes + 2);
            let mut found: Vec<_> = (0..found).map(|_| "x".repeat(bytes)).collect();
            let mut fits = healing.found(&table, &mut found, room);
            if fits == Found::Squeezed {
                debts.retain(|(table, _)| !awaited.contains(table));
                room = Room::beside(debts);
                fits = healing.found(&table, &mut found, room);
            }
            match fits {
                Found::Fits => {
                    let keys: Vec<_> = found.into_iter().map(|key| vec![key]).collect();
                    assert!(!keys.is_empty(), "{table}");
                    room.take(&keys);
                    debts.push((table, keys));
                }
                Found::Squeezed => healing.waits(table),
            }
        }
        assert!(Room::beside(debts).taken <= REQUEST_BYTES_MAX);
    }

    #[test]
    fn every_table_gets_its_first_key_through_beside_those_that_nothing_answers() {
        // As long as an index takes them, and far longer ones that it has compressed.
        for (tables, bytes, looks) in [
            (30, 2_600, 1),
            (400, 10, 3),
            (400, 2_600, 4),
            (9, 200_000, 9),
        ] {
            let tables: Vec<_> = (0..tables)
                .map(|table| TableName::new("public", format!("t{table:04}")))
                .collect();
            let (mut healing, mut debts) = (Healing::default(), Debts::new());
            let mut through = std::collections::HashSet::new();
            for _ in 0..looks {
                look(&mut healing, &mut debts, &tables, bytes);
                through.extend(debts.iter().map(|(table, _)| table.clone()));
            }
            assert_eq!(through.len(), tables.len(), "{bytes}");
        }
    }
}
