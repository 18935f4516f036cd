//! Publishing into the stream: every message of one decoded sequence, in order and without a hole.
//!
//! Messages travel as fast-ingest batches in the mode in which the server refuses everything after a
//! message that is missing. The first message of a batch expects the stream to end where the publisher
//! believes it does; the others carry no such header (it costs 40 % of the rate), because a foreign message
//! among them harms nobody: another publisher of this stream writes the same sequence, and readers drop
//! whatever is not above the highest position that they have seen.
//!
//! A publisher lives as long as its connection and its first error. Its successor reads the stream's tail
//! first and sends everything above it: what became of the messages on their way needs no answer.

mod chunk;
mod window;
mod wire;

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use async_nats::{Client, HeaderMap, StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use tokio::sync::{Mutex, Notify};

pub use chunk::{CHUNK_OVERHEAD_BYTES, ChunkError, chunks};
use window::{Due, Window};
use wire::{Operation, ReplySubjects};

/// The header by which a batch's first message names the sequence that it must follow.
const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";

/// Why publishing stopped. Every variant ends the publisher's life; the stream's tail tells what was stored.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Somebody else wrote to the stream since its tail was read.
    #[error("another publisher wrote to the stream ({text})")]
    WrongLastSequence {
        /// What the server said.
        text: String,
    },
    /// The stream has reached its `max_bytes`.
    #[error("the stream is full")]
    StreamFull,
    /// Messages were lost on the way; the server stored none after them.
    #[error("the server misses message {expected} of a batch (it has seen {found})")]
    Gap {
        /// The first message that is missing, counted from 1 in its batch.
        expected: u64,
        /// The message that arrived instead.
        found: u64,
    },
    /// The server refused a message for another reason.
    #[error("the server refused a message: {text} (code {code})")]
    Rejected {
        /// JetStream's error code, or else the status.
        code: u64,
        /// What the server said.
        text: String,
    },
    /// Nothing listens on the stream's subjects: the stream is gone or has no leader.
    #[error("nothing listens on the stream's subjects")]
    NoResponders,
    /// The server sent something that is not a reply.
    #[error("the server's reply is unreadable")]
    Unreadable(#[source] serde_json::Error),
    /// The server has not acknowledged anything for too long.
    #[error("the server does not acknowledge")]
    Timeout,
    /// The connection ended or was replaced.
    #[error("the connection to the server ended")]
    Disconnected,
    /// The client refused a message before sending it.
    #[error("the client refused a message")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The publisher failed before; its acknowledgements have said why.
    #[error("the publisher has failed before")]
    Closed,
}

/// A message for the stream.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Where it goes; a clone of a subject that was built once costs no allocation.
    pub subject: Subject,
    /// One event, or several of one subject, one per line.
    pub payload: Bytes,
    /// Headers of a chunk or of a copied row; most messages have none.
    pub headers: Option<HeaderMap>,
}

/// How far the stream holds what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// Messages of this publisher that are in the stream: the first `count` that were sent.
    pub count: u64,
    /// The newest one's stream sequence. Too low if a foreign message got in between, which ends the publisher's
    /// life within seconds.
    pub stream_seq: u64,
}

struct Shared {
    client: Client,
    /// The connection's id at the server: another one means that the client reconnected.
    client_id: u64,
    line: Mutex<Line>,
    room: AtomicBool,
    /// Wakes the sender when there may be room.
    roomy: Notify,
    /// Wakes the acknowledgements' side when its next deadline may have moved.
    armed: Notify,
}

/// What must change together: a message's number and its place in the connection's queue.
struct Line {
    window: Window,
    replies: ReplySubjects,
    /// Any subject of the stream: commits and pings are published to it.
    subject: Option<Subject>,
    /// Messages that wait for the answer to a commit; within the window's bounds.
    held: VecDeque<Outgoing>,
    held_bytes: usize,
}

impl Shared {
    /// Returns whether there is room again.
    fn update_room(&self, line: &Line) -> bool {
        let room = line.window.has_room(line.held.len(), line.held_bytes);
        let had = self.room.swap(room, Ordering::AcqRel);
        if room && !had {
            self.roomy.notify_one();
        }
        room && !had
    }

