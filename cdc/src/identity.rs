//! What a source was when its stream was written, and what its publication published: kept beside the stream,
//! so that a start notices what changed while nobody was looking.

pub(crate) mod published;

use async_nats::jetstream::kv;
use millrace_config::{Code, Condition};
use millrace_event::work::{Origin, SinkReport};
use millrace_event::{Lsn, Position};

use crate::life::Stream;
use crate::replication::{ReplicationConnection, SystemIdentity};
use crate::stream::Tail;
use crate::understood;
use crate::{Error, orders, stream};

/// The key of what the source was.
const ORIGIN_KEY: &str = "origin";

/// What an operator does about a source that is not what the stream was written from.
const REMEDY: &str = "if this server is to be captured from now on: run `millrace drop`, then `millrace run`: \
                      the tables are copied again";

/// The epoch of this life: the one that the stream has, if the source is still the same.
pub(crate) async fn check(
    stream: &Stream,
    replication: &mut ReplicationConnection,
    identity: &SystemIdentity,
    tail: Option<&Tail>,
) -> Result<u32, Error> {
    let stored = read::<Origin>(&stream.state, ORIGIN_KEY).await?;
    let newest = tail.map_or(1, |tail| tail.position.epoch());
    let Some(origin) = stored else {
        return Ok(newest);
    };
    check_origin(&origin, identity, newest).map_err(Error::halt)?;
    if identity.timeline > origin.timeline
        && !has_all(stream, replication, identity, &origin).await?
    {
        return Err(Error::halt(Condition::new(
            Code::SourceChanged,
            format!(
                "the source was promoted (timeline {}, was {}) and lost commits that were already published",
                identity.timeline, origin.timeline
            ),
            REMEDY,
        )));
    }
    if tail.is_some_and(|tail| tail.position.commit_lsn() > identity.flushed) {
        return Err(Error::halt(Condition::new(
            Code::SourceWentBack,
            format!(
                "the source's WAL ends at {}, below what was published",
                identity.flushed
            ),
            REMEDY,
        )));
    }
    Ok(origin.epoch)
}

/// Checks that a source may still be the one that it was. `newest` is the stream's epoch.
fn check_origin(origin: &Origin, identity: &SystemIdentity, newest: u32) -> Result<(), Condition> {
    let (code, message) = if origin.system_id != identity.system_id {
        let message = format!(
            "the source is another cluster (system identifier {}, was {})",
            identity.system_id, origin.system_id
        );
        (Code::SourceChanged, message)
    } else if origin.epoch < newest {
        let message = format!(
            "the stream has epoch {newest}, but {} was stored last",
            origin.epoch
        );
        (Code::EpochLower, message)
    } else if identity.timeline < origin.timeline {
        let message = format!(
            "the source is on timeline {}, was {}",
            identity.timeline, origin.timeline
        );
        (Code::SourceWentBack, message)
    } else {
        return Ok(());
    };
    Err(Condition::new(code, message, REMEDY))
}

/// Whether a source that was promoted has all that was published. The history names where each timeline was left:
/// nothing of ours may lie beyond.
async fn has_all(
    stream: &Stream,
    replication: &mut ReplicationConnection,
    identity: &SystemIdentity,
    origin: &Origin,
) -> Result<bool, Error> {
    let history = replication.timeline_history(identity.timeline).await?;
    let left = history
        .iter()
        .find(|(timeline, _)| *timeline == origin.timeline);
    let reached = stream::highest(&stream.jetstream, &stream.name).await?;
    Ok(match (left, reached) {
        (Some((_, switch)), Some(reached)) => {
            reached.lies_before(*switch)
                && sinks_lie_before(stream, reached.position, *switch).await?
        }
        (_, None) => true,
        (None, Some(_)) => false,
    })
}

/// Whether what sinks say that they have applied is part of a history that was left at `switch`. Some may have more
/// than the stream, which reaches `reached`: it may have lost its end.
async fn sinks_lie_before(stream: &Stream, reached: Position, switch: Lsn) -> Result<bool, Error> {
    for sink in orders::reporting(&stream.sinks).await? {
        let report = read::<SinkReport>(&stream.sinks, &sink).await?;
        let beyond = report.filter(|report| report.position > reached);
        if beyond.is_some_and(|report| !lies_before(report.position, switch)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A change's position is where its commit record begins, and one there is not part of the history. Progress has the
/// end of the WAL that it is of.
fn lies_before(position: Position, switch: Lsn) -> bool {
    let at = position.commit_lsn();
    at < switch || at == switch && position.0.seq == 0
}

/// Stores what the source is, for the next life.
pub(crate) async fn remember(
    stream: &Stream,
    identity: &SystemIdentity,
    epoch: u32,
) -> Result<(), Error> {
    let (system_id, timeline) = (identity.system_id.clone(), identity.timeline);
    let value = serde_json::to_vec(&Origin {
        epoch,
        system_id,
        timeline,
    })
    .expect("plain JSON");
    store(&stream.state, ORIGIN_KEY, value).await
}

pub(crate) async fn read<T: serde::de::DeserializeOwned>(
    state: &kv::Store,
    key: &str,
) -> Result<Option<T>, Error> {
    let failed = |error| Error::retry("what was stored beside the stream cannot be read", error);
    let Some(entry) = stream::value(state, key).await.map_err(failed)? else {
        return Ok(None);
    };
    Ok(Some(understood(&state.name, key, &entry)?))
}

pub(crate) async fn store(state: &kv::Store, key: &str, value: Vec<u8>) -> Result<(), Error> {
    state
        .put(key, value.into())
        .await
        .map(|_| ())
        .map_err(|error| Error::retry("nothing can be stored beside the stream", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_at_the_switch_point_is_not_part_of_the_old_history_and_progress_up_to_it_is() {
        let at = |lsn, seq| Position::new(1, Lsn(lsn), seq);
        assert!(lies_before(at(99, u32::MAX), Lsn(100)));
        assert!(lies_before(at(100, 0), Lsn(100)));
        assert!(!lies_before(at(100, 1), Lsn(100)));
        assert!(!lies_before(at(101, 0), Lsn(100)));
    }
}
