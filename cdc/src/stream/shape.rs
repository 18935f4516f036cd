//! What a source's stream must be, and how it is made so.

use std::collections::HashMap;

use async_nats::jetstream::Context;
use async_nats::jetstream::stream::{Config, PersistenceMode};
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
    /// Whether the slot keeps a change until the broker has synced it, however soon it is acknowledged. The broker may
    /// write behind its acknowledgements then: what a crash takes with it comes again from the slot, and a write for
    /// each message is a quarter of all that a message costs the broker.
    pub kept_until_synced: bool,
}

/// Creates a source's stream where it is missing. Where it exists, its limit in bytes and its replicas are brought to
/// `shape`; whatever else differs is the operator's to decide. A stream that writes before it acknowledges, although
/// it need not, is as good.
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
    if writes_behind(&found.config) && !writes_behind(&wanted) {
        return Err(acknowledged_too_early(&wanted).into());
    }
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
        persist_mode: persist_mode(shape.replicas, shape.kept_until_synced),
        metadata: HashMap::from([
            (FORMAT_KEY.to_owned(), "1".to_owned()),
            (PARTITIONS_KEY.to_owned(), shape.partitions.to_string()),
        ]),
        ..base()
    }
}

fn writes_behind(config: &Config) -> bool {
    config.persist_mode == Some(PersistenceMode::Async)
}

/// JetStream never changes how a stream writes.
fn acknowledged_too_early(wanted: &Config) -> Condition {
    let message = format!(
        "stream {} was made with `persist_mode: async`: it acknowledges a message before it is written, which only \
         one replica with `confirm = \"synced\"` and a `sync_interval` other than \"always\" can do with",
        wanted.name
    );
    let remedy = "set `stream.confirm`, `stream.sync_interval` and `stream.replicas` as they were, or have the stream \
                  made anew: `millrace drop`, then start again";
    Condition::new(Code::StreamShape, message, remedy)
}

/// A replicated stream has a log of its own that is written first, and knows no other mode.
pub(super) fn persist_mode(replicas: usize, may_write_behind: bool) -> Option<PersistenceMode> {
    (replicas == 1 && may_write_behind).then_some(PersistenceMode::Async)
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
