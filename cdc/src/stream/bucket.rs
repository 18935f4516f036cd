//! The KV buckets beside the stream.

use async_nats::HeaderMap;
use async_nats::jetstream::kv::{self, Operation};
use async_nats::jetstream::stream::{LastRawMessageError, LastRawMessageErrorKind};
use async_nats::jetstream::{self, Context, ErrorCode};
use bytes::Bytes;

/// The header that says what an entry is, where it is not one that was put.
const KV_OPERATION: &str = "KV-Operation";
const PUT: &str = "PUT";
/// The header of an entry that the server wrote when it removed one by itself.
const MARKER_REASON: &str = "Nats-Marker-Reason";

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

/// What a bucket holds of a key; `None` where it never held anything. The bucket's leader is asked: the client's own
/// `entry` and `get` are answered by any replica, and one that lags behind answers with what was there before.
///
/// # Errors
/// What JetStream answers, or that it does not.
pub async fn entry(store: &kv::Store, key: &str) -> Result<Option<kv::Entry>, LastRawMessageError> {
    let subject = format!("{}{key}", store.prefix);
    let message = match store.stream.get_last_raw_message_by_subject(&subject).await {
        Ok(message) => message,
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(kv::Entry {
        bucket: store.name.clone(),
        key: key.to_owned(),
        operation: operation(&message.headers),
        value: message.payload,
        revision: message.sequence,
        delta: 0,
        created: message.time,
        seen_current: false,
    }))
}

/// The value that a bucket holds of a key, as [`entry`] reads it.
///
/// # Errors
/// What JetStream answers, or that it does not.
pub async fn value(store: &kv::Store, key: &str) -> Result<Option<Bytes>, LastRawMessageError> {
    let entry = entry(store, key).await?;
    let entry = entry.filter(|entry| entry.operation == Operation::Put);
    Ok(entry.map(|entry| entry.value))
}

/// What an entry did with its key, as far as it matters here: whatever was not put is a removal.
fn operation(headers: &HeaderMap) -> Operation {
    let was_put = match headers.get(KV_OPERATION) {
        Some(operation) => operation.as_str() == PUT,
        None => headers.get(MARKER_REASON).is_none(),
    };
    if was_put {
        Operation::Put
    } else {
        Operation::Delete
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_removes_a_key_is_no_value() {
        let with = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value);
            headers
        };
        assert_eq!(operation(&HeaderMap::new()), Operation::Put);
        assert_eq!(operation(&with(KV_OPERATION, PUT)), Operation::Put);
        for removed in ["DEL", "PURGE"] {
            assert_eq!(operation(&with(KV_OPERATION, removed)), Operation::Delete);
        }
        assert_eq!(operation(&with(MARKER_REASON, "MaxAge")), Operation::Delete);
    }
}
