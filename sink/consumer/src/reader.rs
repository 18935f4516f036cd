//! The reader: an ephemeral consumer that is made anew after every fault.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::RawMessageErrorKind;
use async_nats::jetstream::{Context, Message};
use futures_util::{FutureExt as _, StreamExt as _};
use millrace_event::{Position, TableName, header, subject};

use crate::position::{ResumeSearch, control, of_changes};
use crate::progress::{Arrival, Progress};
use crate::{Delivery, Token};

/// Messages asked for at a time: well below the 65,536 that the client holds before it drops some.
const PULL_MESSAGES_MAX: usize = 10_000;
/// Bytes asked for at a time.
const PULL_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long the server keeps a request for messages.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// How often an idle server says that it is there; two missing ones end the consumer.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(5);
/// After a rollback this many messages are read again before the place that the search found: a publisher that was
/// cut off may have left messages there whose positions lie below their neighbours'. What was seen is dropped.
const REWIND: u64 = 4_000;
/// How long the server keeps a consumer that nobody asks.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(60);
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
    /// Only these tables' changes, and no control messages; `None` for everything.
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
    /// Faults in a row.
    faults: u32,
    retry_at: Option<tokio::time::Instant>,
}

struct Link {
    messages: pull::Stream,
    /// The consumer's own number of the newest message; a jump means that the client dropped some.
    consumer_seq: u64,
}

/// Why a consumer could not be made.
enum Fault {
    Fatal(ReadError),
    /// Logged here, tried again by the caller.
    Transient(String),
}

impl<E: std::error::Error> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Transient(error.to_string())
    }
}

impl Reader {
    /// A reader; it connects to the stream at the first [`Reader::next`].
    #[must_use]
    pub fn open(options: ReaderOptions) -> Self {
        Self {
            options,
            progress: None,
            link: None,
            faults: 0,
            retry_at: None,
        }
    }

    /// Where to resume after everything that was delivered; `None` before the stream was seen.
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

    /// Waits for the next message that is new. Safe to cancel.
    ///
    /// # Errors
    /// [`ReadError::Gap`]; every other fault is tried again, for ever.
    pub async fn next(&mut self) -> Result<Delivery, ReadError> {
        loop {
            if self.link.is_none() {
                self.connect().await?;
            }
            let Some(link) = &mut self.link else { continue };
            let next = link.messages.next().await;
            if let Some(delivery) = self.on_next(next)? {
                return Ok(delivery);
            }
        }
    }

