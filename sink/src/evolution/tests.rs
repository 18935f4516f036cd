use millrace_config::{Columns, OnDelete, OnRowError, OnTruncate};
use millrace_event::TableName;

use super::*;

fn target(name: &str, former: &[&str], fresh: bool) -> Target {
    Target {
        name: name.to_owned(),
        former: former.iter().map(|name| (*name).to_owned()).collect(),
        fresh,
    }
}

fn has(names: &[&str]) -> Vec<Has> {
    let has = |name: &&str| Has {
        name: (*name).to_owned(),
        required: name.starts_with("must"),
    };
    names.iter().map(has).collect()
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn what_the_target_lacks_is_renamed_missing_or_dropped() {
    let wanted = [
        target("id", &[], false),
        target("c", &["b", "a"], false),
        target("d", &[], true),
        target("lost", &[], false),
    ];
    let gone = owned(&["must", "may", "never there"]);
    let found = differences(&wanted, &has(&["id", "a", "must", "may", "own"]), &gone);
    let missing = |column: &str, fresh| Difference::Missing {
        column: column.to_owned(),
        fresh,
    };
    let dropped = |column: &str, required| Difference::Dropped {
        column: column.to_owned(),
        required,
    };
    let renamed = Difference::Renamed {
        from: "a".to_owned(),
        to: "c".to_owned(),
    };
    assert_eq!(
        found,
        [
            renamed,
            missing("d", true),
            missing("lost", false),
            dropped("must", true),
            dropped("may", false)
        ]
    );
    assert_eq!(differences(&wanted[..1], &has(&["id", "own"]), &[]), []);
}

#[test]
fn a_former_name_that_is_in_use_is_not_taken() {
    let swapped = [target("a", &["b"], false), target("b", &["a"], false)];
    assert_eq!(differences(&swapped, &has(&["a", "b"]), &[]), []);
    let reused = [target("a", &[], true), target("b", &["a"], false)];
    let found = differences(&reused, &has(&["a"]), &[]);
    let missing = Difference::Missing {
        column: "b".to_owned(),
        fresh: false,
    };
    assert_eq!(found, [missing]);
}

#[test]
fn policies_answer_each_difference() {
    use Answer::{Alter, Leave, Park};
    let name = || "c".to_owned();
    let all = [
        Difference::Renamed {
            from: name(),
            to: name(),
        },
        Difference::Missing {
            column: name(),
            fresh: true,
        },
        Difference::Missing {
            column: name(),
            fresh: false,
        },
        Difference::Retyped { column: name() },
        Difference::Dropped {
            column: name(),
            required: true,
        },
        Difference::Dropped {
            column: name(),
            required: false,
        },
    ];
    for (policy, create, expected) in [
        (
            OnSchemaChange::Evolve,
            Create::Auto,
            [Alter, Alter, Park, Alter, Alter, Leave],
        ),
        (
            OnSchemaChange::Evolve,
            Create::Never,
            [Park, Park, Park, Park, Park, Leave],
        ),
        (OnSchemaChange::Park, Create::Auto, [Park; 6]),
        (
            OnSchemaChange::Ignore,
            Create::Auto,
            [Leave, Leave, Leave, Park, Alter, Leave],
        ),
        (
            OnSchemaChange::Ignore,
            Create::Never,
            [Leave, Leave, Leave, Park, Park, Leave],
        ),
    ] {
        let answers = all
            .each_ref()
            .map(|difference| answer(policy, create, difference));
        assert_eq!(answers, expected, "{policy:?} {create:?}");
    }
}

fn schema(version: &str, oid: u32, columns: &[(i16, &str)], key: &[&str]) -> TableSchema {
    let column = |(number, name): &(i16, &str)| ColumnSchema {
        name: (*name).to_owned(),
        type_name: "integer".to_owned(),
        type_oid: 23,
        typmod: -1,
        not_null: false,
        number: *number,
        missing: None,
        former: Vec::new(),
    };
    TableSchema {
        name: TableName::new("public", "t"),
        version: version.to_owned(),
        columns: columns.iter().map(column).collect(),
        key: owned(key),
        types: Vec::new(),
        oid,
        dropped: Vec::new(),
    }
}

fn settings() -> Table {
    let name = TableName::new("public", "t");
    Table {
        name: name.clone(),
        sinks: Vec::new(),
        target: name,
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

fn laid_out(version: &TableSchema, latest: &TableSchema) -> Result<Vec<String>, Unfit> {
    let column = |source: &str, target: &str| LayoutColumn {
        source: source.to_owned(),
        target: target.to_owned(),
        cast: "integer".to_owned(),
    };
    let key = latest.key.iter().map(|key| {
        let mut columns = latest.columns.iter();
        columns
            .position(|column| column.name == *key)
            .expect("a column")
    });
    let layout = TableLayout {
        source: latest.name.clone(),
        target: latest.name.clone(),
        columns: latest
            .columns
            .iter()
            .map(|known| column(&known.name, &known.name))
            .collect(),
        key: key.collect(),
        shape: latest.version.clone(),
    };
    let laid_out = lay_out(version, latest, &layout, &[column("", "kept")], &settings())?;
    assert_eq!(laid_out.shape, version.version);
    let pairs = laid_out.columns.iter();
    Ok(pairs
        .map(|column| format!("{}:{}", column.source, column.target))
        .collect())
}

#[test]
fn an_old_version_fits_the_target_as_it_is() {
    let old = schema(
        "1",
        7,
        &[(1, "id"), (2, "a"), (3, "b"), (4, "kept"), (5, "away")],
        &["id"],
    );
    let new = schema(
        "2",
        7,
        &[(1, "id"), (2, "b"), (3, "a"), (6, "away")],
        &["id"],
    );
    let new = new.following(&old);
    // Names were swapped; one column is left in the target, and one made room for another of its name.
    let expected = owned(&["id:id", "a:b", "b:a", "kept:kept"]);
    assert_eq!(laid_out(&old, &new), Ok(expected));
    // Another table of that name: only names count.
    let other = schema("3", 8, &[(2, "a"), (1, "id")], &["id"]).following(&new);
    assert_eq!(
        laid_out(&old, &other),
        Ok(owned(&["id:id", "a:a", "kept:kept"]))
    );
}

#[test]
fn a_version_with_another_key_or_from_the_future_does_not_fit() {
    let old = schema("1", 7, &[(1, "id"), (2, "a")], &["id"]);
    let wide = schema("2", 7, &[(1, "id"), (2, "a")], &["a", "id"]).following(&old);
    assert_eq!(laid_out(&old, &wide), Err(Unfit::OtherKey));
    assert_eq!(laid_out(&wide, &old), Err(Unfit::OtherKey));
    let renamed = schema("3", 7, &[(1, "key"), (2, "a")], &["key"]).following(&old);
    assert_eq!(laid_out(&old, &renamed), Ok(owned(&["id:key", "a:a"])));
    let longer = schema("4", 7, &[(1, "id"), (2, "a"), (3, "b")], &["id"]);
    assert_eq!(laid_out(&longer, &old), Err(Unfit::TooNew));
}

#[test]
fn a_given_name_outlasts_a_rename() {
    let mut settings = settings();
    settings.columns.rename = vec![("a".to_owned(), "x".to_owned())];
    assert_eq!(renamed(&settings, "a", &[]), "x");
    assert_eq!(renamed(&settings, "b", &owned(&["a"])), "x");
    assert_eq!(renamed(&settings, "b", &[]), "b");
}
