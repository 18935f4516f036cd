use std::collections::BTreeMap;

use millrace_event::Lsn;

use super::*;
use crate::progress::{Claim, Reading};

const NOW_US: i64 = 7;

fn table(name: &str) -> TableName {
    TableName::new("public", name)
}

fn at(lsn: u64) -> Position {
    Position::new(1, Lsn(lsn), 3)
}

fn copied() -> CopyState {
    CopyState::Copied { lsn: Lsn(4) }
}

fn pending() -> CopyState {
    CopyState::Pending {
        claim: Claim::default(),
        began_us: NOW_US,
    }
}

fn loading() -> CopyState {
    CopyState::Loading {
        lsn: Lsn(4),
        rows: 1,
        claim: Claim::default(),
        began_us: NOW_US,
    }
}

fn chunks(order: Option<BackfillOrder>) -> CopyState {
    CopyState::Chunks(Chunks::begin(at(9), order, NOW_US))
}

fn progress(states: &[(&str, CopyState)]) -> CopyProgress {
    let tables = states.iter();
    CopyProgress {
        reading: Some(Reading {
            request: "asked".to_owned(),
            attempt: 1,
            number: 1,
        }),
        tables: tables
            .map(|(name, state)| (table(name), state.clone()))
            .collect::<BTreeMap<_, _>>(),
        ..CopyProgress::default()
    }
}

fn names(wanted: &[TableRequest]) -> Vec<&str> {
    let names = wanted.iter().map(|wanted| wanted.table.table.as_str());
    names.collect()
}

fn debt(name: &str, key: &str) -> Debts {
    vec![(table(name), vec![vec![key.to_owned()]])]
}

fn order(id: &str, name: &str) -> BackfillOrder {
    BackfillOrder::new(id.to_owned(), table(name))
}

#[test]
fn single_rows_come_first_then_loads_then_chunks() {
    let progress = progress(&[
        ("a", chunks(None)),
        ("b", loading()),
        ("c", pending()),
        ("d", copied()),
    ]);
    let wanted = wanted(&progress, &debt("d", "1"));
    assert_eq!(names(&wanted), ["d", "b", "c", "a"]);
    assert_eq!(wanted[1].rows, Wanted::Load);
    assert!(matches!(wanted[3].rows, Wanted::Chunks { .. }));
}

#[test]
fn a_row_that_chunks_will_bring_is_not_asked_for() {
    let progress = progress(&[("a", chunks(None)), ("b", loading())]);
    for name in ["a", "b", "gone"] {
        let wanted = wanted(&progress, &debt(name, "1"));
        assert_eq!(names(&wanted), ["b", "a"], "{name}");
    }
}

#[test]
fn a_request_is_replaced_when_it_does_not_bring_what_is_wanted_now() {
    let none = Debts::new();
    let (old, new) = (order("o", "a"), order("o", "a"));
    let paused = BackfillOrder {
        paused: true,
        ..new
    };
    let asked = wanted(&progress(&[("a", chunks(Some(old)))]), &none);
    let mut further = progress(&[("a", chunks(Some(order("o", "a"))))]);
    if let Some(CopyState::Chunks(chunks)) = further.tables.get_mut(&table("a")) {
        chunks.after = Some(vec!["7".to_owned()]);
    }
    assert!(brings(&asked, &wanted(&further, &none)), "it goes on");
    assert!(brings(&asked, &[]), "less is enough");
    let paused = wanted(&progress(&[("a", chunks(Some(paused)))]), &none);
    assert!(!brings(&asked, &paused));
    let more = wanted(&progress(&[("a", chunks(None)), ("b", pending())]), &none);
    assert!(!brings(&asked, &more));
    let (one, other) = (debt("d", "1"), debt("d", "2"));
    let state = progress(&[("d", copied())]);
    assert!(!brings(&wanted(&state, &one), &wanted(&state, &other)));
}

#[test]
fn a_load_that_has_begun_is_not_given_up_for_something_else() {
    let begun = progress(&[("a", loading()), ("b", pending())]);
    let asked = wanted(&begun, &Debts::new());
    assert!(must_stay(&asked, &begun));
    let ended = progress(&[("a", copied()), ("b", pending())]);
    assert!(!must_stay(&asked, &ended));
}

