//! The stream changes between a reader's look at it and the making of its consumer.

use std::sync::Arc;

use async_nats::jetstream::Context;
use millrace_event::subject;
use millrace_lab::{Nats, NatsOptions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::decoded::{connect, make, reader, store, token, up_to};

const CREATE: &[u8] = b"CONSUMER.CREATE";

/// Holds what a client sends once it asks for a consumer, the first time.
struct Held {
    port: u16,
    asked: Arc<Semaphore>,
    goes_on: Arc<Semaphore>,
}

impl Held {
    async fn before(nats: &Nats) -> Self {
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
            let mut was_held = false;
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
                let bytes = &buffer[..length];
                if !was_held && bytes.windows(CREATE.len()).any(|bytes| bytes == CREATE) {
                    was_held = true;
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

    let held = Held::before(&nats).await;
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
