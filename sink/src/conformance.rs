//! One suite for every sink: what a target must do, run on the memory model and on real databases alike.
//!
//! Panics say what is wrong, so call it from tests only.

mod bench;
mod history;
mod memory;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use millrace_config::{Columns, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Table};
use millrace_event::{ColumnSchema, Lsn, TableName, TableSchema, Version};

pub use self::bench::elected;
use self::bench::{Bench, create, key, put, seen, text};
use crate::batch::{Batch, Checkpoint};
use crate::fold::RowChange;
use crate::progress::{CopyProgress, CopyState};
use crate::row::{Cell, TableLayout};
use crate::sink::{Applied, Elected, Sink, SinkError};

/// A table's rows as texts, in the order of the layout's columns, by the first of them.
pub type Rows = BTreeMap<String, (Version, Vec<Option<String>>)>;

/// A database that sinks are opened on.
pub trait Target: Sync {
    /// Its sink.
    type Sink: Sink;

    /// A sink of this name, not opened.
    fn sink(&self, name: &str) -> Self::Sink;

    /// What a reader sees.
    fn rows(&self, layout: &TableLayout) -> impl Future<Output = Rows> + Send;

    /// How many dead letters of the table are open.
    fn open_letters(&self, layout: &TableLayout) -> impl Future<Output = usize> + Send;
}

/// Runs every scenario, each on a table and a sink of its own.
pub async fn check<T: Target>(target: &T, seeds: u64) {
    for seed in 0..seeds {
        history::history(target, seed).await;
    }
    replay(target).await;
    floors_and_tombstones(target).await;
    old_deletes(target).await;
    refused_rows(target).await;
    incomplete_rows(target).await;
    large_transaction(target).await;
    fencing(target).await;
    occupied(target).await;
}

/// The schema of the suite's table: an integer key, a text, and a text that is often unchanged.
#[must_use]
pub fn schema(table: &str) -> TableSchema {
    let column = |name: &str, type_name: &str, type_oid, not_null| ColumnSchema {
        name: name.to_owned(),
        type_name: type_name.to_owned(),
        type_oid,
        typmod: -1,
        not_null,
        number: 0,
        missing: None,
        former: Vec::new(),
    };
    TableSchema {
        name: TableName::new("millrace_suite", table),
        version: "0000000000000001".to_owned(),
        columns: vec![
            column("id", "bigint", 20, true),
            column("n", "integer", 23, false),
            column("big", "text", 25, false),
        ],
        key: vec!["id".to_owned()],
        types: Vec::new(),
        oid: 0,
        dropped: Vec::new(),
    }
}

/// Settings of the suite's table.
#[must_use]
pub fn settings(table: &TableName) -> Table {
    Table {
        name: table.clone(),
        sinks: Vec::new(),
        target: table.clone(),
        columns: Columns::default(),
        filter: None,
        key: None,
        adopt: false,
        on_delete: OnDelete::Delete,
        on_truncate: OnTruncate::Apply,
        on_schema_change: OnSchemaChange::Evolve,
        on_row_error: OnRowError::DeadLetter,
    }
}

/// The same changes again, and older ones late, change nothing.
async fn replay<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "replay").await;
    let all: [(u64, RowChange); 4] = [
        (1, put(1, 10, text("a"))),
        (2, RowChange::Delete(key(1))),
        (3, put(2, 20, text("b"))),
        (4, put(2, 21, text("c"))),
    ];
    for (lsn, change) in &all {
        bench.push(*lsn, 1, change.clone());
    }
    bench.apply(true).await;
    let expected = Rows::from([seen(2, 4, 1, 21, "c")]);
    assert_eq!(target.rows(&bench.layout).await, expected);
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 3, 2], [2, 3, 0, 1]] {
        for index in order {
            let (lsn, change) = all[index].clone();
            bench.push(lsn, 1, change);
            let applied = bench.apply(true).await;
            assert_eq!(
                (applied.written, applied.stale),
                (0, 1),
                "change {index} is stale"
            );
        }
        assert_eq!(
            target.rows(&bench.layout).await,
            expected,
            "order {order:?}"
        );
    }
}

