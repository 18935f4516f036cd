use std::sync::Arc;

use millrace_config::{
    Columns, Condition, Create, Mask as MaskKind, OnDelete, OnRowError, OnSchemaChange, OnTruncate,
    Table,
};

use super::*;
use crate::selection::{Mask, Selection};
use crate::source::{Harm, Inspected, Refused};

fn named() -> TableName {
    TableName::new("public", "t")
}

/// A table with these columns, some of which are excluded or redacted.
fn table(known: &[(i16, &str)], excluded: &[&str], masked: &[&str]) -> SourceTable {
    let known: Vec<_> = known
        .iter()
        .map(|(number, name)| (*number, (*name).to_owned()))
        .collect();
    let mut selection = Selection::default();
    excluded.iter().for_each(|name| selection.exclude(*name));
    masked
        .iter()
        .for_each(|name| selection.mask(*name, Mask::Text));
    let list = known.iter().filter(|(_, name)| !selection.excludes(name));
    let list = (!excluded.is_empty()).then(|| list.cloned().collect());
    let has = |name: &&&str| known.iter().any(|(_, known)| known == **name);
    let absent = excluded.iter().chain(masked).filter(|name| !has(name));
    SourceTable {
        name: named(),
        partitioned: false,
        key: vec!["id".to_owned()],
        columns: Vec::new(),
        filter: None,
        list,
        absent: absent.map(|name| (*name).to_owned()).collect(),
        selection: Arc::new(selection),
        binding: None,
        published: None,
        known,
        settings: Table {
            name: named(),
            target: named(),
            sinks: Vec::new(),
            columns: Columns {
                exclude: excluded.iter().map(|name| (*name).to_owned()).collect(),
                mask: masked
                    .iter()
                    .map(|name| ((*name).to_owned(), MaskKind::Redact))
                    .collect(),
                ..Columns::default()
            },
            filter: None,
            key: None,
            adopt: false,
            on_delete: OnDelete::Delete,
            on_truncate: OnTruncate::Apply,
            on_schema_change: OnSchemaChange::Evolve,
            on_row_error: OnRowError::DeadLetter,
        },
    }
}

fn remembered(oid: u32, table: &SourceTable, before: Option<&Remembered>) -> Remembered {
    Remembered {
        table: named(),
        oid,
        publication: 0,
        standing: Standing::Published,
        clause: table.clause(),
        intended: None,
        withheld: withheld(table, before),
    }
}

const COLUMNS: &[(i16, &str)] = &[(1, "id"), (2, "email"), (3, "note")];

#[test]
fn a_changed_selection_is_told_column_by_column() {
    let says = |before: &SourceTable, after: &SourceTable| {
        let before = remembered(1, before, None);
        let after_ = remembered(2, after, Some(&before));
        change(after, &before, &after_).map(|change| change.what)
    };
    let plain = table(COLUMNS, &[], &[]);
    let excluded = table(COLUMNS, &["email"], &[]);
    let masked = table(COLUMNS, &[], &["email"]);
    assert_eq!(says(&plain, &plain), None);
    assert_eq!(says(&excluded, &excluded), None);
    assert_eq!(says(&masked, &masked), None);
    for (before, after, what) in [
        (&plain, &excluded, "column \"email\" is left out"),
        (&excluded, &plain, "column \"email\" came in"),
        (&excluded, &masked, "column \"email\" came in"),
        (&plain, &masked, "another mask of column \"email\""),
        (&masked, &plain, "another mask of column \"email\""),
    ] {
        assert_eq!(says(before, after).as_deref(), Some(what));
    }
    let mut filtered = plain.clone();
    filtered.filter = Some("(id > 3)".to_owned());
    assert_eq!(says(&plain, &filtered).as_deref(), Some("another `where`"));

    // A column that was added at the source: the list kept it out, a table without a list had it at once.
    let grown: Vec<_> = COLUMNS.iter().copied().chain([(4, "new")]).collect();
    let (listed, all) = (table(&grown, &["email"], &[]), table(&grown, &[], &[]));
    assert_eq!(
        says(&excluded, &listed).as_deref(),
        Some("column \"new\" came in")
    );
    assert_eq!(says(&plain, &all), None);
}

