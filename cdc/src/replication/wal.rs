//! The two ends that the program holds of a running stream: batches out, confirmed LSNs in.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use millrace_event::Lsn;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::error::WalError;
use super::framing::WalBatch;

/// How long the thread may take to say goodbye when its reader is dropped without a stop.
const DROP_DEADLINE: Duration = Duration::from_secs(2);

/// What the thread hands over.
pub(super) enum Delivery {
    /// A batch, and its share of the queue's bytes.
    Batch(WalBatch, OwnedSemaphorePermit),
    /// The stream has failed, behind every batch before.
    Failed(WalError),
    /// The stream was stopped by us.
    Stopped,
}

/// What the thread and its handles share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    confirmed: AtomicU64,
    /// A confirmed LSN is waiting to be reported, and the thread knows.
    report_wanted: AtomicBool,
    /// When the thread must be gone, once somebody wants that.
    stop: OnceLock<Instant>,
    /// Wakes the thread: look at the fields above.
    pub(super) wake: Notify,
    /// The thread has let go of the socket.
    pub(super) ended: CancellationToken,
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
    pub(super) stats: WalStats,
}

impl Shared {
    pub(super) fn confirmed(&self) -> Lsn {
        Lsn(self.confirmed.load(Ordering::Acquire))
    }

    /// The confirmed LSN, for the report that is about to be sent.
    pub(super) fn take_confirmed(&self) -> Lsn {
        self.report_wanted.store(false, Ordering::SeqCst);
        Lsn(self.confirmed.load(Ordering::SeqCst))
    }

    pub(super) fn stop_deadline(&self) -> Option<Instant> {
        self.stop.get().copied()
    }

    fn request_stop(&self, deadline: Instant) {
        // The first one to ask decides: a second stop only waits for the end.
        let _ = self.stop.set(deadline);
        self.wake.notify_one();
    }
}

/// Counters of a stream, cheap to read at any time.
#[derive(Debug, Default)]
pub struct WalStats {
    pub(super) bytes: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) reports: AtomicU64,
    pub(super) last_read_us: AtomicU64,
}

impl WalStats {
    /// Bytes read from the socket.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Reads from the socket that brought bytes.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Batches handed over.
    #[must_use]
    pub fn batches(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }

    /// Status reports sent to the server.
    #[must_use]
    pub fn reports(&self) -> u64 {
        self.reports.load(Ordering::Relaxed)
    }

    /// When bytes were last read, in microseconds since the Unix epoch; 0 for never.
    #[must_use]
    pub fn last_read_us(&self) -> u64 {
        self.last_read_us.load(Ordering::Relaxed)
    }
}

/// The stream of WAL batches. Dropping it ends the connection.
#[derive(Debug)]
pub struct WalReader {
    deliveries: UnboundedReceiver<Delivery>,
    shared: Arc<Shared>,
    over: bool,
}

impl WalReader {
    pub(super) fn new(deliveries: UnboundedReceiver<Delivery>, shared: Arc<Shared>) -> Self {
        Self {
            deliveries,
            shared,
            over: false,
        }
    }

    /// A handle to confirm, to stop and to read the counters.
    #[must_use]
    pub fn handle(&self) -> WalHandle {
        WalHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The next batch; `None` once the stream was stopped by us. Cancel-safe.
    ///
    /// # Errors
    /// Why the stream ended, once, behind every batch that was received before.
    pub async fn next(&mut self) -> Result<Option<WalBatch>, WalError> {
        if self.over {
            return Ok(None);
        }
        match self.deliveries.recv().await {
            Some(Delivery::Batch(batch, _share)) => return Ok(Some(batch)),
            Some(Delivery::Stopped) => self.over = true,
            Some(Delivery::Failed(error)) => {
                self.over = true;
                return Err(error);
            }
            None => {
                self.over = true;
                return Err(WalError::ThreadGone);
            }
        }
        Ok(None)
    }
}

impl Drop for WalReader {
    fn drop(&mut self) {
        self.shared.request_stop(Instant::now() + DROP_DEADLINE);
    }
}

/// Confirms and stops a stream from anywhere. Clones share the stream.
#[derive(Clone, Debug)]
pub struct WalHandle {
    shared: Arc<Shared>,
}

impl WalHandle {
    /// Lets the slot forget everything below `lsn`, which must be an end LSN or a keepalive's that is safe
    /// downstream, and not below what the slot has confirmed already. Reported within about 100 ms.
    ///
    /// # Panics
    /// If `lsn` is below an LSN that was confirmed before.
    pub fn confirm(&self, lsn: Lsn) {
        let before = Lsn(self.shared.confirmed.fetch_max(lsn.0, Ordering::SeqCst));
        assert!(
            before <= lsn,
            "confirmed LSN went back from {before} to {lsn}"
        );
        if before < lsn && !self.shared.report_wanted.swap(true, Ordering::SeqCst) {
            self.shared.wake.notify_one();
        }
    }

    /// The highest LSN that was confirmed through this stream; zero for none yet.
    #[must_use]
    pub fn confirmed(&self) -> Lsn {
        self.shared.confirmed()
    }

    /// The stream's counters.
    #[must_use]
    pub fn stats(&self) -> &WalStats {
        &self.shared.stats
    }

    /// Ends the stream: reports the confirmed LSN a last time, terminates the session, and waits until the
    /// server has let go of the slot, for `limit` at most. Batches that were received stay readable.
    ///
    /// # Errors
    /// [`WalError::StopTimedOut`] if the thread is not gone by then, [`WalError::ThreadGone`] if it panicked.
    pub async fn stop(&self, limit: Duration) -> Result<(), WalError> {
        self.shared.request_stop(Instant::now() + limit);
        let ended = tokio::time::timeout(limit + DROP_DEADLINE, self.shared.ended.cancelled());
        ended.await.map_err(|_| WalError::StopTimedOut)?;
        let thread = self
            .shared
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // The thread has nothing left to do but to return, so this does not block.
        match thread.map(JoinHandle::join) {
            Some(Err(_)) => Err(WalError::ThreadGone),
            Some(Ok(())) | None => Ok(()),
        }
    }
}
