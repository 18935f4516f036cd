//! The reader: an ephemeral consumer that is made anew after every fault.

use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{Context, Message};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use millrace_event::{TableName, subject};

use crate::hole;
use crate::link::{self, Fault, Link, Made};
use crate::progress::{Arrival, Progress};
use crate::stored::Stored;
use crate::{Body, Delivery, Token};

/// What a link's messages give.
type Next = Option<Result<Message, pull::MessagesError>>;

/// The wait after the first fault; it doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait after a fault.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Where a reader starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the oldest message.
    Beginning,
    /// After the newest message.
    New,
    /// After what a token names.
    After(Token),
}

/// What makes a message new to a reader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ordering {
    /// Its position is above every one before: a source's stream.
    #[default]
    ByPosition,
    /// Its stream sequence: a copy stream.
    ByStream,
}

/// What to read.
#[derive(Clone, Debug)]
pub struct ReaderOptions {
    /// JetStream, on a client that reconnects by itself.
    pub jetstream: Context,
    /// The stream: [`millrace_event::subject::stream_name`] or a copy stream's name.
    pub stream: String,
    /// The source's name.
    pub source: String,
    /// Where to start.
    pub start: Start,
    /// Only these tables' changes, and no control messages; `None` for everything. Control messages are read all the
    /// same: by them [`Reader::token`] moves on while the tables are quiet.
    pub tables: Option<Vec<TableName>>,
    /// What makes a message new.
    pub ordering: Ordering,
}

impl ReaderOptions {
    /// Everything of a source's stream.
    #[must_use]
    pub fn new(jetstream: Context, source: &str, start: Start) -> Self {
        let (stream, source) = (subject::stream_name(source), source.to_owned());
        Self {
            jetstream,
            stream,
            source,
            start,
            tables: None,
            ordering: Ordering::ByPosition,
        }
    }
}

/// Why reading stopped for good. Everything else is tried again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Messages that the reader needs are gone from the stream.
    #[error("the stream no longer holds sequence {wanted} (it goes on at {found})")]
    Gap {
        /// The first message that is missing.
        wanted: u64,
        /// The oldest message after it.
        found: u64,
    },
}

/// Follows a stream.
pub struct Reader {
    options: ReaderOptions,
    /// `None` until the stream has been seen once and [`Start`] has become a place in it.
    progress: Option<Progress>,
    link: Option<Link>,
    /// The link that is being made. It takes several answers of the server, so it outlives a [`Reader::next`] that
    /// is cancelled before; it borrows nothing, and nothing that it was made from changes while there is no link.
    attempt: Option<BoxFuture<'static, Result<Made, Fault>>>,
    /// Faults in a row.
    faults: u32,
    retry_at: Option<tokio::time::Instant>,
}

impl Reader {
    /// A reader; it connects to the stream at the first [`Reader::next`].
    #[must_use]
    pub fn open(options: ReaderOptions) -> Self {
        Self {
            options,
            progress: None,
            link: None,
            attempt: None,
            faults: 0,
            retry_at: None,
        }
    }

