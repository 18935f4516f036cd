//! Where a reader resumes whose place in the stream holds another message than it did.

use std::time::Duration;

use async_nats::jetstream::Context;
use millrace_consumer::{ReadError, Reader, ReaderOptions, Start};
use millrace_event::subject;
use millrace_lab::{Nats, NatsOptions};

use crate::decoded::{connect, make, reader, store, token, up_to};

async fn stream_of(nats: &Nats, source: &str, sequence: &[u64]) -> Context {
    let jetstream = connect(nats.url()).await;
    make(&jetstream, source).await;
    store(&jetstream, source, "t", sequence).await;
    jetstream
}

#[tokio::test]
async fn it_resumes_before_everything_it_has_not_seen() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");

    // An overtaken publisher's 8 to 12 came long after its successor had written them, and where a bisection looks
    // first.
    let sequence: Vec<u64> = (1..=5_000).chain(8..=12).chain(5_001..=9_999).collect();
    let jetstream = stream_of(&nats, "late", &sequence).await;
    let mut late = reader(jetstream, "late", token(20, 12));
    assert_eq!(
        up_to(&mut late, 9_999).await,
        (13..=9_999).collect::<Vec<_>>()
    );
    assert_eq!(late.token().map(|token| token.stream_seq), Some(10_004));

    // Without a heartbeat that it has seen only the oldest message is safe.
    let jetstream = stream_of(&nats, "none", &[1, 2, 3, 4, 2, 3, 4, 5, 6]).await;
    let mut none = reader(jetstream, "none", token(7, 3));
    assert_eq!(up_to(&mut none, 6).await, [4, 5, 6]);

    // The oldest message is above it: what lies between is gone.
    let jetstream = stream_of(&nats, "gone", &[6, 7, 8, 9, 10]).await;
    let mut gone = reader(jetstream, "gone", token(4, 3));
    let gap = ReadError::Gap {
        wanted: 5,
        found: 1,
    };
    assert_eq!(gone.next().await.err(), Some(gap));
}

#[tokio::test]
async fn a_reader_of_what_is_new_knows_where_it_began() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let before: Vec<u64> = (1..=20).collect();
    let jetstream = stream_of(&nats, "new", &before).await;
    let options = ReaderOptions::new(connect(nats.url()).await, "new", Start::New);
    let mut new = Reader::open(options);
    let early = tokio::time::timeout(Duration::from_secs(1), new.next()).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(new.token(), Some(token(20, 20)));

    let name = subject::stream_name("new");
    jetstream.delete_stream(name).await.expect("deleted");
    let after: Vec<u64> = (1..=10).chain([15, 18, 20, 21, 22]).collect();
    stream_of(&nats, "new", &after).await;
    assert_eq!(up_to(&mut new, 22).await, [21, 22]);
}

/// With several changes a message the stream may be shorter for a long time although it holds what is new.
#[tokio::test]
async fn it_does_not_wait_until_the_stream_is_as_long_again() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let sequence: Vec<u64> = (1..=10).chain([15, 18, 20, 21, 22]).collect();
    let jetstream = stream_of(&nats, "packed", &sequence).await;
    let mut packed = reader(jetstream, "packed", token(20, 20));
    assert_eq!(up_to(&mut packed, 22).await, [21, 22]);

    // What was lost is written again while it reads, and is dropped up to its own position.
    let sequence: Vec<u64> = (1..=12).collect();
    let jetstream = stream_of(&nats, "below", &sequence).await;
    let mut below = reader(jetstream.clone(), "below", token(20, 18));
    let early = tokio::time::timeout(Duration::from_secs(1), below.next()).await;
    assert!(early.is_err(), "{early:?}");
    let sequence: Vec<u64> = (13..=22).collect();
    store(&jetstream, "below", "t", &sequence).await;
    assert_eq!(up_to(&mut below, 22).await, [19, 20, 21, 22]);

    // Nothing is left, and everything comes again.
    let jetstream = stream_of(&nats, "empty", &[]).await;
    let mut empty = reader(jetstream.clone(), "empty", token(3, 3));
    let early = tokio::time::timeout(Duration::from_secs(1), empty.next()).await;
    assert!(early.is_err(), "{early:?}");
    store(&jetstream, "empty", "t", &[1, 2, 3, 4]).await;
    assert_eq!(up_to(&mut empty, 4).await, [4]);
}
