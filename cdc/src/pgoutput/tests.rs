#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

/// The captured messages, by the name of what was done: one message per line, in hexadecimal digits, as a
/// Postgres 15 sent it.
fn captures() -> Vec<(PathBuf, Vec<Vec<u8>>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/pgoutput");
    let mut paths: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "hex"));
    paths.sort();
    assert!(paths.len() >= 8, "{paths:?}");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text.lines().map(unhex).collect())
    };
    paths.into_iter().map(read).collect()
}

fn unhex(line: &str) -> Vec<u8> {
    let digits: Vec<u8> = line
        .chars()
        .map(|digit| u8::try_from(digit.to_digit(16).unwrap()).unwrap())
        .collect();
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

#[test]
fn captured_messages_decode_as_recorded() {
    for (path, messages) in captures() {
        let mut found = String::new();
        for message in &messages {
            writeln!(found, "{:?}", parse(message).unwrap()).unwrap();
        }
        let expected = path.with_extension("txt");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&expected, &found).unwrap();
        }
        assert_eq!(
            found,
            fs::read_to_string(&expected).unwrap(),
            "{}",
            expected.display()
        );
    }
}

#[test]
fn every_shorter_or_longer_message_is_an_error() {
    for (path, messages) in captures() {
        for message in &messages {
            for length in 0..message.len() {
                assert!(
                    parse(&message[..length]).is_err(),
                    "{} {length}",
                    path.display()
                );
            }
            let longer = [message.as_slice(), &[0]].concat();
            assert_eq!(parse(&longer), Err(PgoutputError::Trailing { bytes: 1 }));
        }
    }
}

#[test]
fn tuples_yield_exactly_their_columns() {
    let bytes = b"I\0\0\0\x07N\0\x04nut\0\0\0\x02hib\0\0\0\x01\xff";
    let Ok(Message::Insert(insert)) = parse(bytes) else {
        panic!("{:?}", parse(bytes))
    };
    assert_eq!(insert.new.len(), 4);
    assert_eq!(insert.new.iter().len(), 4);
    let data: Vec<_> = insert.new.iter().collect();
    let expected = [
        Datum::Null,
        Datum::Unchanged,
        Datum::Text(b"hi"),
        Datum::Binary(b"\xff"),
    ];
    assert_eq!(data, expected);
}

#[test]
fn what_we_did_not_ask_for_is_named() {
    for tag in *b"SEcAbPKrp" {
        let error = PgoutputError::StreamingOff {
            tag: char::from(tag),
        };
        assert_eq!(parse(&[tag, 0, 0]), Err(error));
    }
    assert_eq!(parse(b"?"), Err(PgoutputError::UnknownTag { tag: b'?' }));
    assert_eq!(parse(b""), Err(PgoutputError::Truncated { field: "tag" }));
    let negative = parse(b"I\0\0\0\x07N\0\x01t\xff\xff\xff\xff");
    assert_eq!(
        negative,
        Err(PgoutputError::Length {
            field: "column value",
            length: -1
        })
    );
    let relids = parse(b"T\x7f\xff\xff\xff\0\0\0\0\x01");
    assert_eq!(
        relids,
        Err(PgoutputError::Truncated {
            field: "relation oids"
        })
    );
}

proptest! {
    #[test]
    fn random_bytes_never_panic(
        tag in proptest::sample::select(b"BCORYIUDTM".to_vec()),
        rest in proptest::collection::vec(any::<u8>(), 0..120),
    ) {
        let _ = parse(&[vec![tag], rest].concat()).map(|message| format!("{message:?}"));
    }

    #[test]
    fn a_damaged_message_never_panics(pick in any::<usize>(), at in any::<usize>(), byte: u8) {
        let captures = captures();
        let all: Vec<_> = captures.iter().flat_map(|(_, messages)| messages).collect();
        let mut message = all[pick % all.len()].clone();
        let at = at % message.len();
        message[at] = byte;
        let _ = parse(&message).map(|message| format!("{message:?}"));
    }
}
