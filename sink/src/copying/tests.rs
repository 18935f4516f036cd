use std::collections::BTreeMap;

use millrace_event::work::{BackfillOrder, TableRequest};
use millrace_event::{Lsn, Position, decode};

use super::*;
use crate::batch::{Action, RowOp, Step};
use crate::progress::{Chunks, Claim};
use crate::row::LayoutColumn;

const LIMITS: BatchLimits = BatchLimits {
    rows: 3,
    bytes: 1 << 20,
};

fn name() -> TableName {
    TableName::new("public", "t")
}

fn layout() -> Arc<TableLayout> {
    let column = |name: &str| LayoutColumn {
        source: name.to_owned(),
        target: name.to_owned(),
        cast: "text".to_owned(),
    };
    Arc::new(TableLayout {
        source: name(),
        target: name(),
        columns: vec![column("id"), column("v")],
        key: vec![0],
        shape: "0".to_owned(),
    })
}

/// When the copies of these tests began.
const BEGAN_US: i64 = 5;

fn pending(claim: Claim) -> CopyState {
    let began_us = BEGAN_US;
    CopyState::Pending { claim, began_us }
}

fn machine(rows: Wanted, state: CopyState) -> Copying {
    let request = CopyRequest {
        id: "r".to_owned(),
        tables: vec![TableRequest {
            table: name(),
            began_us: BEGAN_US,
            rows,
        }],
        binary: Vec::new(),
    };
    let progress = CopyProgress {
        tables: BTreeMap::from([(name(), state)]),
        ..CopyProgress::default()
    };
    let mut machine = Copying::new(request, LIMITS, HashMap::new(), progress);
    machine.set_layout(layout());
    machine
}

fn chunks(order: Option<BackfillOrder>) -> CopyState {
    CopyState::Chunks(Chunks::begin(Position::new(1, Lsn(10), 0), order, BEGAN_US))
}

fn all_chunks() -> Wanted {
    Wanted::Chunks {
        after: None,
        filter: None,
        rows_per_second: None,
        paused: false,
    }
}

fn mark(number: u64) -> CopyMark<'static> {
    CopyMark {
        request: "r",
        attempt: 1,
        number,
    }
}

fn row(machine: &mut Copying, number: u64, id: u64, lsn: u64) -> Result<(), CopyError> {
    let version = Version::new(1, Lsn(lsn), 0);
    let line: Bytes = format!(
        r#"{{"op":"r","before":null,"after":{{"id":{id},"v":"x"}},"key":{{"id":{id}}},"ts_ms":1,"source":{{"name":"s","db":"d","schema":"public","table":"t","table_version":"0","snapshot":"true","txId":1,"ts_us":1,"version":"{version}","lsn":1}}}}"#
    )
    .into();
    let events: Vec<_> = decode(&line)
        .collect::<Result<_, _>>()
        .expect("well formed");
    machine.handle(Input::Rows {
        mark: mark(number),
        payload: &line,
        events: &events,
    })
}

fn end(machine: &mut Copying, number: u64, part: Part) {
    end_of(machine, number, 20, part);
}

fn end_of(machine: &mut Copying, number: u64, lsn: u64, part: Part) {
    let copied = Copied {
        table: name(),
        epoch: 1,
        lsn: Lsn(lsn),
        rows: 1,
        part,
    };
    machine
        .handle(Input::Copied {
            mark: mark(number),
            copied: &copied,
        })
        .expect("is the next one");
}

fn ops(batch: &Batch) -> Vec<&RowOp> {
    let rows = batch.steps.iter().filter_map(|step| match step {
        Step::Rows(tables) => Some(tables.iter().flat_map(|table| &table.rows)),
        _ => None,
    });
    rows.flatten().collect()
}

fn sweep(batch: &Batch) -> Option<Version> {
    batch.steps.iter().find_map(|step| match step {
        Step::Sweep { below, .. } => Some(*below),
        _ => None,
    })
}

#[test]
fn a_load_ends_where_its_changes_begin() {
    let claim = Claim {
        stream_seq: 5,
        position: Position::new(1, Lsn(10), 0),
    };
    let mut machine = machine(Wanted::Load, pending(claim));
    row(&mut machine, 1, 1, 20).expect("comes first");
    let at = Checkpoint::default();
    assert!(machine.poll(at, false).is_none(), "more is waiting");
    let batch = machine.poll(at, true).expect("nothing more is waiting");
    let stored = batch.copy.as_ref().expect("goes with the rows");
    let (lsn, rows) = (Lsn(20), 1);
    let loading = CopyState::Loading {
        lsn,
        rows,
        claim,
        began_us: BEGAN_US,
    };
    assert_eq!(stored.tables[&name()], loading);
    let reading = stored.reading.as_ref().expect("says where it is");
    assert_eq!((reading.attempt, reading.number), (1, 1));
    end(&mut machine, 2, Part::Load);
    let batch = machine.poll(at, true).expect("the end");
    let loaded = CopyState::Loaded { lsn, claim };
    assert_eq!(
        batch.copy.as_ref().expect("is stored").tables[&name()],
        loaded
    );
    assert_eq!(sweep(&batch), Some(Version::new(1, Lsn(20), 0)));
    assert!(machine.poll(at, true).is_none());
}

