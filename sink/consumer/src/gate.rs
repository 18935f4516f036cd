//! Holds the messages of a reader of some tables until it is sure that none before them was purged unread, or lost.
//!
//! Such a reader's sequences have holes by nature, so a purge that overtakes it shows in nothing that it receives. But
//! while the stream begins at or below the newest message that arrived, nothing behind that one has been purged yet.
//! So messages are gathered, the stream is looked at once for all of them, and then they are handed on. The same look
//! tells how many sequences in the stream's middle have no message. Each hole is judged as by a reader of all tables
//! ([`hole::is_harmless`]).

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::stream::Stream;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use millrace_event::Position;
use tokio::time::Instant;

use crate::ReadError;
use crate::coverage::{Coverage, Look};
use crate::hole::{self, Way};
use crate::holes::{Hole, Holes, LISTED_MAX};
use crate::link::{Fault, answer, message_at};
use crate::position::of_whole;
use crate::progress::Arrival;

/// Messages that one look is for.
const MESSAGES_MAX: usize = 10_000;
/// Their bytes, or one message of any size that the server takes.
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Looks begin at least so far apart: a stream that trickles is not looked at for each message.
const LOOKS_APART: Duration = Duration::from_millis(10);
/// While nothing arrives it is looked this often: what was purged behind the newest message was not ours then.
const IDLE_LOOKS_APART: Duration = Duration::from_secs(10);

/// Messages before a hole that are read to prove that it hides nothing: a set of chunks, and what came late.
const BEFORE_MAX: usize = 4_000;

/// What a look has found, and the holes that are judged by it.
type Looked = Result<(Look, Holes), Fault>;

/// The messages that wait, and the look that they wait for.
pub(crate) struct Gate {
    stream: Stream,
    consumer: PullConsumer,
    coverage: Coverage,
    /// `None` while a look has them.
    holes: Option<Holes>,
    waiting: VecDeque<Arrival>,
    waiting_bytes: usize,
    passed: VecDeque<Arrival>,
    look: Option<BoxFuture<'static, Looked>>,
    looked_at: Instant,
}

impl Gate {
    /// Of a consumer of this stream that begins after `after`.
    pub(crate) fn new(
        stream: Stream,
        consumer: PullConsumer,
        coverage: Coverage,
        after: u64,
    ) -> Self {
        Self {
            stream,
            consumer,
            coverage,
            holes: Some(Holes::after(after)),
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

    /// Looks at the stream, for everything that arrived. `consumer_seq` is the consumer's number of the newest message,
    /// and `own` the highest position that was handed on.
    pub(crate) fn begin_look(&mut self, consumer_seq: u64, own: Position) {
        let Some(mut holes) = self.holes.take() else {
            return;
        };
        let (stream, consumer) = (self.stream.clone(), self.consumer.clone());
        let begins_at = self.looked_at + LOOKS_APART;
        let newest = self.waiting.back().map(|arrival| arrival.stream_seq);
        let begins = self.coverage.begins();
        let look = async move {
            tokio::time::sleep_until(begins_at).await;
            // Before the stream: see `Coverage::on_look`.
            let is_drained = newest.is_none() && {
                let info = answer(consumer.get_info()).await??;
                info.num_pending == 0 && info.delivered.consumer_sequence == consumer_seq
            };
            let state = answer(stream.get_info()).await??.state;
            let look = Look {
                is_drained,
                first: state.first_sequence,
                last: state.last_sequence,
            };
            if let Some(newest) = newest {
                let lacks = state.deleted_count.unwrap_or(0);
                if !holes.are_all(look.first, lacks) {
                    list(&stream, &mut holes, lacks, newest).await?;
                }
                let way = Way {
                    first: look.first,
                    begins,
                };
                for hole in holes.before(newest) {
                    judge(&stream, &holes, hole, own, way).await?;
                }
                holes.judged(newest);
            }
            Ok((look, holes))
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
        let (look, holes) = look?;
        self.holes = Some(holes);
        let newest = self.waiting.back().map(|arrival| arrival.stream_seq);
        let covered = self.coverage.on_look(look, newest);
        let begin = covered.map_err(Fault::Fatal)?;
        self.waiting.retain(|arrival| arrival.stream_seq >= begin);
        self.passed.append(&mut self.waiting);
        self.waiting_bytes = 0;
        Ok(())
    }
}

/// Lists the holes of a stream that lacks `lacks` messages.
async fn list(stream: &Stream, holes: &mut Holes, lacks: u64, newest: u64) -> Result<(), Fault> {
    if lacks > LISTED_MAX {
        let wanted = holes.first_unjudged();
        return Err(Fault::Fatal(ReadError::Gap {
            wanted,
            found: newest,
        }));
    }
    let listed = answer(stream.info_builder().with_deleted(true).fetch()).await??;
    holes.list(listed.info.state.deleted.unwrap_or_default());
    Ok(())
}

/// Finds that a hole hides nothing from a reader that has everything before it.
///
/// Such a reader has the tables' messages before the hole, so to it the position of every whole message there is one
/// that it has, whoever's change it is: what it lacks of the tables is above.
///
/// # Errors
/// [`ReadError::Gap`] where it may hide something. A transient fault where the stream is purged meanwhile.
async fn judge(
    stream: &Stream,
    holes: &Holes,
    hole: Hole,
    mut own: Position,
    way: Way,
) -> Result<(), Fault> {
    let found = hole.last + 1;
    let gone = || Fault::Transient("the stream is purged meanwhile".to_owned());
    let message = message_at(stream, found).await?.ok_or_else(gone)?;
    let behind = hole::Behind::of(found, Some(&message.headers), &message.payload);
    let gap = || {
        Fault::Fatal(ReadError::Gap {
            wanted: hole.first,
            found,
        })
    };
    if !behind.opens_batch() {
        return Err(gap());
    }
    let mut before = hole.first;
    for _ in 0..BEFORE_MAX {
        if hole::is_harmless(own, behind) {
            tracing::warn!(
                wanted = hole.first, found, position = %own,
                "the broker lost messages and what they held is written again behind them"
            );
            return Ok(());
        }
        before = holes.step_back(before);
        let message = match before {
            0 => None,
            _ => message_at(stream, before).await?,
        };
        let Some(message) = message else {
            let first = answer(stream.get_info()).await??.state.first_sequence;
            if way.is_purged(before, first) {
                return Err(gone());
            }
            if way.has_nothing_before(before, own) {
                return Ok(());
            }
            break;
        };
        own = own.max(of_whole(&message.headers, &message.payload).unwrap_or(own));
    }
    Err(gap())
}
