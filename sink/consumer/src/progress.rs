//! What a reader has seen, and what it makes of the next message. Pure.

use std::time::SystemTime;

use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use millrace_event::{Position, header};

use crate::chunks::{Assembly, Place};
use crate::hole::Behind;
use crate::position::{control, of_changes};
use crate::{Body, Delivery, Ordering, Token};

/// One message as it came.
pub(crate) struct Arrival {
    pub(crate) stream_seq: u64,
    pub(crate) stored_at: SystemTime,
    pub(crate) subject: Subject,
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
}

impl Arrival {
    /// What it tells of a hole in the sequences before it.
    pub(crate) fn behind_a_hole(&self) -> Behind {
        Behind::of(self.stream_seq, self.headers.as_ref(), &self.payload)
    }
}

/// What a reader has seen.
#[derive(Debug)]
pub(crate) struct Progress {
    ordering: Ordering,
    /// The newest stream sequence that arrived.
    pub(crate) stream_seq: u64,
    /// The newest message that was delivered, or where the reader starts. What came after it and was dropped comes
    /// again: only of a message that set the highest position the token can be checked against the stream.
    delivered: Token,
    assembly: Assembly,
    /// By position: the highest row that chunks came of. Whatever the source has below it came before them.
    begun: Position,
    /// By stream order: the sequence before the set in progress.
    before_chunks: u64,
    /// Messages that were not ours.
    pub(crate) foreign: u64,
    /// Whether any message arrived: before that, a reader that starts at the oldest message misses nothing.
    pub(crate) has_read: bool,
}

impl Progress {
    pub(crate) fn new(ordering: Ordering, start: Token) -> Self {
        Self {
            ordering,
            stream_seq: start.stream_seq,
            delivered: start,
            assembly: Assembly::default(),
            begun: Position::ZERO,
            before_chunks: 0,
            foreign: 0,
            has_read: false,
        }
    }

    /// Where to resume: before the chunks of a message that is not complete.
    pub(crate) fn token(&self) -> Token {
        match self.ordering {
            Ordering::ByPosition => self.delivered,
            Ordering::ByStream => Token {
                stream_seq: if self.assembly.is_empty() {
                    self.stream_seq
                } else {
                    self.before_chunks
                },
                position: Position::ZERO,
            },
        }
    }

    /// Starts again after `stream_seq`; what was seen stays seen, chunks come again.
    pub(crate) fn rewind(&mut self, stream_seq: u64) {
        (self.stream_seq, self.begun) = (stream_seq, Position::ZERO);
        self.assembly.clear();
    }

    /// Takes in the next message; `Some` where it is new and complete.
    pub(crate) fn on_message(&mut self, arrival: Arrival) -> Option<Delivery> {
        let Arrival {
            stream_seq,
            stored_at,
            subject,
            headers,
            payload,
        } = arrival;
        let before = self.stream_seq;
        (self.stream_seq, self.has_read) = (stream_seq, true);
        let payload = match headers
            .as_ref()
            .and_then(|headers| headers.get(header::CHUNK))
        {
            None => {
                self.begin_message(before, None);
                payload
            }
            Some(place) => {
                let place = Place::parse(place.as_str())?;
                self.begin_message(before, Some(place));
                self.begun = self.begun.max(position_of_chunk(headers.as_ref()));
                self.assembly.push(place, &payload)?
            }
        };
        let Some((position, body)) = self.read(&subject, payload) else {
            self.foreign += 1;
            return None;
        };
        let token = Token {
            stream_seq,
            position,
        };
        let floor = match self.ordering {
            Ordering::ByStream => None,
            Ordering::ByPosition if position <= self.delivered.position => return None,
            // An overtaken publisher's `progress`, which no other one writes, between the chunks of a row above it: it
            // tells nothing new, and behind it the token would pass over the chunks before.
            Ordering::ByPosition if position < self.begun => return None,
            Ordering::ByPosition => {
                // Sets in progress are at or below this position: their publisher was overtaken.
                self.assembly.clear();
                let floor = std::mem::replace(&mut self.delivered, token).position;
                (floor > Position::ZERO).then_some(floor)
            }
        };
        Some(Delivery {
            stream_seq,
            stored_at,
            position,
            subject,
            headers,
            body,
            token,
            floor,
        })
    }

