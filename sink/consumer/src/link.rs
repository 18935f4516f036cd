//! Makes a reader's consumer: finds the place to resume at, and asks the server for what follows.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{self, RawMessageErrorKind, Stream};
use futures_util::StreamExt as _;
use millrace_event::{ControlKind, Position, subject};

use crate::coverage::Coverage;
use crate::gate::Gate;
use crate::hole::{self, Behind};
use crate::position::{ResumeSearch, control, of_message};
use crate::resume::{self, Extent, Place};
use crate::{Ordering, ReadError, ReaderOptions, Start, Token};

/// Messages asked for at a time: well below the 65,536 that the client holds before it drops some.
const PULL_MESSAGES_MAX: usize = 10_000;
/// Bytes asked for at a time, or one message of any size that the server takes.
const PULL_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What a message counts for beyond the server's `max_payload`, which limits payload and headers: its subject, and
/// the reply that says where it is stored.
const MESSAGE_OVERHEAD_BYTES: usize = 16 * 1024;
/// How long the server keeps a request for messages.
const PULL_EXPIRES: Duration = Duration::from_secs(30);
/// How often an idle server says that it is there; two missing ones end the consumer.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(5);
/// How long the server keeps a consumer that nobody asks: what an attempt that was given up leaves behind is gone
/// then.
const INACTIVE_THRESHOLD: Duration = Duration::from_secs(60);
/// How long one answer of the server may take before the attempt counts as failed. An attempt takes a handful of
/// answers, and after a rollback one for each heartbeat that the stream holds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages without a position that are stepped over to find the oldest one that has one.
const FOREIGN_MAX: usize = 1_000;

/// A consumer of ours at the server.
pub(crate) struct Link {
    pub(crate) messages: pull::Stream,
    /// The consumer's own number of the newest message; a jump means that the client dropped some.
    pub(crate) consumer_seq: u64,
    /// The newest message's sequence; before the first one, the one that it is to follow.
    pub(crate) stream_seq: u64,
    /// Of a reader of some tables only.
    pub(crate) gate: Option<Gate>,
}

/// A link that was made, and where it begins.
pub(crate) struct Made {
    pub(crate) link: Link,
    /// Where the reader was to go on.
    pub(crate) token: Token,
    /// The sequence that the link's messages follow.
    pub(crate) after: u64,
}

/// Why a link could not be made.
pub(crate) enum Fault {
    Fatal(ReadError),
    /// Tried again by the caller.
    Transient(String),
}

impl<E: std::error::Error> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Transient(error.to_string())
    }
}

/// Makes a link that goes on at `reached`, or before anything was read at [`ReaderOptions::start`].
///
/// The place is found before the consumer is made and found again afterwards. In between the broker may have lost its
/// end and used the sequences again: the consumer would begin among other messages than those that were looked at, and
/// pass over what stands before. Looking afterwards is enough. The consumer is held in memory and ends with the server
/// that it was made at, so it sees no stream but the one that is there from then on: either the second look sees that
/// one, or the consumer is gone and gives an error instead of messages. (A cluster may make it again by itself. Then its
/// own numbers begin again, or, where it had sent nothing, it begins at the end of a stream that is too short for it:
/// the reader notices both.) A place behind the first one is right too: going on sooner than needed never is wrong.
pub(crate) async fn make(options: ReaderOptions, reached: Option<Token>) -> Result<Made, Fault> {
    let stream = answer(options.jetstream.get_stream(&options.stream)).await??;
    let extent = extent(stream.cached_info());
    let at = |stream_seq| Token {
        stream_seq,
        position: Position::ZERO,
    };
    let token = match (reached, options.start) {
        (Some(token), _) | (None, Start::After(token)) => token,
        (None, Start::Beginning) => at(extent.first - 1),
        // With its position, so that it is noticed if the stream loses its end before anything is read.
        (None, Start::New)
            if options.ordering == Ordering::ByPosition && extent.first <= extent.last =>
        {
            let position = position_at(&stream, extent.last).await?;
            Token {
                stream_seq: extent.last,
                position: position.unwrap_or(Position::ZERO),
            }
        }
        (None, Start::New) => at(extent.last),
    };
    let after = resume_after(&options, &stream, token, extent).await?;
    let (consumer, messages) = consume(&options, &stream, after + 1, filter(&options)).await?;
    let info = answer(stream.get_info()).await??;
    let now = resume_after(&options, &stream, token, self::extent(&info)).await;
    let now = match (now, options.start) {
        // Nothing was read yet, so nothing of it is missing: what is the oldest by now is the beginning.
        (Err(Fault::Fatal(gap)), Start::Beginning) if reached.is_none() => {
            return Err(Fault::Transient(gap.to_string()));
        }
        (now, _) => now?,
    };
    if now < after {
        let reason = format!("the stream lost its end meanwhile: after {now}, not {after}");
        return Err(Fault::Transient(reason));
    }
    if after != token.stream_seq {
        tracing::info!(
            stream = %options.stream, was = token.stream_seq, after, position = %token.position,
            "the stream lost its end and goes on otherwise: reading again from before that"
        );
    }
    let gate = options.tables.is_some();
    let gate = gate.then(|| {
        let begins = reached.is_none() && options.start == Start::Beginning;
        let coverage = Coverage::new(after, info.state.last_sequence, begins);
        Gate::new(stream, consumer, coverage, after)
    });
    let link = Link {
        messages,
        consumer_seq: 0,
        stream_seq: after,
        gate,
    };
    Ok(Made { link, token, after })
}

