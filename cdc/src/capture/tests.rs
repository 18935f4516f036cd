use crate::frontier::ConfirmPolicy;

use super::*;

const XID: u32 = 77;
const MARK: u64 = 0xABCD;

fn machine() -> Capture {
    machine_of(HashMap::new())
}

fn machine_of(tables: HashMap<TableName, Vec<String>>) -> Capture {
    let settings = Settings {
        source: "shop".to_owned(),
        db: "db".to_owned(),
        epoch: 1,
        tables,
        selections: HashMap::new(),
        limits: MessageLimits {
            events: 10,
            bytes: 1 << 20,
            row_bytes: 1 << 20,
        },
        confirm: ConfirmPolicy::Acked,
    };
    let resume = Resume {
        last_seq: 0,
        tail: Position::ZERO,
        boundary: None,
        confirmed: Lsn::ZERO,
    };
    Capture::new(settings, resume, Duration::ZERO)
}

fn data(machine: &mut Capture, payload: &[u8]) {
    let input = Input::Data {
        start: Lsn::ZERO,
        sent_at_us: 0,
        payload,
    };
    machine.handle(input, Duration::ZERO).expect("is read");
}

fn begin(machine: &mut Capture, lsn: u64) {
    let head = [b"B", &lsn.to_be_bytes()[..], &[0; 8]].concat();
    data(machine, &[&head[..], &XID.to_be_bytes()].concat());
}

fn commit(machine: &mut Capture, lsn: u64, end: u64) {
    let head = [b"C\0", &lsn.to_be_bytes()[..], &end.to_be_bytes()].concat();
    data(machine, &[&head[..], &[0; 8]].concat());
}

fn keepalive(machine: &mut Capture, wal_end: u64) {
    let input = Input::Keepalive {
        wal_end: Lsn(wal_end),
        sent_at_us: 0,
    };
    machine.handle(input, Duration::ZERO).expect("is read");
}

#[test]
fn a_transaction_is_told_at_its_commit_with_its_mark_and_only_while_it_is_asked_for() {
    let mut machine = machine();
    begin(&mut machine, 100);
    commit(&mut machine, 100, 110);
    assert_eq!(machine.take_commits(), (Lsn(110), Vec::new()));
    // Asked for in its middle: it counts.
    begin(&mut machine, 200);
    machine.record_commits(true);
    let content = commits::mark_content(MARK);
    let head = [
        b"M\x01",
        &[0; 8][..],
        b"millrace.heartbeat\0",
        &[0, 0, 0, 16],
    ]
    .concat();
    data(&mut machine, &[&head[..], content.as_bytes()].concat());
    assert_eq!(machine.take_commits(), (Lsn(110), Vec::new()));
    commit(&mut machine, 200, 210);
    let committed = Committed {
        xid: XID,
        commit_lsn: Lsn(200),
        mark: Some(MARK),
    };
    assert_eq!(machine.take_commits(), (Lsn(210), vec![committed]));
    assert_eq!(machine.take_commits(), (Lsn(210), Vec::new()));
}

#[test]
fn the_end_of_the_wal_counts_as_read_only_between_transactions() {
    let mut machine = machine();
    keepalive(&mut machine, 150);
    assert_eq!(machine.take_commits().0, Lsn(150));
    begin(&mut machine, 200);
    // Its changes are still to come.
    keepalive(&mut machine, 250);
    assert_eq!(machine.take_commits().0, Lsn(150));
    commit(&mut machine, 200, 210);
    assert_eq!(machine.take_commits().0, Lsn(210));
}

fn relation(machine: &mut Capture, oid: u32, name: &str) {
    announce(machine, oid, name, &[]);
}

