use std::collections::BTreeMap;

use millrace_event::{Lsn, TableName, decode_line};
use proptest::prelude::*;

use super::*;
use crate::guard;
use crate::row::LayoutColumn;

fn layout() -> Arc<TableLayout> {
    let column = |name: &str| LayoutColumn {
        source: name.to_owned(),
        target: name.to_owned(),
        cast: "text".to_owned(),
    };
    Arc::new(TableLayout {
        source: TableName::new("public", "t"),
        target: TableName::new("public", "t"),
        columns: vec![column("id"), column("a"), column("big")],
        key: vec![0],
        shape: String::new(),
    })
}

fn text(value: impl ToString) -> Cell {
    Cell::Text(Bytes::from(value.to_string()))
}

fn row(id: u8, a: u32, big: Option<u32>) -> Row {
    vec![text(id), text(a), big.map_or(Cell::Missing, text)].into()
}

fn key(id: u8) -> Row {
    vec![text(id), Cell::Missing, Cell::Missing].into()
}

fn at(lsn: u64) -> Version {
    Version::new(1, Lsn(lsn), 1)
}

#[test]
fn a_key_change_takes_unchanged_columns_from_the_fold_or_else_moves() {
    let (layout, mut fold) = (layout(), Fold::new());
    let moved = |to: u8| RowChange::Put {
        created: false,
        row: row(to, 9, None),
        old: Some(key(1)),
    };
    fold.change(
        &layout,
        at(1),
        RowChange::Put {
            created: false,
            row: row(1, 1, Some(5)),
            old: None,
        },
    )
    .expect("is well formed");
    fold.change(&layout, at(2), RowChange::Delete(key(1)))
        .expect("is well formed");
    fold.change(&layout, at(3), moved(2))
        .expect("is well formed");
    let steps = fold.finish();
    let [Step::Rows(tables)] = steps.as_slice() else {
        panic!("{steps:?}")
    };
    assert_eq!(tables[0].rows[1].action, Action::Put(row(2, 9, Some(5))));

    fold.change(
        &layout,
        at(4),
        RowChange::Put {
            created: false,
            row: row(7, 1, Some(1)),
            old: None,
        },
    )
    .expect("is well formed");
    fold.change(&layout, at(5), RowChange::Delete(key(1)))
        .expect("is well formed");
    // The batch may end here, and the delete waits for the other half.
    assert_eq!(fold.cut().len(), 1);
    fold.change(&layout, at(6), moved(3))
        .expect("is well formed");
    let steps = fold.finish();
    let [Step::Move(moves), Step::Rows(tables)] = steps.as_slice() else {
        panic!("{steps:?}")
    };
    assert_eq!(moves[0].row.row, row(3, 9, None));
    assert!(matches!(tables[0].rows[0].action, Action::Delete { .. }));
}

#[test]
fn events_are_laid_out_by_name_and_slice_their_payload() {
    let payload = Bytes::from_static(
        br#"{"op":"u","before":null,"after":{"a":"x","id":7},"key":{"id":7},"unchanged":["big"],"source":{"name":"s","db":"d","schema":"public","table":"t","table_version":"0","snapshot":"false","txId":1,"ts_us":0,"lsn":1,"version":"00000001000000000000000200000001","ts_ms":0},"ts_ms":0}"#,
    );
    let (layout, mut fold) = (layout(), Fold::new());
    for _ in 0..2 {
        let event = decode_line(&payload).expect("is well formed");
        fold.push(&layout, &event, &payload)
            .expect("is well formed");
    }
    assert_eq!((fold.rows(), fold.superseded()), (2, 1));
    let steps = fold.finish();
    let [Step::Rows(tables)] = steps.as_slice() else {
        panic!("{steps:?}")
    };
    let expected: Row = vec![text(7), text("x"), Cell::Missing].into();
    assert_eq!(tables[0].rows[0].action, Action::Put(expected));
}

