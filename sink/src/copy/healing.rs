//! Which incomplete rows are asked for, and when again. Pure.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use millrace_event::TableName;
use tokio::time::Instant;

use crate::asking::Debts;

/// So many incomplete rows of a table are asked for at once.
pub(super) const ROWS_MAX: usize = 500;

/// So much a table gets in any case, while the request has it.
const SHARE_MIN: usize = 2 * 1024;

/// The keys never have more bytes than this, nor than a third of what the broker takes as one message: a request is
/// one, and the rest is for what else is asked for.
const REQUEST_BYTES_MAX: usize = 384 * 1024;

/// What a table takes in a request beside its name and its keys, and a few bytes more.
const TABLE_BYTES: usize = 64;

/// A row that was asked for and is still incomplete, because it was changed again meanwhile, is asked for again after
/// this. Each time it takes twice as long, since a row that is gone stays incomplete where deletes are ignored.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);

/// So many rows are remembered as asked for; beyond, all that are not awaited are forgotten, and asked for again. It is
/// more than a request has that others join.
const ASKED_MAX: usize = 20_000;

/// What a request has room for, in bytes of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    taken: usize,
    /// All of it.
    whole: usize,
}

impl Room {
    /// Beside keys that stay asked for, where the broker takes messages of so many bytes.
    pub(super) fn beside(debts: &Debts, max_payload: usize) -> Self {
        let whole = REQUEST_BYTES_MAX.min(max_payload / 3);
        Self { taken: 0, whole }.again(debts)
    }

    /// The same room, beside other keys.
    pub(super) fn again(self, debts: &Debts) -> Self {
        let mut room = Self { taken: 0, ..self };
        debts
            .iter()
            .for_each(|(table, keys)| room.take(table, keys));
        room
    }

    /// Takes what these keys of a table need.
    pub(super) fn take(&mut self, table: &TableName, keys: &[KeyTexts]) {
        self.taken += table_bytes(table) + keys.iter().map(key_bytes).sum::<usize>();
    }

    /// Up to here tables get half of what the others leave, and more tables join the request.
    fn wide(self) -> usize {
        self.whole / 3
    }

    /// Whether more tables may join the request although it is being answered.
    pub(super) fn is_joined(self) -> bool {
        self.taken < self.wide()
    }

    /// What a table's keys may take. Those that get no answer stay in the requests to come, so the others' shares become
    /// small, and never nothing while there is room.
    fn share(self, table: &TableName) -> usize {
        let half = self.wide().saturating_sub(self.taken) / 2;
        half.max(SHARE_MIN).min(self.left(table))
    }

    /// What the first key of a table may take.
    fn left(self, table: &TableName) -> usize {
        self.whole.saturating_sub(self.taken + table_bytes(table))
    }

    /// Whether a request ever holds a key of so many bytes.
    fn holds(self, table: &TableName, key_bytes: usize) -> bool {
        table_bytes(table) + key_bytes <= self.whole
    }
}

/// What a table takes in a request without its keys.
fn table_bytes(table: &TableName) -> usize {
    TABLE_BYTES + json_bytes(table)
}

/// What a key takes in a request, with the comma behind it.
fn key_bytes(key: &KeyTexts) -> usize {
    json_bytes(key) + 1
}

/// Also what has to be escaped counts.
fn json_bytes<T: serde::Serialize>(value: &T) -> usize {
    serde_json::to_vec(value).expect("plain JSON").len()
}

/// Which of a table's keys get into a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Picked {
    /// Of those that are due, as many as the table's share holds, and the first one in any case.
    Keys(Vec<KeyTexts>),
    /// The others leave no room for the first one that is due, so all are still there, and the table waits: see
    /// [`Healing::waits`].
    Squeezed,
}