    /// Where to resume after everything that was delivered; `None` before the stream was seen. Of a reader of some
    /// tables it may be far ahead of the newest [`Delivery::token`]: who stores it now and then can resume although the
    /// stream no longer holds what the tables' last change stood at.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.progress.as_ref().map(Progress::token)
    }

    /// Messages that were skipped because they are not ours.
    #[must_use]
    pub fn foreign(&self) -> u64 {
        self.progress
            .as_ref()
            .map_or(0, |progress| progress.foreign)
    }

    /// Waits for the next message that is new. Safe to cancel, however often: what was begun goes on with the next
    /// call.
    ///
    /// # Errors
    /// [`ReadError::Gap`]; every other fault is tried again, for ever.
    pub async fn next(&mut self) -> Result<Delivery, ReadError> {
        loop {
            if self.link.is_none() {
                self.connect().await?;
            }
            if let Some(delivery) = self.step().await? {
                return Ok(delivery);
            }
        }
    }

    /// The next message that is new, if it has arrived already.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub fn try_next(&mut self) -> Result<Option<Delivery>, ReadError> {
        while self.link.is_some() {
            let Some(step) = self.step().now_or_never() else {
                return Ok(None);
            };
            if let Some(delivery) = step? {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    /// Waits for one thing to happen on the link. Safe to cancel.
    async fn step(&mut self) -> Result<Option<Delivery>, ReadError> {
        let Some(link) = &mut self.link else {
            return Ok(None);
        };
        let Some(gate) = &mut link.gate else {
            let next = link.messages.next().await;
            return match self.arrived(next) {
                Some(arrival) => self.take(arrival),
                None => Ok(None),
            };
        };
        if let Some(arrival) = gate.pop() {
            return Ok(self.take_of_tables(arrival));
        }
        if gate.is_looking() {
            match gate.looked().await {
                Ok(()) => {}
                Err(Fault::Fatal(gap)) => {
                    // The look is spent, and the holes with it: whoever asks again has another link find the gap anew.
                    self.link = None;
                    return Err(gap);
                }
                Err(Fault::Transient(reason)) => self.fault(&reason),
            }
            return Ok(None);
        }
        let idle_until = gate.idle_until();
        let next = tokio::time::timeout_at(idle_until, link.messages.next()).await;
        self.gather(next.ok());
        Ok(None)
    }

    /// Has one look decide about this message and whatever else has arrived; `None` where nothing did for a while.
    fn gather(&mut self, mut next: Option<Next>) {
        while let Some(message) = next {
            let Some(arrival) = self.arrived(message) else {
                return;
            };
            let Some(link) = &mut self.link else { return };
            let Some(gate) = &mut link.gate else { return };
            gate.push(arrival);
            next = if gate.is_full() {
                None
            } else {
                link.messages.next().now_or_never()
            };
        }
        let Some(link) = &mut self.link else { return };
        if let Some(gate) = &mut link.gate {
            let own = self.progress.as_ref().map(Progress::token);
            let own = own.unwrap_or_default().position;
            gate.begin_look(link.consumer_seq, own);
        }
    }

    /// A message that the consumer sent, next in its own order.
    fn arrived(&mut self, next: Next) -> Option<Arrival> {
        let message = match next {
            Some(Ok(message)) => message,
            Some(Err(error)) => {
                self.fault(&error.to_string());
                return None;
            }
            None => {
                self.fault("the consumer ended");
                return None;
            }
        };
        let link = self.link.as_mut()?;
        let async_nats::Message {
            subject,
            reply,
            headers,
            payload,
            ..
        } = message.message;
        let Some(stored) = reply.as_deref().and_then(Stored::parse) else {
            self.fault("a message does not say where it is stored");
            return None;
        };
        let Stored {
            stream_seq,
            consumer_seq,
            at: stored_at,
        } = stored;
        if consumer_seq != link.consumer_seq + 1 {
            self.fault("the client dropped messages");
            return None;
        }
        if stream_seq <= link.stream_seq {
            self.fault("the consumer began again");
            return None;
        }
        (link.consumer_seq, link.stream_seq) = (consumer_seq, stream_seq);
        (self.faults, self.retry_at) = (0, None);
        Some(Arrival {
            stream_seq,
            stored_at,
            subject,
            headers,
            payload,
        })
    }

    fn take(&mut self, arrival: Arrival) -> Result<Option<Delivery>, ReadError> {
        let Some(progress) = &mut self.progress else {
            return Ok(None);
        };
        let (wanted, found) = (progress.stream_seq + 1, arrival.stream_seq);
        let begins = self.options.start == Start::Beginning && !progress.has_read;
        if found != wanted && !begins {
            let own = progress.token().position;
            let by_position = self.options.ordering == Ordering::ByPosition;
            if !by_position || !hole::is_harmless(own, arrival.behind_a_hole()) {
                return Err(ReadError::Gap { wanted, found });
            }
            tracing::warn!(
                stream = %self.options.stream, wanted, found, position = %own,
                "the broker lost messages and what they held is written again behind them"
            );
        }
        Ok(progress.on_message(arrival))
    }

    /// Control messages only move the place on.
    fn take_of_tables(&mut self, arrival: Arrival) -> Option<Delivery> {
        let delivery = self.progress.as_mut()?.on_message(arrival)?;
        matches!(delivery.body, Body::Changes(_)).then_some(delivery)
    }

    /// Gives the consumer up; [`Reader::next`] makes another one after a pause.
    fn fault(&mut self, reason: &str) {
        let pause = BACKOFF_FIRST
            .saturating_mul(1 << self.faults.min(6))
            .min(BACKOFF_MAX);
        tracing::warn!(stream = %self.options.stream, reason, ?pause, "reading again");
        self.link = None;
        self.faults = self.faults.saturating_add(1);
        self.retry_at = Some(tokio::time::Instant::now() + pause);
    }

    async fn connect(&mut self) -> Result<(), ReadError> {
        if let Some(at) = self.retry_at {
            tokio::time::sleep_until(at).await;
        }
        let attempt = self.attempt.get_or_insert_with(|| {
            let begins = self.options.start == Start::Beginning;
            // Before anything was read, what is the oldest by now is the beginning.
            let progress = self.progress.as_ref();
            let reached = progress.filter(|progress| progress.has_read || !begins);
            let reached = reached.map(Progress::token);
            link::make(self.options.clone(), reached).boxed()
        });
        let made = attempt.await;
        self.attempt = None;
        match made {
            Ok(Made { link, token, after }) => {
                let ordering = self.options.ordering;
                let progress = self
                    .progress
                    .get_or_insert_with(|| Progress::new(ordering, token));
                if !progress.has_read {
                    *progress = Progress::new(ordering, token);
                }
                progress.rewind(after);
                self.link = Some(link);
                Ok(())
            }
            Err(Fault::Fatal(error)) => Err(error),
            Err(Fault::Transient(reason)) => {
                self.fault(&reason);
                Ok(())
            }
        }
    }
}
