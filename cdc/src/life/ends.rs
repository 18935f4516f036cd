//! Where the slot and the stream end: from there a life goes on.

use millrace_event::{Lsn, Position};
use tokio_postgres::Client;

use super::Stream;
use crate::Error;
use crate::birth::{self, TailFound};
use crate::capture::Resume;
use crate::frontier::Boundary;
use crate::source;
use crate::stream::{self, StreamState, Tail};

/// Both, while nobody else can move them: the slot is ours.
pub(super) struct Ends {
    confirmed: Lsn,
    state: StreamState,
    tail: Tail,
}

impl Ends {
    /// Finds the stream's end, and checks that it fits a slot which has confirmed so much.
    pub(super) async fn find(stream: &Stream, slot: &str, confirmed: Lsn) -> Result<Self, Error> {
        let (state, tail) = stream_tail(stream, confirmed)
            .await?
            .ok_or_else(|| Error::retry_because("the stream's start is gone again"))?;
        let found = TailFound {
            position: tail.position,
            end_lsn: tail.end_lsn,
        };
        birth::check_tail(slot, found, confirmed).map_err(Error::halt)?;
        Ok(Self {
            confirmed,
            state,
            tail,
        })
    }

    /// The stream's last sequence.
    pub(super) fn last_seq(&self) -> u64 {
        self.state.last_seq
    }

    /// The highest whole message at the stream's end.
    pub(super) async fn after(&self, stream: &Stream) -> Result<Position, Error> {
        Ok(stream::whole_at(&stream.jetstream, &stream.name, &self.tail).await?)
    }

    /// What capture goes on from.
    pub(super) fn resume(&self) -> Resume {
        let Self {
            confirmed,
            state,
            tail,
        } = self;
        let age = state.now.duration_since(tail.stored_at).unwrap_or_default();
        let boundary = tail.end_lsn.map(|end_lsn| {
            (
                Boundary {
                    stream_seq: tail.stream_seq,
                    position: tail.position,
                    end_lsn,
                },
                age,
            )
        });
        let last_seq = state.last_seq.max(tail.stream_seq);
        Resume {
            last_seq,
            tail: tail.position,
            boundary,
            confirmed: *confirmed,
        }
    }
}

/// What our slot has confirmed.
pub(super) async fn confirmed(client: &Client, slot: &str) -> Result<Lsn, Error> {
    let found = source::find_slot(client, slot).await?;
    let slot = found.ok_or_else(|| Error::retry_because("the slot vanished while it was read"))?;
    Ok(slot.confirmed)
}

/// The stream and its tail, where it is begun.
pub(super) async fn stream_tail(
    stream: &Stream,
    confirmed: Lsn,
) -> Result<Option<(StreamState, Tail)>, Error> {
    let Some(state) = stream::find_stream(&stream.jetstream, &stream.name).await? else {
        return Ok(None);
    };
    let tail = stream::tail_covering(&stream.jetstream, &stream.name, confirmed).await?;
    Ok(tail.map(|tail| (state, tail)))
}