#[test]
fn a_load_that_nobody_goes_on_with_is_cut() {
    let progress = progress(&[
        ("a", loading()),
        ("b", pending()),
        ("c", copied()),
        ("d", chunks(None)),
    ]);
    let cut = |asked, cut: &[&str]| {
        let cut: Vec<_> = cut.iter().map(|name| table(name)).collect();
        cut_loads(&progress, asked, &cut)
    };
    assert_eq!(cut(Some("asked"), &[]), []);
    assert_eq!(
        cut(Some("asked"), &["a", "b", "c", "d"]),
        [table("a"), table("b")]
    );
    // The request that brought the rows is no more.
    assert_eq!(cut(Some("another"), &[]), [table("a")]);
    assert_eq!(cut(None, &[]), [table("a")]);
}

#[test]
fn rows_in_chunks_outrank_all_that_was_applied_before() {
    let mut progress = progress(&[("a", loading())]);
    begin_chunks(&mut progress, &[table("a")], at(9), NOW_US);
    let lower = progress.uncovered_below(&table("a"));
    assert!(lower > at(9).0 && lower.commit_lsn == Lsn(9));
    assert!(progress.tables[&table("a")].is_followed());
}

#[test]
fn rows_from_before_an_order_are_doubted_though_the_sink_is_not_there_yet() {
    let ordered = [order("o", "a")];
    let before = progress(&[("a", copied()), ("b", chunks(None)), ("c", copied())]);
    let mut next = follow_orders(&before, &ordered, at(9), NOW_US).expect("begins");
    let begun = begun(&before, &next);
    assert_eq!(begun, [table("a")]);
    doubt(&mut next, &begun, at(30));
    let uncovered = |name| next.uncovered_below(&table(name));
    // The order may tell of rows of up to then.
    assert!(uncovered("a") > at(30).0 && uncovered("a") < at(31).0);
    assert_eq!(uncovered("b"), before.uncovered_below(&table("b")));
    assert_eq!(uncovered("c"), millrace_event::Version::ZERO);
    // What goes at the end, and which deletes are kept, is another matter.
    let CopyState::Chunks(doubting) = &next.tables[&table("a")] else {
        panic!("{next:?}")
    };
    assert_eq!(doubting.sweeps_below(), doubting.lower);
    assert_eq!(next.forgettable(&table("a"), at(50).0), doubting.lower);
    let stored = serde_json::to_string(&next).expect("plain JSON");
    assert_eq!(
        serde_json::from_str::<CopyProgress>(&stored).expect("ours"),
        next
    );
}

#[test]
fn an_order_is_carried_out_once() {
    let ordered = [order("o", "a")];
    let before = progress(&[("a", copied()), ("b", copied())]);
    let begun = follow_orders(&before, &ordered, at(9), NOW_US).expect("begins");
    assert!(
        matches!(&begun.tables[&table("a")], CopyState::Chunks(chunks)
        if chunks.order.as_ref().is_some_and(|order| order.id == "o"))
    );
    assert_eq!(begun.tables[&table("b")], copied());
    assert_eq!(follow_orders(&begun, &ordered, at(10), NOW_US), None);
    // The machine ended it; the order is still on the list.
    let mut ended = before.clone();
    ended.finished.insert("o".to_owned());
    assert_eq!(follow_orders(&ended, &ordered, at(10), NOW_US), None);
    let struck = follow_orders(&ended, &[], at(10), NOW_US).expect("forgets it");
    assert_eq!(struck, before);
}

#[test]
fn an_order_for_a_table_that_is_not_whole_waits() {
    for state in [pending(), loading(), CopyState::Lapsed { refused_at_us: 0 }] {
        let before = progress(&[("a", state)]);
        assert_eq!(
            follow_orders(&before, &[order("o", "a")], at(9), NOW_US),
            None
        );
        let cancelled = BackfillOrder {
            cancelled: true,
            ..order("o", "a")
        };
        let after = follow_orders(&before, &[cancelled], at(9), NOW_US).expect("is finished");
        assert!(after.finished.contains("o") && after.tables == before.tables);
    }
}