/// What a reader of some tables asks for: their changes, and the control messages, by which its place moves on while
/// the tables are quiet.
fn filter(options: &ReaderOptions) -> Vec<String> {
    let Some(tables) = &options.tables else {
        return Vec::new();
    };
    let source = &options.source;
    let tables = tables
        .iter()
        .map(|table| subject::table_filter(source, table));
    let kinds = [
        ControlKind::Start,
        ControlKind::Heartbeat,
        ControlKind::Progress,
    ];
    let controls = kinds.map(|kind| subject::control(source, kind));
    tables.chain(controls).collect()
}

fn extent(info: &stream::Info) -> Extent {
    Extent {
        first: info.state.first_sequence.max(1),
        last: info.state.last_sequence,
    }
}

pub(crate) async fn answer<F: Future>(question: F) -> Result<F::Output, Fault> {
    let late = |_| Fault::Transient("the server does not answer".to_owned());
    tokio::time::timeout(ANSWER_TIMEOUT, question)
        .await
        .map_err(late)
}

/// A new consumer from `start_sequence` on, and its messages.
async fn consume(
    options: &ReaderOptions,
    stream: &Stream,
    start_sequence: u64,
    filter_subjects: Vec<String>,
) -> Result<(PullConsumer, pull::Stream), Fault> {
    let config = pull::Config {
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence },
        ack_policy: AckPolicy::None,
        filter_subjects,
        inactive_threshold: INACTIVE_THRESHOLD,
        num_replicas: 1,
        memory_storage: true,
        ..pull::Config::default()
    };
    let consumer: PullConsumer = answer(stream.create_consumer(config)).await??;
    let max_payload = options.jetstream.client().server_info().max_payload;
    let messages = consumer
        .stream()
        .max_messages_per_batch(PULL_MESSAGES_MAX)
        .max_bytes_per_batch(pull_bytes(max_payload))
        .expires(PULL_EXPIRES)
        .heartbeat(IDLE_HEARTBEAT);
    let messages = answer(messages.messages()).await??;
    Ok((consumer, messages))
}

/// How many bytes to ask for. The server never sends a message that is larger than the request: it refuses the
/// request, and the client makes the same one again, for ever.
fn pull_bytes(max_payload: usize) -> usize {
    PULL_BYTES_MAX.max(max_payload.saturating_add(MESSAGE_OVERHEAD_BYTES))
}