/// A truncate rejects older rows for ever; a sweep removes what the copy did not have.
async fn floors_and_tombstones<T: Target>(target: &T) {
    let mut other = Bench::new(target, "floors_of_another").await;
    other.push(1, 1, put(1, 1, text("a")));
    other.push(2, 1, RowChange::Delete(key(1)));
    other.apply(true).await;
    let mut bench = Bench::new(target, "floors").await;
    bench.push(1, 1, put(1, 1, text("a")));
    bench.push(2, 1, RowChange::Truncate);
    bench.push(3, 1, put(2, 2, text("b")));
    bench.apply(true).await;
    bench.push(1, 1, put(1, 1, text("a")));
    bench.apply(true).await;
    assert_eq!(
        target.rows(&bench.layout).await,
        Rows::from([seen(2, 3, 1, 2, "b")])
    );
    // The floor is as durable as the rows.
    let position = bench::elected(&mut bench.sink).await;
    assert_eq!(position.checkpoint, bench.at);
    let schema = schema("floors");
    let progress = CopyState::Copied { lsn: Lsn(1) };
    let tables = BTreeMap::from([(schema.name.clone(), progress)]);
    let copy = CopyProgress {
        tables,
        ..CopyProgress::default()
    };
    let layout = Arc::clone(&bench.layout);
    bench.fold.sweep(&layout, Version::new(1, Lsn(2), 0), false);
    let batch = Batch {
        copy: Some(copy.clone()),
        ..bench.batch(true)
    };
    bench
        .sink
        .apply(&batch)
        .await
        .expect("stores the copy's progress");
    let ensured = bench
        .sink
        .ensure_table(&schema, None, &settings(&schema.name))
        .await
        .expect("again");
    bench.layout = ensured.layout;
    assert!(!ensured.created);
    bench.push(1, 1, put(1, 1, text("a")));
    bench.apply(true).await;
    assert_eq!(
        target.rows(&bench.layout).await,
        Rows::from([seen(2, 3, 1, 2, "b")])
    );
    bench.push(4, 1, RowChange::Delete(key(2)));
    bench.push(5, 1, put(3, 3, text("c")));
    bench.push(6, 1, put(4, 4, text("d")));
    bench.apply(true).await;
    bench.fold.sweep(&layout, Version::new(1, Lsn(6), 0), false);
    bench.apply(true).await;
    assert_eq!(
        target.rows(&bench.layout).await,
        Rows::from([seen(4, 6, 1, 4, "d")])
    );
    bench.push(7, 1, RowChange::Delete(key(4)));
    bench.apply(true).await;
    // The delete of row 4 is forgotten by the version that its own table may forget, and not before. Another sink's
    // deletes are its own to forget: its source's versions cannot be compared with ours.
    for (lsn, forgotten) in [(6, 0), (7, 1), (9, 0)] {
        let version = Version::new(1, Lsn(lsn), 1);
        let up_to = BTreeMap::from([(bench.layout.target.clone(), version)]);
        let dropped = bench.sink.clean_up(&up_to, Duration::ZERO, 10).await;
        assert_eq!(dropped.expect("cleans up"), forgotten, "{up_to:?}");
    }
    other.push(1, 1, put(1, 1, text("a")));
    other.apply(true).await;
    assert!(target.rows(&other.layout).await.is_empty());
    let position = bench::elected(&mut bench.sink).await;
    assert_eq!(position.copy, copy);
}

/// Old deletes are forgotten in parts: so many at once, and no more.
async fn old_deletes<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "old_deletes").await;
    for row in 1..=5 {
        bench.push(1, row, put(u64::from(row), 1, text("a")));
    }
    bench.apply(true).await;
    for row in 1..=5 {
        bench.push(2, row, RowChange::Delete(key(u64::from(row))));
    }
    bench.apply(true).await;
    let version = Version::new(1, Lsn(3), 0);
    let up_to = BTreeMap::from([(bench.layout.target.clone(), version)]);
    for forgotten in [2, 2, 1, 0] {
        let dropped = bench.sink.clean_up(&up_to, Duration::ZERO, 2).await;
        assert_eq!(dropped.expect("cleans up"), forgotten);
    }
}

/// Refused rows are set aside alone; a newer whole row takes their place.
async fn refused_rows<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "refused").await;
    for id in 0..20 {
        let n = if id % 7 == 3 {
            "x".to_owned()
        } else {
            id.to_string()
        };
        bench.push(1, 1, create(id, n, text("a")));
    }
    let applied = bench.apply(true).await;
    assert_eq!((applied.written, applied.dead()), (17, 3));
    assert_eq!(target.rows(&bench.layout).await.len(), 17);
    assert_eq!(target.open_letters(&bench.layout).await, 3);
    // What a refused row had is not known to the target, so a partial one cannot build on it.
    bench.push(2, 1, put(3, 33, Cell::Missing));
    assert_eq!(bench.apply(true).await.dead(), 1);
    assert_eq!(target.open_letters(&bench.layout).await, 4);
    bench.push(3, 1, put(3, 34, text("b")));
    bench.push(3, 2, RowChange::Delete(key(10)));
    assert_eq!(bench.apply(true).await.dead(), 0);
    assert_eq!(target.open_letters(&bench.layout).await, 1);
    // In the middle of a transaction too, and what came before in it stays.
    bench.push(4, 1, put(50, 50, text("a")));
    bench.apply(false).await;
    bench.push(4, 2, put(51, "y", text("a")));
    bench.push(4, 3, put(52, 52, text("a")));
    assert_eq!(bench.apply(false).await.dead(), 1);
    bench.push(4, 4, put(53, "z", text("a")));
    assert_eq!(bench.apply(true).await.dead(), 1);
    let rows = target.rows(&bench.layout).await;
    assert!(rows.contains_key("50") && rows.contains_key("52"));
    assert!(!rows.contains_key("51") && !rows.contains_key("53"));
}