/// Announces a table with integer columns: a name, and whether the replica identity has it.
fn announce(machine: &mut Capture, oid: u32, name: &str, columns: &[(&str, bool)]) {
    let mut message = [b"R", &oid.to_be_bytes()[..], b"public\0", name.as_bytes()].concat();
    message.extend(b"\0d");
    message.extend(u16::try_from(columns.len()).expect("few").to_be_bytes());
    for (name, in_identity) in columns {
        message.push(u8::from(*in_identity));
        message.extend(name.as_bytes());
        message.extend([&[0][..], &23_u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat());
    }
    data(machine, &message);
}

/// Inserts a row of one column.
fn insert(machine: &mut Capture, oid: u32, value: Option<&str>) {
    let mut message = [b"I", &oid.to_be_bytes()[..], b"N\0\x01"].concat();
    match value {
        None => message.push(b'n'),
        Some(text) => {
            let length = u32::try_from(text.len()).expect("short");
            message.extend([b"t", &length.to_be_bytes()[..], text.as_bytes()].concat());
        }
    }
    data(machine, &message);
}

fn table(name: &str) -> TableName {
    TableName::new("public", name)
}

fn outputs(machine: &mut Capture) -> Vec<Output> {
    std::iter::from_fn(|| machine.poll()).collect()
}

#[test]
fn the_names_that_relations_have_are_told_although_the_stream_has_the_transaction() {
    let mut machine = machine();
    machine.skip_to = Position::new(1, Lsn(100), u32::MAX);
    for (lsn, name) in [(100, "t"), (200, "x")] {
        begin(&mut machine, lsn);
        relation(&mut machine, 7, name);
        let Some(Output::Named(named)) = machine.poll() else {
            panic!("nothing is told of {name}");
        };
        let expected = Named {
            oid: 7,
            name: table(name),
            commit_lsn: Lsn(lsn),
        };
        assert_eq!(named, expected);
        commit(&mut machine, lsn, lsn + 10);
    }
}

#[test]
fn what_is_left_out_is_told_although_the_stream_has_the_transaction() {
    let mut settings = machine().settings;
    for name in ["t", "u"] {
        settings.tables.insert(table(name), vec!["id".to_owned()]);
    }
    let resume = Resume {
        last_seq: 9,
        tail: Position::new(1, Lsn(100), u32::MAX),
        boundary: None,
        confirmed: Lsn::ZERO,
    };
    let mut machine = Capture::new(settings, resume, Duration::ZERO);
    begin(&mut machine, 100);
    // No key to tell its rows apart by; a key that was none; and one that is.
    announce(&mut machine, 7, "t", &[("id", false)]);
    announce(&mut machine, 8, "u", &[("id", true)]);
    outputs(&mut machine);
    insert(&mut machine, 7, Some("1"));
    insert(&mut machine, 8, None);
    insert(&mut machine, 8, Some("1"));
    data(&mut machine, b"T\0\0\0\x01\0\0\0\0\x07");
    commit(&mut machine, 100, 110);
    machine
        .handle(Input::EndOfBatch, Duration::ZERO)
        .expect("is read");
    let told: Vec<_> = outputs(&mut machine)
        .into_iter()
        .filter(|output| !matches!(output, Output::DescribeIfLost(_)))
        .map(|output| match output {
            Output::LeftOut(error, lsn) => (error.table().clone(), lsn),
            other => panic!("{other:?}"),
        })
        .collect();
    let at = |name| (table(name), Lsn(100));
    assert_eq!(told, [at("t"), at("u"), at("t")]);
}

#[test]
fn a_shape_is_described_before_the_first_change_that_the_stream_does_not_have() {
    let mut machine = machine_of(HashMap::from([(table("t"), vec!["id".to_owned()])]));
    machine.skip_to = Position::new(1, Lsn(100), u32::MAX);
    // How often it is described, and how often only where the broker has lost it.
    let describes = |machine: &mut Capture| {
        let outputs = outputs(machine);
        let count = |of: fn(&Output) -> bool| outputs.iter().filter(|output| of(output)).count();
        (
            count(|output| matches!(output, Output::Describe(_))),
            count(|output| matches!(output, Output::DescribeIfLost(_))),
        )
    };
    let truncate = [b"T", &[0, 0, 0, 1][..], b"\0", &[0, 0, 0, 7]].concat();
    begin(&mut machine, 100);
    announce(&mut machine, 7, "t", &[("id", true)]);
    assert_eq!(describes(&mut machine), (0, 0));
    insert(&mut machine, 7, Some("1"));
    data(&mut machine, &truncate);
    commit(&mut machine, 100, 110);
    assert_eq!(describes(&mut machine), (0, 1));
    for (lsn, expected) in [(200, (1, 0)), (300, (0, 0))] {
        begin(&mut machine, lsn);
        data(&mut machine, &truncate);
        insert(&mut machine, 7, Some("1"));
        commit(&mut machine, lsn, lsn + 10);
        assert_eq!(describes(&mut machine), expected);
    }
}
