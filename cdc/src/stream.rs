//! The stream at its server: what it must be, what it holds and how it ends. Every read goes through the
//! stream's leader; a replica's answer may be old.

mod backwards;
mod bucket;
mod shape;
mod tail;
mod whole;

use std::time::{Duration, SystemTime};

use async_nats::jetstream::stream::{
    Compression, Config, DiscardPolicy, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{HeaderMap, jetstream};
use bytes::Bytes;
use millrace_config::{Code, Condition};
use millrace_event::{Lsn, Position};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::json;

pub use bucket::{BucketError, bucket, entry, value};
pub use shape::{StreamShape, ensure_stream};
pub use tail::Tail;

/// The JetStream API level of NATS 2.14, the first with fast ingest.
const API_LEVEL_MIN: u64 = 4;
/// The shortest window JetStream allows: no message carries an id to look for duplicates by.
const DUPLICATE_WINDOW: Duration = Duration::from_millis(100);
/// Bytes of a copy stream: beyond, the copy waits for its sink.
pub const COPY_BYTES_MAX: u64 = 1 << 30;
/// Why the stream could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The operator must act.
    #[error(transparent)]
    Condition(#[from] Condition),
    /// JetStream refused the request.
    #[error("JetStream refused {what}")]
    Refused {
        /// The request's subject below `$JS.API`.
        what: String,
        /// JetStream's error.
        #[source]
        source: jetstream::Error,
    },
    /// The request did not reach JetStream, or its answer did not come back.
    #[error("no answer from JetStream to {what}")]
    Unanswered {
        /// The request's subject below `$JS.API`.
        what: String,
        /// The client's error.
        #[source]
        source: jetstream::context::RequestError,
    },
}

/// A stream as its leader describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// When it was created, as the server writes it: a stream created anew differs.
    pub created: String,
    /// The oldest message's sequence; one above `last_seq` where there is none.
    pub first_seq: u64,
    /// The newest message's sequence, of all that there ever were.
    pub last_seq: u64,
    /// Messages in it.
    pub messages: u64,
    /// Bytes in it.
    pub bytes: u64,
    /// Its limit in bytes.
    pub max_bytes: u64,
    /// The server's clock at this answer.
    pub now: SystemTime,
}

/// A message as the stream holds it.
#[derive(Clone, Debug)]
pub struct StoredMessage {
    /// Its stream sequence.
    pub stream_seq: u64,
    /// Its subject.
    pub subject: String,
    /// Its headers; empty for most messages.
    pub headers: HeaderMap,
    /// Its payload.
    pub payload: Bytes,
    /// When the server stored it, by the server's clock.
    pub stored_at: SystemTime,
}

#[derive(Deserialize)]
struct Answer<T> {
    error: Option<jetstream::Error>,
    #[serde(flatten)]
    value: Option<T>,
}

#[derive(Deserialize)]
struct ApiInfo {
    #[serde(default)]
    api: ApiLevel,
}

#[derive(Default, Deserialize)]
struct ApiLevel {
    #[serde(default)]
    level: u64,
}

#[derive(Deserialize)]
struct InfoAnswer {
    config: Config,
    created: String,
    state: InfoState,
    ts: Option<String>,
}

#[derive(Deserialize)]
struct InfoState {
    messages: u64,
    bytes: u64,
    first_seq: u64,
    last_seq: u64,
}

/// Checks that the server has JetStream and fast ingest.
///
/// # Errors
/// A condition that names the version found, or [`StreamError::Unanswered`].
pub async fn require_level(jetstream: &Context) -> Result<(), StreamError> {
    let version = jetstream.client().server_info().version;
    let off = |why: &str| {
        let message = format!("JetStream is not available on NATS {version}: {why}");
        Condition::new(
            Code::JetStreamOff,
            message,
            "enable JetStream on the server and for this account",
        )
    };
    let info: ApiInfo = match request(jetstream, "INFO", &json!({})).await {
        Ok(info) => info,
        Err(StreamError::Unanswered { source, .. }) if no_responders(&source) => {
            return Err(off("nothing answers its API").into());
        }
        Err(StreamError::Refused { source, .. })
            if matches!(
                source.error_code(),
                ErrorCode::JETSTREAM_NOT_ENABLED | ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
            ) =>
        {
            return Err(off(&source.to_string()).into());
        }
        Err(error) => return Err(error),
    };
    if info.api.level < API_LEVEL_MIN {
        let message =
            format!("the NATS server has version {version}, millrace needs 2.14 or later");
        let remedy = "upgrade every NATS server of the cluster to 2.14 or later";
        return Err(Condition::new(Code::NatsTooOld, message, remedy).into());
    }
    Ok(())
}

