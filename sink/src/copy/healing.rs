//! Which incomplete rows are asked for, and when again. Pure.

use std::collections::HashMap;
use std::time::Duration;

use millrace_config::{Code, Condition};
use millrace_event::{TableName, quote_literal};
use tokio::time::Instant;

use super::crowd::{Crowd, Then};
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

/// So many rows are remembered one by one; beyond, those of the table that has most of them are asked for in rounds.
const ASKED_MAX: usize = 5_000;

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
pub(super) type KeyTexts = Vec<String>;

/// The rows that were asked for, and how far each table was searched.
#[derive(Default)]
pub(super) struct Healing {
    asked: HashMap<TableName, Remembered>,
    searched: HashMap<TableName, Searched>,
    /// The first table that had no room the last time.
    waiting: Option<TableName>,
}

/// What is known of a table's rows that were asked for.
enum Remembered {
    /// When each of them was.
    Each(HashMap<KeyTexts, Asked>),
    /// They are too many for that.
    Crowd(Crowd),
}

impl Default for Remembered {
    fn default() -> Self {
        Self::Each(HashMap::new())
    }
}

impl Remembered {
    /// How many rows are remembered one by one.
    fn rows(&self) -> usize {
        match self {
            Self::Each(asked) => asked.len(),
            Self::Crowd(_) => 0,
        }
    }
}

/// A row that was asked for.
struct Asked {
    at: Instant,
    /// How long its answer may take before it is asked for again.
    wait: Duration,
}

/// How far a table's incomplete rows are gone through, and what was found of them since their first.
#[derive(Default)]
struct Searched {
    /// The key of the last one.
    place: String,
    found: Passed,
}

/// Rows that a search has passed by.
#[derive(Clone, Copy, Default)]
struct Passed {
    /// They were asked for before, and are not due.
    again: usize,
    too_long: TooLong,
}

impl Passed {
    fn add(&mut self, other: Self) {
        self.again += other.again;
        self.too_long = self.too_long.with(other.too_long);
    }
}

/// Rows whose keys no request ever holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TooLong {
    rows: usize,
    /// The shortest of their keys, bytes of the text by which the target knows it.
    shortest: usize,
}

impl TooLong {
    fn one(key: &str) -> Self {
        Self {
            rows: 1,
            shortest: key.len(),
        }
    }

    fn with(self, other: Self) -> Self {
        let shortest = match (self.rows, other.rows) {
            (0, _) => other.shortest,
            (_, 0) => self.shortest,
            _ => self.shortest.min(other.shortest),
        };
        Self {
            rows: self.rows + other.rows,
            shortest,
        }
    }

    /// What an operator is told of it, of a table of this name at the source and in the target; `None` where there are
    /// no such rows.
    pub(super) fn condition(self, source: &TableName, target: &TableName) -> Option<Condition> {
        let Self { rows, shortest } = self;
        if rows == 0 {
            return None;
        }
        let (relation, source_sql) = (quote_literal(&target.to_string()), source.quoted());
        let rows = match rows {
            1 => "an incomplete row".to_owned(),
            _ => format!("{rows} incomplete rows"),
        };
        Some(Condition::new(
            Code::KeyTooLong,
            format!(
                "{rows} of table {source} cannot be read again: the key is too long to be asked for"
            ),
            format!(
                "find them in the target: SELECT key FROM millrace.dead_letter WHERE relation = {relation} AND \
                 resolved_at IS NULL AND octet_length(key) >= {shortest}; then write each large column of these rows \
                 anew at the source: UPDATE {source_sql} SET col = col || '' WHERE .. (for text; for \
                 another type, as jsonb: col::text::jsonb; any way that writes the value anew); whole rows then take their place"
            ),
        ))
    }
}

impl Healing {
    /// Forgets what was asked for long ago, and has tables of which too many rows are remembered ask in rounds.
    pub(super) fn forget_old(&mut self, now: Instant) {
        self.asked.retain(|_, remembered| match remembered {
            Remembered::Each(asked) => {
                asked.retain(|_, asked| now - asked.at < WAIT_MAX * 2);
                !asked.is_empty()
            }
            Remembered::Crowd(_) => true,
        });
        let mut rows: usize = self.asked.values().map(Remembered::rows).sum();
        while rows > ASKED_MAX {
            let most = self.asked.values_mut().max_by_key(|asked| asked.rows());
            let Some(remembered @ Remembered::Each(_)) = most else {
                return;
            };
            rows -= remembered.rows();
            if let Remembered::Each(asked) = remembered {
                *remembered = Remembered::Crowd(Crowd::form(asked.keys()));
            }
        }
    }

