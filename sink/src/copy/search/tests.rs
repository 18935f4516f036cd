use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::*;
use crate::asking::Load;
use crate::copy::healing::ROWS_MAX;
use crate::copy::quiet::{Brought, Quiet};

/// A small one: the keys have 32 KiB.
const MAX_PAYLOAD: usize = 96 * 1024;

/// A sink's looks and capture's answers, which come between them.
struct Line {
    healing: Healing,
    quiet: Quiet,
    debts: Debts,
    /// What is asked for, and how much of it capture has answered.
    request: Debts,
    answered: HashSet<TableName>,
    id: usize,
    now: Instant,
    /// The keys that are still incomplete.
    incomplete: HashMap<TableName, Vec<String>>,
    /// The tables that capture cannot read.
    stuck: HashSet<TableName>,
    /// Requests that were replaced before their answer, and how long they had brought nothing.
    evicted: Vec<Duration>,
    moved: Instant,
    /// How far the load is that each request has too.
    load: Load,
}

impl Line {
    fn new(tables: usize, stuck: usize, keys: usize, bytes: usize) -> Self {
        let table = |table| TableName::new("public", format!("t{table:04}"));
        let key = |key: usize| format!("{key:09}{}", "x".repeat(bytes.saturating_sub(9)));
        let now = Instant::now();
        let all: Vec<_> = (0..tables).map(table).collect();
        let rows = all.iter().cloned();
        Self {
            healing: Healing::default(),
            quiet: Quiet::default(),
            debts: Debts::new(),
            request: Debts::new(),
            answered: HashSet::new(),
            id: 0,
            now,
            incomplete: rows.map(|t| (t, (0..keys).map(key).collect())).collect(),
            stuck: all.into_iter().take(stuck).collect(),
            evicted: Vec::new(),
            moved: now,
            load: Load::None,
        }
    }

    fn awaited(&self) -> Vec<TableName> {
        let tables = self.request.iter().map(|(table, _)| table.clone());
        tables
            .filter(|table| !self.answered.contains(table))
            .collect()
    }

    fn look(&mut self) {
        let awaited = self.awaited();
        self.debts.retain(|(table, _)| awaited.contains(table));
        let brought = Brought {
            tables: self.answered.len(),
            applied_seq: 0,
            load: self.load.clone(),
        };
        let id = self.id.to_string();
        let brought = (self.id > 0).then_some(brought);
        let pace = self.quiet.pace(&id, brought, self.now);
        let room = Room::beside(&self.debts, MAX_PAYLOAD);
        let (healing, debts) = (&mut self.healing, &mut self.debts);
        let mut search = Search::begin(healing, debts, &awaited, room, pace, self.now);
        let mut tables: Vec<_> = self.incomplete.keys().cloned().collect();
        tables.sort_by_key(ToString::to_string);
        tables.retain(|table| !awaited.contains(table));
        for table in search.in_order(tables) {
            let after = search.place(&table).to_owned();
            let found = self.incomplete[&table].iter().filter(|key| **key > after);
            let found = found.take(ROWS_MAX).cloned();
            let found = found.map(|key| (key.clone(), Some(vec![key])));
            search.found(&table, found.collect());
        }
        let brings = self.debts.iter().all(|debt| self.request.contains(debt));
        if !brings {
            // What is awaited is in the next one too, or was given its time.
            let lost = awaited
                .iter()
                .any(|table| !self.debts.iter().any(|(kept, _)| kept == table));
            if lost {
                self.evicted.push(self.now - self.moved);
            }
            self.request = self.debts.clone();
            self.answered.clear();
            self.id += 1;
            self.moved = self.now;
        }
    }

    /// Capture answers the next table that it can read.
    fn answer(&mut self) {
        let request = self.request.iter();
        let mut due = request.filter(|(table, _)| !self.answered.contains(table));
        let Some((table, keys)) = due.find(|(table, _)| !self.stuck.contains(table)) else {
            return;
        };
        let rows = self.incomplete.get_mut(table).expect("known");
        rows.retain(|row| !keys.iter().any(|key| key[0] == *row));
        self.answered.insert(table.clone());
        self.moved = self.now;
    }

    /// The keys that capture can read, and that were not.
    fn left(&self) -> usize {
        let left = self.incomplete.iter();
        let left = left.filter(|(table, _)| !self.stuck.contains(*table));
        left.map(|(_, keys)| keys.len()).sum()
    }
}

/// News make a sink look at once, before anything is answered.
fn heals(mut line: Line, within: Duration) -> Line {
    let end = line.now + within;
    while line.left() > 0 {
        assert!(line.now < end, "{} left after {within:?}", line.left());
        line.look();
        // The first status, before any row.
        line.now += Duration::from_millis(20);
        line.look();
        line.now += Duration::from_millis(280);
        line.answer();
    }
    line
}

#[test]
fn every_key_of_many_tables_is_answered_and_no_request_replaced_before() {
    for (tables, keys, bytes) in [(60, 2, 2_600), (6, 2, 17_000), (30, 200, 12), (60, 1, 10)] {
        let answers = tables * keys * 2;
        let line = heals(
            Line::new(tables, 0, keys, bytes),
            Duration::from_millis(300) * u32::try_from(answers).expect("few"),
        );
        assert!(line.evicted.is_empty(), "{:?}", line.evicted);
        // Many tables share a request.
        let needed = (tables * keys * bytes).div_ceil(10_000) + tables / 20 + keys;
        assert!(line.id <= needed, "{} requests, {needed}", line.id);
    }
}

#[test]
fn keys_that_nothing_answers_give_way_after_a_while_and_only_to_such_as_are_due() {
    // More than a request holds, in each of these.
    for (tables, stuck, bytes) in [(60, 16, 2_600), (5, 2, 17_000)] {
        let line = Line::new(tables, stuck, 2, bytes);
        let mut line = heals(line, Duration::from_secs(600));
        assert!(!line.evicted.is_empty());
        let long_enough = Duration::from_secs(10);
        assert!(line.evicted.iter().all(|quiet| *quiet >= long_enough));
        // Once all others are healed the stuck ones give way to one another, ever more rarely than a look.
        let (before, end) = (line.id, line.now + Duration::from_secs(300));
        while line.now < end {
            line.look();
            line.now += Duration::from_secs(1);
        }
        assert!(line.id - before <= 30, "{} requests", line.id - before);
    }
}

#[test]
fn a_load_under_way_does_not_begin_anew_for_rows_that_become_due() {
    let mut line = Line::new(3, 0, 1, 9);
    line.load = Load::Begins {
        table: TableName::new("public", "loaded"),
        began_us: 1,
    };
    line.look();
    assert_eq!(line.id, 1);
    for second in 0..300 {
        // Keys come before loads.
        line.answer();
        let tables = line.incomplete.values_mut();
        tables.for_each(|keys| keys.push(format!("new {second:05}")));
        line.look();
        line.now += Duration::from_secs(1);
    }
    assert_eq!(line.id, 1, "the load has begun anew");
    // With its first row it is no load under way any more.
    line.load = Load::None;
    let line = heals(line, Duration::from_secs(60));
    assert!(line.id > 1);
}
