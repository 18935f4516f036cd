//! Where a reader resumes whose place in the stream holds another message than it did: on a real broker.

#![allow(missing_docs)]

use async_nats::jetstream::{Context, stream};
use millrace_consumer::{ReadError, Reader, ReaderOptions, Start, Token};
use millrace_event::{Control, ControlKind, Lsn, Position, subject};
use millrace_lab::{Nats, NatsOptions};

/// Every fifth of the decoded change sequence is a heartbeat.
const HEARTBEATS_APART: u64 = 5;

fn position(n: u64) -> Position {
    let heartbeat = n.is_multiple_of(HEARTBEATS_APART);
    Position::new(1, Lsn(n), if heartbeat { u32::MAX } else { 1 })
}

/// A stream that holds these of the decoded change sequence, in this order.
async fn stream_of(nats: &Nats, source: &str, sequence: &[u64]) -> Context {
    let client = async_nats::connect(nats.url()).await.expect("connects");
    let jetstream = async_nats::jetstream::new(client);
    let config = stream::Config {
        name: subject::stream_name(source),
        subjects: vec![subject::all(source)],
        ..stream::Config::default()
    };
    jetstream.create_stream(config).await.expect("stream");
    for n in sequence {
        let position = position(*n);
        let (subject, payload) = if n.is_multiple_of(HEARTBEATS_APART) {
            let control = Control {
                kind: ControlKind::Heartbeat,
                position,
                end_lsn: Lsn(*n),
                ts_us: 0,
                origin: None,
            };
            let payload = serde_json::to_string(&control).expect("plain JSON");
            (subject::control(source, ControlKind::Heartbeat), payload)
        } else {
            let payload = format!(r#"{{"op":"c","source":{{"version":"{position}"}}}}"#);
            (format!("cdc.{source}.public.t.c"), payload)
        };
        let stored = jetstream.publish(subject, payload.into()).await;
        stored.expect("published").await.expect("stored");
    }
    jetstream
}

fn reader(jetstream: Context, source: &str, stream_seq: u64, read: u64) -> Reader {
    let position = position(read);
    let token = Token {
        stream_seq,
        position,
    };
    Reader::open(ReaderOptions::new(jetstream, source, Start::After(token)))
}

/// The ones that are delivered, up to this one.
async fn up_to(reader: &mut Reader, newest: u64) -> Vec<u64> {
    let mut delivered = Vec::new();
    while delivered.last() != Some(&newest) {
        let delivery = reader.next().await.expect("no gap");
        delivered.push(delivery.position.commit_lsn().0);
    }
    delivered
}

#[tokio::test]
async fn it_resumes_before_everything_it_has_not_seen() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");

    // An overtaken publisher's 8 to 12 came long after its successor had written them, and where a bisection looks
    // first.
    let sequence: Vec<u64> = (1..=5_000).chain(8..=12).chain(5_001..=9_999).collect();
    let jetstream = stream_of(&nats, "late", &sequence).await;
    let mut late = reader(jetstream, "late", 20, 12);
    assert_eq!(
        up_to(&mut late, 9_999).await,
        (13..=9_999).collect::<Vec<_>>()
    );
    assert_eq!(late.token().map(|token| token.stream_seq), Some(10_004));

    // Without a heartbeat that it has seen only the oldest message is safe.
    let jetstream = stream_of(&nats, "none", &[1, 2, 3, 4, 2, 3, 4, 5, 6]).await;
    let mut none = reader(jetstream, "none", 7, 3);
    assert_eq!(up_to(&mut none, 6).await, [4, 5, 6]);

    // The oldest message is above it: what lies between is gone.
    let jetstream = stream_of(&nats, "gone", &[6, 7, 8, 9, 10]).await;
    let mut gone = reader(jetstream, "gone", 4, 3);
    let gap = ReadError::Gap {
        wanted: 5,
        found: 1,
    };
    assert_eq!(gone.next().await.err(), Some(gap));
}
