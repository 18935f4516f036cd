#![allow(clippy::unwrap_used)]

use bytes::BufMut;
use proptest::prelude::*;

use super::*;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.put_i32(i32::try_from(body.len() + 4).unwrap());
    out.extend_from_slice(body);
    out
}

fn data(lsn: u64, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![b'w'];
    body.put_u64(lsn);
    body.put_u64(lsn);
    body.put_i64(1);
    body.extend_from_slice(payload);
    message(b'd', &body)
}

fn keepalive(lsn: u64, reply: bool) -> Vec<u8> {
    let mut body = vec![b'k'];
    body.put_u64(lsn);
    body.put_i64(2);
    body.put_u8(u8::from(reply));
    message(b'd', &body)
}

fn stream() -> Vec<u8> {
    let notice = message(b'N', b"SNOTICE\0\0");
    [
        data(7, b"abc"),
        keepalive(9, true),
        notice,
        data(3, b""),
        keepalive(4, false),
    ]
    .concat()
}

fn drain(framer: &mut Framer, seen: &mut Vec<String>) -> Scanned {
    let scanned = framer.scan().unwrap();
    if let Some(batch) = framer.take() {
        assert_eq!(batch.iter().count(), batch.frames());
        seen.extend(batch.iter().map(|frame| format!("{frame:?}")));
    }
    scanned
}

#[test]
fn a_stream_cut_at_any_two_bytes_is_the_same_stream() {
    let bytes = stream();
    let mut whole = Vec::new();
    let scanned = drain(&mut Framer::new(&bytes), &mut whole);
    assert_eq!(
        scanned,
        Scanned {
            wal_end: Lsn(9),
            reply_requested: true,
            ending: None
        }
    );
    assert_eq!(whole.len(), 4);
    for first in 0..=bytes.len() {
        for second in first..=bytes.len() {
            let mut framer = Framer::new(&bytes[..first]);
            let mut seen = Vec::new();
            for part in [&bytes[..0], &bytes[first..second], &bytes[second..]] {
                framer.room().extend_from_slice(part);
                drain(&mut framer, &mut seen);
            }
            assert_eq!(seen, whole);
        }
    }
}

#[test]
fn a_message_larger_than_the_buffer_passes_and_the_buffer_shrinks_again() {
    let big = data(1, &vec![b'x'; 5 * BUFFER_BYTES]);
    let bytes = [data(0, b"before"), big, data(2, b"after")].concat();
    let mut framer = Framer::new(&[]);
    let mut sizes = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let room = framer.room();
        let spare = room.capacity() - room.len();
        assert!(spare >= ROOM_BYTES_MIN);
        let (part, tail) = rest.split_at(spare.min(rest.len()));
        room.extend_from_slice(part);
        rest = tail;
        framer.scan().unwrap();
        if let Some(batch) = framer.take() {
            sizes.extend(batch.iter().map(|frame| match frame {
                Frame::Data { payload, .. } => payload.len(),
                Frame::Keepalive { .. } => 0,
            }));
        }
    }
    assert_eq!(sizes, [6, 5 * BUFFER_BYTES, 5]);
    framer.room();
    assert!(framer.buffer.capacity() <= BUFFER_BYTES);
}

#[test]
fn a_length_alone_allocates_little() {
    let mut framer = Framer::new(b"d\x7f\xff\xff\xff");
    framer.scan().unwrap();
    assert!(framer.room().capacity() <= 2 * BUFFER_BYTES);
}

#[test]
fn memory_is_reused_once_the_batches_are_gone() {
    let mut framer = Framer::new(&[]);
    let start = framer.room().as_ptr();
    for _ in 0..100 {
        framer.room().extend_from_slice(&data(1, &[b'x'; 50_000]));
        framer.scan().unwrap();
        assert!(framer.take().is_some());
    }
    framer.room();
    assert!(framer.buffer.capacity() <= BUFFER_BYTES);
    assert!(framer.buffer.as_ptr().addr().abs_diff(start.addr()) <= BUFFER_BYTES);
}

#[test]
fn endings_and_violations_are_told_apart() {
    let scan = |bytes: &[u8]| Framer::new(bytes).scan();
    let ending = |bytes: &[u8]| scan(bytes).unwrap().ending;
    assert_eq!(ending(&message(b'C', b"COPY 0\0")), Some(Ending::Complete));
    assert_eq!(ending(&message(b'c', b"")), Some(Ending::Complete));
    let error = ending(&message(b'E', b"SFATAL\0C57P01\0Mgone\0Hwait\0\0"));
    let expected = ServerError {
        sqlstate: "57P01".into(),
        message: "gone".into(),
        hint: Some("wait".into()),
        detail: None,
    };
    assert_eq!(error, Some(Ending::Failed(expected)));
    let wrong = message(b'T', b"");
    assert_eq!(scan(&wrong), Err(FramingError::UnexpectedTag { tag: b'T' }));
    assert_eq!(
        scan(b"d\0\0\0\x03"),
        Err(FramingError::Length {
            tag: b'd',
            length: 3
        })
    );
    let short = message(b'd', b"w123");
    assert_eq!(scan(&short), Err(FramingError::Malformed { length: 4 }));
    let mut long = keepalive(1, true);
    long.push(0);
    long[4] += 1;
    assert_eq!(scan(&long), Err(FramingError::Malformed { length: 19 }));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut framer = Framer::new(&bytes);
        if framer.scan().is_ok() && let Some(batch) = framer.take() {
            prop_assert_eq!(batch.iter().count(), batch.frames());
        }
    }
}