/// A key as the target has it, and the texts of its columns, where it has them.
pub(super) type FoundKey = (String, Option<KeyTexts>);

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
    /// Forgets what was asked for long ago, and not what is awaited.
    pub(super) fn forget_old(&mut self, awaited: &Debts, now: Instant) {
        self.asked.retain(|_, asked| now - asked.at < WAIT_MAX * 2);
        if self.asked.len() > ASKED_MAX {
            let keys = |(table, keys): &(TableName, Vec<KeyTexts>)| {
                let keys = keys.iter().cloned().map(|key| (table.clone(), key));
                keys.collect::<Vec<_>>()
            };
            let awaited: HashSet<_> = awaited.iter().flat_map(keys).collect();
            self.asked.retain(|key, _| awaited.contains(key));
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

    /// Up to [`ROWS_MAX`] keys were found there; returns those that are asked for now. Rows that nothing heals must not
    /// keep those behind them from it.
    pub(super) fn pick(
        &mut self,
        table: &TableName,
        found: &[FoundKey],
        room: Room,
        now: Instant,
    ) -> Picked {
        let mut share = room.share(table);
        let mut picked: Vec<KeyTexts> = Vec::new();
        let mut passed = 0;
        for (_, texts) in found {
            if let Some(texts) = texts.as_ref().filter(|key| self.is_due(table, key, now)) {
                let bytes = key_bytes(texts);
                // What no request ever holds is passed by like what is not due.
                if room.holds(table, bytes) {
                    if bytes > share && !picked.is_empty() {
                        break;
                    }
                    if bytes > share && bytes > room.left(table) {
                        return Picked::Squeezed;
                    }
                    share = share.saturating_sub(bytes);
                    picked.push(texts.clone());
                }
            }
            passed += 1;
        }
        if passed == found.len() && passed < ROWS_MAX {
            self.searched.remove(table);
        } else if let Some((last, _)) = passed.checked_sub(1).and_then(|last| found.get(last)) {
            self.searched.insert(table.clone(), last.clone());
        }
        for key in &picked {
            self.note(table, key, now);
        }
        Picked::Keys(picked)
    }

    /// Whether a row is to be asked for now.
    fn is_due(&self, table: &TableName, key: &KeyTexts, now: Instant) -> bool {
        let asked = self.asked.get(&(table.clone(), key.clone()));
        asked.is_none_or(|asked| now - asked.at >= asked.wait)
    }

    /// A row is asked for.
    fn note(&mut self, table: &TableName, key: &KeyTexts, now: Instant) {
        let asked = self.asked.entry((table.clone(), key.clone()));
        let again = asked.and_modify(|asked| {
            asked.at = now;
            asked.wait = (asked.wait * 2).min(WAIT_MAX);
        });
        again.or_insert(Asked {
            at: now,
            wait: WAIT_FIRST,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_PAYLOAD: usize = 1024 * 1024;

    fn room() -> Room {
        Room::beside(&Vec::new(), MAX_PAYLOAD)
    }

    fn found<T: AsRef<str>>(keys: &[T]) -> Vec<FoundKey> {
        let keys = keys.iter().map(|key| key.as_ref().to_owned());
        keys.map(|key| (key.clone(), Some(vec![key]))).collect()
    }

    fn keys(picked: Picked) -> Vec<String> {
        match picked {
            Picked::Keys(keys) => keys.into_iter().flatten().collect(),
            Picked::Squeezed => panic!("no room"),
        }
    }

    #[test]
    fn a_row_is_asked_for_again_ever_more_rarely() {
        let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
        let begin = Instant::now();
        let mut asked = Vec::new();
        for second in 0..400 {
            let now = begin + Duration::from_secs(second);
            healing.forget_old(&Vec::new(), now);
            if !keys(healing.pick(&table, &found(&["1"]), room(), now)).is_empty() {
                asked.push(second);
            }
        }
        assert_eq!(asked, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 303, 363]);
    }

    #[test]
    fn every_row_has_its_turn_also_behind_those_that_stay() {
        let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
        let all: Vec<String> = (0..ROWS_MAX).map(|key| format!("{key:04}")).collect();
        let now = Instant::now();
        assert_eq!(healing.place(&table), "");
        healing.pick(&table, &found(&all), room(), now);
        assert_eq!(healing.place(&table), "0499");
        healing.pick(&table, &found(&all[..7]), room(), now);
        assert_eq!(healing.place(&table), "");
        // A key that the table does not have any more is passed by.
        let mut foreign = found(&all);
        foreign.iter_mut().for_each(|(_, texts)| *texts = None);
        assert!(keys(healing.pick(&table, &foreign, room(), now)).is_empty());
        assert_eq!(healing.place(&table), "0499");
    }

    #[test]
    fn long_keys_are_asked_for_in_turns() {
        let mut healing = Healing::default();
        let table = TableName::new("public", "a");
        let now = Instant::now();
        let all = ["1", "2", "3"].map(|key| key.repeat(20 * 1024)).to_vec();
        let picked = keys(healing.pick(&table, &found(&all), room(), now));
        assert_eq!(picked, all[..2]);
        assert_eq!(healing.place(&table), all[1]);
        let picked = keys(healing.pick(&table, &found(&all[2..]), room(), now));
        assert_eq!(picked, all[2..]);
        assert_eq!(healing.place(&table), "");
        // What no request holds keeps nothing else back.
        let long = ["4".repeat(REQUEST_BYTES_MAX), "5".to_owned()];
        let picked = keys(healing.pick(&table, &found(&long), room(), now));
        assert_eq!(picked, long[1..]);
        // What is not due needs no room.
        let full = Room {
            taken: room().whole,
            ..room()
        };
        assert!(keys(healing.pick(&table, &found(&all), full, now)).is_empty());
        let due = healing.pick(&table, &found(&["6"]), full, now);
        assert_eq!(due, Picked::Squeezed);
    }

    #[test]
    fn keys_that_stay_asked_for_take_their_room() {
        let table = TableName::new("public", "t");
        let wide = room().wide();
        assert_eq!(room().share(&table), wide / 2);
        let debts = vec![(table.clone(), vec![vec!["x".repeat(995)]; 20])];
        let beside = room().again(&debts);
        let taken = 20_000 + table_bytes(&table);
        assert_eq!(beside.taken, taken);
        assert_eq!(beside.share(&table), (wide - taken) / 2);
        let left = room().whole - taken - table_bytes(&table);
        assert_eq!(beside.left(&table), left);
        assert!(beside.is_joined());
        let full = vec![(table.clone(), vec![vec!["x".repeat(REQUEST_BYTES_MAX)]])];
        let full = room().again(&full);
        assert_eq!((full.share(&table), full.left(&table)), (0, 0));
        assert!(!full.is_joined());
    }

    #[test]
    fn a_request_never_has_more_bytes_than_its_room() {
        use millrace_event::work::{CopyRequest, TableRequest, Wanted};
        let now = Instant::now();
        for max_payload in [64 * 1024, MAX_PAYLOAD, 64 * MAX_PAYLOAD] {
            // Short columns, and such as have to be escaped.
            for column in ["1", "", "\"\\", "\u{1}", "plain"] {
                let mut healing = Healing::default();
                let (mut room, mut debts) = (Room::beside(&Vec::new(), max_payload), Vec::new());
                let key = |row: usize| vec![row.to_string(), column.into(), column.into()];
                let found = (0..ROWS_MAX).map(|row| (row.to_string(), Some(key(row))));
                let found: Vec<_> = found.collect();
                for table in 0.. {
                    let table = TableName::new("public", format!("t{table}"));
                    let Picked::Keys(keys) = healing.pick(&table, &found, room, now) else {
                        break;
                    };
                    room.take(&table, &keys);
                    debts.push((table, keys));
                }
                let tables = debts.into_iter().map(|(table, keys)| TableRequest {
                    table,
                    began_us: 0,
                    rows: Wanted::Keys { keys },
                });
                let request = CopyRequest {
                    id: "0123456789abcdef".into(),
                    tables: tables.collect(),
                    binary: true,
                };
                let bytes = json_bytes(&request);
                assert!(bytes < max_payload.min(REQUEST_BYTES_MAX * 3) / 3 + 64);
                assert!(bytes > room.whole * 4 / 5, "{bytes} of {}", room.whole);
            }
        }
    }

    #[test]
    fn what_is_awaited_is_not_forgotten() {
        let (mut healing, table) = (Healing::default(), TableName::new("public", "t"));
        let now = Instant::now();
        let key = |row: usize| vec![row.to_string()];
        (0..=ASKED_MAX).for_each(|row| healing.note(&table, &key(row), now));
        let awaited = vec![(table.clone(), (0..9).map(key).collect())];
        healing.forget_old(&awaited, now);
        assert_eq!(healing.asked.len(), 9);
        assert!(!healing.is_due(&table, &key(8), now));
        assert!(healing.is_due(&table, &key(9), now));
        // Fewer keys than are remembered keep others from joining.
        let shortest = key_bytes(&vec![String::new(); 1]);
        assert!(room().wide() / (shortest + 1) < ASKED_MAX);
    }
}
