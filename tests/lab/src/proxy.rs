//! A TCP proxy that injects network faults.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::error::LabError;

const BUFFER_BYTES: usize = 64 * 1024;
/// Chunks under way in one direction while they are delayed.
const IN_FLIGHT_MAX: usize = 1024;
const REBIND_PAUSE: Duration = Duration::from_millis(20);

/// A proxy in front of one upstream; closes everything when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    faults: Arc<Faults>,
    listening: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Faults {
    /// Rises with every cut.
    cuts: watch::Sender<u64>,
    refuse: watch::Sender<bool>,
    stall: watch::Sender<bool>,
    delay: watch::Sender<Duration>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards to `upstream` (`host:port`).
    ///
    /// # Errors
    ///
    /// Fails when no port can be bound.
    pub async fn start(upstream: impl Into<String>) -> Result<Self, LabError> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .map_err(LabError::io("bind the proxy"))?;
        let address = listener
            .local_addr()
            .map_err(LabError::io("name the proxy's port"))?;
        let faults = Arc::new(Faults {
            cuts: watch::Sender::new(0),
            refuse: watch::Sender::new(false),
            stall: watch::Sender::new(false),
            delay: watch::Sender::new(Duration::ZERO),
        });
        let (state, listening) = watch::channel(true);
        let task = tokio::spawn(serve(
            listener,
            address,
            upstream.into(),
            faults.clone(),
            state,
        ));
        Ok(Self {
            address,
            faults,
            listening,
            task,
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets every connection that is open now; new ones are taken.
    pub fn cut(&self) {
        self.faults.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// While `true` the port is closed: connecting is refused. Open connections go on. Returns
    /// when it is so.
    pub async fn refuse(&self, refuse: bool) {
        self.faults.refuse.send_replace(refuse);
        // Fails only when the proxy's task is gone, and then the port is closed for good.
        let _ = self
            .listening
            .clone()
            .wait_for(|listening| *listening != refuse)
            .await;
    }

    /// While `true` no byte passes in either direction and nothing is closed: a half-open
    /// connection. What was held back passes afterwards, as TCP would retransmit it.
    pub fn stall(&self, stall: bool) {
        self.faults.stall.send_replace(stall);
    }

    /// Delays every byte by that much in each direction; the throughput stays.
    pub fn delay(&self, delay: Duration) {
        self.faults.delay.send_replace(delay);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Its connections are in a set of the task and end with it.
        self.task.abort();
    }
}

async fn serve(
    listener: TcpListener,
    address: SocketAddr,
    upstream: String,
    faults: Arc<Faults>,
    listening: watch::Sender<bool>,
) {
    let mut connections = JoinSet::new();
    let mut refuse = faults.refuse.subscribe();
    let mut listener = Some(listener);
    loop {
        if *refuse.borrow_and_update() {
            listener = None;
            listening.send_replace(false);
            if refuse.wait_for(|refuse| !refuse).await.is_err() {
                return;
            }
        }
        let open = match &listener {
            Some(open) => open,
            None => match TcpListener::bind(address).await {
                Ok(bound) => {
                    let open = listener.insert(bound);
                    listening.send_replace(true);
                    open
                }
                // The port is ours but for a moment; only another's brief use of it fails here.
                Err(_) => {
                    tokio::time::sleep(REBIND_PAUSE).await;
                    continue;
                }
            },
        };
        tokio::select! {
            biased;
            _ = refuse.changed() => {}
            Some(_) = connections.join_next() => {}
            accepted = open.accept() => if let Ok((client, _)) = accepted {
                connections.spawn(carry(client, upstream.clone(), faults.clone()));
            }
        }
    }
}

/// One connection, until either side closes it or a cut.
async fn carry(client: TcpStream, upstream: String, faults: Arc<Faults>) {
    let mut cuts = faults.cuts.subscribe();
    cuts.mark_unchanged();
    let carried = async {
        let server = TcpStream::connect(&upstream).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        // A dropped connection is reset, as a cut is; an orderly end was shut down before.
        client.set_zero_linger()?;
        server.set_zero_linger()?;
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        tokio::try_join!(
            pump(client_read, server_write, &faults),
            pump(server_read, client_write, &faults),
        )?;
        io::Result::Ok(())
    };
    tokio::select! {
        _ = cuts.changed() => {}
        _ = carried => {}
    }
}

async fn pump(read: OwnedReadHalf, write: OwnedWriteHalf, faults: &Faults) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel(IN_FLIGHT_MAX);
    tokio::try_join!(
        take_in(read, sender, faults),
        give_out(write, receiver, faults)
    )?;
    Ok(())
}

type Timed = (Instant, Vec<u8>);

async fn take_in(
    mut read: OwnedReadHalf,
    sender: mpsc::Sender<Timed>,
    faults: &Faults,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let length = read.read(&mut buffer).await?;
        let due = Instant::now() + *faults.delay.borrow();
        if length == 0 || sender.send((due, buffer[..length].to_vec())).await.is_err() {
            return Ok(());
        }
    }
}

async fn give_out(
    mut write: OwnedWriteHalf,
    mut receiver: mpsc::Receiver<Timed>,
    faults: &Faults,
) -> io::Result<()> {
    let mut stall = faults.stall.subscribe();
    while let Some((due, bytes)) = receiver.recv().await {
        tokio::time::sleep_until(due).await;
        // The sender lives as long as we borrow the faults.
        let _ = stall.wait_for(|stall| !stall).await;
        write.write_all(&bytes).await?;
    }
    let _ = stall.wait_for(|stall| !stall).await;
    write.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        (address, task)
    }

    async fn round_trip(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.map(drop)
    }

    #[tokio::test]
    async fn each_fault_does_what_it_says() {
        let (upstream, _echo) = echo().await;
        let proxy = Proxy::start(upstream.to_string()).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream).await.unwrap();

        proxy.delay(Duration::from_millis(40));
        let began = Instant::now();
        round_trip(&mut stream).await.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(80));
        proxy.delay(Duration::ZERO);

        proxy.stall(true);
        let held = tokio::time::timeout(Duration::from_millis(100), round_trip(&mut stream));
        assert!(held.await.is_err(), "a byte passed a stalled proxy");
        proxy.stall(false);
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();

        proxy.refuse(true).await;
        assert!(TcpStream::connect(proxy.address()).await.is_err());
        round_trip(&mut stream).await.unwrap();
        proxy.refuse(false).await;

        proxy.cut();
        assert!(round_trip(&mut stream).await.is_err());
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        round_trip(&mut stream).await.unwrap();
    }
}