    /// By stream order one publisher writes at a time and nothing is written between a message's chunks. So a set
    /// that anything else follows stays unfinished, its publisher is gone, and the token must not wait for it: what
    /// lies behind it may be purged. (Where a late message of a dead publisher cuts a living one's set in two, the
    /// numbers of the copy's messages tell that one is missing.)
    fn begin_message(&mut self, before: u64, chunk: Option<Place<'_>>) {
        if self.ordering == Ordering::ByPosition {
            return;
        }
        if !chunk.is_some_and(|chunk| self.assembly.expects(chunk)) {
            self.assembly.clear();
            self.before_chunks = before;
        }
    }

    fn read(&self, subject: &str, payload: Bytes) -> Option<(Position, Body)> {
        if self.ordering == Ordering::ByStream {
            return Some((Position::ZERO, Body::Changes(payload)));
        }
        if is_control(subject) {
            let control = control(&payload)?;
            return Some((control.position, Body::Control(control)));
        }
        Some((of_changes(&payload)?, Body::Changes(payload)))
    }
}

/// The position of a chunk's row.
fn position_of_chunk(headers: Option<&HeaderMap>) -> Position {
    let position = headers.and_then(|headers| headers.get(header::POSITION));
    let position = position.and_then(|position| position.as_str().parse().ok());
    position.unwrap_or(Position::ZERO)
}

