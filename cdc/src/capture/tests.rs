use crate::frontier::ConfirmPolicy;

use super::*;

const XID: u32 = 77;
const MARK: u64 = 0xABCD;

fn machine() -> Capture {
    let settings = Settings {
        source: "shop".to_owned(),
        db: "db".to_owned(),
        epoch: 1,
        tables: HashMap::new(),
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
    let head = [b"R", &oid.to_be_bytes()[..], b"public\0", name.as_bytes()].concat();
    data(machine, &[&head[..], b"\0d", &[0; 2]].concat());
}

#[test]
fn the_names_that_relations_have_are_told_where_the_stream_does_not_have_the_transaction() {
    let mut machine = machine();
    machine.skip_to = Position::new(1, Lsn(100), u32::MAX);
    begin(&mut machine, 100);
    relation(&mut machine, 7, "t");
    commit(&mut machine, 100, 110);
    assert!(machine.poll().is_none());
    begin(&mut machine, 200);
    relation(&mut machine, 7, "x");
    let Some(Output::Named(named)) = machine.poll() else {
        panic!("nothing is told");
    };
    let expected = Named {
        oid: 7,
        name: TableName::new("public", "x"),
        commit_lsn: Lsn(200),
    };
    assert_eq!(named, expected);
}
