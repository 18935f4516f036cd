use millrace_event::{Lsn, Position};
use millrace_sink::progress::Claim;

use super::*;

fn table() -> TableName {
    TableName::new("public", "t")
}

fn order(id: &str) -> BackfillOrder {
    BackfillOrder::new(id.to_owned(), table())
}

fn copied() -> CopyState {
    CopyState::Copied { lsn: Lsn(7) }
}

fn loading() -> CopyState {
    CopyState::Loading {
        lsn: Lsn(7),
        rows: 3,
        claim: Claim::default(),
        began_us: 0,
    }
}

fn chunks(order: Option<BackfillOrder>) -> CopyState {
    CopyState::Chunks(Chunks::begin(Position::new(1, Lsn(9), 0), order, 0))
}

fn adopts(id: &str) -> BackfillOrder {
    BackfillOrder {
        adopts: true,
        ..order(id)
    }
}

fn cancelled(order: BackfillOrder) -> BackfillOrder {
    BackfillOrder {
        cancelled: true,
        ..order
    }
}

fn paused(order: BackfillOrder) -> BackfillOrder {
    BackfillOrder {
        paused: true,
        ..order
    }
}

fn progress(state: CopyState) -> CopyProgress {
    let mut progress = CopyProgress::default();
    progress.tables.insert(table(), state);
    progress
}

