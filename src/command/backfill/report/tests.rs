use millrace_config::Code;
use millrace_event::{Lsn, Position, TableName};
use millrace_sink::progress::{Claim, CopyProgress};

use super::*;

const BEGAN_US: i64 = 1_000_000_000;

fn table() -> TableName {
    TableName::new("public", "t")
}

fn order(id: &str) -> BackfillOrder {
    BackfillOrder::new(id.to_owned(), table())
}

fn chunks(rows: u64, order: Option<BackfillOrder>) -> CopyState {
    CopyState::Chunks(Chunks {
        rows,
        ..Chunks::begin(Position::new(1, Lsn(9), 0), order, BEGAN_US)
    })
}

fn told(orders: &[BackfillOrder], estimate: u64, trouble: Option<&str>) -> Told {
    let mut status = CopyStatus::new("r".to_owned());
    status.estimates.push((table(), estimate));
    status
        .troubles
        .extend(trouble.map(|reason| (table(), reason.to_owned())));
    Told {
        orders: orders.to_vec(),
        status: Some(status),
    }
}

/// A line 10 s after chunks began.
fn line(state: Option<CopyState>, told: &Told, estimate: Option<u64>) -> Line {
    line_where(state, told, estimate, |_| {})
}

/// The same where more is known.
fn line_where(
    state: Option<CopyState>,
    told: &Told,
    estimate: Option<u64>,
    known: impl FnOnce(&mut Known<'_>),
) -> Line {
    let mut progress = CopyProgress::default();
    progress.tables.extend(state.map(|state| (table(), state)));
    let mut all = Known {
        at: At {
            sink: "wh",
            table: &table(),
            progress: Ok(Some(&progress)),
        },
        told,
        estimate,
        filtered: false,
        held: None,
        now_us: BEGAN_US + 10_000_000,
    };
    known(&mut all);
    all.line()
}

#[test]
fn progress_has_a_pace_and_an_end() {
    let told = told(&[order("o")], 10_000, None);
    let line = line(Some(chunks(2_500, Some(order("o")))), &told, Some(7));
    assert_eq!(line.state, Stage::Chunks);
    assert_eq!(line.percent, Some(25.0));
    assert_eq!(line.rows_per_second, Some(250.0));
    assert_eq!(line.eta_seconds, Some(30));
    assert_eq!(line.order.as_deref(), Some("o"));
    assert_eq!(line.rows_text(), "2500 of about 10000 (25.0 %)");
    assert_eq!(
        line.in_words(),
        "public.t at sink wh: chunks, 2500 of about 10000 (25.0 %) rows, 250 rows/s, 30s left"
    );
}

#[test]
fn an_estimate_that_was_passed_promises_nothing() {
    let nothing = Told::default();
    let line = line(Some(chunks(2_500, None)), &nothing, Some(2_000));
    assert_eq!((line.percent, line.eta_seconds), (Some(99.9), None));
    assert_eq!(line.order, None);
}

#[test]
fn a_part_of_a_table_has_no_estimate() {
    let part = BackfillOrder {
        filter: Some("id > 3".to_owned()),
        rows_per_second: Some(5),
        ..order("o")
    };
    let told = told(std::slice::from_ref(&part), 10_000, None);
    let line = line(Some(chunks(2_500, Some(part))), &told, Some(10_000));
    assert_eq!(
        (line.of, line.percent, line.eta_seconds),
        (None, None, None)
    );
    assert_eq!(line.rows_per_second, Some(250.0));
    assert_eq!(line.details(), "order o, at most 5 rows/s, where id > 3");
}

#[test]
fn a_table_that_is_captured_in_part_has_no_estimate() {
    let told = told(&[order("o")], 10_000, None);
    let running = || Some(chunks(2_500, Some(order("o"))));
    let line = line_where(running(), &told, Some(10_000), |known| {
        known.filtered = true;
    });
    assert_eq!(
        (line.of, line.percent, line.eta_seconds),
        (None, None, None)
    );
    assert_eq!(line.rows_per_second, Some(250.0));
}

#[test]
fn a_pause_is_not_counted() {
    let told = told(&[order("o")], 10_000, None);
    let paused = BackfillOrder {
        paused: true,
        ..order("o")
    };
    let begun = Chunks::begin(
        Position::new(1, Lsn(9), 0),
        Some(order("o")),
        BEGAN_US - 3_600_000_000,
    );
    // 5 s, an hour's pause, and 5 s until now.
    let resumed = Chunks {
        rows: 2_500,
        ..begun
    }
    .ordered(Some(paused.clone()), BEGAN_US - 3_595_000_000)
    .ordered(Some(order("o")), BEGAN_US + 5_000_000);
    let going = line(Some(CopyState::Chunks(resumed.clone())), &told, None);
    assert_eq!(
        (going.rows_per_second, going.eta_seconds),
        (Some(250.0), Some(30))
    );
    // While it is paused its pace stays what it was.
    let held = resumed.ordered(Some(paused), BEGAN_US + 5_000_000);
    let held = line_where(Some(CopyState::Chunks(held)), &told, None, |known| {
        known.now_us += 86_400_000_000;
    });
    assert_eq!(
        (held.state, held.rows_per_second, held.eta_seconds),
        (Stage::Chunks, Some(500.0), Some(15))
    );
}

#[test]
fn the_states_are_told_apart() {
    let claim = Claim::default();
    let nothing = Told::default();
    let lsn = Lsn(1);
    let loading = CopyState::Loading {
        lsn,
        rows: 5,
        claim,
        began_us: 0,
    };
    let copied = || Some(CopyState::Copied { lsn });
    for (state, stage) in [
        (None, Stage::New),
        (
            Some(CopyState::Pending { claim, began_us: 0 }),
            Stage::Queued,
        ),
        (Some(loading), Stage::Loading),
        (Some(CopyState::Loaded { lsn, claim }), Stage::CatchingUp),
        (Some(CopyState::Parked { lsn, claim }), Stage::Parked),
        (copied(), Stage::Done),
    ] {
        assert_eq!(line(state, &nothing, None).state, stage);
    }
    let paused = BackfillOrder {
        paused: true,
        ..order("o")
    };
    let cancelled = BackfillOrder {
        cancelled: true,
        ..order("o")
    };
    let running = || Some(chunks(1, Some(order("o"))));
    for (state, listed, stage) in [
        (copied(), order("o"), Stage::Queued),
        (copied(), paused.clone(), Stage::Paused),
        (copied(), cancelled.clone(), Stage::Done),
        // The sink has not read the list yet.
        (running(), paused, Stage::Paused),
        (running(), cancelled.clone(), Stage::Cancelling),
    ] {
        assert_eq!(line(state, &told(&[listed], 0, None), None).state, stage);
    }
    // A new one waits behind the one that ends.
    let listed = [cancelled, order("p")];
    let line = line(running(), &told(&listed, 0, None), None);
    assert_eq!(line.state, Stage::Cancelling);
    assert_eq!(line.order.as_deref(), Some("o"));
}

#[test]
fn what_waits_says_why() {
    let told = told(&[], 0, Some("a transaction is open"));
    let waiting = line(Some(chunks(0, None)), &told, None);
    assert_eq!(waiting.reason.as_deref(), Some("a transaction is open"));
    let done = line(Some(CopyState::Copied { lsn: Lsn(1) }), &told, None);
    assert_eq!(done.reason, None);
}

#[test]
fn a_sink_that_is_far_behind_says_why_nothing_comes() {
    let told = told(&[], 0, Some("a transaction is open"));
    let late = |state, told: &Told| {
        line_where(Some(state), told, None, |known| {
            known.held = Some(super::super::held::LATE);
        })
    };
    let nothing = Told::default();
    let claim = Claim::default();
    let began_us = BEGAN_US;
    for waiting in [chunks(5, None), CopyState::Pending { claim, began_us }] {
        let waiting = late(waiting, &nothing);
        assert_eq!(waiting.reason.as_deref(), Some(super::super::held::LATE));
        assert!(waiting.in_words().contains("30 s behind"));
    }
    let bound = format!("{} s", millrace_sink::late::LAG_MAX_US / 1_000_000);
    assert!(super::super::held::LATE.contains(&bound), "{bound}");
    // What the table itself waits for says more.
    let own = late(chunks(5, None), &told);
    assert_eq!(own.reason.as_deref(), Some("a transaction is open"));
    let done = late(CopyState::Copied { lsn: Lsn(1) }, &nothing);
    assert_eq!(done.reason, None);
}

#[test]
fn the_json_has_the_names_that_others_rely_on() {
    let away = Condition::new(Code::SinkUnreachable, "no route", "look");
    let report = Report {
        backfills: vec![line(
            Some(chunks(2_500, Some(order("o")))),
            &told(&[order("o")], 10_000, None),
            None,
        )],
        unreachable: vec![Unreachable::new("sink archive", &away)],
    };
    let json = serde_json::to_value(&report).expect("json");
    let line = &json["backfills"][0];
    assert_eq!(line["table"], "public.t");
    assert_eq!(line["sink"], "wh");
    assert_eq!(line["state"], "chunks");
    assert_eq!(line["rows"], 2_500);
    assert_eq!(line["of"], 10_000);
    assert_eq!(line["percent"], 25.0);
    assert_eq!(line["rows_per_second"], 250.0);
    assert_eq!(line["eta_seconds"], 30);
    assert_eq!(line["order"], "o");
    assert!(line["where"].is_null() && line["rate"].is_null() && line["reason"].is_null());
    assert_eq!(json["unreachable"][0]["code"], "E1301");
    let text = report.render();
    assert!(
        text.starts_with("TABLE") || text.starts_with(" TABLE"),
        "{text}"
    );
    assert!(text.contains("2500 of about 10000 (25.0 %)"), "{text}");
    assert!(
        text.contains("sink archive does not answer: E1301: no route"),
        "{text}"
    );
}

#[test]
fn a_long_condition_is_cut_on_one_line() {
    assert_eq!(shown("a\n  > 3"), "a > 3");
    let cut = shown(&"ä".repeat(100));
    assert_eq!(cut.chars().count(), FILTER_SHOWN_MAX + 2);
}
