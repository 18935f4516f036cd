use super::*;

fn column(number: i16, name: &str, type_oid: u32) -> Column {
    Column {
        number,
        name: name.to_owned(),
        type_oid,
        typmod: -1,
        hidden: false,
        entry: Some(Entry {
            xid: 1,
            missing: false,
            default: 0,
        }),
    }
}

fn seen(oid: u32, files: &str, leaves: &[u32], columns: &[Column]) -> Seen {
    Seen {
        table: TableName::new("public", "t"),
        oid,
        files: files.to_owned(),
        leaves: leaves.to_vec(),
        leaf_files: None,
        attached: Some(leaves.iter().map(|leaf| (*leaf, 1)).collect()),
        columns: columns.to_vec(),
        names: Vec::new(),
        keys: String::new(),
        primary: Some(vec![1]),
        due: None,
    }
}

fn after(before: &Seen, now: Seen, empty: &[u32]) -> Seen {
    let look = Look {
        seen: now,
        empty: empty.to_vec(),
    };
    remembered(Some(before), &look, Lsn(9))
}

fn due(before: &Seen, now: Seen, empty: &[u32]) -> bool {
    after(before, now, empty).due.is_some()
}

/// Whether a backfill is due after the last of these looks, and after any before.
fn due_at_last(looks: &[&[Column]]) -> (bool, bool) {
    let mut known = seen(7, "a", &[], looks[0]);
    let (mut earlier, mut last) = (false, false);
    for columns in looks {
        earlier |= last;
        known = after(&known, seen(7, "a", &[], columns), &[]);
        last = known.due.take().is_some();
    }
    (earlier, last)
}

#[test]
fn a_compaction_is_no_change_of_rows_and_a_rewrite_may_be() {
    let before = seen(7, "a", &[], &[column(1, "id", 23), column(2, "v", 25)]);
    let compacted = seen(7, "b", &[], &before.columns);
    assert!(!due(&before, compacted, &[]));
    let retyped = |files| seen(7, files, &[], &[column(1, "id", 20), column(2, "v", 25)]);
    assert!(due(&before, retyped("b"), &[]));
    assert!(!due(&before, retyped("a"), &[]));
    let longer = |files| {
        seen(
            7,
            files,
            &[],
            &[column(1, "id", 23), column(2, "v", 25), column(3, "w", 25)],
        )
    };
    assert!(due(&before, longer("b"), &[]));
    assert!(!due(&before, longer("a"), &[]));
    let mut hidden = longer("a");
    hidden.columns[2].hidden = true;
    assert!(due(&before, hidden, &[]));
    let dropped = seen(7, "a", &[], &[column(1, "id", 23)]);
    assert!(!due(&before, dropped, &[]));
    let renamed = seen(7, "a", &[], &[column(1, "id", 23), column(2, "w", 25)]);
    assert!(!due(&before, renamed, &[]));
    // Dropped and added again: nothing of the old values is left.
    let again = seen(7, "a", &[], &[column(1, "id", 23), column(3, "v", 25)]);
    assert!(due(&before, again, &[]));
    let another = seen(8, "a", &[], &before.columns);
    assert!(due(&before, another, &[]));
}

#[test]
fn rows_are_read_again_under_another_key() {
    let columns = [column(1, "id", 23), column(2, "v", 25)];
    let with = |primary: Option<&[i16]>| Seen {
        primary: primary.map(<[i16]>::to_vec),
        ..seen(7, "a", &[], &columns)
    };
    let key = with(Some(&[1]));
    assert!(due(&key, with(Some(&[1, 2])), &[]));
    assert!(due(&key, with(Some(&[2])), &[]));
    assert!(!due(&key, with(Some(&[1])), &[]));
    // An older release did not look; and a table without a key is parked, and read again once it has one.
    assert!(!due(&with(None), key.clone(), &[]));
    assert!(!due(&key, with(None), &[]));
}

