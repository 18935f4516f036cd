//! From lines to messages: packing, chunking, and the end of a line that is known only later.
//!
//! Pure. Lines are written one after the other into one buffer; when a batch of WAL is through, the buffer
//! becomes one [`Bytes`] that all its messages share.

use bytes::Bytes;
use millrace_event::{LineEnd, Lsn, Position, decode_line, write_line_end};

use crate::relation::SubjectId;

/// A message, ready to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Where to.
    pub subject: SubjectId,
    /// The lines, or a part of one line.
    pub payload: Bytes,
    /// Where the message stands: at its last change.
    pub position: Position,
    /// After this message the stream holds everything of the source up to this LSN.
    pub boundary: Option<Lsn>,
    /// Set where the message is a part of a row that exceeds the broker's message size.
    pub chunk: Option<Chunk>,
}

/// Which part of a chunked message this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// From 1.
    pub index: u32,
    /// How many parts there are.
    pub count: u32,
}

/// The sizes that messages keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageLimits {
    /// How many changes a message packs at most.
    pub events: u32,
    /// How many payload bytes a message has at most.
    pub bytes: usize,
    /// How many payload bytes a row has at most, over all its chunks.
    pub row_bytes: usize,
}

/// So much of each key column's value is shown of a row that is too large, in characters.
const KEY_CHARS_SHOWN: usize = 100;

/// A row that exceeds even what chunks may carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a row{row} needs {bytes} bytes on the stream and may have {limit}")]
pub struct RowTooLarge {
    /// Its table and key, as a part of a sentence; empty where they cannot be told.
    pub row: String,
    /// What it needs.
    pub bytes: usize,
    /// What it may have.
    pub limit: usize,
}

#[derive(Debug)]
struct Pending {
    start: usize,
    end: usize,
    subject: SubjectId,
    position: Position,
    boundary: Option<Lsn>,
}

/// The last line of the message that is still open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastLine {
    /// Its transaction goes on: whether it is the last event is not known yet.
    Open,
    /// It is complete; the message may take another line.
    Ended,
}

#[derive(Debug)]
struct OpenMessage {
    start: usize,
    /// Where its newest line starts.
    line: usize,
    /// Position and boundary of the line before the newest.
    before: (Position, Option<Lsn>),
    subject: SubjectId,
    position: Position,
    events: u32,
    boundary: Option<Lsn>,
    last_line: LastLine,
}

/// Collects lines into messages.
#[derive(Debug)]
pub struct Assembler {
    limits: MessageLimits,
    buffer: Vec<u8>,
    complete: Vec<Pending>,
    open: Option<OpenMessage>,
}

impl Assembler {
    /// Begins with nothing collected.
    #[must_use]
    pub fn new(limits: MessageLimits) -> Self {
        assert!(
            limits.events > 0 && limits.bytes > 0,
            "a message holds something"
        );
        Self {
            limits,
            buffer: Vec::new(),
            complete: Vec::new(),
            open: None,
        }
    }

    /// Begins a line: what is written to the returned buffer next is the change at `position`, without its
    /// end. The line before, if its end is open, was not its transaction's last.
    pub fn begin_line(&mut self, subject: SubjectId, position: Position) -> &mut Vec<u8> {
        self.end_line(LineEnd::More);
        let (events, bytes) = (self.limits.events, self.limits.bytes);
        let filled = |open: &OpenMessage| {
            open.subject != subject
                || open.events >= events
                || self.buffer.len() - open.start >= bytes / 2
        };
        if self.open.as_ref().is_some_and(filled) {
            self.close_message();
        }
        if let Some(open) = &mut self.open {
            assert!(position > open.position, "positions rise");
            self.buffer.push(b'\n');
            open.line = self.buffer.len();
            open.before = (open.position, open.boundary);
            open.position = position;
            open.events += 1;
            open.boundary = None;
            open.last_line = LastLine::Open;
        } else {
            let start = self.buffer.len();
            self.open = Some(OpenMessage {
                start,
                line: start,
                before: (Position::ZERO, None),
                subject,
                position,
                events: 1,
                boundary: None,
                last_line: LastLine::Open,
            });
        }
        &mut self.buffer
    }

    /// The transaction is complete: its last line, if it has one, says so.
    pub fn commit(&mut self, end_lsn: Lsn) {
        self.end_line(LineEnd::Last(end_lsn));
    }