/// A partial row or a move without its older row is set aside, never completed with NULL.
async fn incomplete_rows<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "incomplete").await;
    bench.push(1, 1, put(1, 1, Cell::Missing));
    let row = vec![text(3), text(3), Cell::Missing].into();
    bench.push(1, 2, RowChange::Delete(key(2)));
    bench.push(
        1,
        3,
        RowChange::Put {
            created: false,
            row,
            old: Some(key(2)),
        },
    );
    assert_eq!(bench.apply(true).await.dead(), 2);
    assert_eq!(target.rows(&bench.layout).await, Rows::new());
    let first = bench.incomplete("", 1).await;
    let [first] = first.as_slice() else {
        panic!("not one key: {first:?}")
    };
    let others = bench.incomplete(first, 9).await;
    let both = bench.incomplete("", 9).await;
    assert_eq!(both, [vec![first.clone()], others].concat());
    assert_eq!(both.len(), 2);
    // However often they are changed, each is one row that lacks columns; as it was last changed.
    for lsn in 2..5 {
        bench.push(lsn, 1, put(1, lsn, Cell::Missing));
        bench.push(lsn, 2, put(3, lsn, Cell::Missing));
        assert_eq!(bench.apply(true).await.dead(), 2);
        assert_eq!(target.open_letters(&bench.layout).await, 2);
    }
    bench.push(4, 1, put(1, 4, Cell::Missing));
    let applied = bench.apply(true).await;
    assert_eq!((applied.dead(), applied.stale), (0, 1));
    bench.push(3, 1, put(1, 3, text("a")));
    bench.apply(true).await;
    assert_eq!(target.open_letters(&bench.layout).await, 2);
    bench.push(5, 1, put(1, 1, text("a")));
    bench.push(5, 2, put(3, 3, text("b")));
    bench.apply(true).await;
    assert_eq!(target.open_letters(&bench.layout).await, 0);
    assert!(bench.incomplete("", 9).await.is_empty());
    // Old ones that come again are stale, not incomplete.
    bench.push(1, 1, put(1, 1, Cell::Missing));
    assert_eq!(
        bench.apply(true).await,
        Applied {
            stale: 1,
            ..Applied::default()
        }
    );
}

/// Nothing of a large transaction is seen before its end, and nothing stays of one that is rolled back.
async fn large_transaction<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "large").await;
    let start = bench.at;
    for part in 0..3 {
        for id in 0..100 {
            bench.push(
                1,
                part * 100 + id + 1,
                create(u64::from(part * 100 + id), id, text("a")),
            );
        }
        bench.apply(false).await;
        assert_eq!(target.rows(&bench.layout).await.len(), 0);
    }
    bench.sink.roll_back().await.expect("rolls back");
    bench.at = start;
    for part in 0..3 {
        for id in 0..100 {
            bench.push(
                1,
                part * 100 + id + 1,
                create(u64::from(part * 100 + id), id, text("a")),
            );
        }
        bench.apply(part == 2).await;
    }
    assert_eq!(target.rows(&bench.layout).await.len(), 300);
}

/// One worker at a time, and one that stands elsewhere than it believes writes nothing.
async fn fencing<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "fencing").await;
    let mut second = target.sink("fencing");
    assert_eq!(second.open().await.expect("answers"), Elected::No);
    let stands = bench.at;
    bench.push(1, 1, put(1, 1, text("a")));
    bench.apply(true).await;
    bench.push(2, 1, put(2, 2, text("b")));
    let batch = Batch {
        from: stands,
        ..bench.batch(true)
    };
    assert!(matches!(
        bench.sink.apply(&batch).await,
        Err(SinkError::Fenced)
    ));
    assert_eq!(
        target.rows(&bench.layout).await.len(),
        1,
        "nothing of it was written"
    );
    drop(bench);
    // The lock of a dropped connection is free once the server has noticed.
    for _ in 0..200 {
        if second.open().await.expect("answers") != Elected::No {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the second worker takes over");
}

/// A table with rows that this sink has not written is refused, unless it may be adopted and they can be
/// overwritten.
async fn occupied<T: Target>(target: &T) {
    let mut bench = Bench::new(target, "occupied").await;
    bench.push(1, 1, put(1, 1, text("a")));
    bench.apply(true).await;
    let schema = schema("occupied");
    let mut other = target.sink("occupied_other");
    assert!(matches!(other.open().await, Ok(Elected::Yes(_))));
    let mut settings = settings(&schema.name);
    let refused = other.ensure_table(&schema, None, &settings).await;
    assert!(matches!(refused, Err(SinkError::Table { .. })));
    // Rows above where the sink begins would not be overwritten.
    settings.adopt = true;
    let refused = other.ensure_table(&schema, None, &settings).await;
    assert!(matches!(refused, Err(SinkError::Table { .. })));
    let begins = Batch {
        to: Checkpoint {
            position: Version::new(1, Lsn(1), 1).into(),
            ..Checkpoint::default()
        },
        commit: true,
        ..Batch::default()
    };
    other.apply(&begins).await.expect("begins above them");
    other
        .ensure_table(&schema, None, &settings)
        .await
        .expect("adopts");
}
