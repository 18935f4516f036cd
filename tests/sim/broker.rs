//! The model broker: a stream whose unsynced tail may be lost, and publishers' connections to it.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use millrace_event::{Control, Lsn, Position, decode_line};

/// A chunk's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) index: u32,
    pub(crate) count: u32,
    pub(crate) publisher: u64,
}

/// Where on a copy stream a message belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) request: String,
    pub(crate) attempt: u64,
    pub(crate) number: u64,
    /// Up to where the stream must be applied before it.
    pub(crate) reach: Option<Lsn>,
}

/// A message.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) subject: String,
    pub(crate) payload: Bytes,
    /// Headers of a chunk: the row's position and the place.
    pub(crate) chunk: Option<(Position, Place)>,
    /// Headers of a copy stream's message.
    pub(crate) mark: Option<Mark>,
}

impl Message {
    pub(crate) fn is_control(&self) -> bool {
        self.subject.split('.').nth(2) == Some("_ctl")
    }

    pub(crate) fn control(&self) -> Option<Control> {
        serde_json::from_slice(&self.payload).ok()
    }
}

/// Position and, on a boundary, `end_lsn` of a whole payload, as every reader finds them.
fn read(message: &Message, payload: &[u8]) -> (Position, Option<Lsn>) {
    if message.is_control() {
        let control = message.control().expect("a control message of ours");
        return (control.position, Some(control.end_lsn));
    }
    let line = payload
        .rsplit(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let event = decode_line(line).expect("an event of ours");
    (event.source.version.into(), event.source.end_lsn)
}

/// A message in the stream.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) message: Message,
    /// Its own position; of a chunk its row's.
    pub(crate) position: Position,
    pub(crate) end_lsn: Option<Lsn>,
    pub(crate) stored_at: Duration,
    /// The highest position of a whole message up to here.
    pub(crate) highest: Position,
}

/// How the stream ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    pub(crate) stream_seq: u64,
    pub(crate) position: Position,
    pub(crate) stored_at: Duration,
    pub(crate) end_lsn: Option<Lsn>,
}

impl Tail {
    /// A slot that has forgotten more than this has forgotten what the stream does not have.
    pub(crate) fn represented(&self) -> Lsn {
        self.end_lsn.unwrap_or(self.position.commit_lsn())
    }
}

/// Sets of chunks in progress, at most one of each of two publishers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Assembly(Vec<(Place, BytesMut)>);

impl Assembly {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn push(&mut self, place: Place, payload: &Bytes) -> Option<Bytes> {
        let known = self
            .0
            .iter()
            .position(|(set, _)| set.publisher == place.publisher);
        let set = known.map(|at| self.0.remove(at));
        let mut bytes = match set {
            _ if place.index == 1 => BytesMut::new(),
            Some((set, bytes)) if set.index + 1 == place.index && set.count == place.count => bytes,
            _ => return None,
        };
        bytes.extend_from_slice(payload);
        if place.index == place.count {
            return Some(bytes.freeze());
        }
        if self.0.len() == 2 {
            self.0.remove(0);
        }
        self.0.push((place, bytes));
        None
    }
}

/// One stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Broker {
    messages: Vec<Stored>,
    /// So many messages survive a crash.
    synced: u64,
    synced_at: Duration,
    assembly: Assembly,
}

impl Broker {
    pub(crate) fn last_seq(&self) -> u64 {
        self.messages.len() as u64
    }

    pub(crate) fn synced(&self) -> u64 {
        self.synced
    }

    pub(crate) fn get(&self, stream_seq: u64) -> Option<&Stored> {
        let index = usize::try_from(stream_seq.checked_sub(1)?).ok()?;
        self.messages.get(index)
    }

    pub(crate) fn position_at(&self, stream_seq: u64) -> Option<Position> {
        self.get(stream_seq).map(|stored| stored.position)
    }

    pub(crate) fn append(&mut self, message: Message, now: Duration) -> u64 {
        let before = self
            .messages
            .last()
            .map_or(Position::ZERO, |stored| stored.highest);
        let (mut position, mut end_lsn, mut whole) = (Position::ZERO, None, false);
        match &message.chunk {
            _ if message.mark.is_some() => {}
            None => {
                (position, end_lsn) = read(&message, &message.payload);
                whole = true;
            }
            Some((of_row, place)) => {
                position = *of_row;
                whole = self.assembly.push(*place, &message.payload).is_some();
            }
        }
        let highest = if whole { before.max(position) } else { before };
        let stored_at = now;
        self.messages.push(Stored {
            message,
            position,
            end_lsn,
            stored_at,
            highest,
        });
        self.last_seq()
    }