#[test]
fn pausing_and_cancelling_reach_what_is_under_way() {
    let running = progress(&[("a", chunks(Some(order("o", "a"))))]);
    let paused = BackfillOrder {
        paused: true,
        filter: Some("false".to_owned()),
        ..order("o", "a")
    };
    let after = follow_orders(&running, &[paused], at(12), NOW_US).expect("is paused");
    let CopyState::Chunks(state) = &after.tables[&table("a")] else {
        panic!("{after:?}")
    };
    let own = state.order.as_ref().expect("has its order");
    assert!(own.paused && own.filter.is_none() && state.lower.commit_lsn == Lsn(9));
    let cancelled = BackfillOrder {
        cancelled: true,
        ..order("o", "a")
    };
    let after = follow_orders(&running, &[cancelled], at(12), NOW_US).expect("is cancelled");
    assert!(matches!(
        after.tables[&table("a")],
        CopyState::Copied { .. }
    ));
    assert!(after.finished.contains("o"));
}

#[test]
fn what_nobody_ordered_is_not_cancelled() {
    let initial = progress(&[("a", chunks(None))]);
    let cancelled = BackfillOrder {
        cancelled: true,
        ..order("o", "a")
    };
    assert_eq!(follow_orders(&initial, &[cancelled], at(12), NOW_US), None);
}

#[test]
fn what_began_by_itself_is_paced_and_never_ended_by_an_order() {
    let order_of = |progress: &CopyProgress| {
        let CopyState::Chunks(chunks) = &progress.tables[&table("a")] else {
            panic!("{progress:?}")
        };
        chunks.order.clone()
    };
    let paused = BackfillOrder {
        paused: true,
        adopts: true,
        ..order("o", "a")
    };
    let cancelled = BackfillOrder {
        cancelled: true,
        ..paused.clone()
    };
    let began = progress(&[("a", chunks(None))]);
    let adopted = follow_orders(&began, std::slice::from_ref(&paused), at(12), NOW_US);
    let adopted = adopted.expect("adopted");
    let own = order_of(&adopted).expect("adopted");
    assert!(own.adopts && own.paused);
    let again = follow_orders(&adopted, std::slice::from_ref(&paused), at(12), NOW_US);
    assert_eq!(again, None);
    let after = follow_orders(&adopted, &[cancelled], at(12), NOW_US).expect("let go");
    assert_eq!(order_of(&after), None);
    // One that is about rows that came already waits for its own backfill.
    assert_eq!(
        follow_orders(&began, &[order("o", "a")], at(12), NOW_US),
        None
    );
    // The chunks have ended before it came.
    let copied = progress(&[("a", copied())]);
    let after = follow_orders(&copied, &[paused], at(12), NOW_US).expect("is finished");
    assert!(after.finished.contains("o") && after.tables == copied.tables);
}

#[test]
fn an_order_for_a_table_of_others_is_struck() {
    let before = progress(&[("a", copied())]);
    let after = follow_orders(&before, &[order("o", "elsewhere")], at(9), NOW_US);
    assert!(after.expect("is finished").finished.contains("o"));
}

#[test]
fn a_request_for_an_earlier_copy_of_a_table_does_not_bring_the_next_one() {
    for state in [pending(), chunks(None)] {
        let asked = wanted(&progress(&[("t", state.clone())]), &Debts::new());
        assert!(brings(&asked, &asked));
        let later = match state {
            CopyState::Pending { claim, .. } => CopyState::Pending {
                claim,
                began_us: NOW_US + 1,
            },
            _ => CopyState::Chunks(Chunks::begin(at(9), None, NOW_US + 1)),
        };
        let wanted = wanted(&progress(&[("t", later)]), &Debts::new());
        assert!(!brings(&asked, &wanted));
    }
}

#[test]
fn what_a_replica_needs_is_not_cancelled() {
    let owed = BackfillOrder {
        owed: true,
        cancelled: true,
        ..order("o", "t")
    };
    let begun = follow_orders(
        &progress(&[("t", copied())]),
        std::slice::from_ref(&owed),
        at(9),
        NOW_US,
    );
    let begun = begun.expect("it begins");
    assert!(matches!(begun.tables[&table("t")], CopyState::Chunks(_)));
    let orders = [owed];
    let again = follow_orders(&begun, &orders, at(9), NOW_US);
    assert_eq!(again, None, "it goes on");
    let waiting = progress(&[("t", pending())]);
    assert_eq!(follow_orders(&waiting, &orders, at(9), NOW_US), None);
}

