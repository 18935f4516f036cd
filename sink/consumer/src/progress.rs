//! What a reader has seen, and what it makes of the next message. Pure.

use std::time::SystemTime;

use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use millrace_event::{Position, header};

use crate::chunks::{Assembly, Place};
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

/// What a reader has seen.
#[derive(Debug)]
pub(crate) struct Progress {
    ordering: Ordering,
    /// The newest stream sequence that arrived.
    pub(crate) stream_seq: u64,
    /// The highest position that was delivered; `None` before the first.
    highest: Option<Position>,
    assembly: Assembly,
    /// The sequence before the oldest chunk of the sets in progress.
    before_chunks: u64,
    /// Messages that were not ours.
    pub(crate) foreign: u64,
}

impl Progress {
    pub(crate) fn new(ordering: Ordering, start: Token) -> Self {
        let highest = (start.position > Position::ZERO).then_some(start.position);
        Self {
            ordering,
            stream_seq: start.stream_seq,
            highest,
            assembly: Assembly::default(),
            before_chunks: 0,
            foreign: 0,
        }
    }

    /// Where to resume: before the chunks of a message that is not complete.
    pub(crate) fn token(&self) -> Token {
        let stream_seq = if self.assembly.is_empty() {
            self.stream_seq
        } else {
            self.before_chunks
        };
        Token {
            stream_seq,
            position: self.highest.unwrap_or(Position::ZERO),
        }
    }

    /// Starts again after `stream_seq`; what was seen stays seen, chunks come again.
    pub(crate) fn rewind(&mut self, stream_seq: u64) {
        self.stream_seq = stream_seq;
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
        self.stream_seq = stream_seq;
        let payload = match headers
            .as_ref()
            .and_then(|headers| headers.get(header::CHUNK))
        {
            None => payload,
            Some(place) => {
                if self.assembly.is_empty() {
                    self.before_chunks = before;
                }
                self.assembly
                    .push(Place::parse(place.as_str())?, &payload)?
            }
        };
        let Some((position, body)) = self.read(&subject, payload) else {
            self.foreign += 1;
            return None;
        };
        let floor = match self.ordering {
            Ordering::ByStream => None,
            Ordering::ByPosition if Some(position) <= self.highest => return None,
            Ordering::ByPosition => {
                // Sets in progress are at or below this position: their publisher was overtaken.
                self.assembly.clear();
                self.highest.replace(position)
            }
        };
        let token = self.token();
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

    fn read(&self, subject: &str, payload: Bytes) -> Option<(Position, Body)> {
        if self.ordering == Ordering::ByStream {
            return Some((Position::ZERO, Body::Changes(payload)));
        }
        if subject.split('.').nth(2) == Some("_ctl") {
            let control = control(&payload)?;
            return Some((control.position, Body::Control(control)));
        }
        Some((of_changes(&payload)?, Body::Changes(payload)))
    }
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
        assert_eq!((progress.foreign, progress.token().stream_seq), (1, 6));
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
}