#[test]
fn a_column_that_is_kept_back_stays_so_under_the_name_it_had() {
    let renamed: &[(i16, &str)] = &[(1, "id"), (2, "mail"), (3, "note")];
    for (excluded, masked) in [(&["email"][..], &[][..]), (&[], &["email"])] {
        let before = remembered(1, &table(COLUMNS, excluded, masked), None);

        // The file still says the old name: what follows would go out as it is.
        let mut unaware = table(renamed, excluded, masked);
        let condition = carry_over(&mut unaware, &before.withheld).expect_err("renamed");
        assert_eq!(condition.code, Code::ColumnSelection);
        let told = "column \"email\", which is excluded or masked, was renamed to \"mail\"";
        assert!(condition.message.contains(told), "{condition}");

        // With the new name, older WAL is kept back as well; so it is with both.
        for both in [false, true] {
            let with = |names: &[&'static str]| match (names.is_empty(), both) {
                (true, _) => vec![],
                (false, false) => vec!["mail"],
                (false, true) => vec!["mail", "email"],
            };
            let (excluded, masked) = (
                with(&[excluded, &[]].concat()),
                with(&[masked, &[]].concat()),
            );
            let mut aware = table(renamed, &excluded, &masked);
            carry_over(&mut aware, &before.withheld).expect("named anew");
            assert!(!aware.selection.leaves("email") && !aware.selection.leaves("mail"));
            assert_eq!(aware.selection.excludes("email"), !excluded.is_empty());
            assert_eq!(
                aware.selection.mask_of("email"),
                aware.selection.mask_of("mail")
            );
            // And in the lives to come.
            let after = remembered(1, &aware, Some(&before));
            assert_eq!(after.withheld.len(), 2, "{after:?}");
        }

        // Let go altogether: that was somebody's decision.
        let mut neither = table(renamed, &[], &[]);
        carry_over(&mut neither, &before.withheld).expect("let go");
        assert!(neither.selection.leaves("mail"));
    }
}

#[test]
fn a_dropped_column_stays_back_in_older_wal_and_a_misspelt_one_is_refused() {
    let before = remembered(1, &table(COLUMNS, &[], &["email"]), None);
    let dropped: &[(i16, &str)] = &[(1, "id"), (3, "note")];
    for masked in [&["email"][..], &[]] {
        let mut table = table(dropped, &[], masked);
        carry_over(&mut table, &before.withheld).expect("it was there");
        assert!(table.selection.excludes("email"));
    }
    let mut misspelt = table(COLUMNS, &["emial"], &[]);
    let condition = carry_over(&mut misspelt, &before.withheld).expect_err("never there");
    assert!(
        condition.message.contains("no column \"emial\""),
        "{condition}"
    );
}

fn published(oid: u32, table: &SourceTable) -> HashMap<TableName, Member> {
    let clause = table.clause();
    let member = Member {
        oid,
        own: true,
        clause,
        unread: false,
    };
    HashMap::from([(named(), member)])
}

fn memory(members: &[Remembered]) -> Earlier {
    let members = members.iter();
    let members = members.map(|member| (member.table.clone(), member.clone()));
    Earlier {
        members: members.collect(),
        revision: 5,
    }
}

#[test]
fn what_nobody_can_read_is_as_it_was_or_judged_later() {
    let mut open = table(COLUMNS, &[], &[]);
    open.filter = Some("(id > 3)".to_owned());
    let before = remembered(1, &open, None);
    let then = open.clone();
    let unread = |oid| {
        let mut members = published(oid, &then);
        let member = members.get_mut(&named()).expect("is there");
        (member.clause.filter, member.unread) = (None, true);
        members
    };
    let earlier = memory(std::slice::from_ref(&before));
    let (mut same, mut another) = (unread(1), unread(2));
    earlier.recall(&mut same);
    earlier.recall(&mut another);
    assert_eq!(same, published(1, &open));
    assert!(another[&named()].unread, "it has left and come back");
    // Neither lost nor back, and no reason to stop.
    assert_eq!(drift(&before, &another, &open), Ok((None, false)));
    let mut lost = before.clone();
    lost.standing = Standing::Lost { since_us: 7 };
    assert!(drift(&lost, &another, &open).expect("parked").0.is_some());

    open.published = Some((1, open.filter.clone()));
    assert!(open.is_published_as(&unread(1)[&named()]));
    assert!(!open.is_published_as(&another[&named()]));
    open.filter = Some("(id > 4)".to_owned());
    assert!(!open.is_published_as(&unread(1)[&named()]));
}

