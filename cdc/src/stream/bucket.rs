//! The KV buckets beside the stream.

use async_nats::jetstream::{self, Context, ErrorCode};

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