    async fn publish(&self, line: &mut Line, message: Outgoing) -> Result<(), PublishError> {
        let size = message.payload.len();
        let (batch, number, operation, expected) = line.window.next()?;
        let reply = line.replies.reply(batch, number, operation);
        let Outgoing {
            subject,
            payload,
            mut headers,
        } = message;
        if let Some(last_seq) = expected {
            headers
                .get_or_insert_with(HeaderMap::new)
                .insert(EXPECTED_LAST_SEQUENCE, last_seq.to_string());
            line.subject = Some(subject.clone());
        }
        let sent = match headers {
            Some(headers) => {
                let client = &self.client;
                client
                    .publish_with_reply_and_headers(subject, reply, headers, payload)
                    .await
            }
            None => {
                self.client
                    .publish_with_reply(subject, reply, payload)
                    .await
            }
        };
        sent.map_err(|error| PublishError::Client(Box::new(error)))?;
        if line.window.on_sent(size, Instant::now()) {
            self.armed.notify_one();
        }
        Ok(())
    }

    /// Sends what waited for the answer to a commit. Safe to cancel.
    async fn publish_held(&self, line: &mut Line) -> Result<(), PublishError> {
        while !line.window.is_committing() {
            let Some(message) = line.held.front().cloned() else {
                break;
            };
            let size = message.payload.len();
            self.publish(line, message).await?;
            line.held.pop_front();
            line.held_bytes -= size;
        }
        Ok(())
    }

    fn on_reply(
        &self,
        line: &mut Line,
        message: &async_nats::Message,
    ) -> Result<Option<Acked>, PublishError> {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(PublishError::NoResponders);
        }
        if !line
            .replies
            .belongs_to(&message.subject, line.window.batch())
        {
            return Ok(None);
        }
        let acked = line
            .window
            .on_reply(wire::parse(&message.payload)?, Instant::now())?;
        // A caller that asks `Sender::has_room` beside `Acks::next` must hear of room without more messages too.
        let roomy = self.update_room(line);
        Ok(acked.or_else(|| roomy.then(|| line.window.acked())))
    }
}

/// The sending half of a publisher.
pub struct Sender {
    shared: Arc<Shared>,
}

/// The acknowledgements of a publisher. It also commits batches and notices silence, so [`Acks::next`] must
/// be polled as long as the publisher lives.
pub struct Acks {
    shared: Arc<Shared>,
    replies: Subscriber,
    /// A reply that was taken from the subscription and not dealt with yet: a cancelled wait must not lose it.
    reply: Option<async_nats::Message>,
}

/// Starts publishing to a stream that ends at `last_seq`. The connection must be this publisher's own, and
/// it should not reconnect by itself (what it loses then is noticed as a gap).
///
/// # Errors
/// [`PublishError::Client`] where the client is closed already.
pub async fn open(client: Client, last_seq: u64) -> Result<(Sender, Acks), PublishError> {
    let inbox = client.new_inbox();
    let replies = client
        .subscribe(format!("{inbox}.>"))
        .await
        .map_err(|error| PublishError::Client(Box::new(error)))?;
    let client_id = client.server_info().client_id;
    // The batch's id must be unique among all publishers of the stream: the inbox's last token is.
    let publisher = inbox.rsplit('.').next().unwrap_or(&inbox).to_owned();
    let line = Line {
        window: Window::new(last_seq),
        replies: ReplySubjects::new(&inbox, &publisher, window::FLOW),
        subject: None,
        held: VecDeque::new(),
        held_bytes: 0,
    };
    let shared = Arc::new(Shared {
        client,
        client_id,
        line: Mutex::new(line),
        room: AtomicBool::new(true),
        roomy: Notify::new(),
        armed: Notify::new(),
    });
    Ok((
        Sender {
            shared: Arc::clone(&shared),
        },
        Acks {
            shared,
            replies,
            reply: None,
        },
    ))
}

impl Sender {
    /// Whether a message can be sent now without waiting.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.shared.room.load(Ordering::Acquire)
    }

    /// Waits until [`Sender::has_room`]. Safe to cancel.
    pub async fn room(&self) {
        while !self.has_room() {
            self.shared.roomy.notified().await;
        }
    }

    /// Sends one message, after waiting for room; does not wait for [`Acks::next`] where [`Sender::has_room`].
    /// Safe to cancel: a cancelled message was not sent.
    ///
    /// # Errors
    /// [`PublishError::Closed`] after a failure, [`PublishError::Client`] where the client refuses the message
    /// (too large, illegal subject) or is gone.
    pub async fn send(&mut self, message: Outgoing) -> Result<(), PublishError> {
        self.room().await;
        let mut line = self.shared.line.lock().await;
        if line.window.is_committing() || !line.held.is_empty() {
            line.held_bytes += message.payload.len();
            line.held.push_back(message);
        } else {
            self.shared.publish(&mut line, message).await?;
        }
        self.shared.update_room(&line);
        Ok(())
    }
}

