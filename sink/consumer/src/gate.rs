//! Holds the messages of a reader of some tables until it is sure that none before them was purged unread.
//!
//! Such a reader's sequences have holes by nature, so a purge that overtakes it shows in nothing that it receives. But
//! while the stream begins at or below the newest message that arrived, nothing behind that one has been purged yet.
//! So messages are gathered, the stream is looked at once for all of them, and then they are handed on.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::Stream;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::coverage::{Coverage, Look};
use crate::link::{Fault, answer};
use crate::progress::Arrival;

/// Messages that one look is for.
const MESSAGES_MAX: usize = 10_000;
/// Their bytes, or one message of any size that the server takes.
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Looks begin at least so far apart: a stream that trickles is not looked at for each message.
const LOOKS_APART: Duration = Duration::from_millis(10);
/// While nothing arrives it is looked this often: what was purged behind the newest message was not ours then.
const IDLE_LOOKS_APART: Duration = Duration::from_secs(10);

/// The messages that wait, and the look that they wait for.
pub(crate) struct Gate {
    stream: Stream,
    consumer: PullConsumer,
    coverage: Coverage,
    waiting: VecDeque<Arrival>,
    waiting_bytes: usize,
    passed: VecDeque<Arrival>,
    look: Option<BoxFuture<'static, Result<Look, Fault>>>,
    looked_at: Instant,
}

impl Gate {
    /// Of a consumer of this stream.
    pub(crate) fn new(stream: Stream, consumer: PullConsumer, coverage: Coverage) -> Self {
        Self {
            stream,
            consumer,
            coverage,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            passed: VecDeque::new(),
            look: None,
            looked_at: Instant::now(),
        }
    }

    /// The next message that may be handed on.
    pub(crate) fn pop(&mut self) -> Option<Arrival> {
        self.passed.pop_front()
    }

    /// Whether the stream is being looked at. What arrives meanwhile waits for the next look.
    pub(crate) fn is_looking(&self) -> bool {
        self.look.is_some()
    }

    /// Whether the next look is for as many messages as it may be.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= MESSAGES_MAX || self.waiting_bytes >= BYTES_MAX
    }

    /// When to look although nothing arrived.
    pub(crate) fn idle_until(&self) -> Instant {
        self.looked_at + IDLE_LOOKS_APART
    }

    /// Takes in the next message.
    pub(crate) fn push(&mut self, arrival: Arrival) {
        self.waiting_bytes += arrival.payload.len();
        self.waiting.push_back(arrival);
    }

    /// Looks at the stream, for everything that arrived. `consumer_seq` is the consumer's number of the newest message.
    pub(crate) fn begin_look(&mut self, consumer_seq: u64) {
        let (stream, consumer) = (self.stream.clone(), self.consumer.clone());
        let begins_at = self.looked_at + LOOKS_APART;
        let is_idle = self.waiting.is_empty();
        let look = async move {
            tokio::time::sleep_until(begins_at).await;
            // Before the stream: see `Coverage::on_look`.
            let is_drained = is_idle && {
                let info = answer(consumer.get_info()).await??;
                info.num_pending == 0 && info.delivered.consumer_sequence == consumer_seq
            };
            let state = answer(stream.get_info()).await??.state;
            Ok(Look {
                is_drained,
                first: state.first_sequence,
                last: state.last_sequence,
            })
        };
        self.look = Some(look.boxed());
    }

    /// Waits for the look that was begun. Safe to cancel.
    pub(crate) async fn looked(&mut self) -> Result<(), Fault> {
        let Some(look) = &mut self.look else {
            return Ok(());
        };
        let look = look.await;
        (self.look, self.looked_at) = (None, Instant::now());
        let newest = self.waiting.back().map(|arrival| arrival.stream_seq);
        let covered = self.coverage.on_look(look?, newest);
        let begin = covered.map_err(Fault::Fatal)?;
        self.waiting.retain(|arrival| arrival.stream_seq >= begin);
        self.passed.append(&mut self.waiting);
        self.waiting_bytes = 0;
        Ok(())
    }
}