#[test]
fn the_time_of_a_pause_is_kept_with_the_chunks() {
    const S: i64 = 1_000_000;
    let paused = BackfillOrder {
        paused: true,
        ..order("o", "t")
    };
    let at_us = |begun: &CopyProgress, order: &BackfillOrder, now_us| {
        let orders = std::slice::from_ref(order);
        follow_orders(begun, orders, at(9), now_us)
    };
    let took = |progress: &CopyProgress, now_us| match &progress.tables[&table("t")] {
        CopyState::Chunks(chunks) => chunks.took(now_us).as_secs(),
        other => panic!("{other:?}"),
    };
    let begun = at_us(&progress(&[("t", copied())]), &order("o", "t"), 100 * S).expect("begins");
    assert_eq!(took(&begun, 107 * S), 7);
    let held = at_us(&begun, &paused, 110 * S).expect("is held");
    assert_eq!(took(&held, 500 * S), 10);
    // The same word again is no other pause.
    assert_eq!(at_us(&held, &paused, 400 * S), None);
    let resumed = at_us(&held, &order("o", "t"), 500 * S).expect("goes on");
    assert_eq!(took(&resumed, 505 * S), 15);
    let again = at_us(&resumed, &paused, 505 * S).expect("is held again");
    let again = at_us(&again, &order("o", "t"), 605 * S).expect("goes on");
    assert_eq!(took(&again, 605 * S), 15);
    // One that is held before it begins has taken no time.
    let held = at_us(&progress(&[("t", copied())]), &paused, 100 * S).expect("begins");
    assert_eq!(took(&held, 200 * S), 0);
    // A clock that goes back takes none either.
    assert_eq!(took(&begun, 0), 0);
}

#[test]
fn keys_that_cannot_be_read_are_awaited_alone() {
    let keys = |name| TableRequest {
        table: table(name),
        began_us: 0,
        rows: Wanted::Keys { keys: Vec::new() },
    };
    let chunks = wanted(&progress(&[("c", chunks(None))]), &Debts::new());
    let asked: Vec<_> = [keys("a"), keys("b")].into_iter().chain(chunks).collect();
    let (a, b, both) = ([table("a")], [table("b")], [table("a"), table("b")]);
    assert_eq!(awaited_keys(&asked, &[], true), both);
    assert_eq!(awaited_keys(&asked, &b, false), both);
    assert_eq!(awaited_keys(&asked, &b, true), a);
    assert_eq!(awaited_keys(&asked, &both, true), []);
}

#[test]
fn a_load_is_under_way_until_its_first_row_comes_or_capture_is_in_trouble_with_it() {
    let request = wanted(
        &progress(&[("a", copied()), ("b", pending())]),
        &Debts::new(),
    );
    let mut status = CopyStatus::new("asked".to_owned());
    status.estimates = vec![(table("b"), 1)];
    let under_way = |state, status: &CopyStatus| {
        load_under_way(&request, &progress(&[("b", state)]), status) != Load::None
    };
    assert!(under_way(pending(), &status));
    assert!(!under_way(loading(), &status));
    assert!(!under_way(copied(), &status));
    let another = CopyState::Pending {
        claim: Claim::default(),
        began_us: NOW_US + 1,
    };
    assert!(!under_way(another, &status));
    let mut in_trouble = status.clone();
    in_trouble.troubles = vec![(table("b"), "locked".to_owned())];
    assert!(!under_way(pending(), &in_trouble));
    in_trouble.troubles = vec![(table("c"), "locked".to_owned())];
    assert!(under_way(pending(), &in_trouble));
    // Capture leaves it out, or has told nothing yet.
    let mut left_out = status.clone();
    left_out.estimates = vec![(table("c"), 1)];
    assert!(!under_way(pending(), &left_out));
    let whole = status.clone();
    let mut cut = status;
    cut.cut = vec![table("b")];
    assert!(!under_way(pending(), &cut));
    // Its rows are on the copy stream, whatever else is told of it.
    let load =
        |status: &CopyStatus| load_under_way(&request, &progress(&[("b", pending())]), status);
    in_trouble.troubles = vec![(table("b"), "locked".to_owned())];
    let begins = Load::Begins {
        table: table("b"),
        began_us: NOW_US,
    };
    assert_eq!((load(&left_out), load(&whole)), (Load::None, begins));
    for status in [left_out, in_trouble] {
        let mut comes = status.clone();
        comes.loading = Some(table("b"));
        assert_eq!(load(&comes), Load::Comes);
        comes = status;
        comes.copied = vec![table("b")];
        assert_eq!(load(&comes), Load::Comes);
        comes.cut = vec![table("b")];
        assert_eq!(load(&comes), Load::None);
    }
}
