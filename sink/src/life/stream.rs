//! What a sink asks the broker: for capture's buckets, and how far the streams reach.

use async_nats::HeaderMap;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::{self, ErrorCode, kv, stream};
use millrace_consumer::ReadError;
use millrace_event::{Position, decode_line, header, subject};

use super::Life;
use crate::batch::Checkpoint;
use crate::error::Error;

impl Life<'_> {
    /// When the stream was created, and its newest message, once capture has begun the stream.
    pub(crate) async fn newest(&self) -> Result<(String, Checkpoint), Error> {
        let name = subject::stream_name(self.source);
        let waiting = || Error::Waiting(format!("begin stream {name}"));
        let mut stream = self.jetstream.get_stream(&name).await.map_err(|error| {
            if is_missing(&error) {
                waiting()
            } else {
                Error::retry("the stream cannot be read", error)
            }
        })?;
        let state = stream
            .info()
            .await
            .map_err(|error| Error::retry("the stream cannot be read", error))?;
        let last = state.state.last_sequence;
        let created = created(state);
        // The broker has no message of that number, and says only that it is asked wrongly.
        if last == 0 {
            return Err(waiting());
        }
        let message =
            stream.get_raw_message(last).await.map_err(|error| {
                match is_missing_message(error.kind()) {
                    true => waiting(),
                    false => Error::retry("the stream's newest message cannot be read", error),
                }
            })?;
        let position = position_of(&message.headers, &message.payload)
            .ok_or_else(|| Error::retry_because("the stream's newest message is not ours"))?;
        Ok((
            created,
            Checkpoint {
                stream_seq: last,
                position,
                source_ts_us: 0,
            },
        ))
    }

    /// What it means that the source's stream lacks what is read next.
    pub(crate) async fn gap(&self, gap: ReadError) -> Error {
        let found = self
            .jetstream
            .get_stream(subject::stream_name(self.source))
            .await;
        match found {
            Ok(found) => meaning(gap, &self.progress.stream, &created(found.cached_info())),
            // Whatever it is: the next life finds the stream again, or the same gap.
            Err(error) => Error::retry("the stream cannot be read", error),
        }
    }

    /// Whether a stream has a message with this sequence or a later one; not where there is no such stream.
    pub(crate) async fn stream_holds(&self, name: &str, sequence: u64) -> Result<bool, Error> {
        let stream = match self.jetstream.get_stream(name).await {
            Ok(stream) => stream,
            Err(error) if is_missing(&error) => return Ok(false),
            Err(error) => return Err(Error::retry("a stream cannot be read", error)),
        };
        match stream.get_first_raw_message_by_subject(">", sequence).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == stream::RawMessageErrorKind::NoMessageFound => Ok(false),
            Err(error) => Err(Error::retry("a stream cannot be read", error)),
        }
    }

    /// The oldest sequence that the source's stream holds.
    pub(crate) async fn stream_start(&self) -> Result<u64, Error> {
        let name = subject::stream_name(self.source);
        Ok(self.stream_state(&name).await?.first_sequence)
    }

    async fn stream_state(&self, name: &str) -> Result<stream::State, Error> {
        let failed = |error| Error::retry("a stream cannot be read", error);
        let mut stream = self.jetstream.get_stream(name).await.map_err(failed)?;
        let info = stream
            .info()
            .await
            .map_err(|error| Error::retry("a stream cannot be read", error))?;
        Ok(info.state.clone())
    }
}

/// When a stream was created, as a sink remembers it.
fn created(info: &stream::Info) -> String {
    info.created.unix_timestamp_nanos().to_string()
}

/// What a gap means on the stream that was created at `found`, for a sink that stands on the one created at `own`. On
/// another one its position says nothing, and it begins there as after a start.
fn meaning(gap: ReadError, own: &str, found: &str) -> Error {
    if own == found {
        gap.into()
    } else {
        Error::retry("the stream was begun anew", gap)
    }
}

/// Whether the broker says that there is no such stream.
fn is_missing(error: &GetStreamError) -> bool {
    let GetStreamErrorKind::JetStream(answer) = error.kind() else {
        return false;
    };
    answer.error_code() == ErrorCode::STREAM_NOT_FOUND
}

/// Whether the broker says that there is no such message. Any other answer says nothing about the stream.
fn is_missing_message(kind: stream::RawMessageErrorKind) -> bool {
    kind == stream::RawMessageErrorKind::NoMessageFound
}

/// A bucket that capture makes.
pub(super) async fn bucket(
    jetstream: &jetstream::Context,
    source: &str,
    kind: &str,
) -> Result<kv::Store, Error> {
    let name = subject::bucket_name(source, kind);
    let found = jetstream.get_key_value(&name).await;
    found.map_err(|error| {
        let below = std::error::Error::source(&error);
        let below = below.and_then(|below| below.downcast_ref::<GetStreamError>());
        match below {
            Some(stream) if is_missing(stream) => Error::Waiting(format!("create bucket {name}")),
            _ => Error::retry(format!("bucket {name} cannot be opened"), error),
        }
    })
}

/// Up to where a message completes the stream: a set of chunks does so with its last.
fn position_of(headers: &HeaderMap, payload: &[u8]) -> Option<Position> {
    if let Some(place) = headers.get(header::CHUNK) {
        let position: Position = headers.get(header::POSITION)?.as_str().parse().ok()?;
        let (index, rest) = place.as_str().split_once('/')?;
        let (count, _) = rest.split_once('/')?;
        return Some(if index == count {
            position
        } else {
            position.just_below()
        });
    }
    if let Ok(control) = serde_json::from_slice::<millrace_event::Control>(payload) {
        return Some(control.position);
    }
    let line = payload
        .rsplit(|byte| *byte == b'\n')
        .find(|line| !line.is_empty())?;
    Some(decode_line(line).ok()?.source.version.into())
}

#[cfg(test)]
mod tests {
    use millrace_config::Code;

    use super::*;

    #[test]
    fn a_gap_halts_on_the_own_stream_only() {
        let gap = ReadError::Gap {
            wanted: 7,
            found: 9,
        };
        let same = meaning(gap.clone(), "1", "1");
        assert!(
            matches!(&same, Error::Halt(condition) if condition.code == Code::StreamGap),
            "{same:?}"
        );
        let another = meaning(gap, "1", "2");
        assert!(matches!(another, Error::Retry { .. }), "{another:?}");
    }
}
