//! What is on its way to the stream, and when the server must be asked about it. Pure: time is an argument.
//!
//! The server acknowledges every `flow` messages of a batch and, when the batch is committed, the rest. It
//! never acknowledges fewer than `flow` by itself, so a batch whose newest messages wait too long is
//! committed, and the next message starts another one. A batch that grows without a pause is committed now and then as well,
//! because only a commit tells the stream sequence.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use millrace_config::limits::{PUBLISH_WINDOW_BYTES_MAX, PUBLISH_WINDOW_MESSAGES_MAX};

use super::wire::{Operation, Reply};
use super::{Acked, PublishError};

/// Messages that the server acknowledges at once. Smaller means quicker acknowledgements, larger means fewer.
pub(super) const FLOW: u16 = 100;
/// Acknowledgements that may be outstanding: those of as many messages as may be on their way.
const FLOWS_OUTSTANDING_MAX: u64 = PUBLISH_WINDOW_MESSAGES_MAX / FLOW as u64;
const _: () = assert!(FLOW as u64 * FLOWS_OUTSTANDING_MAX == PUBLISH_WINDOW_MESSAGES_MAX);
/// A message that the server will not acknowledge by itself waits this long for company.
const COMMIT_DELAY: Duration = Duration::from_millis(20);
/// A batch is committed after this time, whatever its rate: a foreign message in its midst is noticed then.
const BATCH_AGE_MAX: Duration = Duration::from_secs(10);
/// A batch without any message is committed after this time: the server forgets it after 10 s.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// Without any acknowledgement for this long while one is due, the connection counts as lost.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// The server is asked where the batch stands before that.
const PING_DELAY: Duration = Duration::from_millis(2_500);

/// Where the batch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No batch: the next message starts one and expects the stream to end at `base`.
    Closed,
    /// Messages may be added. Entered by a batch's first message.
    Open {
        /// When the first message was sent.
        since: Instant,
        /// Whether the server was asked since it last acknowledged something.
        pinged: bool,
    },
    /// The commit was sent: nothing may follow before its answer, which tells where the stream ends.
    Committing,
    /// The batch failed: nothing more can be sent. Only a new publisher helps.
    Failed,
}

/// What must be done next, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing before a message is sent or a reply arrives.
    Never,
    /// The batch is to be committed.
    Commit(Instant),
    /// The server is to be asked where the batch stands.
    Ping(Instant),
    /// The server has not answered in time.
    Timeout(Instant),
}

impl Due {
    pub(super) fn at(self) -> Option<Instant> {
        match self {
            Self::Never => None,
            Self::Commit(at) | Self::Ping(at) | Self::Timeout(at) => Some(at),
        }
    }
}

/// The messages on their way.
#[derive(Debug)]
pub(super) struct Window {
    phase: Phase,
    /// The stream sequence before the batch's first message.
    base: u64,
    /// The batch's number on this connection, from 1.
    batch: u64,
    /// Messages of the batch that were sent.
    sent: u64,
    /// Messages of the batch that are in the stream.
    acked: u64,
    /// Messages of earlier batches, all of them in the stream.
    before: u64,
    /// Messages that the server acknowledges at once.
    flow: u64,
    /// Payload sizes of the messages on their way, oldest first.
    sizes: VecDeque<usize>,
    bytes: usize,
    /// The last acknowledgement, or the first message sent after everything was acknowledged.
    progress_at: Option<Instant>,
    /// When the newest message was sent.
    sent_at: Option<Instant>,
}

impl Window {
    /// An empty window on a stream that ends at `last_seq`.
    pub(super) fn new(last_seq: u64) -> Self {
        Self {
            phase: Phase::Closed,
            base: last_seq,
            batch: 0,
            sent: 0,
            acked: 0,
            before: 0,
            flow: u64::from(FLOW),
            sizes: VecDeque::new(),
            bytes: 0,
            progress_at: None,
            sent_at: None,
        }
    }

    pub(super) fn outstanding(&self) -> u64 {
        self.sent - self.acked
    }

    /// Whether a message may be handed over, with `held` messages of `held_bytes` waiting already. A failed
    /// window has room, so that the sender learns of the failure.
    pub(super) fn has_room(&self, held: usize, held_bytes: usize) -> bool {
        self.phase == Phase::Failed
            || (self.outstanding() + (held as u64) < self.flow * FLOWS_OUTSTANDING_MAX
                && self.bytes + held_bytes < PUBLISH_WINDOW_BYTES_MAX)
    }

    /// Whether messages must wait for the answer to a commit.
    pub(super) fn is_committing(&self) -> bool {
        self.phase == Phase::Committing
    }

    /// The next message's batch, its number in it and its operation; with it the stream sequence that the first
    /// message of a batch expects.
    ///
    /// # Errors
    /// [`PublishError::Closed`] once the batch has failed.
    pub(super) fn next(&self) -> Result<(u64, u64, Operation, Option<u64>), PublishError> {
        match self.phase {
            Phase::Failed => Err(PublishError::Closed),
            Phase::Closed => Ok((self.batch + 1, 1, Operation::Start, Some(self.base))),
            Phase::Open { .. } | Phase::Committing => {
                Ok((self.batch, self.sent + 1, Operation::Append, None))
            }
        }
    }