fn no_responders(error: &jetstream::context::RequestError) -> bool {
    error.kind() == jetstream::context::RequestErrorKind::NoResponders
}

/// The state of a stream; `None` where it does not exist.
///
/// # Errors
/// [`StreamError::Refused`] or [`StreamError::Unanswered`].
pub async fn find_stream(
    jetstream: &Context,
    name: &str,
) -> Result<Option<StreamState>, StreamError> {
    Ok(find(jetstream, name).await?.map(InfoAnswer::into_state))
}

async fn find(jetstream: &Context, name: &str) -> Result<Option<InfoAnswer>, StreamError> {
    absent(
        request(jetstream, &format!("STREAM.INFO.{name}"), &json!({})).await,
        ErrorCode::STREAM_NOT_FOUND,
    )
}

/// Creates a sink's copy stream where it is missing: bounded, so that the copy waits for its sink.
///
/// # Errors
/// What JetStream answers.
pub async fn ensure_copy_stream(
    jetstream: &Context,
    source: &str,
    sink: &str,
    replicas: usize,
) -> Result<StreamState, StreamError> {
    let name = millrace_event::subject::copy_stream_name(source, sink);
    if let Some(found) = find_stream(jetstream, &name).await? {
        return Ok(found);
    }
    let config = Config {
        name,
        subjects: vec![millrace_event::subject::copy_all(source, sink)],
        max_bytes: i64::try_from(COPY_BYTES_MAX).unwrap_or(i64::MAX),
        num_replicas: replicas,
        // What a crash of the broker takes with it is copied again.
        persist_mode: shape::persist_mode(replicas, true),
        // It holds little and not for long: to compress it would cost the broker more than to write it.
        compression: None,
        ..base()
    };
    create(jetstream, &config).await
}

/// Deletes a stream; that it does not exist is no error.
///
/// # Errors
/// What JetStream answers.
pub async fn delete_stream(jetstream: &Context, name: &str) -> Result<(), StreamError> {
    let answer: Result<IgnoredAny, _> =
        request(jetstream, &format!("STREAM.DELETE.{name}"), &json!({})).await;
    absent(answer, ErrorCode::STREAM_NOT_FOUND).map(|_| ())
}

/// Removes the messages up to and including `stream_seq`.
///
/// # Errors
/// What JetStream answers.
pub async fn purge(jetstream: &Context, name: &str, stream_seq: u64) -> Result<(), StreamError> {
    // The server's `seq` is the first message that stays.
    let body = json!({ "seq": stream_seq.saturating_add(1) });
    let _: IgnoredAny = request(jetstream, &format!("STREAM.PURGE.{name}"), &body).await?;
    Ok(())
}

/// The newest sequence from `first` to `last` of a source's stream whose message was stored before a time, by the
/// server's clock; `None` where there is none. A sequence without a message counts as old as the next one that has one.
///
/// # Errors
/// What JetStream answers.
pub async fn newest_before(
    jetstream: &Context,
    source: &str,
    before: SystemTime,
    first: u64,
    last: u64,
) -> Result<Option<u64>, StreamError> {
    tail::newest_before(jetstream, source, before, first, last).await
}

/// The position of the message at a stream sequence; `None` where there is no message of ours.
///
/// # Errors
/// What JetStream answers.
pub async fn position_at(
    jetstream: &Context,
    name: &str,
    stream_seq: u64,
) -> Result<Option<Position>, StreamError> {
    let message = tail::message(jetstream, name, stream_seq).await?;
    Ok(message.as_ref().and_then(tail::end).map(|end| end.position))
}

