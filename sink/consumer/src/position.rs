//! Which position a message stands at, and which messages a reader drops. Pure.

use std::sync::LazyLock;

use async_nats::HeaderMap;
use memchr::memmem::Finder;
use millrace_event::{Control, Position, Version, decode_line, header};

use crate::chunks::Place;

/// What stands before the object that holds the position of an event. Its quotes are not escaped and an object
/// follows, so it cannot occur inside a row: values of columns are never objects.
const SOURCE: &[u8] = b"\"source\":";
/// Where in it the position stands.
static VERSION_MEMBER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"version\":\""));
const DIGITS: usize = 32;

/// The position of a message; of a chunk, its row's. `None` for a message that is not ours.
#[must_use]
pub(crate) fn of_message(headers: Option<&HeaderMap>, payload: &[u8]) -> Option<Position> {
    if let Some(position) = headers.and_then(|headers| headers.get(header::POSITION)) {
        return position.as_str().parse().ok();
    }
    of_changes(payload).or_else(|| control(payload).map(|control| control.position))
}

/// The position of a message that readers take as soon as they have it: no chunk, or the last one of its set.
#[must_use]
pub(crate) fn of_whole(headers: &HeaderMap, payload: &[u8]) -> Option<Position> {
    if let Some(place) = headers.get(header::CHUNK) {
        let place = Place::parse(place.as_str())?;
        return (place.index == place.count).then(|| of_message(Some(headers), payload))?;
    }
    of_message(Some(headers), payload)
}

/// The position of a message with changes: its last line's. `None` for a message that is not ours.
#[must_use]
pub(crate) fn of_changes(payload: &[u8]) -> Option<Position> {
    let payload = payload.trim_ascii_end();
    // The last brace that opens an object: our own publisher ends a line with its source.
    if let Some(brace) = memchr::memrchr(b'{', payload)
        && let (before, source) = payload.split_at(brace)
        && before.ends_with(SOURCE)
        && let Some(position) = of_source(source)
    {
        return Some(position);
    }
    let start = memchr::memrchr(b'\n', payload).map_or(0, |end| end + 1);
    let event = decode_line(payload.get(start..)?).ok()?;
    Some(event.source.version.into())
}

/// The position in a `source` of the last line, whose members are no objects.
fn of_source(source: &[u8]) -> Option<Position> {
    if memchr::memchr(b'\n', source).is_some() {
        return None;
    }
    let digits = VERSION_MEMBER.find(source)? + VERSION_MEMBER.needle().len();
    let digits = source.get(digits..)?.get(..DIGITS)?;
    Version::from_digits(digits).map(Position)
}

/// The control message in a payload; `None` for one that is not ours.
#[must_use]
pub(crate) fn control(payload: &[u8]) -> Option<Control> {
    serde_json::from_slice(payload).ok()
}

/// Finds where to resume after the stream was rolled back: after the first appearance of the newest heartbeat that
/// is not above the reader's own position. The heartbeats that the stream holds are taken in, oldest first.
///
/// Why nothing is lost. Let f be the first message above the reader's own position; resuming anywhere before f is
/// right, because readers drop what they have seen, and resuming behind it loses f. Each time a position appears in
/// the stream for the first time, every position of the decoded change sequence below it has appeared before: that
/// holds for any number of publishers that take over from each other, late messages of overtaken ones, and tails
/// that the broker lost (ARCHITECTURE.md, the fence). Heartbeats are part of that sequence: they come from the WAL,
/// and every publisher writes them. So a heartbeat that is not above the reader's position is below f, and its first
/// appearance lies before f.
///
/// Nothing weaker will do. Messages not above the reader's position also lie behind f, as many as publishers repeat
/// and as far behind as they are late, so neither a bisection nor a fixed distance to what it finds is safe. Nor is
/// a `progress` message: its position is its publisher's own, and may appear for the first time behind f.
///
/// What is assumed: what was purged does not appear again. Purging leaves what the slot may still be asked for, and a
/// successor repeats nothing older; late messages of an overtaken publisher come within seconds.
#[derive(Clone, Debug)]
pub(crate) struct ResumeSearch {
    own: Position,
    newest: Option<(Position, u64)>,
}

impl ResumeSearch {
    #[must_use]
    pub(crate) fn new(own: Position) -> Self {
        Self { own, newest: None }
    }

    /// Takes in the next heartbeat; `false` where no further one is needed: below the first one that is above the
    /// reader's position every other one has appeared.
    pub(crate) fn on_heartbeat(&mut self, stream_seq: u64, position: Position) -> bool {
        if position > self.own {
            return false;
        }
        if self.newest.is_none_or(|(newest, _)| position > newest) {
            self.newest = Some((position, stream_seq));
        }
        true
    }