#[test]
fn a_rewrite_to_the_same_type_is_no_compaction() {
    let with = |files, entry: Entry| {
        let mut column = column(2, "v", 25);
        column.entry = Some(entry);
        seen(7, files, &[], &[column])
    };
    let entry = |xid, missing, default| Entry {
        xid,
        missing,
        default,
    };
    let before = with("a", entry(1, false, 0));
    assert!(due(&before, with("b", entry(2, false, 0)), &[]));
    // Its statistics target, say.
    assert!(!due(&before, with("a", entry(2, false, 0)), &[]));
    // Reused transaction ids are as good as any.
    assert!(due(
        &with("a", entry(9, false, 0)),
        with("b", entry(3, false, 0)),
        &[]
    ));
    let filled = with("a", entry(1, true, 5));
    // A compaction of a table whose older rows lack a column's value, and a rewrite.
    assert!(!due(&filled, with("b", entry(2, false, 5)), &[]));
    assert!(due(&filled, with("b", entry(2, false, 6)), &[]));
    let bare = with("a", entry(1, true, 0));
    assert!(due(&bare, with("b", entry(2, false, 0)), &[]));
}

#[test]
fn a_name_that_comes_back_with_another_number_is_known_for_ever() {
    let id = column(1, "id", 23);
    let with = |columns: &[(i16, &str)]| {
        let others = columns
            .iter()
            .map(|(number, name)| column(*number, name, 25));
        std::iter::once(id.clone())
            .chain(others)
            .collect::<Vec<_>>()
    };
    let looks = |all: &[&[(i16, &str)]]| {
        let all: Vec<_> = all.iter().map(|columns| with(columns)).collect();
        due_at_last(&all.iter().map(Vec::as_slice).collect::<Vec<_>>())
    };
    let v = (2, "v");
    // Dropped, looked at, added again; once.
    assert_eq!(looks(&[&[v], &[], &[], &[(3, "v")]]), (false, true));
    assert_eq!(looks(&[&[v], &[], &[(3, "v")], &[(3, "v")]]), (true, false));
    assert_eq!(
        looks(&[&[v], &[(2, "w")], &[(2, "w"), (3, "v")]]),
        (false, true)
    );
    // There and back.
    assert_eq!(looks(&[&[v], &[(2, "w")], &[v]]), (false, false));
    // The last one that had the name counts.
    let lent = [(2, "w"), (3, "v")];
    assert_eq!(looks(&[&[v], &[(2, "w")], &lent, &[v]]), (true, true));
    assert_eq!(looks(&[&[v], &[v, (3, "w")], &[v]]), (false, false));

    // Another table of the name had one of that name, of the same number too.
    let before = seen(6, "a", &[], &with(&[v]));
    let replaced = after(&before, seen(7, "a", &[], &with(&[])), &[]);
    assert!(replaced.due.is_some());
    let mut replaced = replaced;
    replaced.due = None;
    assert!(due(&replaced, seen(7, "a", &[], &with(&[v])), &[]));
}

#[test]
fn names_are_remembered_up_to_a_limit() {
    let mut known = seen(7, "a", &[], &[column(1, "n0", 23)]);
    for n in 0..=NAMES_MAX {
        let now = seen(7, "a", &[], &[column(1, &format!("n{n}"), 23)]);
        known = after(&known, now, &[]);
    }
    assert_eq!(known.names.len(), NAMES_MAX);
    assert_eq!(known.names[0].0, "n1");
    assert_eq!(known.names[NAMES_MAX - 1].0, format!("n{NAMES_MAX}"));
}

#[test]
fn partitions_that_come_and_go_are_seen() {
    let before = seen(7, "a", &[1, 2], &[]);
    assert!(due(&before, seen(7, "b", &[1, 2, 3], &[]), &[]));
    assert!(!due(&before, seen(7, "b", &[1, 2, 3], &[]), &[3]));
    assert!(due(&before, seen(7, "b", &[1], &[]), &[]));
    // One that was away meanwhile; empty now or not.
    let mut again = seen(7, "a", &[1, 2], &[]);
    again.attached = Some(vec![(1, 1), (2, 5)]);
    assert!(due(&before, again, &[2]));
}

