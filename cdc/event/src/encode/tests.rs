//! Golden payloads, one a kind of event, and their way back.

use std::path::PathBuf;

use super::*;
use crate::{Value, decode};

fn orders() -> Relation {
    let column = |name, type_oid| ColumnShape {
        name,
        type_oid,
        typmod: -1,
    };
    let columns = [
        column("id", 20),
        column("note", 25),
        column("tags", 1009),
        column("doc", 3802),
    ];
    Relation::new(
        "shop",
        "shopdb",
        TableName::new("public", "orders"),
        &columns,
        vec![0],
    )
}

fn line(change: &Change<'_>, end: LineEnd) -> String {
    let transaction = Transaction::new(1, Lsn(0x16B_3748), 734, 1_700_000_000_123_456);
    let mut out = Vec::new();
    write_change(&mut out, &orders(), &transaction, change).unwrap();
    write_line_end(&mut out, end);
    String::from_utf8(out).unwrap()
}

fn check(name: &str, payload: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/{name}.json"));
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(&path, format!("{payload}\n")).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(expected.trim_end(), payload, "{}", path.display());
}

const NEW: [Datum<'static>; 4] = [
    Datum::Text(b"7"),
    Datum::Text(b"a \"note\""),
    Datum::Text(b"{x,NULL}"),
    Datum::Text(b"{\"k\": null}"),
];
const KEY: [Datum<'static>; 4] = [Datum::Text(b"6"), Datum::Null, Datum::Null, Datum::Null];
const PARTIAL: [Datum<'static>; 4] = [
    Datum::Text(b"7"),
    Datum::Null,
    Datum::Text(b"{}"),
    Datum::Unchanged,
];

fn change<'a>(op: Op, before: Before<'a>, after: Option<&'a [Datum<'a>]>) -> Change<'a> {
    let key = match (op, before) {
        (Op::Truncate, _) => None,
        (Op::Delete, Before::Key(row) | Before::Row(row)) => Some(row),
        _ => after,
    };
    let seq = if op == Op::Read { 0 } else { 3 };
    Change {
        op,
        before,
        after,
        key,
        seq,
        lsn: Lsn(0x16B_3700),
        sent_at_us: 1_700_000_000_125_000,
    }
}

#[test]
fn golden_payloads_and_their_way_back() {
    for (name, change, end) in [
        (
            "create",
            change(Op::Create, Before::None, Some(&NEW)),
            LineEnd::More,
        ),
        (
            "create_last",
            change(Op::Create, Before::None, Some(&NEW)),
            LineEnd::Last(Lsn(0x16B_3778)),
        ),
        (
            "update",
            change(Op::Update, Before::None, Some(&NEW)),
            LineEnd::More,
        ),
        (
            "update_full_identity",
            change(Op::Update, Before::Row(&NEW), Some(&NEW)),
            LineEnd::More,
        ),
        (
            "update_unchanged_toast",
            change(Op::Update, Before::None, Some(&PARTIAL)),
            LineEnd::More,
        ),
        (
            "key_change_create",
            change(Op::Create, Before::Key(&KEY), Some(&PARTIAL)),
            LineEnd::More,
        ),
        (
            "delete",
            change(Op::Delete, Before::Key(&KEY), None),
            LineEnd::More,
        ),
        (
            "read",
            change(Op::Read, Before::None, Some(&NEW)),
            LineEnd::More,
        ),
        (
            "truncate",
            change(Op::Truncate, Before::None, None),
            LineEnd::Last(Lsn(0x16B_3778)),
        ),
    ] {
        let payload = line(&change, end);
        check(name, &payload);
        let events: Vec<_> = decode(payload.as_bytes())
            .collect::<Result<_, _>>()
            .unwrap();
        let [event] = &events[..] else {
            panic!("{name}: one line is one event")
        };
        assert_eq!(event.op, change.op);
        assert_eq!(
            event.source.version,
            Version::new(1, Lsn(0x16B_3748), change.seq)
        );
        assert_eq!(event.source.table_version, orders().version());
        assert_eq!(
            event.source.table_name(),
            TableName::new("public", "orders")
        );
        assert_eq!(event.source.last, end != LineEnd::More);
        assert_eq!(
            event.source.end_lsn,
            (end != LineEnd::More).then_some(Lsn(0x16B_3778))
        );
        assert_eq!(event.source.snapshot, change.op == Op::Read);
        assert_eq!(event.source.tx_id, 734);
        assert_eq!(event.ts_ms, 1_700_000_000_125);
        assert_eq!(event.key.is_none(), change.op == Op::Truncate);
    }
}

#[test]
fn unchanged_columns_are_listed_and_absent() {
    let payload = line(
        &change(Op::Update, Before::None, Some(&PARTIAL)),
        LineEnd::More,
    );
    let event = crate::decode_line(payload.as_bytes()).unwrap();
    assert_eq!(event.unchanged, ["doc"]);
    let after = event.after.unwrap();
    assert_eq!(after.get("doc"), None);
    assert_eq!(after.get("note"), Some(&Value::Null));
    assert_eq!(after.get("tags").and_then(Value::as_text), Some("{}"));
}

#[test]
fn a_value_that_is_not_utf8_names_its_column() {
    let mut row = NEW;
    row[1] = Datum::Text(b"\xff");
    let transaction = Transaction::new(1, Lsn(1), 1, 0);
    let error = write_change(
        &mut Vec::new(),
        &orders(),
        &transaction,
        &change(Op::Create, Before::None, Some(&row)),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "column \"note\" of table public.orders: value cannot be written"
    );
}

#[test]
fn control_messages_have_a_golden_payload() {
    use crate::{Control, ControlKind, Position, StreamOrigin};
    let origin = StreamOrigin {
        system_id: "7".to_owned(),
        timeline: 1,
        slot: "millrace_shop".to_owned(),
    };
    for (name, kind, seq, origin) in [
        ("control_start", ControlKind::Start, 0, Some(origin)),
        ("control_heartbeat", ControlKind::Heartbeat, u32::MAX, None),
        ("control_progress", ControlKind::Progress, 0, None),
    ] {
        let position = Position::new(1, Lsn(0x16B_3748), seq);
        let control = Control {
            kind,
            position,
            end_lsn: Lsn(0x16B_3778),
            ts_us: 1_700_000_000_123_456,
            origin,
        };
        let payload = serde_json::to_string(&control).unwrap();
        check(name, &payload);
        assert_eq!(serde_json::from_str::<Control>(&payload).unwrap(), control);
    }
}
