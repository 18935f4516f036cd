//! The stream at its server: what it must be, what it holds and how it ends. Every read goes through the
//! stream's leader; a replica's answer may be old.

mod tail;

use std::collections::HashMap;
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

pub use tail::Tail;

/// The JetStream API level of NATS 2.14, the first with fast ingest.
const API_LEVEL_MIN: u64 = 4;
/// The shortest window JetStream allows: no message carries an id to look for duplicates by.
const DUPLICATE_WINDOW: Duration = Duration::from_millis(100);
/// Bytes of a copy stream: beyond, the copy waits for its sink.
pub const COPY_BYTES_MAX: u64 = 1 << 30;
/// The key of a stream's metadata that says which wire format it holds.
const FORMAT_KEY: &str = "millrace.format";
/// The key of a stream's metadata that says how many partitions its subjects have.
const PARTITIONS_KEY: &str = "millrace.partitions";

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

/// What a source's stream must be.
#[derive(Clone, Debug)]
pub struct StreamShape {
    /// The source's name.
    pub source: String,
    /// Its limit in bytes.
    pub max_bytes: u64,
    /// Its replicas.
    pub replicas: usize,
    /// Partitions that its subjects have.
    pub partitions: u16,
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

/// Creates a source's stream where it is missing. Where it exists, its limit in bytes and its replicas are brought to
/// `shape`; whatever else differs is the operator's to decide.
///
/// # Errors
/// A condition that names each difference, or what JetStream answers.
pub async fn ensure_stream(
    jetstream: &Context,
    shape: &StreamShape,
) -> Result<StreamState, StreamError> {
    let wanted = config(shape);
    let Some(found) = find(jetstream, &wanted.name).await? else {
        return create(jetstream, &wanted).await;
    };
    let differences = differences(&wanted, &found.config);
    if !differences.is_empty() {
        let message = format!(
            "stream {} has another shape: {}",
            wanted.name,
            differences.join("; ")
        );
        let remedy = format!(
            "if nothing else uses it, delete it (`nats stream rm {}`), else give the source another name",
            wanted.name
        );
        return Err(Condition::new(Code::StreamShape, message, remedy).into());
    }
    let same = found.config.max_bytes == wanted.max_bytes
        && found.config.num_replicas == wanted.num_replicas;
    if same {
        return Ok(found.into_state());
    }
    let changed = Config {
        max_bytes: wanted.max_bytes,
        num_replicas: wanted.num_replicas,
        ..found.config
    };
    let answer: InfoAnswer = request(
        jetstream,
        &format!("STREAM.UPDATE.{}", changed.name),
        &changed,
    )
    .await?;
    Ok(answer.into_state())
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

/// The message at a stream sequence, read through the leader; `None` where the stream holds none there.
///
/// # Errors
/// What JetStream answers.
pub async fn message(
    jetstream: &Context,
    name: &str,
    stream_seq: u64,
) -> Result<Option<StoredMessage>, StreamError> {
    tail::message(jetstream, name, stream_seq).await
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

/// The message that represents most of the source among the newest 4,000; for rare questions.
///
/// # Errors
/// What JetStream answers.
pub async fn highest(jetstream: &Context, name: &str) -> Result<Option<Tail>, StreamError> {
    tail::highest(jetstream, name).await
}

/// Why a KV bucket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// It may be there, and cannot be looked at.
    #[error("bucket {bucket} cannot be opened")]
    Open {
        /// The bucket.
        bucket: String,
        /// The client's error.
        #[source]
        source: jetstream::context::KeyValueError,
    },
    /// It is not there, and cannot be made.
    #[error("bucket {bucket} cannot be created")]
    Create {
        /// The bucket.
        bucket: String,
        /// The client's error.
        #[source]
        source: jetstream::context::CreateKeyValueError,
    },
}

/// The KV bucket `MILLRACE_<source>_<kind>`, created where it is missing. Only an answer that it is not there counts
/// as that.
///
/// # Errors
/// What JetStream answers, or that it does not.
pub async fn bucket(
    jetstream: &Context,
    source: &str,
    kind: &str,
    replicas: usize,
) -> Result<jetstream::kv::Store, BucketError> {
    let bucket = millrace_event::subject::bucket_name(source, kind);
    match jetstream.get_key_value(&bucket).await {
        Ok(store) => return Ok(store),
        Err(error) if is_missing(&error) => {}
        Err(source) => return Err(BucketError::Open { bucket, source }),
    }
    let config = jetstream::kv::Config {
        bucket: bucket.clone(),
        history: 1,
        num_replicas: replicas,
        ..Default::default()
    };
    let created = jetstream.create_key_value(config).await;
    created.map_err(|source| BucketError::Create { bucket, source })
}

/// Whether JetStream has answered that there is no such bucket.
fn is_missing(error: &jetstream::context::KeyValueError) -> bool {
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<jetstream::context::GetStreamError>());
    let kind = cause.map(jetstream::context::GetStreamError::kind);
    matches!(
        kind,
        Some(jetstream::context::GetStreamErrorKind::JetStream(answer))
            if answer.error_code() == ErrorCode::STREAM_NOT_FOUND
    )
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

fn config(shape: &StreamShape) -> Config {
    Config {
        name: millrace_event::subject::stream_name(&shape.source),
        subjects: vec![millrace_event::subject::all(&shape.source)],
        deny_delete: true,
        max_bytes: i64::try_from(shape.max_bytes).unwrap_or(i64::MAX),
        num_replicas: shape.replicas,
        metadata: HashMap::from([
            (FORMAT_KEY.to_owned(), "1".to_owned()),
            (PARTITIONS_KEY.to_owned(), shape.partitions.to_string()),
        ]),
        ..base()
    }
}

/// What differs and may not be changed in place, for a human.
fn differences(wanted: &Config, found: &Config) -> Vec<String> {
    let mut differences = Vec::new();
    let mut differs = |what: &str, wanted: String, found: String| {
        if wanted != found {
            differences.push(format!("{what} is {found} instead of {wanted}"));
        }
    };
    let value = |config: &Config, key| {
        config
            .metadata
            .get(key)
            .cloned()
            .unwrap_or("unset".to_owned())
    };
    differs(
        "subjects",
        wanted.subjects.join(","),
        found.subjects.join(","),
    );
    differs(
        "retention",
        format!("{:?}", wanted.retention),
        format!("{:?}", found.retention),
    );
    differs(
        "storage",
        format!("{:?}", wanted.storage),
        format!("{:?}", found.storage),
    );
    differs(
        "discard",
        format!("{:?}", wanted.discard),
        format!("{:?}", found.discard),
    );
    differs(
        "max_age",
        format!("{:?}", wanted.max_age),
        format!("{:?}", found.max_age),
    );
    differs(
        "deny_delete",
        wanted.deny_delete.to_string(),
        found.deny_delete.to_string(),
    );
    let batched = |config: &Config| config.allow_batch_publish.to_string();
    differs("allow_batched", batched(wanted), batched(found));
    for key in [FORMAT_KEY, PARTITIONS_KEY] {
        differs(key, value(wanted, key), value(found, key));
    }
    differences
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
