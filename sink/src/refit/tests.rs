use bytes::Bytes;
use millrace_event::{LoadColumn, LoadFormat, LoadHead, Lsn, TableName, Version};

use super::*;
use crate::fold::{Fold, RowChange};
use crate::load::Load;
use crate::row::LayoutColumn;

/// A layout of `public.t` with these columns: at the source, and in the target.
fn layout(columns: &[(&str, &str)], key: Vec<usize>) -> Arc<TableLayout> {
    let column = |(source, target): &(&str, &str)| LayoutColumn {
        source: (*source).to_owned(),
        target: (*target).to_owned(),
        cast: "text".to_owned(),
    };
    Arc::new(TableLayout {
        source: TableName::new("public", "t"),
        target: TableName::new("public", "t"),
        columns: columns.iter().map(column).collect(),
        key,
        shape: "1".to_owned(),
    })
}

fn before() -> Arc<TableLayout> {
    layout(&[("a", "a"), ("b", "b"), ("gone", "gone")], vec![0, 1])
}

fn after() -> Arc<TableLayout> {
    layout(
        &[("b", "b"), ("late", "late"), ("a", "renamed")],
        vec![0, 2],
    )
}

fn renamed() -> Arc<TableLayout> {
    layout(
        &[("b", "b"), ("gone", "kept"), ("a", "renamed")],
        vec![0, 2],
    )
}

fn row(cells: &[Option<&str>]) -> Row {
    let cell = |cell: &Option<&str>| match cell {
        Some(text) => Cell::Text(Bytes::copy_from_slice(text.as_bytes())),
        None => Cell::Missing,
    };
    cells.iter().map(cell).collect()
}

fn put(cells: &[Option<&str>], old: Option<&[Option<&str>]>) -> RowChange {
    RowChange::Put {
        created: false,
        row: row(cells),
        old: old.map(row),
    }
}

fn batch(steps: Vec<Step>) -> Batch {
    Batch {
        steps,
        commit: true,
        ..Batch::default()
    }
}

/// The steps of these changes, collected in a layout.
fn collected(layout: &Arc<TableLayout>, changes: Vec<RowChange>) -> Batch {
    let mut fold = Fold::new();
    for (change, seq) in changes.into_iter().zip(1..) {
        let version = Version::new(1, Lsn(1), seq);
        fold.change(layout, version, change).expect("has its key");
    }
    batch(fold.finish())
}

fn steps(batch: &Batch) -> String {
    format!("{:?}", batch.steps)
}

#[test]
fn rows_that_were_collected_are_as_if_they_had_been_collected_later() {
    let (old, new) = (before(), renamed());
    let mut refitted = collected(
        &old,
        vec![
            put(&[Some("1"), Some("x"), Some("g")], None),
            RowChange::Delete(row(&[Some("2"), Some("y"), None])),
            put(
                &[Some("3"), Some("y"), None],
                Some(&[Some("2"), Some("y"), None]),
            ),
            RowChange::Truncate,
        ],
    );
    let later = collected(
        &new,
        vec![
            put(&[Some("x"), Some("g"), Some("1")], None),
            RowChange::Delete(row(&[Some("y"), None, Some("2")])),
            put(
                &[Some("y"), None, Some("3")],
                Some(&[Some("y"), None, Some("2")]),
            ),
            RowChange::Truncate,
        ],
    );
    assert_ne!(steps(&refitted), steps(&later));
    let is_old = |layout: &Arc<TableLayout>| Arc::ptr_eq(layout, &old);
    assert!(refitted.layout_that(is_old).is_some());
    refitted.refit(&old, &new).expect("has its key");
    assert_eq!(steps(&refitted), steps(&later));
    assert!(refitted.layout_that(is_old).is_none());
}

#[test]
fn rows_of_which_a_value_was_left_out_are_collected_again() {
    let (old, new) = (before(), after());
    let whole = || put(&[Some("1"), Some("x"), Some("g")], None);
    let moved = || {
        put(
            &[Some("3"), Some("y"), None],
            Some(&[Some("2"), Some("y"), None]),
        )
    };
    for change in [whole(), moved()] {
        let refused = collected(&old, vec![change]).refit(&old, &new);
        assert!(matches!(refused, Err(Unfit::LeftOut(column)) if column == "late"));
    }
    // A delete brings no values.
    let delete = RowChange::Delete(row(&[Some("2"), Some("y"), None]));
    let fitted = collected(&old, vec![delete]).refit(&old, &new);
    fitted.expect("has its key");
}

#[test]
fn only_names_change_where_the_columns_stay() {
    let (old, new) = (
        before(),
        layout(&[("a", "x"), ("b", "b"), ("gone", "gone")], vec![0, 1]),
    );
    let change = || vec![put(&[Some("1"), Some("x"), Some("g")], None)];
    let mut refitted = collected(&old, change());
    refitted.refit(&old, &new).expect("has its key");
    assert_eq!(steps(&refitted), steps(&collected(&new, change())));
}

#[test]
fn a_loads_fields_go_where_their_columns_are() {
    let (old, new) = (before(), after());
    let head = LoadHead {
        load: old.source.clone(),
        version: Version::new(1, Lsn(1), 0),
        table_version: "1".to_owned(),
        format: LoadFormat::Text,
        columns: ["a", "b", "gone"]
            .map(|name| LoadColumn {
                name: name.to_owned(),
                type_oid: 25,
            })
            .into(),
    };
    let mut load = Load::new(Arc::clone(&old), &head);
    load.push(Bytes::from_static(b"1\tx\tg\n"), 1);
    let mut refitted = batch(vec![Step::Load(load)]);
    refitted.refit(&old, &new).expect("has its key");
    let laid_out = refitted.laid_out().expect("is a load's row");
    let [Step::Rows(tables)] = laid_out.steps.as_slice() else {
        panic!("{:?}", laid_out.steps)
    };
    assert!(Arc::ptr_eq(&tables[0].layout, &new));
    let Action::Put(found) = &tables[0].rows[0].action else {
        panic!("{:?}", tables[0].rows)
    };
    assert_eq!(*found, row(&[Some("x"), None, Some("1")]));
}