#[test]
fn a_condition_that_nobody_can_read_is_remembered_as_it_is_known() {
    let mut filtered = table(COLUMNS, &["note"], &[]);
    filtered.filter = Some("(id > 3)".to_owned());
    let before = remembered(1, &filtered, None);
    let unread = || {
        let mut members = published(2, &filtered);
        let mut member = members.remove(&named()).expect("is there");
        (member.clause.filter, member.unread) = (None, true);
        member
    };
    let after = |clause| Remembered {
        oid: 2,
        clause,
        ..before.clone()
    };
    let now = after(clause(unread(), Some(&filtered), Some(&before)));
    assert_eq!(now.clause, before.clause);
    assert_eq!(change(&filtered, &before, &now), None);
    // What is configured now was just published, and is another condition than before.
    let mut other = filtered.clone();
    other.filter = Some("(id > 4)".to_owned());
    let now = after(clause(unread(), Some(&other), Some(&before)));
    assert_eq!(now.clause, other.clause());
    assert!(change(&other, &before, &now).is_some());
    // Not configured now.
    assert_eq!(clause(unread(), None, Some(&before)), before.clause);
    assert_eq!(clause(unread(), None, None).filter, None);
}

/// What has become of a table that was published as `before`: what is said of it where it is parked, and whether it
/// is back.
fn drift(
    before: &Remembered,
    now: &HashMap<TableName, Member>,
    table: &SourceTable,
) -> Result<(Option<String>, bool), String> {
    let earlier = memory(std::slice::from_ref(before));
    let checked = earlier.check("p", std::slice::from_ref(table), now, Create::Auto);
    let mut drift = checked.map_err(|error| error.to_string())?;
    let lost = drift.lost.pop().map(|(_, condition)| condition.remedy);
    Ok((lost, drift.has_back(&table.name)))
}

#[test]
fn our_own_change_is_told_from_anothers() {
    let (plain, part) = (table(COLUMNS, &[], &[]), table(COLUMNS, &["email"], &[]));
    let mut earlier = remembered(1, &plain, None);
    let (same, back) = (Ok((None, false)), Ok((None, true)));
    assert_eq!(drift(&earlier, &published(1, &plain), &plain), same);
    let error = drift(&earlier, &published(2, &part), &plain).expect_err("somebody else's");
    assert_eq!(
        error,
        "E1106: publication \"p\" publishes other columns or rows of public.t than before"
    );
    assert_eq!(drift(&earlier, &published(2, &plain), &plain), back);
    // Somebody has run the statement that makes it what is configured now.
    assert_eq!(drift(&earlier, &published(2, &part), &part), back);

    // A crash between our change and its remembrance.
    earlier.intended = Some(part.clause());
    assert_eq!(drift(&earlier, &published(2, &part), &part), same);
    let made = drift(&earlier, &published(1, &plain), &part);
    assert_eq!(made, same, "the change was not made");
    assert_eq!(drift(&earlier, &published(2, &plain), &part), back);
}

#[test]
fn a_table_that_left_is_parked_until_it_is_back_as_it_must_be() {
    let (plain, part) = (table(COLUMNS, &[], &[]), table(COLUMNS, &["email"], &[]));
    let mut earlier = remembered(1, &part, None);
    let gone = HashMap::new();
    let add = "ALTER PUBLICATION \"p\" ADD TABLE ONLY \"public\".\"t\" (\"id\", \"note\")";
    for standing in [Standing::Published, Standing::Lost { since_us: 7 }] {
        earlier.standing = standing;
        let (remedy, back) = drift(&earlier, &gone, &part).expect("parked");
        let remedy = remedy.expect("parked");
        assert!(remedy.starts_with(add) && !back, "{remedy}");
    }
    // Back with other columns than it must have, it stays parked.
    let (remedy, back) = drift(&earlier, &published(2, &plain), &part).expect("parked");
    let remedy = remedy.expect("parked");
    assert!(
        remedy.contains("DROP TABLE ONLY \"public\".\"t\"; ALTER") && !back,
        "{remedy}"
    );
    for oid in [2, 0] {
        let back = drift(&earlier, &published(oid, &part), &part);
        assert_eq!(back, Ok((None, true)));
    }
    earlier.standing = Standing::Beside;
    assert_eq!(
        drift(&earlier, &gone, &part),
        Ok((None, false)),
        "it is new"
    );
}

#[test]
fn what_we_took_out_ourselves_is_no_loss() {
    let plain = table(COLUMNS, &[], &[]);
    let mut earlier = remembered(1, &plain, None);
    earlier.standing = Standing::Leaving;
    let part = table(COLUMNS, &["email"], &[]);
    for now in [
        HashMap::new(),
        published(1, &plain),
        published(2, &plain),
        published(2, &part),
    ] {
        assert_eq!(drift(&earlier, &now, &plain), Ok((None, false)));
    }
    // Until it is out it is to be taken out.
    let removed = |earlier: &Earlier| earlier.removed(&[]).count();
    let known = memory(&[earlier.clone()]);
    assert_eq!((removed(&known), known.leaving()), (1, vec![named()]));
    earlier.standing = Standing::Beside;
    let known = memory(&[earlier]);
    assert_eq!((removed(&known), known.leaving()), (0, vec![]));
}