    /// Takes note of a message of `size` bytes that was sent as [`Window::next`] said. Returns whether
    /// [`Window::due`] may be earlier now.
    pub(super) fn on_sent(&mut self, size: usize, now: Instant) -> bool {
        if self.phase == Phase::Closed {
            self.phase = Phase::Open {
                since: now,
                pinged: false,
            };
            self.batch += 1;
        }
        let first = self.outstanding() == 0;
        if first {
            self.progress_at = Some(now);
        }
        self.sent += 1;
        self.sizes.push_back(size);
        self.bytes += size;
        self.sent_at = Some(now);
        first
    }

    /// What to do next if nothing happens before.
    pub(super) fn due(&self) -> Due {
        let (Some(progress_at), Some(sent_at)) = (self.progress_at, self.sent_at) else {
            return Due::Never;
        };
        match self.phase {
            Phase::Closed | Phase::Failed => Due::Never,
            Phase::Committing => Due::Timeout(progress_at + ACK_TIMEOUT),
            Phase::Open { since, .. } if self.outstanding() == 0 => {
                Due::Commit((sent_at + IDLE_MAX).min(since + BATCH_AGE_MAX))
            }
            Phase::Open { since, .. } if self.outstanding() < self.flow => {
                Due::Commit((progress_at + COMMIT_DELAY).min(since + BATCH_AGE_MAX))
            }
            // The age counts here too: under an unbroken load there is always a full flow on its way.
            Phase::Open {
                since,
                pinged: false,
            } => match (progress_at + PING_DELAY, since + BATCH_AGE_MAX) {
                (ping, age) if age < ping => Due::Commit(age),
                (ping, _) => Due::Ping(ping),
            },
            Phase::Open { pinged: true, .. } => Due::Timeout(progress_at + ACK_TIMEOUT),
        }
    }

    /// The batch and the number of its commit; `None` where no batch is open.
    pub(super) fn commit(&self) -> Option<(u64, u64)> {
        matches!(self.phase, Phase::Open { .. }).then_some((self.batch, self.sent + 1))
    }

    /// Takes note that the commit was sent.
    pub(super) fn on_commit_sent(&mut self, now: Instant) {
        self.phase = Phase::Committing;
        self.progress_at = Some(now);
    }

    /// The batch and the number of its newest message, for a ping.
    pub(super) fn ping(&self) -> Option<(u64, u64)> {
        matches!(self.phase, Phase::Open { .. }).then_some((self.batch, self.sent))
    }

    /// Takes note that a ping was sent.
    pub(super) fn on_ping_sent(&mut self) {
        if let Phase::Open { pinged, .. } = &mut self.phase {
            *pinged = true;
        }
    }

    /// The batch whose replies matter.
    pub(super) fn batch(&self) -> u64 {
        self.batch
    }

    /// Whether every message is in the stream and no batch is open.
    pub(super) fn is_settled(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Takes note that nothing more can be sent.
    pub(super) fn fail(&mut self) {
        self.phase = Phase::Failed;
    }

    /// Takes in what the server said about the open batch; `Some` where more messages are in the stream.
    ///
    /// # Errors
    /// [`PublishError::Gap`] where the server ended the batch early, [`PublishError::WrongLastSequence`]
    /// where somebody else's messages are among the batch's.
    pub(super) fn on_reply(
        &mut self,
        reply: Reply,
        now: Instant,
    ) -> Result<Option<Acked>, PublishError> {
        match reply {
            Reply::Flow { number, flow } => {
                self.flow = u64::from(flow.max(1));
                let acked = self.advance(number, now);
                // An answer that tells nothing new is no reason to ask again, or a lost message would never be
                // noticed.
                if let (Some(_), Phase::Open { pinged, .. }) = (&acked, &mut self.phase) {
                    *pinged = false;
                }
                Ok(acked)
            }
            Reply::Ended { count, stream_seq } => {
                if self.phase != Phase::Committing || count != self.sent {
                    return Err(PublishError::Gap {
                        expected: count + 1,
                        found: self.sent,
                    });
                }
                if stream_seq != self.base + count {
                    let text = format!("expected {}, found {stream_seq}", self.base + count);
                    return Err(PublishError::WrongLastSequence { text });
                }
                let acked = self.advance(count, now);
                self.phase = Phase::Closed;
                self.base = stream_seq;
                self.before += count;
                (self.sent, self.acked) = (0, 0);
                self.progress_at = None;
                Ok(acked)
            }
        }
    }

    /// How far the stream holds what was sent.
    pub(super) fn acked(&self) -> Acked {
        Acked {
            count: self.before + self.acked,
            stream_seq: self.base + self.acked,
        }
    }

    fn advance(&mut self, number: u64, now: Instant) -> Option<Acked> {
        let number = number.min(self.sent);
        if number <= self.acked {
            return None;
        }
        for size in self
            .sizes
            .drain(..usize::try_from(number - self.acked).ok()?)
        {
            self.bytes -= size;
        }
        self.acked = number;
        self.progress_at = Some(now);
        Some(self.acked())
    }
}

#[cfg(test)]
mod tests;
