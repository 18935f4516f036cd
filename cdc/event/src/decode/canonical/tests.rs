use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

/// The golden lines of change events.
fn golden() -> Vec<String> {
    let testdata = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let mut paths: Vec<_> = fs::read_dir(testdata)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.to_string_lossy().contains("control"))
        .collect();
    paths.sort();
    let lines = paths.iter().map(|path| fs::read_to_string(path).unwrap());
    lines.map(|line| line.trim_end().to_owned()).collect()
}

/// What is read here is what `serde_json` reads; returns whether it was read.
fn is_read_the_same(line: &str) -> bool {
    let event = read(line);
    if let Some(event) = &event {
        let general: ChangeEvent<'_> = serde_json::from_str(line).expect(line);
        assert_eq!(*event, general, "{line}");
    }
    event.is_some()
}

#[test]
fn every_golden_line_is_read_here() {
    let lines = golden();
    assert!(lines.len() >= 9);
    for line in lines {
        assert!(is_read_the_same(&line), "{line}");
    }
}

#[test]
fn another_layout_is_left_alone() {
    let line = &golden()[0];
    for (from, to) in [
        ("{\"op\"", " {\"op\""),
        ("}}", "}} "),
        ("}}", "},\"new\":1}"),
        ("\"seq\":", "\"new\":{},\"seq\":"),
        ("\"lsn\":", "\"lsn\":0"),
        ("\"txId\":", "\"txId\":9999999999"),
        ("\"ts_us\":", "\"ts_us\":-"),
        ("\"snapshot\":\"", "\"snapshot\":\"x"),
        ("\"op\":\"c\"", "\"op\":\"x\""),
        ("\"id\":7", "\"id\":07"),
        ("\"id\":7", "\"id\":{}"),
        ("\"id\":7", "\"id\":7,"),
        ("a \\\"", "a \n\\\""),
    ] {
        let other = line.replacen(from, to, 1);
        assert_ne!(other, *line, "{from}");
        assert_eq!(read(&other), None, "{other}");
    }
}

fn string() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z_]{0,12}",
        "\\PC{0,20}",
        "[\\x00-\\x7f]{0,20}",
        "([{}:,\"\\\\é€]|source|version|null){0,8}",
    ]
}

/// A string as JSON: short escapes, numbered escapes, or none where it may.
fn string_json() -> impl Strategy<Value = String> {
    (string(), any::<bool>()).prop_map(|(text, numbered)| {
        let json = serde_json::to_string(&text).unwrap();
        if numbered && !json.contains('\\') {
            json.replace('a', "\\u0061").replace('/', "\\/")
        } else {
            json
        }
    })
}

fn value_json() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        20 => Just("null".to_owned()),
        20 => Just("true".to_owned()),
        20 => Just("false".to_owned()),
        40 => any::<i64>().prop_map(|number| number.to_string()),
        40 => any::<f64>().prop_map(|number| serde_json::to_string(&number).unwrap()),
        80 => string_json(),
        1 => "-?[0-9.eE+-]{1,6}",
    ];
    prop_oneof![
        80 => scalar.clone(),
        10 => prop::collection::vec(scalar, 0..4).prop_map(|all| format!("[{}]", all.join(","))),
        1 => "(\\{\"a\":1\\}|\\[\\[1\\]\\]|nul|truex|\"a|a)",
    ]
}

fn columns_json() -> impl Strategy<Value = String> {
    let member = (string_json(), value_json()).prop_map(|(name, value)| format!("{name}:{value}"));
    prop_oneof![
        1 => Just("null".to_owned()),
        4 => prop::collection::vec(member, 0..12).prop_map(|all| format!("{{{}}}", all.join(","))),
    ]
}

fn number_json() -> impl Strategy<Value = String> {
    prop_oneof![
        200 => any::<u32>().prop_map(|number| number.to_string()),
        4 => any::<u64>().prop_map(|number| number.to_string()),
        1 => any::<i64>().prop_map(|number| number.to_string()),
        1 => "(0[0-9]|-0|1e3|1\\.0|null|[0-9]{20})",
    ]
}

