use super::*;

#[test]
fn copy_progress_round_trips_as_json() {
    let stream = "2026-11-21T00:00:00Z".to_owned();
    let claim = Claim {
        stream_seq: 5,
        position: Position::new(1, Lsn(16), 2),
    };
    let order = BackfillOrder {
        filter: Some("id > 5".into()),
        ..BackfillOrder::new("o".into(), TableName::new("a", "f"))
    };
    let tables = BTreeMap::from([
        (
            TableName::new("a", "b"),
            CopyState::Pending { claim, began_us: 7 },
        ),
        (
            TableName::new("a", "c"),
            CopyState::Loading {
                lsn: Lsn(17),
                rows: 3,
                claim,
                began_us: 7,
            },
        ),
        (
            TableName::new("a", "d"),
            CopyState::Copied {
                lsn: Lsn(0x1_0000_0001),
            },
        ),
        (
            TableName::new("a", "e"),
            CopyState::Lapsed { refused_at_us: 7 },
        ),
        (
            TableName::new("a", "f"),
            CopyState::Chunks(Chunks::begin(claim.position, Some(order), 8)),
        ),
    ]);
    let progress = CopyProgress {
        stream,
        copied_to: Version::new(1, Lsn(0x1_0000_0001), 0),
        reading: Some(Reading {
            request: "r".into(),
            attempt: 2,
            number: 9,
        }),
        finished: BTreeSet::from(["done".to_owned()]),
        tables,
        left: BTreeSet::from([TableName::new("a", "g")]),
        shapes: BTreeMap::from([(TableName::new("a", "d"), "0f".to_owned())]),
    };
    let json = serde_json::to_string(&progress).expect("is well formed");
    assert!(
        json.contains(r#"{"schema":"a","table":"d","state":"copied","lsn":"1/1"}"#),
        "{json}"
    );
    assert_eq!(
        serde_json::from_str::<CopyProgress>(&json).expect("is well formed"),
        progress
    );
    assert!(!progress.is_complete());
    let covers =
        |table, lsn| progress.covers(&TableName::new("a", table), Version::new(1, Lsn(lsn), 1));
    assert!(covers("d", 0x1_0000_0000));
    assert!(!covers("d", 0x1_0000_0001));
    assert!(!covers("c", 1));
}

#[test]
fn deletes_of_a_table_are_kept_for_what_comes_of_it_alone() {
    let name = |table| TableName::new("a", table);
    let claim = |lsn| Claim {
        stream_seq: 5,
        position: Position::new(1, Lsn(lsn), 2),
    };
    let chunks = Chunks::begin(Position::new(1, Lsn(30), 0), None, 8);
    let lower = chunks.lower;
    let (lsn, refused_at_us) = (Lsn(4), 7);
    let states = [
        ("copied", CopyState::Copied { lsn }),
        ("chunks", CopyState::Chunks(chunks)),
        (
            "pending",
            CopyState::Pending {
                claim: claim(20),
                began_us: 7,
            },
        ),
        (
            "parked",
            CopyState::Parked {
                lsn,
                claim: claim(40),
            },
        ),
        ("lapsed", CopyState::Lapsed { refused_at_us }),
    ];
    let states = states.map(|(table, state)| (name(table), state));
    let progress = CopyProgress {
        tables: BTreeMap::from(states),
        ..CopyProgress::default()
    };
    let passed = |lsn| Version::new(1, Lsn(lsn), 9);
    let forgettable = |table, lsn| progress.forgettable(&name(table), passed(lsn));
    assert_eq!(forgettable("copied", 90), passed(90));
    assert_eq!(forgettable("lapsed", 90), passed(90));
    assert_eq!(forgettable("chunks", 90), lower);
    assert_eq!(forgettable("chunks", 25), passed(25));
    assert_eq!(forgettable("pending", 90), claim(20).position.0);
    assert_eq!(forgettable("parked", 90), claim(40).position.0);
    assert_eq!(forgettable("parked", 35), passed(35));
}

#[test]
fn a_table_waits_in_peace_after_the_target_refused_its_copy() {
    let (refused_at_us, wait) = (1_000_000_000, COPY_AGAIN_INTERVAL_US);
    let lapsed = CopyState::Lapsed { refused_at_us };
    assert!(!lapsed.may_copy_again(refused_at_us));
    assert!(!lapsed.may_copy_again(refused_at_us + wait - 1));
    assert!(lapsed.may_copy_again(refused_at_us + wait));
    assert!(lapsed.may_copy_again(refused_at_us - 1));
    assert!(CopyState::Lapsed { refused_at_us: 0 }.may_copy_again(refused_at_us));
    let copied = CopyState::Copied { lsn: Lsn(1) };
    assert!(!copied.may_copy_again(refused_at_us));
    assert!(lapsed.is_copied() && !lapsed.is_followed());
}
