//! Cuts the replication stream's bytes into batches of whole messages. Pure.

use bytes::{Bytes, BytesMut};
use millrace_config::limits::WAL_BATCH_BYTES_MAX;
use millrace_event::Lsn;

use super::error::ServerError;

/// Microseconds from the Unix epoch to Postgres's, 2000-01-01.
pub(super) const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// The size of a read buffer, and of a batch unless a single message is larger.
const BUFFER_BYTES: usize = WAL_BATCH_BYTES_MAX;

/// A buffer with less room than this is not read into again.
const ROOM_BYTES_MIN: usize = 64 << 10;

/// A message's tag and length.
const HEADER_BYTES: usize = 5;

/// Bytes of the server's that break the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// A message's length does not even cover itself.
    #[error("message {tag:#04x} has the impossible length {length}")]
    Length {
        /// The message's tag.
        tag: u8,
        /// The length that was sent.
        length: i32,
    },
    /// A message that has no place in a replication stream.
    #[error("message {tag:#04x} does not belong into a replication stream")]
    UnexpectedTag {
        /// The message's tag.
        tag: u8,
    },
    /// CopyData that is neither WAL nor a keepalive, or is too short for what it is.
    #[error("a replication message of {length} bytes is malformed")]
    Malformed {
        /// Its length in bytes.
        length: usize,
    },
}

/// One replication message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// WAL: one pgoutput message.
    Data {
        /// The change's own LSN; zero for what has none (relations, types). Runs backwards between
        /// transactions: neither a version nor ever to be confirmed.
        start: Lsn,
        /// The same LSN again.
        wal_end: Lsn,
        /// The server's clock when it sent this, in microseconds since the Unix epoch.
        sent_at_us: i64,
        /// The pgoutput message.
        payload: &'a [u8],
    },
    /// Everything below `wal_end` was decoded and sent.
    Keepalive {
        /// How far the server has come.
        wal_end: Lsn,
        /// The server's clock when it sent this, in microseconds since the Unix epoch.
        sent_at_us: i64,
        /// The server wanted a report at once; the reader has already sent it.
        reply_requested: bool,
    },
}

impl<'a> Frame<'a> {
    /// Reads the content of one CopyData message.
    fn parse(body: &'a [u8]) -> Option<Self> {
        let (kind, rest) = body.split_first()?;
        let (wal_or_start, rest) = rest.split_first_chunk()?;
        let first = Lsn(u64::from_be_bytes(*wal_or_start));
        match kind {
            b'w' => {
                let (wal_end, rest) = rest.split_first_chunk()?;
                let (sent_at, payload) = rest.split_first_chunk()?;
                Some(Self::Data {
                    start: first,
                    wal_end: Lsn(u64::from_be_bytes(*wal_end)),
                    sent_at_us: unix_us(*sent_at),
                    payload,
                })
            }
            b'k' => {
                let (sent_at, rest) = rest.split_first_chunk()?;
                let [reply] = rest else { return None };
                Some(Self::Keepalive {
                    wal_end: first,
                    sent_at_us: unix_us(*sent_at),
                    reply_requested: *reply != 0,
                })
            }
            _ => None,
        }
    }
}

fn unix_us(bytes: [u8; 8]) -> i64 {
    i64::from_be_bytes(bytes).saturating_add(POSTGRES_EPOCH_US)
}

/// Whole replication messages, in one piece of memory.
#[derive(Clone, Debug)]
pub struct WalBatch {
    bytes: Bytes,
    frames: usize,
}

impl WalBatch {
    /// The frames in the order in which they were sent.
    #[must_use]
    pub fn iter(&self) -> Frames<'_> {
        Frames {
            rest: &self.bytes,
            left: self.frames,
        }
    }

    /// How many frames there are: at least one.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// The size on the wire, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl<'a> IntoIterator for &'a WalBatch {
    type Item = Frame<'a>;
    type IntoIter = Frames<'a>;

    fn into_iter(self) -> Frames<'a> {
        self.iter()
    }
}

/// Walks a [`WalBatch`].
#[derive(Clone, Debug)]
pub struct Frames<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Frames<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        // The framer has checked every message, so none of these ends the walk early.
        while let Ok(Some(message)) = split_message(self.rest) {
            self.rest = message.rest;
            if message.tag == b'd' {
                self.left = self.left.saturating_sub(1);
                return Frame::parse(message.body);
            }
        }
        None
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Frames<'_> {}

/// How the server ended the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It has nothing more to send and shuts down.
    Complete,
    /// An error.
    Failed(ServerError),
}

/// What a scan came across.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scanned {
    /// The highest LSN of a keepalive.
    pub(super) wal_end: Lsn,
    /// A keepalive wants a report at once.
    pub(super) reply_requested: bool,
    /// The stream is over, behind the messages before.
    pub(super) ending: Option<Ending>,
}

/// The bytes that have been read and not handed over yet.
#[derive(Debug)]
pub(super) struct Framer {
    buffer: BytesMut,
    /// Up to here the buffer holds whole messages, checked.
    scanned: usize,
    frames: usize,
    /// The buffer has grown for one large message and is not kept for the next ones.
    grown: bool,
}

