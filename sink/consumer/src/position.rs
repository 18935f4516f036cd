//! Which position a message stands at, and which messages a reader drops. Pure.

use millrace_event::{Control, Position, decode_line};

/// The member that holds the position in an event's last line. Its quotes are not escaped and its value is an
/// object, so it cannot occur inside a row: values of columns are never objects.
const SOURCE: &[u8] = b"\"source\":{";
/// The member is seldom longer than this.
const SOURCE_BYTES: usize = 512;
const VERSION: &[u8] = b"\"version\":\"";
const DIGITS: usize = 32;

/// The position of a message with changes: its last line's. `None` for a message that is not ours.
#[must_use]
pub(crate) fn of_changes(payload: &[u8]) -> Option<Position> {
    let payload = payload.trim_ascii_end();
    let start = memchr::memrchr(b'\n', payload).map_or(0, |end| end + 1);
    let line = payload.get(start..)?;
    quick(line).or_else(|| {
        decode_line(line)
            .ok()
            .map(|event| event.source.version.into())
    })
}

/// The version of a line as our own publisher writes it, without decoding its row.
fn quick(line: &[u8]) -> Option<Position> {
    // The member is the line's last and short; what a row holds before it need not be looked at.
    let end = line.len().saturating_sub(SOURCE_BYTES);
    let source = memchr::memmem::rfind(&line[end..], SOURCE).map(|at| end + at + SOURCE.len());
    let source = &line[source.or_else(|| find(line, SOURCE))?..];
    let digits = source.get(find(source, VERSION)?..)?.get(..DIGITS)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Where the first `needle` ends.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle).map(|at| at + needle.len())
}

/// The control message in a payload; `None` for one that is not ours.
#[must_use]
pub(crate) fn control(payload: &[u8]) -> Option<Control> {
    serde_json::from_slice(payload).ok()
}

/// Finds where to resume after the stream was rolled back: the newest sequence in `first..=last` whose position
/// is not above `own`, by about log2 questions of `position_at`, which answers `None` for a message without a
/// position. Positions never fall along a stream but for the messages that readers drop, so the answer is exact up to
/// those.
#[derive(Clone, Debug)]
pub(crate) struct ResumeSearch {
    own: Position,
    low: u64,
    high: u64,
    probe: u64,
}

impl ResumeSearch {
    /// A search among the sequences `first..=last`.
    #[must_use]
    pub(crate) fn new(own: Position, first: u64, last: u64) -> Self {
        let (low, high) = (first, last.saturating_add(1).max(first));
        Self {
            own,
            low,
            high,
            probe: low + (high - low) / 2,
        }
    }

    /// The sequence whose position is asked for; `None` when the search is over.
    #[must_use]
    pub(crate) fn question(&self) -> Option<u64> {
        (self.low < self.high).then_some(self.probe)
    }

    /// Takes in the position at [`ResumeSearch::question`].
    pub(crate) fn answer(&mut self, position: Option<Position>) {
        match position {
            Some(position) if position > self.own => self.high = self.probe,
            Some(_) => self.low = self.probe + 1,
            // A foreign message: its neighbours tell. The upper half may be all foreign, then the lower half decides.
            None if self.probe + 1 < self.high => {
                self.probe += 1;
                return;
            }
            None => self.high = self.low + (self.high - self.low) / 2,
        }
        self.probe = self.low + (self.high - self.low) / 2;
    }

    /// The sequence to resume after; one below the first where nothing is at or below the position.
    #[must_use]
    pub(crate) fn after(&self) -> u64 {
        self.low.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;

    fn at(seq: u32) -> Position {
        Position::new(0, Lsn(1), seq)
    }

    #[test]
    fn a_version_in_a_row_is_not_the_position() {
        let version = at(7).to_string();
        let other = at(9).to_string();
        let line = format!(
            r#"{{"op":"c","after":{{"version":"{other}","t":"\"source\":{{\"version\":\"{other}"}},"source":{{"name":"s","version":"{version}"}}}}"#
        );
        assert_eq!(of_changes(line.as_bytes()), Some(at(7)));
        assert_eq!(of_changes(format!("{line}\n").as_bytes()), Some(at(7)));
        assert_eq!(of_changes(b"hello"), None);
    }

    /// Every stream of up to 40 messages, some foreign, against the naive answer.
    #[test]
    fn the_search_finds_the_newest_message_not_above_the_position() {
        for length in 0..40_u64 {
            for own in 0..45_u32 {
                for foreign in [0_u64, 2, 3, 7] {
                    let position = |seq: u64| {
                        let ours = foreign == 0 || !seq.is_multiple_of(foreign);
                        ours.then(|| at(u32::try_from(seq).unwrap_or(u32::MAX)))
                    };
                    let mut search = ResumeSearch::new(at(own), 1, length);
                    let mut questions = 0;
                    while let Some(seq) = search.question() {
                        search.answer(position(seq));
                        questions += 1;
                        assert!(questions < 100);
                    }
                    let newest =
                        (1..=length).filter(|seq| position(*seq).is_some_and(|p| p <= at(own)));
                    let newest = newest.max().unwrap_or(0);
                    // Foreign messages just behind it may be skipped too, one that is above never.
                    let between = newest + 1..=search.after();
                    assert!(
                        search.after() >= newest
                            && between.clone().all(|seq| position(seq).is_none())
                    );
                }
            }
        }
    }
}