/// Whether a subject is a control message's: its third token says so.
fn is_control(subject: &str) -> bool {
    let mut dots = memchr::memchr_iter(b'.', subject.as_bytes());
    let rest = dots.nth(1).and_then(|dot| subject.get(dot + 1..));
    rest.is_some_and(|rest| rest.starts_with("_ctl."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;

    fn arrival(stream_seq: u64, seq: u32, chunk: Option<&str>, part: &[u8]) -> Arrival {
        let headers = chunk.map(|chunk| {
            let mut headers = HeaderMap::new();
            headers.insert(header::POSITION, Position::new(0, Lsn(1), seq).to_string());
            headers.insert(header::CHUNK, chunk);
            headers
        });
        let subject = Subject::from("cdc.s.public.t.c");
        let payload = Bytes::copy_from_slice(part);
        Arrival {
            stream_seq,
            stored_at: SystemTime::UNIX_EPOCH,
            subject,
            headers,
            payload,
        }
    }

    fn line(seq: u32) -> Vec<u8> {
        format!(
            r#"{{"op":"c","source":{{"version":"{}"}}}}"#,
            Position::new(0, Lsn(1), seq)
        )
        .into()
    }

    #[test]
    fn only_a_control_messages_third_token_makes_it_one() {
        assert!(is_control("cdc.s._ctl.heartbeat"));
        for subject in [
            "cdc.s.public._ctl.c",
            "cdc.s.=5Fctl.t.c",
            "cdc._ctl.x.y",
            "cdc",
            "",
        ] {
            assert!(!is_control(subject), "{subject}");
        }
    }

    #[test]
    fn what_was_seen_is_dropped_and_still_advances_the_sequence() {
        let mut progress = Progress::new(Ordering::ByPosition, Token::default());
        let seen: Vec<_> = [1, 2, 2, 1, 3]
            .iter()
            .zip(1..)
            .filter_map(|(seq, at)| progress.on_message(arrival(at, *seq, None, &line(*seq))))
            .map(|delivery| (delivery.stream_seq, delivery.position.0.seq))
            .collect();
        assert_eq!(seen, [(1, 1), (2, 2), (5, 3)]);
        assert!(
            progress
                .on_message(arrival(6, 0, None, b"foreign"))
                .is_none()
        );
        assert_eq!((progress.foreign, progress.token().stream_seq), (1, 5));
    }

    #[test]
    fn the_token_stays_before_an_unfinished_message() {
        let mut progress = Progress::new(Ordering::ByPosition, Token::default());
        let whole = line(2);
        let (one, two) = whole.split_at(9);
        assert!(progress.on_message(arrival(1, 1, None, &line(1))).is_some());
        assert!(
            progress
                .on_message(arrival(2, 2, Some("1/2/a"), one))
                .is_none()
        );
        assert_eq!(progress.token().stream_seq, 1);
        // The publisher died; its successor starts the row again.
        assert!(
            progress
                .on_message(arrival(3, 2, Some("1/2/b"), one))
                .is_none()
        );
        let delivery = progress.on_message(arrival(4, 2, Some("2/2/b"), two));
        assert_eq!(
            delivery.map(|delivery| delivery.token().stream_seq),
            Some(4)
        );
        assert_eq!(progress.token().stream_seq, 4);
    }

    /// Positions of progress are their publisher's own: between the chunks of a row, one below the row may be above all
    /// that was seen.
    #[test]
    fn a_late_publishers_progress_between_the_chunks_of_a_row_does_not_end_it() {
        let mut progress = Progress::new(Ordering::ByPosition, Token::default());
        let whole = line(7);
        let (one, two) = whole.split_at(9);
        let control = |stream_seq, seq| {
            let position = Position::new(0, Lsn(1), seq);
            let text =
                format!(r#"{{"kind":"progress","position":"{position}","end_lsn":1,"ts_us":1}}"#);
            let subject = Subject::from("cdc.s._ctl.progress");
            let arrival = arrival(stream_seq, seq, None, text.as_bytes());
            Arrival { subject, ..arrival }
        };
        assert!(progress.on_message(control(1, 2)).is_some());
        let first = arrival(2, 7, Some("1/2/b"), one);
        assert!(progress.on_message(first).is_none());
        assert!(progress.on_message(control(3, 4)).is_none());
        assert_eq!(progress.token().stream_seq, 1, "before the chunks");
        let delivery = progress.on_message(arrival(4, 7, Some("2/2/b"), two));
        assert_eq!(delivery.map(|delivery| delivery.stream_seq), Some(4));
        assert!(progress.on_message(control(5, 9)).is_some());
        // Where it is read again, chunks come again too.
        let first = arrival(6, 20, Some("1/2/b"), one);
        assert!(progress.on_message(first).is_none());
        progress.rewind(5);
        assert!(progress.on_message(control(6, 10)).is_some());
    }

    /// The token names the message that set the highest position, never one that was dropped behind it: another
    /// position at its sequence then says that the stream was rolled back.
    #[test]
    fn the_token_is_the_newest_delivery_whatever_was_dropped_behind_it() {
        let mut progress = Progress::new(Ordering::ByPosition, Token::default());
        for (stream_seq, seq) in [(1, 1), (2, 2), (3, 1), (4, 2)] {
            progress.on_message(arrival(stream_seq, seq, None, &line(seq)));
        }
        let position = Position::new(0, Lsn(1), 2);
        let token = Token {
            stream_seq: 2,
            position,
        };
        assert_eq!(progress.token(), token);
    }

    /// A dead copy attempt's half message must not hold the token back: what lies behind it is purged.
    #[test]
    fn by_stream_an_unfinished_message_ends_where_another_one_begins() {
        let token_after = |chunks: &[Option<&str>]| {
            let mut progress = Progress::new(Ordering::ByStream, Token::default());
            let mut delivered = Vec::new();
            for (stream_seq, chunk) in (1..).zip(chunks) {
                if let Some(delivery) = progress.on_message(arrival(stream_seq, 1, *chunk, b"x")) {
                    delivered.push(delivery.token().stream_seq);
                }
            }
            (progress.token().stream_seq, delivered)
        };
        assert_eq!(
            token_after(&[Some("1/3/r/1"), Some("2/3/r/1")]),
            (0, vec![])
        );
        let whole = [Some("1/3/r/1"), Some("2/3/r/1"), None, None];
        assert_eq!(token_after(&whole), (4, vec![3, 4]));
        let chunks = [Some("1/3/r/1"), Some("1/2/r/2"), Some("2/2/r/2"), None];
        assert_eq!(token_after(&chunks), (4, vec![3, 4]));
        let again = [None, Some("1/3/r/1"), None, Some("1/2/r/2")];
        assert_eq!(token_after(&again), (3, vec![1, 3]));
        // The same publisher's set may start anew.
        assert_eq!(
            token_after(&[Some("1/2/r/1"), Some("1/2/r/1")]),
            (1, vec![])
        );
    }
}
