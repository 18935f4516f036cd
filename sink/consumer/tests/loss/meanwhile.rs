//! The stream changes between a reader's look at it and the making of its consumer.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use millrace_consumer::{Reader, ReaderOptions, Start};
use millrace_event::{TableName, subject};
use millrace_lab::{Nats, NatsOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::decoded::{HEARTBEATS_APART, connect, make, reader, store, token, up_to};

const CREATE: &str = "CONSUMER.CREATE";
const PULL: &str = "CONSUMER.MSG.NEXT";
const LOOK: &str = "STREAM.INFO";

/// Holds what a client sends once it asks for something.
struct Held {
    port: u16,
    asked: Arc<Semaphore>,
    goes_on: Arc<Semaphore>,
}

impl Held {
    /// Before it asks for this a `nth` time.
    async fn before(nats: &Nats, what: &'static str, nth: usize) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let held = Self {
            port: listener.local_addr().expect("bound").port(),
            asked: Arc::new(Semaphore::new(0)),
            goes_on: Arc::new(Semaphore::new(0)),
        };
        let (asked, goes_on) = (held.asked.clone(), held.goes_on.clone());
        let broker = nats.port();
        tokio::spawn(async move {
            let (client, _) = listener.accept().await.expect("a client");
            let server = TcpStream::connect(("127.0.0.1", broker)).await;
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.expect("the broker").into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
            let mut times = 0;
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
                let bytes = &buffer[..length];
                let before = times;
                let asks = |bytes: &&[u8]| *bytes == what.as_bytes();
                times += bytes.windows(what.len()).filter(asks).count();
                if before < nth && times >= nth {
                    asked.add_permits(1);
                    goes_on.acquire().await.expect("open").forget();
                }
                to_server.write_all(bytes).await.expect("the broker");
            }
        });
        held
    }

    async fn client(&self) -> Context {
        connect(format!("nats://127.0.0.1:{}", self.port)).await
    }
}

#[tokio::test]
async fn a_consumer_among_other_messages_than_were_looked_at_is_not_read() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    let jetstream = connect(nats.url()).await;
    make(&jetstream, "s").await;
    let before: Vec<u64> = (1..=20).collect();
    store(&jetstream, "s", "t", &before).await;

    let held = Held::before(&nats, CREATE, 1).await;
    let mut reader = reader(held.client().await, "s", token(20, 20));
    let broker = async {
        held.asked.acquire().await.expect("open").forget();
        // It lost its end, and what the slot gives again takes fewer messages.
        let name = subject::stream_name("s");
        jetstream.delete_stream(name).await.expect("deleted");
        make(&jetstream, "s").await;
        let after: Vec<u64> = (1..=10).chain([15, 18]).chain(20..=30).collect();
        store(&jetstream, "s", "t", &after).await;
        held.goes_on.add_permits(1);
    };
    let (delivered, ()) = tokio::join!(up_to(&mut reader, 30), broker);
    assert_eq!(delivered, (21..=30).collect::<Vec<_>>());
}

/// Retention takes what is the oldest away while a reader opens that begins with the oldest.
#[tokio::test]
async fn who_begins_with_the_oldest_misses_nothing_that_goes_before_it_has_read() {
    let nats = Nats::start(NatsOptions::default()).await.expect("nats");
    // Everything: the consumer is made, and nothing is asked of it. Some tables: what has come is to be handed on, and
    // the answer may come too late.
    let (at_once, late) = (Duration::ZERO, Duration::from_secs(11));
    let cases = [
        ("all", PULL, 1, at_once),
        ("some", LOOK, 3, at_once),
        ("late", LOOK, 3, late),
    ];
    for (source, what, nth, pause) in cases {
        let jetstream = connect(nats.url()).await;
        make(&jetstream, source).await;
        let sequence: Vec<u64> = (1..=20).collect();
        store(&jetstream, source, "t", &sequence).await;
        let held = Held::before(&nats, what, nth).await;
        let mut options = ReaderOptions::new(held.client().await, source, Start::Beginning);
        if source != "all" {
            options.tables = Some(vec![TableName::new("public", "t")]);
        }
        let mut reader = Reader::open(options);
        let broker = async {
            held.asked.acquire().await.expect("open").forget();
            let stream = jetstream.get_stream(subject::stream_name(source)).await;
            let purge = stream.expect("a stream").purge().sequence(12).await;
            purge.expect("purged");
            store(&jetstream, source, "t", &[21]).await;
            tokio::time::sleep(pause).await;
            held.goes_on.add_permits(1);
        };
        let (delivered, ()) = tokio::join!(up_to(&mut reader, 21), broker);
        let expected = (12..=21).filter(|n| source == "all" || n % HEARTBEATS_APART != 0);
        assert_eq!(delivered, expected.collect::<Vec<_>>(), "{source}");
    }
}