/// How the stream ends: its newest message that has a position. `None` where there is none.
///
/// # Errors
/// What JetStream answers.
pub async fn tail(jetstream: &Context, name: &str) -> Result<Option<Tail>, StreamError> {
    tail::tail(jetstream, name).await
}

/// How the stream ends for its readers, who drop what a publisher that was taken over sent late: as [`tail`],
/// unless the stream's last messages do not represent the source up to `confirmed` and one before them does.
///
/// # Errors
/// What JetStream answers.
pub async fn tail_covering(
    jetstream: &Context,
    name: &str,
    confirmed: Lsn,
) -> Result<Option<Tail>, StreamError> {
    tail::tail_covering(jetstream, name, confirmed).await
}

/// The position of the highest whole message at or below a tail. Nothing of the source lies between the two, so a reader
/// that has the one needs nothing but what comes behind the other. Reads nothing, unless the tail is an unfinished set of
/// chunks: then up to 4,000 messages besides the set's.
///
/// # Errors
/// What JetStream answers.
pub async fn whole_at(
    jetstream: &Context,
    name: &str,
    tail: &Tail,
) -> Result<Position, StreamError> {
    tail::whole_at(jetstream, name, tail).await
}

/// The message that represents most of the source among the newest 4,000; for rare questions.
///
/// # Errors
/// What JetStream answers.
pub async fn highest(jetstream: &Context, name: &str) -> Result<Option<Tail>, StreamError> {
    tail::highest(jetstream, name).await
}

/// Whether the stream holds nothing above a position, as far as its newest 4,000 messages say; not where it holds
/// no message of ours. Reads one message where the newest is above, else all of those: for rare questions.
///
/// # Errors
/// What JetStream answers.
pub async fn is_covered(
    jetstream: &Context,
    name: &str,
    position: Position,
) -> Result<bool, StreamError> {
    match tail::tail(jetstream, name).await? {
        Some(tail) if tail.position <= position => {}
        _ => return Ok(false),
    }
    let highest = tail::highest(jetstream, name).await?;
    Ok(highest.is_some_and(|highest| highest.position <= position))
}

fn base() -> Config {
    Config {
        storage: StorageType::File,
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::New,
        compression: Some(Compression::S2),
        max_messages: -1,
        max_messages_per_subject: -1,
        max_consumers: -1,
        max_message_size: -1,
        allow_direct: true,
        allow_batch_publish: true,
        duplicate_window: DUPLICATE_WINDOW,
        ..Config::default()
    }
}

async fn create(jetstream: &Context, config: &Config) -> Result<StreamState, StreamError> {
    let answer: InfoAnswer =
        request(jetstream, &format!("STREAM.CREATE.{}", config.name), config).await?;
    Ok(answer.into_state())
}

async fn request<T: DeserializeOwned>(
    jetstream: &Context,
    what: &str,
    body: &impl serde::Serialize,
) -> Result<T, StreamError> {
    let answer: Answer<T> = jetstream
        .request(what.to_owned(), body)
        .await
        .map_err(|source| StreamError::Unanswered {
            what: what.to_owned(),
            source,
        })?;
    match (answer.error, answer.value) {
        (None, Some(value)) => Ok(value),
        (Some(source), _) => Err(StreamError::Refused {
            what: what.to_owned(),
            source,
        }),
        (None, None) => Err(StreamError::Unanswered {
            what: what.to_owned(),
            source: jetstream::context::RequestError::new(
                jetstream::context::RequestErrorKind::Other,
            ),
        }),
    }
}

fn absent<T>(answer: Result<T, StreamError>, code: ErrorCode) -> Result<Option<T>, StreamError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(StreamError::Refused { source, .. }) if source.error_code() == code => Ok(None),
        Err(error) => Err(error),
    }
}

impl InfoAnswer {
    fn into_state(self) -> StreamState {
        let InfoState {
            messages,
            bytes,
            first_seq,
            last_seq,
        } = self.state;
        let now = self.ts.and_then(|text| tail::time(&text));
        StreamState {
            created: self.created,
            first_seq: first_seq.max(1),
            last_seq,
            messages,
            bytes,
            max_bytes: u64::try_from(self.config.max_bytes).unwrap_or(u64::MAX),
            // Servers of the supported versions always send their clock.
            now: now.unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}
