//! What failed of one sink's copies, and when it is tried again. Pure: time and chance are arguments.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_config::{Backoff, Condition};
use millrace_event::TableName;

/// How failures are retried, for ever. An attempt costs the source a slot and a snapshot, so it waits longer
/// than a connection does.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_secs(1),
    max: Duration::from_secs(60),
};

#[derive(Debug)]
struct Setback {
    failures: u32,
    due: Duration,
    /// `None` once the next try got past what failed.
    condition: Option<Condition>,
}

/// The failures of one sink's copies, of single tables and of whole attempts.
#[derive(Debug, Default)]
pub(super) struct Setbacks {
    attempt: Option<Setback>,
    tables: BTreeMap<TableName, Setback>,
}

impl Setbacks {
    /// Whether an attempt may be made.
    pub(super) fn allow(&self, now: Duration) -> bool {
        self.attempt
            .as_ref()
            .is_none_or(|setback| setback.due <= now)
    }

    /// Whether an attempt may take this table in.
    pub(super) fn allow_table(&self, table: &TableName, now: Duration) -> bool {
        self.tables
            .get(table)
            .is_none_or(|setback| setback.due <= now)
    }

    /// An attempt failed as a whole; returns the wait.
    pub(super) fn attempt_failed(
        &mut self,
        condition: Condition,
        now: Duration,
        jitter: f64,
    ) -> Duration {
        let next = next(self.attempt.take(), condition, now, jitter);
        let wait = next.due - now;
        self.attempt = Some(next);
        wait
    }

    /// A table could not be copied; returns the wait.
    pub(super) fn table_failed(
        &mut self,
        table: &TableName,
        condition: Condition,
        now: Duration,
        jitter: f64,
    ) -> Duration {
        let next = next(self.tables.remove(table), condition, now, jitter);
        let wait = next.due - now;
        self.tables.insert(table.clone(), next);
        wait
    }

    /// A table waits for something at the source, which is no failure: it goes on at once when that has passed.
    pub(super) fn table_waits(&mut self, table: &TableName, condition: Condition, now: Duration) {
        let before = self.tables.remove(table);
        let waiting = Setback {
            failures: before.map_or(0, |setback| setback.failures),
            due: now,
            condition: Some(condition),
        };
        self.tables.insert(table.clone(), waiting);
    }

    /// An attempt has its snapshot: what kept it from one is history.
    pub(super) fn attempt_goes_on(&mut self) {
        if let Some(setback) = &mut self.attempt {
            setback.condition = None;
        }
    }

    /// Rows of a table come: what kept them back is history.
    pub(super) fn table_goes_on(&mut self, table: &TableName) {
        if let Some(setback) = self.tables.get_mut(table) {
            setback.condition = None;
        }
    }

    /// A table is copied: attempts work.
    pub(super) fn copied(&mut self, table: &TableName) {
        self.attempt = None;
        self.tables.remove(table);
    }

    /// Forgets the tables that are not asked for any more.
    pub(super) fn keep_only(&mut self, tables: &[TableName]) {
        self.tables.retain(|table, _| tables.contains(table));
        if tables.is_empty() {
            self.attempt = None;
        }
    }

    /// What fails now: whole attempts first, then tables.
    pub(super) fn troubles(&self) -> impl Iterator<Item = (Option<&TableName>, &Condition)> {
        let attempt = self.attempt.iter().map(|setback| (None, setback));
        let tables = self
            .tables
            .iter()
            .map(|(name, setback)| (Some(name), setback));
        attempt
            .chain(tables)
            .filter_map(|(table, setback)| Some((table, setback.condition.as_ref()?)))
    }
}

fn next(before: Option<Setback>, condition: Condition, now: Duration, jitter: f64) -> Setback {
    let failures = before
        .map_or(0, |setback| setback.failures)
        .saturating_add(1);
    Setback {
        failures,
        due: now + BACKOFF.delay(failures, jitter),
        condition: Some(condition),
    }
}

#[cfg(test)]
mod tests {
    use millrace_config::Code;

    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn condition() -> Condition {
        Condition::new(Code::SourcePrivilege, "denied", "grant")
    }

    fn names(setbacks: &Setbacks) -> Vec<Option<String>> {
        let troubles = setbacks.troubles();
        troubles
            .map(|(table, _)| table.map(ToString::to_string))
            .collect()
    }

    #[test]
    fn a_table_that_fails_waits_longer_each_time_and_holds_no_other_up() {
        let (bad, good) = (
            TableName::new("public", "bad"),
            TableName::new("public", "good"),
        );
        let mut setbacks = Setbacks::default();
        let mut now = NOW;
        let mut waits = Vec::new();
        for _ in 0..8 {
            let wait = setbacks.table_failed(&bad, condition(), now, 1.0);
            assert!(!setbacks.allow_table(&bad, now) && setbacks.allow_table(&good, now));
            assert!(setbacks.allow(now));
            now += wait;
            assert!(setbacks.allow_table(&bad, now));
            waits.push(wait.as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(names(&setbacks), [Some("public.bad".to_owned())]);
        setbacks.copied(&good);
        assert_eq!(names(&setbacks).len(), 1);
        setbacks.copied(&bad);
        assert!(names(&setbacks).is_empty());
    }

    #[test]
    fn a_failed_attempt_holds_all_up_until_it_is_due() {
        let mut setbacks = Setbacks::default();
        let wait = setbacks.attempt_failed(condition(), NOW, 0.0);
        assert_eq!(wait, BACKOFF.first / 2);
        assert!(!setbacks.allow(NOW) && setbacks.allow(NOW + wait));
        assert_eq!(names(&setbacks), [None]);
    }

    #[test]
    fn what_goes_on_is_no_trouble_but_waits_longer_if_it_fails_again() {
        let table = TableName::new("public", "t");
        let mut setbacks = Setbacks::default();
        setbacks.attempt_failed(condition(), NOW, 1.0);
        setbacks.table_failed(&table, condition(), NOW, 1.0);
        setbacks.attempt_goes_on();
        setbacks.table_goes_on(&table);
        assert!(names(&setbacks).is_empty());
        let wait = setbacks.attempt_failed(condition(), NOW, 1.0);
        assert_eq!(wait, BACKOFF.first * 2);
        let wait = setbacks.table_failed(&table, condition(), NOW, 1.0);
        assert_eq!(wait, BACKOFF.first * 2);
    }

    #[test]
    fn what_waits_is_shown_and_held_up_by_nothing() {
        let table = TableName::new("public", "t");
        let mut setbacks = Setbacks::default();
        setbacks.table_waits(&table, condition(), NOW);
        assert!(setbacks.allow_table(&table, NOW));
        assert_eq!(names(&setbacks), [Some("public.t".to_owned())]);
        setbacks.table_goes_on(&table);
        assert!(names(&setbacks).is_empty());
        assert_eq!(
            setbacks.table_failed(&table, condition(), NOW, 1.0),
            BACKOFF.first
        );
    }

    #[test]
    fn what_is_not_asked_for_any_more_is_forgotten() {
        let (a, b) = (TableName::new("public", "a"), TableName::new("public", "b"));
        let mut setbacks = Setbacks::default();
        for table in [&a, &b] {
            setbacks.table_failed(table, condition(), NOW, 1.0);
        }
        setbacks.attempt_failed(condition(), NOW, 1.0);
        setbacks.keep_only(std::slice::from_ref(&b));
        assert_eq!(names(&setbacks), [None, Some("public.b".to_owned())]);
        setbacks.keep_only(&[]);
        assert!(names(&setbacks).is_empty());
    }
}