impl Framer {
    /// Starts with what was read behind the server's CopyBothResponse.
    pub(super) fn new(leftover: &[u8]) -> Self {
        let mut buffer = BytesMut::with_capacity(BUFFER_BYTES.max(leftover.len()));
        buffer.extend_from_slice(leftover);
        Self {
            buffer,
            scanned: 0,
            frames: 0,
            grown: false,
        }
    }

    /// The buffer to append to, with room. To be called with no batch waiting to be taken.
    pub(super) fn room(&mut self) -> &mut BytesMut {
        let missing = self.missing();
        let wanted = missing.clamp(ROOM_BYTES_MIN, self.buffer.len().max(BUFFER_BYTES));
        let shrink = self.grown && self.buffer.len() + missing <= BUFFER_BYTES / 2;
        if shrink || !self.has_room() {
            self.replace(wanted, shrink);
        }
        &mut self.buffer
    }

    /// Whether more can be read into the buffer as it is.
    pub(super) fn has_room(&self) -> bool {
        self.spare() >= ROOM_BYTES_MIN
    }

    fn spare(&self) -> usize {
        self.buffer.capacity() - self.buffer.len()
    }

    /// How many bytes the unfinished message still lacks, if its header is here.
    fn missing(&self) -> usize {
        let rest = self.buffer.get(self.scanned..).unwrap_or_default();
        match message_bytes(rest) {
            Ok(Some((_, length))) => length.saturating_sub(rest.len()),
            _ => 0,
        }
    }

    /// Makes room for `wanted` bytes: in the memory that the batches before have given back, or in new memory.
    /// A large message at most doubles the buffer, so a length alone never makes us allocate it.
    fn replace(&mut self, wanted: usize, shrink: bool) {
        if !shrink && self.buffer.try_reclaim(wanted) {
            return;
        }
        let capacity = BUFFER_BYTES.max(self.buffer.len() + wanted);
        let mut buffer = BytesMut::with_capacity(capacity);
        buffer.extend_from_slice(&self.buffer);
        self.buffer = buffer;
        self.grown = capacity > BUFFER_BYTES;
    }

    /// Checks the messages that have become whole.
    pub(super) fn scan(&mut self) -> Result<Scanned, FramingError> {
        let mut scanned = Scanned::default();
        let mut rest = self.buffer.get(self.scanned..).unwrap_or_default();
        while scanned.ending.is_none() {
            let Some(message) = split_message(rest)? else {
                break;
            };
            match message.tag {
                b'd' => {
                    let frame = Frame::parse(message.body).ok_or(FramingError::Malformed {
                        length: message.body.len(),
                    })?;
                    if let Frame::Keepalive {
                        wal_end,
                        reply_requested,
                        ..
                    } = frame
                    {
                        scanned.wal_end = scanned.wal_end.max(wal_end);
                        scanned.reply_requested |= reply_requested;
                    }
                    self.frames += 1;
                }
                b'N' | b'S' | b'A' => {}
                b'c' | b'C' => scanned.ending = Some(Ending::Complete),
                b'E' => scanned.ending = Some(Ending::Failed(ServerError::from_body(message.body))),
                tag => return Err(FramingError::UnexpectedTag { tag }),
            }
            rest = message.rest;
            self.scanned = self.buffer.len() - rest.len();
        }
        Ok(scanned)
    }

    /// Takes the checked messages out, if there are frames among them.
    pub(super) fn take(&mut self) -> Option<WalBatch> {
        let frames = std::mem::take(&mut self.frames);
        let scanned = std::mem::take(&mut self.scanned);
        if scanned == 0 {
            return None;
        }
        let bytes = self.buffer.split_to(scanned).freeze();
        (frames > 0).then_some(WalBatch { bytes, frames })
    }
}

struct RawMessage<'a> {
    tag: u8,
    body: &'a [u8],
    rest: &'a [u8],
}

/// The tag and the whole length of the first message, if its header is there.
fn message_bytes(bytes: &[u8]) -> Result<Option<(u8, usize)>, FramingError> {
    let Some(([tag, length @ ..], _)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let (tag, length) = (*tag, i32::from_be_bytes(*length));
    match usize::try_from(length) {
        Ok(covered) if covered >= size_of::<i32>() => Ok(Some((tag, covered + 1))),
        _ => Err(FramingError::Length { tag, length }),
    }
}

/// The first message, if all of it is there.
fn split_message(bytes: &[u8]) -> Result<Option<RawMessage<'_>>, FramingError> {
    let Some((tag, length)) = message_bytes(bytes)? else {
        return Ok(None);
    };
    let Some((message, rest)) = bytes.split_at_checked(length) else {
        return Ok(None);
    };
    let body = message.get(HEADER_BYTES..).unwrap_or_default();
    Ok(Some(RawMessage { tag, body, rest }))
}

#[cfg(test)]
mod tests;