    /// The sequence to resume after; `None` where no heartbeat is at or below the position: then only the oldest
    /// message is safe.
    #[must_use]
    pub(crate) fn after(&self) -> Option<u64> {
        self.newest.map(|(_, stream_seq)| stream_seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_event::Lsn;
    use proptest::prelude::*;

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
        assert_eq!(of_changes(format!("{line}\nhello").as_bytes()), None);
    }

    #[test]
    fn the_position_is_found_in_any_layout_of_the_last_line() {
        let line = |table: &str, seq| {
            format!(
                r#"{{"op":"t","before":null,"after":null,"key":null,"ts_ms":1,"source":{{"name":"s","db":"d","schema":"p","table":"{table}","table_version":"0","snapshot":"false","txId":1,"ts_us":1,"version":"{}","lsn":1}}}}"#,
                at(seq)
            )
        };
        let plain = line("t", 7);
        let layouts = [
            plain.clone(),
            line("{", 7),
            line(r#"\"source\":{"#, 7),
            plain.replacen("\"source\":", "\"source\" : ", 1),
            plain.replacen("\"version\":", "\"version\": ", 1),
            plain.replacen("\"lsn\"", "\"new\":{\"version\":\"0\"},\"lsn\"", 1),
            plain.replacen("}}", "},\"new\":{\"version\":\"0\"}}", 1),
        ];
        for last in layouts {
            let payload = format!("{}\n{last}\n", line("t", 6));
            assert_eq!(of_changes(payload.as_bytes()), Some(at(7)), "{last}");
        }
    }

    /// Steps of publishers, of which several write to one stream.
    #[derive(Clone, Debug)]
    enum Step {
        /// A publisher's next messages are stored.
        Store { publisher: usize, messages: u64 },
        /// A publisher tells progress that no other one tells.
        Progress { publisher: usize },
        /// Another publisher goes on at the stream's tail. Those before it may still have messages on their way.
        TakeOver,
    }

    /// The `n`th of the decoded change sequence: every seventh is a heartbeat.
    fn decoded(n: u64) -> Position {
        let heartbeat = n.is_multiple_of(7);
        Position::new(0, Lsn(n), if heartbeat { u32::MAX } else { 1 })
    }

    #[derive(Default)]
    struct Model {
        stream: Vec<Position>,
        /// The next of the decoded change sequence that each publisher stores.
        publishers: Vec<u64>,
    }

    impl Model {
        fn take_over(&mut self) {
            let tail = self.stream.last().copied().unwrap_or(Position::ZERO);
            let next = (tail.commit_lsn().0..).find(|n| *n > 0 && decoded(*n) > tail);
            self.publishers.extend(next);
        }

        fn step(&mut self, step: &Step) {
            let number = self.publishers.len();
            match *step {
                Step::TakeOver => self.take_over(),
                Step::Store {
                    publisher,
                    messages,
                } => {
                    let next = &mut self.publishers[publisher % number];
                    self.stream.extend((*next..*next + messages).map(decoded));
                    *next += messages;
                }
                Step::Progress { publisher } => {
                    let next = self.publishers[publisher % number];
                    self.stream.push(Position::new(0, Lsn(next), 0));
                }
            }
        }

        /// The broker loses the stream's end and every batch on its way.
        fn lose(&mut self, length: usize) {
            self.stream.truncate(length);
            self.publishers.clear();
            self.take_over();
        }

        fn newest_heartbeat(&self, own: Position) -> Option<u64> {
            let mut search = ResumeSearch::new(own);
            for (seq, position) in (1..).zip(&self.stream) {
                let heartbeat = decoded(position.commit_lsn().0) == *position
                    && position.commit_lsn().0.is_multiple_of(7);
                if heartbeat && !search.on_heartbeat(seq, *position) {
                    break;
                }
            }
            search.after()
        }
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let publisher = 0..4_usize;
        let store = (publisher.clone(), 1..12_u64).prop_map(|(publisher, messages)| Step::Store {
            publisher,
            messages,
        });
        let progress = publisher.prop_map(|publisher| Step::Progress { publisher });
        let step = prop_oneof![8 => store, 1 => progress, 2 => Just(Step::TakeOver)];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// Whatever publishers repeat and how late it comes: what the reader has not seen lies behind the place, and
        /// what it reads again is never more than the stream holds behind the heartbeat before it.
        #[test]
        fn a_search_never_resumes_behind_what_was_not_seen(
            before in steps(), after in steps(), read in 0.0..1.0_f64, kept in 0.0..1.0_f64,
        ) {
            let mut model = Model::default();
            model.take_over();
            before.iter().for_each(|step| model.step(step));
            let read = (model.stream.len() as f64 * read) as usize;
            let Some(own) = model.stream[..read].iter().max().copied() else { return Ok(()) };
            model.lose((read as f64 * kept) as usize);
            after.iter().for_each(|step| model.step(step));

            let first_above = model.stream.iter().position(|position| *position > own);
            let found = model.newest_heartbeat(own);
            if let (Some(index), Some(resumed)) = (first_above, found) {
                // Sequences count from 1, so that the sequence before the message is its index.
                prop_assert!(resumed <= index as u64, "{resumed} > {index} of {:?}", model.stream);
            }
            let last = decoded(own.commit_lsn().0 / 7 * 7).min(own);
            let written = model.stream.iter().position(|position| *position == last);
            if let (Some(index), true) = (written, last < own && last > Position::ZERO) {
                prop_assert_eq!(found, Some(index as u64 + 1));
            }
        }
    }
}
