//! A decoded change sequence, and streams that hold parts of it on a real broker.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::{Context, stream};
use millrace_consumer::{Reader, ReaderOptions, Start, Token};
use millrace_event::{Control, ControlKind, Lsn, Position, subject};

/// Every fifth of the decoded change sequence is a heartbeat.
pub(crate) const HEARTBEATS_APART: u64 = 5;

/// Longer than anything takes that happens at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn position(n: u64) -> Position {
    let heartbeat = n.is_multiple_of(HEARTBEATS_APART);
    Position::new(1, Lsn(n), if heartbeat { u32::MAX } else { 1 })
}

pub(crate) fn token(stream_seq: u64, read: u64) -> Token {
    Token {
        stream_seq,
        position: position(read),
    }
}

/// Where a message of the sequence goes, and what it says: a heartbeat, or a change of this table.
pub(crate) fn message(source: &str, table: &str, n: u64) -> (String, String) {
    let position = position(n);
    if !n.is_multiple_of(HEARTBEATS_APART) {
        let payload = format!(r#"{{"op":"c","source":{{"version":"{position}"}}}}"#);
        return (format!("cdc.{source}.public.{table}.c"), payload);
    }
    let control = Control {
        kind: ControlKind::Heartbeat,
        position,
        end_lsn: Lsn(n),
        ts_us: 0,
        origin: None,
    };
    let payload = serde_json::to_string(&control).expect("plain JSON");
    (subject::control(source, ControlKind::Heartbeat), payload)
}

/// Makes a source's stream, empty.
pub(crate) async fn make(jetstream: &Context, source: &str) {
    let config = stream::Config {
        name: subject::stream_name(source),
        subjects: vec![subject::all(source)],
        ..stream::Config::default()
    };
    jetstream.create_stream(config).await.expect("stream");
}

/// Stores these of the sequence, in this order, as changes of this table.
pub(crate) async fn store(jetstream: &Context, source: &str, table: &str, sequence: &[u64]) {
    for n in sequence {
        let (subject, payload) = message(source, table, *n);
        publish(jetstream, subject, HeaderMap::new(), payload).await;
    }
}

pub(crate) async fn publish(
    jetstream: &Context,
    subject: String,
    headers: HeaderMap,
    payload: String,
) {
    let stored = jetstream.publish_with_headers(subject, headers, payload.into());
    let stored = stored.await.expect("published");
    stored.await.expect("stored");
}

pub(crate) async fn connect(url: String) -> Context {
    async_nats::jetstream::new(async_nats::connect(url).await.expect("connects"))
}

/// A reader of everything, after what the token names.
pub(crate) fn reader(jetstream: Context, source: &str, token: Token) -> Reader {
    Reader::open(ReaderOptions::new(jetstream, source, Start::After(token)))
}

/// The ones that are delivered, up to this one.
pub(crate) async fn up_to(reader: &mut Reader, newest: u64) -> Vec<u64> {
    let mut delivered = Vec::new();
    while delivered.last() != Some(&newest) {
        let next = tokio::time::timeout(PATIENCE, reader.next()).await;
        let delivery = next.unwrap_or_else(|_| panic!("only {delivered:?}"));
        delivered.push(delivery.expect("no gap").position.commit_lsn().0);
    }
    delivered
}