    /// Behind which key a table's incomplete rows are looked for.
    pub(super) fn place(&self, table: &TableName) -> &str {
        let searched = self.searched.get(table);
        searched.map_or("", |searched| &searched.place)
    }

    /// These tables, in the order in which they get room: one that had none comes first.
    pub(super) fn in_order(&mut self, mut tables: Vec<TableName>) -> Vec<TableName> {
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
    /// keep those behind them from it. The rows of which keys are too long are told once all of the table's were gone
    /// through.
    pub(super) fn pick(
        &mut self,
        table: &TableName,
        found: &[FoundKey],
        room: Room,
        now: Instant,
    ) -> (Picked, Option<TooLong>) {
        let mut share = room.share(table);
        let mut picked: Vec<KeyTexts> = Vec::new();
        let mut passed = Passed::default();
        let mut rows: usize = 0;
        for (key, texts) in found {
            rows += 1;
            // A key that the table does not have any more is passed by.
            let Some(texts) = texts else { continue };
            let bytes = key_bytes(texts);
            if !room.holds(table, bytes) {
                passed.too_long = passed.too_long.with(TooLong::one(key));
            } else if !self.is_due(table, texts, now) {
                passed.again += 1;
            } else if bytes > share && !picked.is_empty() {
                rows -= 1;
                break;
            } else if bytes > share && bytes > room.left(table) {
                return (Picked::Squeezed, None);
            } else {
                share = share.saturating_sub(bytes);
                picked.push(texts.clone());
            }
        }
        for key in &picked {
            self.note(table, key, now);
        }
        let last = rows.checked_sub(1).map(|last| found[last].0.as_str());
        let is_through = rows == found.len() && rows < ROWS_MAX;
        let passed = self.pass(table, last, passed, is_through);
        if let Some(Passed { again, .. }) = passed
            && let Some(Remembered::Crowd(crowd)) = self.asked.get_mut(table)
            && crowd.gone_through(again, now) == Then::Leaves
        {
            self.asked.remove(table);
        }
        (Picked::Keys(picked), passed.map(|passed| passed.too_long))
    }

    /// A table was searched up to the row `last`, which leaves what was passed by. Returns that of the whole table once
    /// it is through: the next search begins anew.
    fn pass(
        &mut self,
        table: &TableName,
        last: Option<&str>,
        passed: Passed,
        is_through: bool,
    ) -> Option<Passed> {
        if is_through {
            let mut whole = self.searched.remove(table).unwrap_or_default().found;
            whole.add(passed);
            return Some(whole);
        }
        if let Some(last) = last {
            let searched = self.searched.entry(table.clone()).or_default();
            last.clone_into(&mut searched.place);
            searched.found.add(passed);
        }
        None
    }

    /// Whether a row is to be asked for now.
    fn is_due(&self, table: &TableName, key: &KeyTexts, now: Instant) -> bool {
        match self.asked.get(table) {
            Some(Remembered::Each(asked)) => {
                let asked = asked.get(key);
                asked.is_none_or(|asked| now - asked.at >= asked.wait)
            }
            Some(Remembered::Crowd(crowd)) => crowd.is_due(key),
            None => true,
        }
    }

    /// A row is asked for.
    fn note(&mut self, table: &TableName, key: &KeyTexts, now: Instant) {
        match self.asked.entry(table.clone()).or_default() {
            Remembered::Each(asked) => {
                let again = asked.entry(key.clone()).and_modify(|asked| {
                    asked.at = now;
                    asked.wait = (asked.wait * 2).min(WAIT_MAX);
                });
                again.or_insert(Asked {
                    at: now,
                    wait: WAIT_FIRST,
                });
            }
            Remembered::Crowd(crowd) => crowd.note(key),
        }
    }
}

#[cfg(test)]
mod tests;