    /// The next message that is new, if it has arrived already.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub fn try_next(&mut self) -> Result<Option<Delivery>, ReadError> {
        while let Some(link) = &mut self.link {
            let Some(next) = link.messages.next().now_or_never() else {
                return Ok(None);
            };
            if let Some(delivery) = self.on_next(next)? {
                return Ok(Some(delivery));
            }
        }
        Ok(None)
    }

    fn on_next(
        &mut self,
        next: Option<Result<Message, pull::MessagesError>>,
    ) -> Result<Option<Delivery>, ReadError> {
        match next {
            Some(Ok(message)) => self.on_message(message),
            Some(Err(error)) => {
                self.fault(&error.to_string());
                Ok(None)
            }
            None => {
                self.fault("the consumer ended");
                Ok(None)
            }
        }
    }

    fn on_message(&mut self, message: Message) -> Result<Option<Delivery>, ReadError> {
        let (Some(link), Some(progress)) = (&mut self.link, &mut self.progress) else {
            return Ok(None);
        };
        let (stream_seq, consumer_seq, stored_at) = match message.info() {
            Ok(info) => (info.stream_sequence, info.consumer_sequence, info.published),
            Err(error) => {
                self.fault(&error.to_string());
                return Ok(None);
            }
        };
        if consumer_seq != link.consumer_seq + 1 {
            self.fault("the client dropped messages");
            return Ok(None);
        }
        let wanted = progress.stream_seq + 1;
        if self.options.tables.is_none() && stream_seq != wanted {
            return Err(ReadError::Gap {
                wanted,
                found: stream_seq,
            });
        }
        link.consumer_seq = consumer_seq;
        (self.faults, self.retry_at) = (0, None);
        let Message { message, .. } = message;
        let async_nats::Message {
            subject,
            headers,
            payload,
            ..
        } = message;
        let stored_at = stored_at.into();
        Ok(progress.on_message(Arrival {
            stream_seq,
            stored_at,
            subject,
            headers,
            payload,
        }))
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
        match self.make_link().await {
            Ok(link) => {
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

    async fn make_link(&mut self) -> Result<Link, Fault> {
        let stream = self
            .options
            .jetstream
            .get_stream(&self.options.stream)
            .await?;
        let state = &stream.cached_info().state;
        let (first, last) = (state.first_sequence.max(1), state.last_sequence);
        let token = match (&self.progress, self.options.start) {
            (Some(progress), _) => progress.token(),
            (None, Start::After(token)) => token,
            (None, Start::Beginning) => Token {
                stream_seq: first - 1,
                position: Position::ZERO,
            },
            (None, Start::New) => Token {
                stream_seq: last,
                position: Position::ZERO,
            },
        };
        let after = self.resume_after(&stream, token, first, last).await?;
        let filter_subjects = self.options.tables.iter().flatten();
        let filter_subjects = filter_subjects
            .map(|table| subject::table_filter(&self.options.source, table))
            .collect();
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: after + 1,
            },
            ack_policy: AckPolicy::None,
            filter_subjects,
            inactive_threshold: INACTIVE_THRESHOLD,
            num_replicas: 1,
            memory_storage: true,
            ..pull::Config::default()
        };
        let consumer: PullConsumer = stream.create_consumer(config).await?;
        let messages = consumer
            .stream()
            .max_messages_per_batch(PULL_MESSAGES_MAX)
            .max_bytes_per_batch(PULL_BYTES_MAX)
            .expires(PULL_EXPIRES)
            .heartbeat(IDLE_HEARTBEAT)
            .messages()
            .await?;
        let ordering = self.options.ordering;
        self.progress
            .get_or_insert_with(|| Progress::new(ordering, token))
            .rewind(after);
        Ok(Link {
            messages,
            consumer_seq: 0,
        })
    }

    /// The sequence to resume after: the token's, unless the stream was rolled back meanwhile.
    async fn resume_after(
        &self,
        stream: &async_nats::jetstream::stream::Stream,
        token: Token,
        first: u64,
        last: u64,
    ) -> Result<u64, Fault> {
        let wanted = token.stream_seq + 1;
        if first > wanted {
            return Err(Fault::Fatal(ReadError::Gap {
                wanted,
                found: first,
            }));
        }
        if last < token.stream_seq {
            let reason = format!("the stream ends at {last}, before {}", token.stream_seq);
            return Err(Fault::Transient(reason));
        }
        let unchecked = token.position == Position::ZERO
            || self.options.ordering == Ordering::ByStream
            || first == wanted;
        if unchecked || position_at(stream, token.stream_seq).await? == Some(token.position) {
            return Ok(token.stream_seq);
        }
        let mut search = ResumeSearch::new(token.position, first, last);
        while let Some(stream_seq) = search.question() {
            search.answer(position_at(stream, stream_seq).await?);
        }
        let after = search.after();
        // Not even the oldest message was seen, although something was: what lies between may be missing.
        if after < first {
            return Err(Fault::Fatal(ReadError::Gap {
                wanted,
                found: first,
            }));
        }
        Ok(after.saturating_sub(REWIND).max(first.saturating_sub(1)))
    }
}

/// The position of a message, read through the stream's leader; of a chunk, its row's.
async fn position_at(
    stream: &async_nats::jetstream::stream::Stream,
    stream_seq: u64,
) -> Result<Option<Position>, Fault> {
    let message = match stream.get_raw_message(stream_seq).await {
        Ok(message) => message,
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Some(position) = message.headers.get(header::POSITION) {
        return Ok(position.as_str().parse().ok());
    }
    let control_position = || control(&message.payload).map(|control| control.position);
    Ok(of_changes(&message.payload).or_else(control_position))
}
