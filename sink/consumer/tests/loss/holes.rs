//! Sequences without messages in the middle of a stream, which a broker may leave that lost power.

use async_nats::HeaderMap;
use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream::Context;
use millrace_consumer::ReadError;
use millrace_event::subject;
use millrace_lab::{Nats, NatsOptions};

use crate::decoded::{connect, make, message, publish, reader, store, token, up_to};

/// A stream of 1 to 20 of which 13 to 20 are lost and not forgotten, and what a publisher writes then.
async fn stream_with_a_hole(
    nats: &Nats,
    source: &str,
    opens_batch: bool,
    again: &[u64],
) -> Context {
    let jetstream = connect(nats.url()).await;
    make(&jetstream, source).await;
    let before: Vec<u64> = (1..=20).collect();
    store(&jetstream, source, "t", &before).await;
    let (first, rest) = again.split_first().expect("something");
    let mut headers = HeaderMap::new();
    if opens_batch {
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, "20");
    }
    let (subject, payload) = message(source, "t", *first);
    publish(&jetstream, subject, headers, payload).await;
    store(&jetstream, source, "t", rest).await;
    let stream = jetstream.get_stream(subject::stream_name(source)).await;
    let stream = stream.expect("a stream");
    for stream_seq in 13..=20 {
        stream.delete_message(stream_seq).await.expect("deleted");
    }
    jetstream
}

#[tokio::test]
async fn a_hole_is_a_gap_unless_what_it_held_is_written_again() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let again: Vec<u64> = (13..=30).collect();
    for own in [13, 17, 20] {
        let source = format!("s{own}");
        let jetstream = stream_with_a_hole(&nats, &source, true, &again).await;
        let mut reader = reader(jetstream, &source, token(own, own));
        let expected: Vec<u64> = (own + 1..=30).collect();
        assert_eq!(up_to(&mut reader, 30).await, expected);
    }
    let gap = ReadError::Gap {
        wanted: 13,
        found: 21,
    };
    // It cannot know whether 13 is what follows 12.
    let jetstream = stream_with_a_hole(&nats, "next", true, &again).await;
    let mut next = reader(jetstream, "next", token(12, 12));
    assert_eq!(next.next().await.err(), Some(gap.clone()));
    // What an overtaken publisher sent late.
    let jetstream = stream_with_a_hole(&nats, "late", false, &[12, 21, 22]).await;
    let mut late = reader(jetstream, "late", token(12, 12));
    assert_eq!(late.next().await.err(), Some(gap));
}