/// The sequence to resume after: the token's, unless the stream was rolled back meanwhile.
async fn resume_after(
    options: &ReaderOptions,
    stream: &Stream,
    token: Token,
    extent: Extent,
) -> Result<u64, Fault> {
    let found = if resume::is_checked(options.ordering, token, extent) {
        position_at(stream, token.stream_seq).await?
    } else {
        None
    };
    let mut place = resume::place(options.ordering, token, extent, found);
    if place == Place::Search {
        let heartbeat = newest_heartbeat(options, stream, token.position, extent.first).await?;
        place = match heartbeat {
            Some(stream_seq) => Place::After(stream_seq),
            None => resume::from_the_oldest(token, extent, oldest_position(stream, extent).await?),
        };
    }
    if place == Place::Gone && options.ordering == Ordering::ByPosition {
        // What is gone may be what the broker lost, and is written again.
        let behind = behind_what_is_gone(stream, extent.first).await?;
        if behind.is_some_and(|behind| hole::is_harmless(token.position, behind)) {
            place = Place::After(extent.first - 1);
        }
    }
    let wanted = token.stream_seq + 1;
    match place {
        Place::After(stream_seq) => Ok(stream_seq),
        Place::Wait | Place::Search => {
            let reason = format!("the stream ends at {}, before {wanted}", extent.last);
            Err(Fault::Transient(reason))
        }
        Place::Gone => Err(Fault::Fatal(ReadError::Gap {
            wanted,
            found: extent.first,
        })),
    }
}

/// Where [`ResumeSearch`] says to resume.
async fn newest_heartbeat(
    options: &ReaderOptions,
    stream: &Stream,
    own: Position,
    first: u64,
) -> Result<Option<u64>, Fault> {
    let heartbeats = subject::control(&options.source, ControlKind::Heartbeat);
    let (consumer, mut messages) = consume(options, stream, first, vec![heartbeats]).await?;
    let mut pending = consumer.cached_info().num_pending;
    let mut search = ResumeSearch::new(own);
    let mut consumer_seq = 0;
    while pending > 0 {
        let Some(message) = answer(messages.next()).await? else {
            return Err(Fault::Transient("the consumer ended".to_owned()));
        };
        let message = message?;
        let info = message
            .info()
            .map_err(|error| Fault::Transient(error.to_string()))?;
        if info.consumer_sequence != consumer_seq + 1 {
            return Err(Fault::Transient("the client dropped messages".to_owned()));
        }
        (consumer_seq, pending) = (info.consumer_sequence, info.pending);
        let position = control(&message.payload).map(|control| control.position);
        if position.is_some_and(|position| !search.on_heartbeat(info.stream_sequence, position)) {
            break;
        }
    }
    Ok(search.after())
}

/// The position of the oldest message that has one.
async fn oldest_position(stream: &Stream, extent: Extent) -> Result<Option<Position>, Fault> {
    for stream_seq in (extent.first..=extent.last).take(FOREIGN_MAX) {
        if let Some(position) = position_at(stream, stream_seq).await? {
            return Ok(Some(position));
        }
    }
    Ok(None)
}

/// What the message tells with which the stream goes on.
async fn behind_what_is_gone(stream: &Stream, first: u64) -> Result<Option<Behind>, Fault> {
    let message = message_at(stream, first).await?;
    Ok(message.map(|message| Behind::of(first, Some(&message.headers), &message.payload)))
}

/// The position of a message, read through the stream's leader; of a chunk, its row's.
async fn position_at(stream: &Stream, stream_seq: u64) -> Result<Option<Position>, Fault> {
    let message = message_at(stream, stream_seq).await?;
    Ok(message.and_then(|message| of_message(Some(&message.headers), &message.payload)))
}

/// A message, read through the stream's leader.
pub(crate) async fn message_at(
    stream: &Stream,
    stream_seq: u64,
) -> Result<Option<StreamMessage>, Fault> {
    match answer(stream.get_raw_message(stream_seq)).await? {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_room_for_the_largest_message_that_the_server_takes() {
        assert_eq!(pull_bytes(1024 * 1024), PULL_BYTES_MAX);
        assert!(pull_bytes(PULL_BYTES_MAX) > PULL_BYTES_MAX);
        assert_eq!(
            pull_bytes(64 * 1024 * 1024),
            64 * 1024 * 1024 + MESSAGE_OVERHEAD_BYTES
        );
    }
}