impl Acks {
    /// Waits until more messages are in the stream, or until the sender has room again (the count may then
    /// be the same as before). Safe to cancel.
    ///
    /// # Errors
    /// Whatever ended the publisher's life; the sender fails from then on.
    pub async fn next(&mut self) -> Result<Acked, PublishError> {
        let outcome = loop {
            match self.step().await {
                Ok(Some(acked)) => break Ok(acked),
                Ok(None) => {}
                Err(error) => break Err(error),
            }
        };
        self.settle(outcome).await
    }

    /// Commits what was sent and waits until all of it is in the stream.
    ///
    /// # Errors
    /// As [`Acks::next`].
    pub async fn finish(mut self, sender: Sender) -> Result<Option<Acked>, PublishError> {
        // Nothing can be sent any more, so the batch that is committed here is the last one.
        drop(sender);
        let mut newest = None;
        loop {
            {
                let mut line = self.shared.line.lock().await;
                self.shared.publish_held(&mut line).await?;
                if line.window.is_settled() {
                    return Ok(newest);
                }
                self.commit(&mut line).await?;
            }
            match self.step().await {
                Ok(Some(acked)) => newest = Some(acked),
                Ok(None) => {}
                Err(error) => return self.settle(Err(error)).await.map(Some),
            }
        }
    }

    async fn settle(&self, outcome: Result<Acked, PublishError>) -> Result<Acked, PublishError> {
        if outcome.is_err() {
            let mut line = self.shared.line.lock().await;
            line.window.fail();
            self.shared.update_room(&line);
        }
        outcome
    }

    /// Waits for one reply, one deadline or a deadline that moved, and deals with it.
    async fn step(&mut self) -> Result<Option<Acked>, PublishError> {
        if self.reply.is_none() {
            let due = {
                let mut line = self.shared.line.lock().await;
                self.shared.publish_held(&mut line).await?;
                line.window.due()
            };
            let armed = pin!(self.shared.armed.notified());
            let either = select(self.replies.next(), armed);
            let event = match due.at() {
                Some(at) => tokio::time::timeout_at(at.into(), either).await.ok(),
                None => Some(either.await),
            };
            self.reply = match event {
                Some(Either::Left((Some(reply), _))) => Some(reply),
                Some(Either::Left((None, _))) => return Err(PublishError::Disconnected),
                Some(Either::Right(_)) => return Ok(None),
                None => return self.on_due().await.map(|()| None),
            };
        }
        let mut line = self.shared.line.lock().await;
        match self.reply.take() {
            Some(reply) => self.shared.on_reply(&mut line, &reply),
            None => Ok(None),
        }
    }

    async fn on_due(&self) -> Result<(), PublishError> {
        let mut line = self.shared.line.lock().await;
        match line.window.due() {
            Due::Commit(at) if at <= Instant::now() => self.commit(&mut line).await,
            Due::Ping(at) if at <= Instant::now() => {
                // A client that has reconnected may have lost messages that nothing else would reveal.
                if self.shared.client.server_info().client_id != self.shared.client_id {
                    return Err(PublishError::Disconnected);
                }
                let Some((batch, number)) = line.window.ping() else {
                    return Ok(());
                };
                self.operate(&mut line, batch, number, Operation::Ping)
                    .await?;
                line.window.on_ping_sent();
                Ok(())
            }
            Due::Timeout(at) if at <= Instant::now() => Err(PublishError::Timeout),
            _ => Ok(()),
        }
    }

    async fn commit(&self, line: &mut Line) -> Result<(), PublishError> {
        let Some((batch, number)) = line.window.commit() else {
            return Ok(());
        };
        self.operate(line, batch, number, Operation::Commit).await?;
        line.window.on_commit_sent(Instant::now());
        Ok(())
    }

    async fn operate(
        &self,
        line: &mut Line,
        batch: u64,
        number: u64,
        operation: Operation,
    ) -> Result<(), PublishError> {
        let Some(subject) = line.subject.clone() else {
            return Ok(());
        };
        let reply = line.replies.reply(batch, number, operation);
        self.shared
            .client
            .publish_with_reply(subject, reply, Bytes::new())
            .await
            .map_err(|error| PublishError::Client(Box::new(error)))
    }
}