    fn end_line(&mut self, end: LineEnd) {
        let Some(open) = &mut self.open else { return };
        if open.last_line == LastLine::Ended {
            return;
        }
        write_line_end(&mut self.buffer, end);
        open.last_line = LastLine::Ended;
        if let LineEnd::Last(end_lsn) = end {
            open.boundary = Some(end_lsn);
        }
        self.split_overlong();
    }

    /// A packed message whose newest line made it too long gives that line a message of its own.
    fn split_overlong(&mut self) {
        let Some(open) = &mut self.open else { return };
        if open.events > 1 && self.buffer.len() - open.start > self.limits.bytes {
            self.complete.push(Pending {
                start: open.start,
                // The newline between the two goes.
                end: open.line - 1,
                subject: open.subject,
                position: open.before.0,
                boundary: open.before.1,
            });
            open.start = open.line;
            open.events = 1;
        }
    }

    /// Adds a message with a payload of its own.
    pub fn message(
        &mut self,
        subject: SubjectId,
        position: Position,
        end_lsn: Lsn,
        payload: &[u8],
    ) {
        self.close_message();
        let start = self.buffer.len();
        self.buffer.extend_from_slice(payload);
        let (end, boundary) = (self.buffer.len(), Some(end_lsn));
        self.complete.push(Pending {
            start,
            end,
            subject,
            position,
            boundary,
        });
    }

    fn close_message(&mut self) {
        if let Some(open) = self.open.take() {
            assert_eq!(
                open.last_line,
                LastLine::Ended,
                "only whole lines are published"
            );
            self.complete.push(Pending {
                start: open.start,
                end: self.buffer.len(),
                subject: open.subject,
                position: open.position,
                boundary: open.boundary,
            });
        }
    }

    /// Takes every complete message, oldest first. A message whose last line is open stays.
    ///
    /// # Errors
    /// A row exceeds what chunks may carry.
    pub fn take(&mut self, mut emit: impl FnMut(Outgoing)) -> Result<(), RowTooLarge> {
        if self
            .open
            .as_ref()
            .is_some_and(|open| open.last_line == LastLine::Ended)
        {
            self.close_message();
        }
        if self.complete.is_empty() {
            return Ok(());
        }
        let kept_from = self
            .open
            .as_ref()
            .map_or(self.buffer.len(), |open| open.start);
        let kept = self.buffer.split_off(kept_from);
        if let Some(open) = &mut self.open {
            open.line -= kept_from;
            open.start = 0;
        }
        let shared = Bytes::from(std::mem::replace(&mut self.buffer, kept));
        for message in self.complete.drain(..) {
            let payload = shared.slice(message.start..message.end);
            emit_chunks(self.limits, &message, payload, &mut emit)?;
        }
        Ok(())
    }
}

/// The table and the key of a line, as a part of a sentence.
fn row_of(line: &[u8]) -> String {
    let Ok(event) = decode_line(line) else {
        return String::new();
    };
    let key = event.key.iter().flat_map(|key| key.iter());
    let key: Vec<String> = key
        .map(|(name, value)| {
            let value = value.as_text().unwrap_or_default();
            let shown: String = value.chars().take(KEY_CHARS_SHOWN).collect();
            format!("{name} = {shown}")
        })
        .collect();
    format!(
        " of {} with the key {}",
        event.source.table_name(),
        key.join(", ")
    )
}

