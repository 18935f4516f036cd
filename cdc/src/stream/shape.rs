//! What a source's stream must be, and how it is made so.

use std::collections::HashMap;

use async_nats::jetstream::Context;
use async_nats::jetstream::stream::Config;
use millrace_config::{Code, Condition};

use super::{InfoAnswer, StreamError, StreamState, base, create, find, request};

/// The key of a stream's metadata that says which wire format it holds.
const FORMAT_KEY: &str = "millrace.format";
/// The key of a stream's metadata that says how many partitions its subjects have.
const PARTITIONS_KEY: &str = "millrace.partitions";

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