fn with<T>(progress: &CopyProgress, act: impl FnOnce(&At<'_>) -> T) -> T {
    act(&At {
        sink: "wh",
        table: &table(),
        progress: Ok(Some(progress)),
    })
}

fn started(state: CopyState, orders: &[BackfillOrder]) -> Decision {
    with(&progress(state), |at| start(orders, at, &order("new")))
}

fn changed(state: CopyState, orders: &[BackfillOrder], change: Change) -> Decision {
    with(&progress(state), |at| {
        super::change(orders, at, change, "new".to_owned())
    })
}

fn code(decision: Decision) -> Code {
    decision.expect_err("refused").code
}

#[test]
fn a_whole_table_is_read_again() {
    let (orders, said) = started(copied(), &[]).expect("starts");
    assert_eq!(orders, [order("new")]);
    assert_eq!(said, "public.t at sink wh: backfill new is queued");
    let slow = BackfillOrder {
        rows_per_second: Some(5),
        ..order("new")
    };
    let said = with(&progress(copied()), |at| start(&[], at, &slow));
    assert!(said.expect("starts").1.ends_with("at most 5 rows/s"));
    // Orders of other tables stay, and one of this table that was carried out does not count.
    let other = BackfillOrder::new("other".to_owned(), TableName::new("public", "u"));
    let mut done = progress(copied());
    done.finished.insert("old".to_owned());
    let listed = [other.clone(), order("old")];
    let (orders, _) = with(&done, |at| start(&listed, at, &order("new"))).expect("starts");
    assert_eq!(orders, [other, order("old"), order("new")]);
}

#[test]
fn a_table_is_not_read_twice_at_once() {
    let own = || chunks(Some(order("a")));
    assert_eq!(code(started(copied(), &[order("a")])), Code::BackfillTwice);
    assert_eq!(code(started(own(), &[order("a")])), Code::BackfillTwice);
    assert_eq!(
        code(started(own(), &[paused(order("a"))])),
        Code::BackfillTwice
    );
    assert_eq!(code(started(own(), &[])), Code::BackfillTwice);
    assert_eq!(code(started(chunks(None), &[])), Code::BackfillTwice);
    // Behind one that ends; but what is owed does not end.
    let ending = [cancelled(order("a"))];
    for state in [own(), copied()] {
        let (orders, _) = started(state, &ending).expect("starts");
        assert_eq!(orders.len(), 2);
    }
    let owed = chunks(Some(adopts("a")));
    assert_eq!(code(started(owed, &ending)), Code::BackfillTwice);
}

#[test]
fn a_table_that_is_not_whole_is_not_read_again() {
    let claim = Claim::default();
    for state in [
        CopyState::Pending { claim, began_us: 0 },
        loading(),
        CopyState::Loaded { lsn: Lsn(7), claim },
        CopyState::Parked { lsn: Lsn(7), claim },
        CopyState::Lapsed { refused_at_us: 0 },
    ] {
        assert_eq!(code(started(state, &[])), Code::BackfillNotReady);
    }
    let mut at = At {
        sink: "wh",
        table: &table(),
        progress: Ok(None),
    };
    assert_eq!(code(start(&[], &at, &order("new"))), Code::BackfillNotReady);
    let empty = CopyProgress::default();
    at.progress = Ok(Some(&empty));
    assert_eq!(code(start(&[], &at, &order("new"))), Code::BackfillNotReady);
    let away = Condition::new(Code::SinkUnreachable, "away", "look");
    at.progress = Err(&away);
    assert_eq!(code(start(&[], &at, &order("new"))), Code::SinkUnreachable);
}

#[test]
fn an_order_is_paused_resumed_and_cancelled_once() {
    for state in [copied(), chunks(Some(order("a")))] {
        let (orders, said) = changed(state.clone(), &[order("a")], Change::Pause).expect("pauses");
        assert_eq!(orders, [paused(order("a"))]);
        assert!(said.ends_with(": paused"), "{said}");
        let (again, said) = changed(state.clone(), &orders, Change::Pause).expect("is paused");
        assert!(again == orders && said.ends_with("already"), "{said}");

        let (resumed, _) = changed(state.clone(), &orders, Change::Resume(None)).expect("goes on");
        assert_eq!(resumed, [order("a")]);
        let pace = Change::Resume(Some(Pace::RowsPerSecond(5)));
        let (slower, said) = changed(state.clone(), &resumed, pace).expect("is slower");
        assert_eq!(slower[0].rows_per_second, Some(5));
        assert!(said.ends_with("is not paused, at most 5 rows/s"), "{said}");
        let pace = Change::Resume(Some(Pace::Unlimited));
        let (fast, _) = changed(state.clone(), &slower, pace).expect("is fast");
        assert_eq!(fast, resumed);

        let (ended, _) = changed(state.clone(), &orders, Change::Cancel).expect("ends");
        assert_eq!(ended, [cancelled(paused(order("a")))]);
        let (again, said) = changed(state.clone(), &ended, Change::Cancel).expect("ends");
        assert!(again == ended && said.ends_with("already"), "{said}");
        assert_eq!(
            code(changed(state, &ended, Change::Pause)),
            Code::BackfillNone
        );
    }
}

#[test]
fn what_is_not_there_cannot_be_changed() {
    for change in [Change::Pause, Change::Resume(None), Change::Cancel] {
        assert_eq!(code(changed(copied(), &[], change)), Code::BackfillNone);
        assert_eq!(code(changed(loading(), &[], change)), Code::BackfillOwed);
        let mut done = progress(copied());
        done.finished.insert("a".to_owned());
        let decided = with(&done, |at| {
            super::change(&[order("a")], at, change, "new".to_owned())
        });
        assert_eq!(code(decided), Code::BackfillNone);
    }
}

#[test]
fn what_began_by_itself_is_held_and_paced_and_not_cancelled() {
    let (orders, _) = changed(chunks(None), &[], Change::Pause).expect("pauses");
    assert_eq!(orders, [paused(adopts("new"))]);
    let pace = Change::Resume(Some(Pace::RowsPerSecond(5)));
    let (orders, _) = changed(chunks(None), &[], pace).expect("is slower");
    assert!(orders[0].adopts && orders[0].rows_per_second == Some(5));
    let (orders, said) = changed(chunks(None), &[], Change::Resume(None)).expect("as before");
    assert!(orders.is_empty() && said.ends_with("is not paused"));
    for (state, listed) in [
        (chunks(None), vec![]),
        (chunks(None), vec![order("a")]),
        (chunks(Some(adopts("a"))), vec![]),
        (chunks(Some(adopts("a"))), vec![adopts("a")]),
        (copied(), vec![adopts("a")]),
    ] {
        assert_eq!(
            code(changed(state, &listed, Change::Cancel)),
            Code::BackfillOwed
        );
    }
}

#[test]
fn a_list_that_was_lost_is_written_again() {
    let state = chunks(Some(order("a")));
    let (orders, _) = changed(state.clone(), &[], Change::Cancel).expect("ends");
    assert_eq!(orders, [cancelled(order("a"))]);
    let (orders, _) = changed(state, &[], Change::Pause).expect("pauses");
    assert_eq!(orders, [paused(order("a"))]);
}

#[test]
fn one_refusal_keeps_everything_as_it_was() {
    let before = [order("a")];
    let mut decided = Decided::from(&before);
    decided.note(Ok((vec![], "changed".to_owned())));
    assert_eq!(decided.lines(), "changed\n");
    decided.note(Err(Condition::new(Code::BackfillTwice, "twice", "wait")));
    let decided = decided.all_or_nothing(&before);
    assert_eq!(decided.orders, before);
    assert!(decided.said.is_empty() && decided.refused.len() == 1);
}

#[test]
fn orders_of_one_command_differ() {
    assert_ne!(new_id(5, 0), new_id(5, 1));
    assert_ne!(new_id(5, 0), new_id(6, 0));
}