#[test]
fn chunks_go_on_where_they_were_and_end_with_a_sweep_of_what_none_of_them_brought() {
    let mut machine = machine(all_chunks(), chunks(None));
    let at = Checkpoint::default();
    row(&mut machine, 1, 1, 20).expect("comes first");
    let after = Some(vec!["1".to_owned()]);
    end(
        &mut machine,
        2,
        Part::Chunk {
            after: after.clone(),
            last: false,
        },
    );
    let batch = machine.poll(at, true).expect("a chunk");
    let stored = batch.copy.expect("goes with the rows");
    let CopyState::Chunks(state) = &stored.tables[&name()] else {
        panic!("{stored:?}")
    };
    assert_eq!((&state.after, state.rows), (&after, 1));

    // Another request goes on behind it, and counts anew.
    let mut machine = self::machine(all_chunks(), stored.tables[&name()].clone());
    let last = Part::Chunk {
        after: None,
        last: true,
    };
    end_of(&mut machine, 1, 30, last);
    let batch = machine.poll(at, true).expect("the end");
    // The first chunk's rows may be as old as where its request began. A row that the stream brought after the sink
    // took the order, and before that, is none of the source's if no chunk has it.
    assert!(stored.uncovered_below(&name()) < Version::new(1, Lsn(20), 0));
    assert_eq!(sweep(&batch), Some(Version::new(1, Lsn(20), 0)));
    let stored = batch.copy.expect("is stored");
    assert!(matches!(stored.tables[&name()], CopyState::Copied { .. }));
}

#[test]
fn a_sweep_never_passes_what_each_chunk_warrants() {
    let last = || Part::Chunk {
        after: None,
        last: true,
    };
    let swept = |state: Chunks, lsns: &[u64]| {
        let mut machine = machine(all_chunks(), CopyState::Chunks(state));
        for (number, lsn) in (1..).zip(lsns) {
            let after = Some(vec![number.to_string()]);
            let part = Part::Chunk { after, last: false };
            end_of(&mut machine, number, *lsn, part);
        }
        end_of(&mut machine, lsns.len() as u64 + 1, 40, last());
        sweep(&machine.poll(Checkpoint::default(), true).expect("the end"))
    };
    let fresh = || Chunks::begin(Position::new(1, Lsn(10), 0), None, BEGAN_US);
    let below = |lsn| Some(Version::new(1, Lsn(lsn), 0));
    assert_eq!(swept(fresh(), &[]), below(40));
    assert_eq!(swept(fresh(), &[30, 20, 35]), below(20));
    // What was there when it began goes in any case.
    assert_eq!(swept(fresh(), &[5]), Some(fresh().lower));
    // Of chunks that an older release took nobody knows what they warrant.
    let older = Chunks {
        after: Some(vec!["0".to_owned()]),
        ..fresh()
    };
    assert_eq!(swept(older, &[30, 20]), Some(fresh().lower));
}

#[test]
fn rows_that_outlive_their_delete_outlive_a_copy() {
    let mut kept = machine(all_chunks(), chunks(None));
    kept.keeps.insert(name(), Keeps::Truncated);
    let last = || Part::Chunk {
        after: None,
        last: true,
    };
    end(&mut kept, 1, last());
    let keeps = |machine: &mut Copying| {
        let batch = machine.poll(Checkpoint::default(), true).expect("the end");
        let mut steps = batch.steps.into_iter();
        steps.find_map(|step| match step {
            Step::Sweep { keeps_rows, .. } => Some(keeps_rows),
            _ => None,
        })
    };
    assert_eq!(keeps(&mut kept), Some(true));
    let mut others = machine(all_chunks(), chunks(None));
    end(&mut others, 1, last());
    assert_eq!(keeps(&mut others), Some(false));
}