/// The members of the envelope, or of `source`: in their order, or with one too much, missing or elsewhere.
fn object(members: Vec<String>) -> impl Strategy<Value = String> {
    let length = members.len();
    let change = prop_oneof![
        6 => Just((None, None)),
        1 => (0..length, 0..length).prop_map(|(from, to)| (Some(from), Some(to))),
        1 => (0..length).prop_map(|from| (Some(from), None)),
        1 => (0..length).prop_map(|to| (None, Some(to))),
    ];
    let space = prop_oneof![8 => Just(","), 1 => Just(", "), 1 => Just("\t,")];
    (Just(members), change, space).prop_map(|(mut members, change, comma)| {
        match change {
            (None, None) => {}
            (Some(from), Some(to)) => members.swap(from, to),
            (Some(from), None) => drop(members.remove(from)),
            (None, Some(to)) => members.insert(to, "\"new\":[1,{\"version\":\"x\"}]".to_owned()),
        }
        format!("{{{}}}", members.join(comma))
    })
}

fn source_json() -> impl Strategy<Value = String> {
    let strings = prop::collection::vec(string_json(), 5);
    let numbers = prop::collection::vec(number_json(), 8);
    let rest = (
        "\"(true|false|true|false|true|false|x)\"",
        "\"[0-9a-fA-F]{32}\"",
        0..4,
    );
    (strings, numbers, rest).prop_flat_map(|(strings, numbers, (snapshot, version, last))| {
        let names = ["name", "db", "schema", "table", "table_version"];
        let mut members: Vec<_> = names
            .iter()
            .zip(&strings)
            .map(|(name, value)| format!("\"{name}\":{value}"))
            .collect();
        members.push(format!("\"snapshot\":{snapshot}"));
        let names = [
            "txId",
            "ts_ms",
            "ts_us",
            "epoch",
            "commit_lsn",
            "seq",
            "lsn",
        ];
        let numbered = names.iter().zip(&numbers);
        members.extend(numbered.map(|(name, value)| format!("\"{name}\":{value}")));
        members.insert(11, format!("\"version\":{version}"));
        if last & 1 != 0 {
            members.push("\"last\":true".to_owned());
        }
        if last & 2 != 0 {
            members.push(format!("\"end_lsn\":{}", numbers[7]));
        }
        object(members)
    })
}

fn line() -> impl Strategy<Value = String> {
    let rows = (columns_json(), columns_json(), columns_json());
    let unchanged = prop::option::of(prop::collection::vec(string_json(), 0..3));
    ("[cudrt]", rows, unchanged, number_json(), source_json()).prop_flat_map(
        |(op, (before, after, key), unchanged, ts_ms, source)| {
            let mut members = vec![
                format!("\"op\":\"{op}\""),
                format!("\"before\":{before}"),
                format!("\"after\":{after}"),
                format!("\"key\":{key}"),
            ];
            members.extend(unchanged.map(|names| format!("\"unchanged\":[{}]", names.join(","))));
            members.push(format!("\"ts_ms\":{ts_ms}"));
            members.push(format!("\"source\":{source}"));
            object(members)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn any_line_is_read_as_serde_reads_it_or_not_at_all(line in line()) {
        is_read_the_same(&line);
    }

    /// One wrong byte anywhere in a line of ours.
    #[test]
    fn any_damage_is_seen_as_serde_sees_it(
        line in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), length in 0..3_usize,
        put in "[0-9{}\\[\\]:,\"\\\\ .e+a-f\\x00-\\x1f-]{0,2}",
    ) {
        let lines = golden();
        let mut line = line.get(&lines).clone();
        let at = at.index(line.len());
        let end = (at + length).min(line.len());
        line.replace_range(at..end, &put);
        is_read_the_same(&line);
    }

    #[test]
    fn what_is_plain_ends_at_the_first_special_byte(
        bytes in prop::collection::vec(prop_oneof![4 => 0x20..=0xFF_u8, 1 => any::<u8>()], 0..40),
    ) {
        let special = |byte: &u8| *byte < 0x20 || *byte == b'"' || *byte == b'\\';
        prop_assert_eq!(plain(&bytes), bytes.iter().position(special).unwrap_or(bytes.len()));
    }
}