    /// Time passes: what was stored is written to disk at every interval.
    pub(crate) fn on_time(&mut self, now: Duration, interval: Duration) {
        if now.saturating_sub(self.synced_at) >= interval {
            self.sync(now);
        }
    }

    pub(crate) fn sync(&mut self, now: Duration) {
        (self.synced, self.synced_at) = (self.last_seq(), now);
    }

    /// The broker crashes; only `kept` messages are there afterwards, never less than what was synced.
    pub(crate) fn crash(&mut self, kept: u64) {
        assert!(kept >= self.synced, "what was synced stays");
        self.messages.truncate(usize::try_from(kept).unwrap_or(0));
        self.synced = kept;
        let messages = std::mem::take(&mut self.messages);
        self.assembly.clear();
        for Stored {
            message, stored_at, ..
        } in messages
        {
            self.append(message, stored_at);
        }
    }

    /// How the stream ends.
    pub(crate) fn tail(&self) -> Tail {
        self.end_at(self.last_seq()).expect("the stream has begun")
    }

    /// The newest message that represents the source up to `confirmed`, as capture finds it: what is behind it is a
    /// late publisher's. Where there is none, the stream's end.
    pub(crate) fn tail_covering(&self, confirmed: Lsn) -> Tail {
        let ends = (1..=self.last_seq()).rev();
        let mut ends = ends.filter_map(|stream_seq| self.end_at(stream_seq));
        let covering = ends.find(|end| end.represented() >= confirmed);
        covering.unwrap_or_else(|| self.tail())
    }

    /// What a message says of the stream up to itself: an unfinished set of chunks counts as just below its row.
    fn end_at(&self, stream_seq: u64) -> Option<Tail> {
        let stored = self.get(stream_seq)?;
        let position = match &stored.message.chunk {
            Some((position, place)) if place.index < place.count => position.just_below(),
            _ => stored.position,
        };
        Some(Tail {
            stream_seq,
            position,
            stored_at: stored.stored_at,
            end_lsn: stored.end_lsn,
        })
    }

    /// Sabotage: two neighbours change places.
    pub(crate) fn swap_last_two(&mut self) -> bool {
        let count = self.messages.len();
        if count < 3
            || self.messages[count - 2..]
                .iter()
                .any(|stored| stored.message.is_control())
        {
            return false;
        }
        self.messages.swap(count - 1, count - 2);
        true
    }

    /// Sabotage: the newest message was never stored.
    pub(crate) fn forget_last(&mut self) -> bool {
        let ours = self
            .messages
            .last()
            .is_some_and(|stored| !stored.message.is_control());
        if ours {
            self.messages.pop();
        }
        ours
    }
}

/// A publisher's connection: messages that were sent, in order, of which any prefix may arrive. Messages of one
/// batch are stored in order; only its first and its last check where the stream ends.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) publisher: u64,
    pub(crate) sent: VecDeque<Message>,
    /// Messages stored, ever.
    pub(crate) stored: u64,
    /// The stream's last sequence before the batch.
    base: u64,
    /// Messages of the open batch; `None` between batches.
    batch: Option<u64>,
}

/// The server has ended a batch.
#[derive(Debug)]
pub(crate) struct BatchFailed;

impl Pipe {
    pub(crate) fn new(publisher: u64, base: u64) -> Self {
        Self {
            publisher,
            sent: VecDeque::new(),
            stored: 0,
            base,
            batch: None,
        }
    }

    /// The next message arrives.
    pub(crate) fn store(&mut self, broker: &mut Broker, now: Duration) -> Result<(), BatchFailed> {
        if self.batch.is_none() && broker.last_seq() != self.base {
            return Err(BatchFailed);
        }
        if let Some(message) = self.sent.pop_front() {
            broker.append(message, now);
            self.stored += 1;
            *self.batch.get_or_insert(0) += 1;
        }
        Ok(())
    }

    /// Ends the batch, if one is open and everything arrived.
    pub(crate) fn commit(&mut self, broker: &Broker) -> Result<(), BatchFailed> {
        if let (Some(count), true) = (self.batch, self.sent.is_empty()) {
            self.batch = None;
            self.base += count;
            if broker.last_seq() != self.base {
                return Err(BatchFailed);
            }
        }
        Ok(())
    }
}