fn emit_chunks(
    limits: MessageLimits,
    message: &Pending,
    payload: Bytes,
    emit: &mut impl FnMut(Outgoing),
) -> Result<(), RowTooLarge> {
    let Pending {
        subject,
        position,
        boundary,
        ..
    } = *message;
    let size = payload.len();
    if size <= limits.bytes {
        emit(Outgoing {
            subject,
            payload,
            position,
            boundary,
            chunk: None,
        });
        return Ok(());
    }
    if size > limits.row_bytes {
        return Err(RowTooLarge {
            row: row_of(&payload),
            bytes: size,
            limit: limits.row_bytes,
        });
    }
    let count = size.div_ceil(limits.bytes);
    for index in 0..count {
        let part = payload.slice(index * limits.bytes..size.min((index + 1) * limits.bytes));
        let number = |n: usize| u32::try_from(n).expect("a row has fewer bytes than u32::MAX");
        let chunk = Some(Chunk {
            index: number(index + 1),
            count: number(count),
        });
        emit(Outgoing {
            subject,
            payload: part,
            position,
            // What is read of the stream's end tells no end of a transaction where it is a chunk. So the slot may not
            // forget so far before something that does comes behind it: a heartbeat at the latest.
            boundary: None,
            chunk,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECT: SubjectId = SubjectId(1);
    const OTHER: SubjectId = SubjectId(2);

    fn limits(events: u32, bytes: usize) -> MessageLimits {
        MessageLimits {
            events,
            bytes,
            row_bytes: 1000,
        }
    }

    fn at(seq: u32) -> Position {
        Position::new(1, Lsn(9), seq)
    }

    fn line(assembler: &mut Assembler, subject: SubjectId, seq: u32, text: &str) {
        assembler
            .begin_line(subject, at(seq))
            .extend_from_slice(text.as_bytes());
    }

    fn take(assembler: &mut Assembler) -> Vec<(SubjectId, String, Position, Option<Lsn>)> {
        let mut taken = Vec::new();
        assembler
            .take(|out| {
                let payload = String::from_utf8(out.payload.to_vec()).unwrap();
                taken.push((out.subject, payload, out.position, out.boundary));
            })
            .unwrap();
        taken
    }

    #[test]
    fn the_last_event_of_a_transaction_says_so_and_waits_for_its_commit() {
        let mut assembler = Assembler::new(limits(1, 500));
        line(&mut assembler, SUBJECT, 1, "{{a");
        line(&mut assembler, SUBJECT, 2, "{{b");
        assert_eq!(
            take(&mut assembler),
            [(SUBJECT, "{{a}}".to_owned(), at(1), None)]
        );
        assert_eq!(take(&mut assembler), []);
        assembler.commit(Lsn(10));
        let last = "{{b,\"last\":true,\"end_lsn\":10}}".to_owned();
        assert_eq!(
            take(&mut assembler),
            [(SUBJECT, last, at(2), Some(Lsn(10)))]
        );
    }

    #[test]
    fn packing_keeps_to_one_subject_and_the_number_of_events() {
        let mut assembler = Assembler::new(limits(2, 500));
        for (seq, subject) in [SUBJECT, SUBJECT, SUBJECT, OTHER].into_iter().enumerate() {
            line(
                &mut assembler,
                subject,
                seq as u32 + 1,
                &format!("{{{{{seq}"),
            );
        }
        assembler.commit(Lsn(10));
        let taken = take(&mut assembler);
        let payloads: Vec<_> = taken
            .iter()
            .map(|(_, payload, ..)| payload.as_str())
            .collect();
        let last = "{{3,\"last\":true,\"end_lsn\":10}}";
        assert_eq!(payloads, ["{{0}}\n{{1}}", "{{2}}", last]);
        assert_eq!(taken[0].2, at(2));
    }

    #[test]
    fn a_line_that_makes_a_packed_message_too_long_gets_its_own() {
        let mut assembler = Assembler::new(limits(10, 60));
        line(&mut assembler, SUBJECT, 1, "{{short");
        line(
            &mut assembler,
            SUBJECT,
            2,
            &format!("{{{{{}", "x".repeat(55)),
        );
        assembler.commit(Lsn(10));
        let mut taken = Vec::new();
        assembler
            .take(|out| taken.push((out.payload.len(), out.position, out.chunk)))
            .unwrap();
        assert_eq!(taken[0], (9, at(1), None));
        assert_eq!(taken[1], (60, at(2), Some(Chunk { index: 1, count: 2 })));
        assert_eq!(taken.len(), 3);
    }

    #[test]
    fn a_row_beyond_the_limit_is_refused() {
        let mut assembler = Assembler::new(limits(1, 100));
        line(&mut assembler, SUBJECT, 1, &"x".repeat(1001));
        assembler.commit(Lsn(10));
        let error = assembler.take(|_| {}).unwrap_err();
        assert!(error.bytes > 1000 && error.limit == 1000);
    }

    #[test]
    fn no_chunk_is_a_boundary() {
        let mut assembler = Assembler::new(limits(1, 100));
        line(&mut assembler, SUBJECT, 1, &"x".repeat(250));
        assembler.commit(Lsn(10));
        let mut boundaries = Vec::new();
        assembler.take(|out| boundaries.push(out.boundary)).unwrap();
        assert_eq!(boundaries, [None, None, None]);
    }
}
