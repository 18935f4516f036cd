//! The loop of the reading thread: socket to batches, and reports back.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::FutureExt;
use millrace_config::limits::CAPTURE_QUEUE_BYTES_MAX;
use millrace_connect::clock::now_us;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::{sleep_until, timeout, timeout_at};

use super::error::WalError;
use super::feedback::Feedback;
use super::framing::{Ending, Framer, WalBatch};
use super::pace::Pace;
use super::wal::{Delivery, Shared};

/// What the smallest batch counts as in the queue, which bounds the number of batches as well.
const BATCH_SHARE_BYTES_MIN: usize = 4 << 10;

/// What is read at a time when nobody wants it any more.
const DISCARD_BYTES: usize = 16 << 10;

/// How long a report may take to be written. It is 39 bytes: the socket is dead when it does not fit.
const REPORT_WRITE_LIMIT: Duration = Duration::from_secs(10);

/// A stream that has been started.
pub(super) struct Stream<S> {
    pub(super) socket: S,
    pub(super) framer: Framer,
    pub(super) feedback: Feedback,
    pub(super) shared: Arc<Shared>,
    pub(super) queue: UnboundedSender<Delivery>,
    pub(super) budget: Arc<Semaphore>,
}

/// Why a wait came to an end.
enum Event<T> {
    /// What was waited for.
    Done(T),
    /// Somebody wants the stream to end by then.
    Stop(Instant),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream<S> {
    /// Reads until the stream is stopped or fails, and says which.
    pub(super) async fn run(mut self) {
        let delivery = match self.read_all().await {
            Ok(deadline) => {
                self.say_goodbye(deadline).await;
                Delivery::Stopped
            }
            Err(error) => Delivery::Failed(error),
        };
        let _ = self.queue.send(delivery);
    }

    async fn read_all(&mut self) -> Result<Instant, WalError> {
        // Messages may have arrived together with the answer to START_REPLICATION.
        let mut read = 0;
        let mut pace = Pace::default();
        loop {
            let scanned = self.framer.scan()?;
            self.feedback
                .keepalive(scanned.wal_end, scanned.reply_requested);
            if let Some(batch) = self.framer.take()
                && let Event::Stop(deadline) = self.hand_over(batch).await?
            {
                return Ok(deadline);
            }
            match scanned.ending {
                None => {}
                Some(Ending::Complete) => return Err(WalError::ServerShutdown),
                Some(Ending::Failed(error)) => return Err(WalError::server(error)),
            }
            if let Some(pause) = pace.after(read) {
                std::thread::sleep(pause);
            }
            read = match self.read().await? {
                Event::Done(read) => read,
                Event::Stop(deadline) => return Ok(deadline),
            };
        }
    }

    /// Waits for bytes, reporting when it is time to, and then takes all that are there.
    async fn read(&mut self) -> Result<Event<usize>, WalError> {
        let failed = |source| WalError::Io {
            doing: "reading WAL",
            source,
        };
        let first = loop {
            if let Some(deadline) = self.shared.stop_deadline() {
                return Ok(Event::Stop(deadline));
            }
            let due = self.feedback.due(self.shared.confirmed()).into();
            tokio::select! {
                biased;
                () = sleep_until(due) => self.report().await?,
                () = self.shared.wake.notified() => {}
                read = self.socket.read_buf(self.framer.room()) => break read.map_err(failed)?,
            }
        };
        let mut total = first;
        let mut reads = 1;
        let mut last = first;
        while last > 0 && self.framer.has_room() {
            match self.socket.read_buf(self.framer.room()).now_or_never() {
                None => break,
                Some(read) => last = read.map_err(failed)?,
            }
            total += last;
            reads += 1;
        }
        let stats = &self.shared.stats;
        stats.bytes.fetch_add(total as u64, Ordering::Relaxed);
        stats.reads.fetch_add(reads, Ordering::Relaxed);
        stats
            .last_read_us
            .store(now_us().unsigned_abs(), Ordering::Relaxed);
        // An end of file behind bytes shows again at the next read.
        if total == 0 {
            Err(WalError::Closed)
        } else {
            Ok(Event::Done(total))
        }
    }

    /// Puts a batch into the queue. While the queue is full nothing is read, but reports go on.
    async fn hand_over(&mut self, batch: WalBatch) -> Result<Event<()>, WalError> {
        // A batch larger than the whole queue takes all of it.
        let share = batch
            .bytes()
            .clamp(BATCH_SHARE_BYTES_MIN, CAPTURE_QUEUE_BYTES_MAX);
        let budget = Arc::clone(&self.budget);
        let mut admitted = pin!(budget.acquire_many_owned(share as u32));
        let permit = loop {
            if let Some(deadline) = self.shared.stop_deadline() {
                return Ok(Event::Stop(deadline));
            }
            let due = self.feedback.due(self.shared.confirmed()).into();
            tokio::select! {
                biased;
                permit = &mut admitted => break permit.map_err(|_| WalError::ThreadGone)?,
                () = sleep_until(due) => self.report().await?,
                () = self.shared.wake.notified() => {}
            }
        };
        self.shared.stats.batches.fetch_add(1, Ordering::Relaxed);
        // Fails only if the reader is gone, which has asked for the end as well.
        let _ = self.queue.send(Delivery::Batch(batch, permit));
        Ok(Event::Done(()))
    }

    async fn report(&mut self) -> Result<(), WalError> {
        let failed = |source| WalError::Io {
            doing: "reporting to the server",
            source,
        };
        let mut out = BytesMut::new();
        let confirmed = self.shared.take_confirmed();
        self.feedback
            .report(Instant::now(), confirmed, now_us(), &mut out);
        let write = async {
            self.socket.write_all(&out).await?;
            self.socket.flush().await
        };
        let written = timeout(REPORT_WRITE_LIMIT, write).await;
        written
            .map_err(|late| failed(late.into()))?
            .map_err(failed)?;
        self.shared.stats.reports.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Reports a last time and terminates, which the walsender heeds even in the middle of a large
    /// transaction (a CopyDone it would not). Then reads on until it has closed: an unread byte would make our
    /// close a reset, which can overtake the report; and the slot is free once the server has closed.
    async fn say_goodbye(&mut self, deadline: Instant) {
        let goodbye = async {
            self.report().await?;
            let failed = |source| WalError::Io {
                doing: "ending the session",
                source,
            };
            let mut out = BytesMut::new();
            frontend::terminate(&mut out);
            self.socket.write_all(&out).await.map_err(failed)?;
            self.socket.shutdown().await.map_err(failed)?;
            let mut discarded = vec![0; DISCARD_BYTES];
            while self.socket.read(&mut discarded).await.map_err(failed)? > 0 {}
            Ok::<(), WalError>(())
        };
        match timeout_at(deadline.into(), goodbye).await {
            Ok(Ok(())) => {}
            // The confirmed LSN is reported again by the next connection: nothing is lost.
            Ok(Err(error)) => tracing::debug!(error = &error as &dyn std::error::Error, "goodbye"),
            Err(_) => tracing::debug!("the server did not close the stream by the deadline"),
        }
    }
}