#[test]
fn a_partition_with_another_file_lost_rows_that_nobody_told_of() {
    let with = |files: &[(u32, u32)]| {
        let leaves: Vec<_> = files.iter().map(|(leaf, _)| *leaf).collect();
        let mut seen = seen(7, "a", &leaves, &[]);
        seen.leaf_files = Some(files.to_vec());
        seen
    };
    let before = with(&[(1, 1), (2, 20)]);
    assert!(!due(&before, before.clone(), &[]));
    assert!(due(&before, with(&[(1, 10), (2, 20)]), &[]));
    assert!(due(&before, with(&[(1, 1), (2, 21)]), &[]));
    // One more, as it was made. Made, written and truncated since: its rows were told of.
    assert!(!due(&before, with(&[(1, 1), (2, 20), (3, 3)]), &[3]));
    assert!(due(&before, with(&[(1, 1), (2, 20), (3, 30)]), &[3]));
    // An older release did not look.
    assert!(!due(&seen(7, "a", &[1, 2], &[]), before, &[]));
}

#[test]
fn a_partition_that_cannot_be_looked_into_is_judged_by_a_later_look() {
    let before = seen(7, "a", &[1], &[]);
    let mut look = Look {
        seen: seen(7, "b", &[1, 2], &[]),
        empty: Vec::new(),
    };
    look.seen.leaf_files = Some(vec![(1, 1), (2, 2)]);
    let came = look.came(&before);
    assert_eq!(came, [2]);
    look.leave(&came);
    let between = remembered(Some(&before), &look, Lsn(9));
    assert_eq!(between.due, None);
    let found = |empty: &[u32]| {
        let mut now = seen(7, "b", &[1, 2], &[]);
        now.leaf_files = Some(vec![(1, 1), (2, 2)]);
        due(&between, now, empty)
    };
    assert!(found(&[]));
    assert!(!found(&[2]));
}

#[test]
fn what_is_due_stays_due() {
    let mut before = seen(7, "a", &[], &[]);
    let due = Due {
        id: "schema-7-0/9".to_owned(),
        lsn: Lsn(9),
    };
    before.due = Some(due.clone());
    let look = Look {
        seen: seen(7, "a", &[], &[]),
        empty: Vec::new(),
    };
    assert_eq!(remembered(Some(&before), &look, Lsn(99)).due, Some(due));
}

#[test]
fn a_life_goes_on_with_what_changes_no_shape() {
    let before = seen(7, "a", &[], &[column(1, "id", 23)]);
    let mut now = seen(7, "b", &[], &[column(1, "id", 23)]);
    now.columns[0].hidden = true;
    now.columns[0].entry = None;
    assert!(before.is_alike(&now));
    for other in [
        column(2, "id", 23),
        column(1, "no", 23),
        column(1, "id", 20),
    ] {
        assert!(!before.is_alike(&seen(7, "a", &[], &[other])));
    }
    assert!(!before.is_alike(&seen(8, "a", &[], &before.columns)));
}

#[test]
fn what_an_older_release_remembered_orders_nothing() {
    let old = r#"{"schema":"public","table":"t","oid":7,"files":"a","leaves":[1,2],"columns":[
        {"number":1,"name":"id","type_oid":23,"typmod":-1,"hidden":false},
        {"number":2,"name":"v","type_oid":25,"typmod":-1,"hidden":true}],"keys":"","due":{"id":"x","lsn":"0/9"}}"#;
    let mut before: Seen = serde_json::from_str(old).expect("is understood");
    assert_eq!(before.due.take().map(|due| due.lsn), Some(Lsn(9)));
    let columns = [column(1, "id", 23), column(2, "v", 25)];
    // Compacted since.
    let now = after(&before, seen(7, "b", &[1, 2], &columns), &[]);
    assert_eq!(now.due, None);
    // From now on all is known, and read back as it is.
    let text = serde_json::to_string(&now).expect("plain JSON");
    assert_eq!(serde_json::from_str::<Seen>(&text).expect("is read"), now);
    let names: Vec<_> = now.names.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["id", "v"]);
    // Its names count.
    let again = [column(1, "id", 23), column(4, "v", 25)];
    assert!(due(&before, seen(7, "a", &[1, 2], &again), &[]));
}
