//! Gaps of a reader of some tables only, whose sequences have holes by nature.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use millrace_consumer::{ReadError, Reader, ReaderOptions, Start};
use millrace_event::{TableName, subject};
use millrace_lab::{Nats, NatsOptions};

use crate::decoded::{
    HEARTBEATS_APART, PATIENCE, connect, make, message, publish, store, token, up_to,
};

const SOURCE: &str = "s";

async fn stream(nats: &Nats) -> Context {
    let jetstream = connect(nats.url()).await;
    make(&jetstream, SOURCE).await;
    jetstream
}

/// A reader of `t`.
async fn reader(nats: &Nats, start: Start) -> Reader {
    let mut options = ReaderOptions::new(connect(nats.url()).await, SOURCE, start);
    options.tables = Some(vec![TableName::new("public", "t")]);
    Reader::open(options)
}

/// The stream begins with this sequence from now on.
async fn purge_before(jetstream: &Context, stream_seq: u64) {
    let stream = jetstream.get_stream(subject::stream_name(SOURCE)).await;
    let stream = stream.expect("a stream");
    stream.purge().sequence(stream_seq).await.expect("purged");
}

async fn reads_nothing(reader: &mut Reader, time: Duration) {
    let next = tokio::time::timeout(time, reader.next()).await;
    assert!(next.is_err(), "{next:?}");
}

#[tokio::test]
async fn a_quiet_table_is_no_gap_though_the_stream_let_go_of_its_last_change() {
    let mut nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let jetstream = stream(&nats).await;
    store(&jetstream, SOURCE, "t", &[1]).await;
    let others: Vec<u64> = (2..=25).collect();
    store(&jetstream, SOURCE, "u", &others).await;

    let mut quiet = reader(&nats, Start::Beginning).await;
    assert_eq!(up_to(&mut quiet, 1).await, [1]);
    reads_nothing(&mut quiet, Duration::from_secs(1)).await;
    let reached = quiet.token().expect("it has read");
    assert_eq!(reached, token(25, 25), "the newest heartbeat");

    purge_before(&jetstream, 25).await;
    nats.kill9();
    nats.start_again().await.expect("broker");
    store(&jetstream, SOURCE, "t", &[26]).await;
    assert_eq!(up_to(&mut quiet, 26).await, [26]);

    // Where it was told to begin there is nothing left to go by.
    let stored = Start::After(token(1, 1));
    let mut late = reader(&nats, stored).await;
    let gap = ReadError::Gap {
        wanted: 2,
        found: 25,
    };
    assert_eq!(late.next().await.err(), Some(gap));
}

#[tokio::test]
async fn a_purge_that_overtakes_a_slow_reader_is_a_gap() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let jetstream = stream(&nats).await;
    store(&jetstream, SOURCE, "t", &[1]).await;
    let mut slow = reader(&nats, Start::Beginning).await;
    assert_eq!(up_to(&mut slow, 1).await, [1]);

    // More than the broker sends before it is asked again.
    let padding = " ".repeat(200 * 1024);
    for n in (2..=100).filter(|n| n % HEARTBEATS_APART != 0) {
        let (subject, payload) = message(SOURCE, "t", n);
        let payload = padding.clone() + &payload;
        publish(&jetstream, subject, HeaderMap::new(), payload).await;
    }
    purge_before(&jetstream, 79).await;
    let read = async {
        loop {
            if let Err(gap) = slow.next().await {
                break gap;
            }
        }
    };
    let gap = tokio::time::timeout(PATIENCE, read).await.expect("a gap");
    let ReadError::Gap { wanted, found } = gap;
    assert!(wanted < 79 && found == 79, "{gap:?}");
}

#[tokio::test]
async fn what_other_tables_wrote_may_go_while_the_reader_has_everything() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let jetstream = stream(&nats).await;
    store(&jetstream, SOURCE, "t", &[1]).await;
    store(&jetstream, SOURCE, "u", &[2, 3, 4, 6, 7]).await;
    let mut idle = reader(&nats, Start::Beginning).await;
    assert_eq!(up_to(&mut idle, 1).await, [1]);
    // It looks every 10 s.
    reads_nothing(&mut idle, Duration::from_secs(12)).await;
    purge_before(&jetstream, 6).await;
    store(&jetstream, SOURCE, "t", &[8]).await;
    assert_eq!(up_to(&mut idle, 8).await, [8]);
}