#[test]
fn a_table_that_can_be_captured_again_is_read_again_or_put_back_by_its_operator() {
    let (plain, part) = (table(COLUMNS, &[], &[]), table(COLUMNS, &["email"], &[]));
    let mut before = remembered(1, &part, None);
    before.standing = Standing::Refused { since_us: 7 };
    let earlier = memory(&[before]);
    let found = |now: &HashMap<TableName, Member>, create| {
        let checked = earlier.check("p", std::slice::from_ref(&part), now, create);
        let drift = checked.expect("no fault of all");
        (drift.has_back(&named()), drift.has_lost(&named()))
    };
    let (back, lost) = ((true, false), (false, true));
    let (gone, other, same) = (HashMap::new(), published(2, &plain), published(1, &part));
    for now in [&gone, &other, &same] {
        assert_eq!(found(now, Create::Auto), back);
    }
    for (now, expected) in [(&gone, lost), (&other, lost), (&same, back)] {
        assert_eq!(found(now, Create::Never), expected);
    }
}

#[test]
fn only_a_table_that_was_captured_is_parked_without_its_key() {
    let plain = table(COLUMNS, &[], &[]);
    let refused = |code, harm| Refused {
        name: named(),
        condition: Condition::new(code, "said", "do"),
        harm,
    };
    let parks = |before: Option<Standing>, code, harm| {
        let member = before.map(|standing| Remembered {
            standing,
            ..remembered(1, &plain, None)
        });
        let earlier = memory(member.as_slice());
        let inspected = Inspected {
            tables: Vec::new(),
            refused: vec![refused(code, harm)],
        };
        let now = published(1, &plain);
        let admitted = earlier.admit(inspected, &now, |_| true);
        admitted
            .map(|(_, refused)| refused.len())
            .map_err(|error| error.to_string())
    };
    let standings = [
        Standing::Published,
        Standing::Lost { since_us: 7 },
        Standing::Refused { since_us: 7 },
    ];
    for code in [Code::NoKey, Code::NoReplicaIdentity, Code::TableMissing] {
        for standing in standings {
            assert_eq!(
                parks(Some(standing), code, Harm::None),
                Ok(1),
                "{standing:?}"
            );
        }
        for never in [None, Some(Standing::Beside), Some(Standing::Leaving)] {
            parks(never, code, Harm::None).expect_err("an error at the start");
        }
    }
    // What the table's file says wrong is an error, unless it says what is published.
    let published = Some(Standing::Published);
    parks(published, Code::ColumnSelection, Harm::None).expect_err("an error");
    let own = Harm::PublishedAs(plain.clause());
    assert_eq!(parks(published, Code::SelectionIdentity, own), Ok(1));
    let other = Harm::PublishedAs(table(COLUMNS, &["email"], &[]).clause());
    parks(published, Code::SelectionIdentity, other).expect_err("another one than is published");
    // It was taken out for that by a process that ended before it could store it.
    let gone = Inspected {
        tables: Vec::new(),
        refused: vec![refused(
            Code::SelectionIdentity,
            Harm::PublishedAs(plain.clause()),
        )],
    };
    let admitted = memory(&[remembered(1, &plain, None)]).admit(gone, &HashMap::new(), |_| true);
    assert_eq!(admitted.expect("no fault of all").1.len(), 1);
    // Who knows what has changed refuses it.
    let earlier = memory(&[remembered(1, &plain, None)]);
    let inspected = Inspected {
        tables: Vec::new(),
        refused: vec![refused(Code::NoKey, Harm::None)],
    };
    let admitted = earlier.admit(inspected, &HashMap::new(), |_| false);
    admitted.expect_err("its settings have changed");
}

#[test]
fn what_an_earlier_release_remembered_is_understood() {
    let json = r#"[{"schema":"public","table":"t","oid":7}]"#;
    let members: Vec<Remembered> = serde_json::from_str(json).expect("understood");
    assert_eq!(members, [remembered(7, &table(COLUMNS, &[], &[]), None)]);
    let member = remembered(7, &table(COLUMNS, &["note"], &["email"]), None);
    let json = serde_json::to_string(&member).expect("plain JSON");
    let expected = r#"{"schema":"public","table":"t","oid":7,"clause":{"columns":[1,2]},"withheld":[{"number":2,"name":"email","by":"redact"},{"number":3,"name":"note","by":"exclude"}]}"#;
    assert_eq!(json, expected);
}
