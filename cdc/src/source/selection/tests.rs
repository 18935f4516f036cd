use millrace_config::{Columns, OnDelete, OnRowError, OnSchemaChange, OnTruncate, Place};
use millrace_event::TableName;

use super::*;

fn table(columns: Columns) -> Table {
    let name = TableName::new("public", "t");
    Table {
        target: name.clone(),
        name,
        sinks: Vec::new(),
        columns,
        filter: None,
        key: None,
        adopt: false,
        on_delete: OnDelete::Delete,
        on_truncate: OnTruncate::Apply,
        on_schema_change: OnSchemaChange::Evolve,
        on_row_error: OnRowError::DeadLetter,
    }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn masked(column: &str, mask: MaskKind) -> Table {
    table(Columns {
        mask: vec![(column.to_owned(), mask)],
        ..Columns::default()
    })
}

fn column(number: i16, name: &str, is_text: bool, not_null: bool) -> CatalogColumn {
    let (type_oid, type_name) = if is_text {
        (1043, "character varying(9)")
    } else {
        (23, "integer")
    };
    CatalogColumn {
        number,
        name: name.to_owned(),
        type_oid,
        typmod: if is_text { 13 } else { -1 },
        type_name: type_name.to_owned(),
        not_null,
        is_text,
        generated: name == "generated",
    }
}

/// `id int NOT NULL, name varchar(9), born int, age int NOT NULL, generated int`.
fn catalog() -> Vec<CatalogColumn> {
    vec![
        column(1, "id", false, true),
        column(3, "name", true, true),
        column(4, "born", false, false),
        column(5, "age", false, true),
        column(6, "generated", false, false),
    ]
}

fn selected(table: &Table) -> Result<Selected, Condition> {
    let salt = Salt::new(b"a salt of sixteen bytes");
    select(table, &catalog(), &owned(&["id"]), Some(&salt))
}

fn names(selected: &Selected) -> Vec<(&str, u32)> {
    let columns = selected.columns.iter();
    columns
        .map(|(name, oid, _)| (name.as_str(), *oid))
        .collect()
}

#[test]
fn what_is_published_has_the_types_of_what_travels() {
    let plain = selected(&table(Columns::default())).expect("nothing selected");
    let all = [("id", 23), ("name", 1043), ("born", 23), ("age", 23)];
    assert_eq!(names(&plain), all);
    assert_eq!(plain.columns[1].2, 13);

    let settings = Columns {
        exclude: owned(&["age", "generated"]),
        mask: vec![
            ("name".to_owned(), MaskKind::Truncate(3)),
            ("born".to_owned(), MaskKind::Redact),
        ],
        ..Columns::default()
    };
    let part = selected(&table(settings)).expect("valid");
    assert_eq!(names(&part), [("id", 23), ("name", 25), ("born", 23)]);
    assert_eq!(part.columns[1].2, -1);
    assert_eq!(part.selection.mask_of("born"), Some(&Mask::Null));
    assert!(part.absent.is_empty());
    let hashed = selected(&masked("age", MaskKind::Hash)).expect("valid");
    assert_eq!(names(&hashed)[3], ("age", 25));
}

#[test]
fn a_mask_that_does_not_fit_is_refused_with_another_that_does() {
    for (column, mask, message, remedy) in [
        (
            "id",
            MaskKind::Hash,
            "key column \"id\" cannot be masked",
            "another key",
        ),
        (
            "age",
            MaskKind::Redact,
            "integer and NOT NULL",
            "mask \"age\" with \"hash\"",
        ),
        (
            "born",
            MaskKind::Truncate(2),
            "\"born\" is integer",
            "\"hash\" or \"redact\"",
        ),
    ] {
        let condition = selected(&masked(column, mask)).expect_err(column);
        assert_eq!(condition.code, Code::ColumnSelection);
        assert!(condition.message.contains(message), "{condition}");
        assert!(condition.remedy.contains(remedy), "{}", condition.remedy);
        assert!(
            condition.remedy.starts_with("in tables/public.t.toml: "),
            "{}",
            condition.remedy
        );
    }
    let excluded = table(Columns {
        exclude: owned(&["id"]),
        ..Columns::default()
    });
    let condition = selected(&excluded).expect_err("the key");
    assert!(
        condition
            .message
            .contains("key column \"id\" cannot be excluded"),
        "{condition}"
    );
}

#[test]
fn a_column_that_is_not_there_is_named_unless_the_defaults_name_it() {
    let settings = Columns {
        exclude: owned(&["agee"]),
        rename: vec![("nam".to_owned(), "n".to_owned())],
        mask: vec![
            ("mail".to_owned(), MaskKind::Hash),
            ("note".to_owned(), MaskKind::Truncate(1)),
        ],
        from_defaults: owned(&["mail"]),
    };
    let found = selected(&table(settings)).expect("valid so far");
    assert_eq!(found.absent, ["agee", "note", "nam"]);
    // Whatever they turn out to be: they do not go out as they are.
    assert!(matches!(
        found.selection.mask_of("mail"),
        Some(Mask::Hash(_))
    ));
    assert_eq!(found.selection.mask_of("note"), Some(&Mask::Null));
    let condition = unknown_columns(&table(Columns::default()), &found.absent);
    assert!(
        condition
            .message
            .ends_with("it has no column \"agee\", \"note\", \"nam\""),
        "{condition}"
    );
}

#[test]
fn two_columns_do_not_share_a_name_in_the_targets() {
    let renamed = |from: &str, to: &str, exclude: &[&str]| {
        table(Columns {
            exclude: owned(exclude),
            rename: vec![(from.to_owned(), to.to_owned())],
            ..Columns::default()
        })
    };
    let condition = selected(&renamed("name", "age", &[])).expect_err("taken");
    assert!(
        condition
            .message
            .contains("two columns have the name \"age\""),
        "{condition}"
    );
    assert!(selected(&renamed("name", "age", &["age"])).is_ok());
    assert!(selected(&renamed("name", "generated", &[])).is_ok());
}

#[test]
fn a_filter_needs_postgres_15() {
    let mut filtered = table(Columns::default());
    assert!(require_filters(140_011, &filtered).is_ok());
    filtered.filter = Some(Filter {
        sql: "id > 3".to_owned(),
        place: Place::whole("tables/public.t.toml"),
    });
    assert!(require_filters(150_000, &filtered).is_ok());
    let condition = require_filters(140_011, &filtered).expect_err("too old");
    assert_eq!(condition.code, Code::FilterUnsupported);
    assert!(
        condition.message.contains("the source is Postgres 14"),
        "{condition}"
    );
    assert!(
        condition.remedy.contains("Postgres 15"),
        "{}",
        condition.remedy
    );
}