/// Rows, tombstones and floor of one table under the guard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    rows: BTreeMap<Key, (Version, Row)>,
    tombstones: BTreeMap<Key, Version>,
    floor: Version,
}

impl Model {
    fn steps(&mut self, steps: &[Step]) {
        for step in steps {
            match step {
                Step::Rows(tables) => {
                    tables
                        .iter()
                        .flat_map(|table| &table.rows)
                        .for_each(|op| self.row(op));
                }
                Step::Truncate(tables) => {
                    for (_, version) in tables {
                        self.floor = self.floor.max(*version);
                        self.rows.retain(|_, (stored, _)| *stored >= *version);
                    }
                }
                Step::Load(_) | Step::Move(_) | Step::Sweep { .. } => {
                    unreachable!("not in these histories")
                }
            }
        }
    }

    fn row(&mut self, op: &RowOp) {
        let stored = self.rows.get(&op.key).map(|(version, _)| *version);
        let tombstone = self.tombstones.get(&op.key).copied();
        if !guard::applies(stored, tombstone, self.floor, op.version) {
            return;
        }
        match &op.action {
            Action::Put(row) => {
                self.rows.insert(op.key.clone(), (op.version, row.clone()));
            }
            Action::Delete { .. } => {
                self.rows.remove(&op.key);
                self.tombstones.insert(op.key.clone(), op.version);
            }
        }
    }
}

fn change(kind: u8, id: u8, value: u32) -> RowChange {
    match kind {
        0 => RowChange::Truncate,
        1..=3 => RowChange::Delete(key(id)),
        _ => RowChange::Put {
            created: false,
            row: row(id, value, Some(value)),
            old: None,
        },
    }
}

#[test]
fn the_first_change_of_a_key_says_whether_the_row_is_new() {
    let (layout, mut fold) = (layout(), Fold::new());
    let put = |id: u8, created| RowChange::Put {
        created,
        row: row(id, 1, Some(1)),
        old: None,
    };
    let changes = [
        put(1, true),
        put(1, false),
        put(2, false),
        RowChange::Delete(key(3)),
        put(3, true),
        put(4, true),
        RowChange::Delete(key(4)),
        put(4, true),
    ];
    for (lsn, change) in (1..).zip(changes) {
        fold.change(&layout, at(lsn), change)
            .expect("is well formed");
    }
    let steps = fold.finish();
    let [Step::Rows(tables)] = steps.as_slice() else {
        panic!("{steps:?}")
    };
    let created: Vec<_> = tables[0].rows.iter().map(|op| op.created).collect();
    assert_eq!(created, [true, false, false, true]);
}

proptest! {
    /// Any order, any repetition and any batching of a history of whole rows end the same.
    #[test]
    fn any_delivery_ends_the_same(
        history in prop::collection::vec((0u8..12, 0u8..5), 1..40),
        delivery in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..120),
    ) {
        let layout = layout();
        let changes: Vec<_> = history
            .iter()
            .enumerate()
            .map(|(n, (kind, id))| (at(n as u64 + 1), change(*kind, *id, n as u32)))
            .collect();
        let mut expected = Model::default();
        for (version, change) in &changes {
            let mut fold = Fold::new();
            fold.change(&layout, *version, change.clone()).expect("is well formed");
            expected.steps(&fold.finish());
        }
        let (mut model, mut fold) = (Model::default(), Fold::new());
        let anything = delivery.iter().map(|(index, cut)| (index.index(changes.len()), *cut));
        // Whatever came before, in the end each change has come at least once, here backwards.
        for (index, cut) in anything.chain((0..changes.len()).rev().map(|index| (index, false))) {
            let (version, change) = &changes[index];
            fold.change(&layout, *version, change.clone()).expect("is well formed");
            if cut {
                model.steps(&fold.finish());
            }
        }
        model.steps(&fold.finish());
        prop_assert_eq!(model.rows, expected.rows);
        prop_assert_eq!(model.floor, expected.floor);
    }
}