#[test]
fn rows_of_a_copy_that_was_given_up_do_not_complete_the_next_one() {
    let at = Checkpoint::default();
    let anew = |state| match state {
        CopyState::Chunks(chunks) => CopyState::Chunks(Chunks {
            began_us: BEGAN_US + 1,
            ..chunks
        }),
        CopyState::Pending { claim, .. } => CopyState::Pending {
            claim,
            began_us: BEGAN_US + 1,
        },
        other => other,
    };
    let last = Part::Chunk {
        after: None,
        last: true,
    };
    for (wanted, state, part) in [
        (all_chunks(), chunks(None), last),
        (Wanted::Load, pending(Claim::default()), Part::Load),
    ] {
        let mut machine = machine(wanted, anew(state.clone()));
        row(&mut machine, 1, 2, 20).expect("is ours");
        end(&mut machine, 2, part);
        let batch = machine.poll(at, true).expect("its place is stored");
        assert!(ops(&batch).is_empty());
        assert_eq!(sweep(&batch), None);
        let stored = batch.copy.expect("is stored");
        assert_eq!(stored.tables[&name()], anew(state));
    }
}

#[test]
fn chunks_of_a_part_of_a_table_sweep_nothing() {
    let order = BackfillOrder {
        filter: Some("id < 5".to_owned()),
        ..BackfillOrder::new("o".to_owned(), name())
    };
    let mut machine = machine(all_chunks(), chunks(Some(order)));
    end(
        &mut machine,
        1,
        Part::Chunk {
            after: None,
            last: true,
        },
    );
    let batch = machine.poll(Checkpoint::default(), true).expect("the end");
    assert_eq!(sweep(&batch), None);
    assert!(batch.copy.expect("is stored").finished.contains("o"));
}

#[test]
fn a_key_without_a_row_is_gone() {
    let keys = vec![vec!["1".to_owned()], vec!["2".to_owned()]];
    let wanted = || Wanted::Keys { keys: keys.clone() };
    let copied = || CopyState::Copied { lsn: Lsn(3) };
    let mut heal = machine(wanted(), copied());
    row(&mut heal, 1, 2, 25).expect("comes first");
    end(&mut heal, 2, Part::Keys);
    let batch = heal.poll(Checkpoint::default(), true).expect("the rows");
    let mut ops = ops(&batch);
    ops.sort_by(|a, b| a.key.cmp(&b.key));
    assert_eq!(ops.len(), 2);
    assert!(matches!(ops[0].action, Action::Delete { .. }));
    assert_eq!(ops[0].version, Version::new(1, Lsn(20), 0));
    assert!(matches!(ops[1].action, Action::Put(_)));
    assert_eq!(
        batch.copy.as_ref().expect("is stored").tables[&name()],
        copied()
    );

    // Where rows outlive their delete at the source, nothing is known of one that is not there.
    let mut heal = machine(wanted(), copied());
    heal.keeps.insert(name(), Keeps::Deleted);
    end(&mut heal, 1, Part::Keys);
    let batch = heal.poll(Checkpoint::default(), true).expect("the end");
    assert!(self::ops(&batch).is_empty());
}

#[test]
fn rows_that_were_asked_for_in_another_way_are_left_alone() {
    let at = Checkpoint::default();
    // The load was cut, and its last rows are still on the copy stream.
    let mut machine = machine(Wanted::Load, chunks(None));
    row(&mut machine, 1, 1, 20).expect("is ours");
    end(&mut machine, 2, Part::Load);
    let batch = machine.poll(at, true).expect("only says where it is");
    assert!(batch.steps.is_empty());
    assert!(matches!(
        batch.copy.expect("is stored").tables[&name()],
        CopyState::Chunks(_)
    ));
}

#[test]
fn a_missing_message_is_noticed_and_a_repeated_one_is_not_taken_twice() {
    let mut machine = machine(all_chunks(), chunks(None));
    row(&mut machine, 1, 1, 20).expect("comes first");
    row(&mut machine, 1, 9, 20).expect("is a repetition");
    let error = row(&mut machine, 3, 3, 20).expect_err("2 is missing");
    assert!(matches!(
        error,
        CopyError::Gap {
            expected: 2,
            found: 3
        }
    ));
    let batch = machine
        .poll(Checkpoint::default(), true)
        .expect("the first");
    assert_eq!(ops(&batch).len(), 1);
}

#[test]
fn a_full_batch_does_not_wait_for_more() {
    let mut machine = machine(all_chunks(), chunks(None));
    for number in 1..=3 {
        assert!(machine.poll(Checkpoint::default(), false).is_none());
        row(&mut machine, number, number, 20).expect("is the next");
    }
    assert!(machine.is_full());
    let batch = machine.poll(Checkpoint::default(), false).expect("is full");
    assert_eq!(ops(&batch).len(), 3);
}
