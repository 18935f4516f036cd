//! Messages read one by one, and the position at which a stream ends.

use std::time::{Duration, SystemTime};

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use async_nats::jetstream::stream::{RawMessageBuilder, RawMessageErrorKind};
use millrace_event::{Control, Lsn, Position, decode_line, header, subject};

use super::backwards::Backwards;
use super::whole::{Search, Whole};
use super::{StoredMessage, StreamError};

/// Messages without a position that are stepped over at the end of a stream before it counts as empty.
const FOREIGN_MAX: u64 = 1_000;

/// Messages that publishers which were taken over may have sent late. One has 2,000 under way at most.
pub(super) const STRAGGLERS_MAX: u64 = 4_000;

/// How a stream ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The newest message's sequence that has a position. Foreign messages may follow.
    pub stream_seq: u64,
    /// Everything up to here is in the stream: an unfinished set of chunks counts as just below its row.
    pub position: Position,
    /// When the server stored the message, by the server's clock.
    pub stored_at: SystemTime,
    /// Everything whose commit ends at or below this LSN is in the stream, where the message says so.
    pub end_lsn: Option<Lsn>,
    /// Whether the message is a control message of kind `start`.
    pub is_start: bool,
    /// The row of which the message is a chunk, and not the last one.
    pub unfinished_row: Option<Position>,
}

pub(super) async fn message(
    jetstream: &Context,
    name: &str,
    stream_seq: u64,
) -> Result<Option<StoredMessage>, StreamError> {
    asked(jetstream, name, |request| request.sequence(stream_seq)).await
}

/// The newest message of a subject, whatever is missing behind it.
async fn newest(
    jetstream: &Context,
    name: &str,
    subject: &str,
) -> Result<Option<StoredMessage>, StreamError> {
    asked(jetstream, name, |request| request.last_by_subject(subject)).await
}

/// The first message of a subject at a sequence or above it.
pub(super) async fn next(
    jetstream: &Context,
    name: &str,
    subject: &str,
    stream_seq: u64,
) -> Result<Option<StoredMessage>, StreamError> {
    asked(jetstream, name, |request| {
        request.sequence(stream_seq).next_by_subject(subject)
    })
    .await
}

async fn asked(
    jetstream: &Context,
    name: &str,
    of: impl FnOnce(RawMessageBuilder) -> RawMessageBuilder,
) -> Result<Option<StoredMessage>, StreamError> {
    let what = || format!("STREAM.MSG.GET.{name}");
    let other =
        |source: async_nats::jetstream::context::RequestErrorKind| StreamError::Unanswered {
            what: what(),
            source: source.into(),
        };
    let stream = jetstream
        .get_stream_no_info(name)
        .await
        .map_err(|_| other(async_nats::jetstream::context::RequestErrorKind::Other))?;
    match of(stream.raw_message_builder()).send().await {
        Ok(raw) => Ok(Some(StoredMessage {
            stream_seq: raw.sequence,
            subject: raw.subject.to_string(),
            headers: raw.headers,
            payload: raw.payload,
            stored_at: raw.time.into(),
        })),
        Err(error) => match error.kind() {
            RawMessageErrorKind::NoMessageFound => Ok(None),
            RawMessageErrorKind::JetStream(source) => Err(StreamError::Refused {
                what: what(),
                source,
            }),
            _ => Err(other(
                async_nats::jetstream::context::RequestErrorKind::Other,
            )),
        },
    }
}

impl Tail {
    /// A slot that has forgotten more than this has forgotten what the stream does not have.
    #[must_use]
    pub fn represented(&self) -> Lsn {
        self.end_lsn.unwrap_or(self.position.commit_lsn())
    }

    /// What the highest message is told by. Where two represent as much, one of them may be a transaction's end and
    /// the other one the next transaction's beginning, or both lie within one.
    fn reach(&self) -> (Lsn, Position) {
        (self.represented(), self.position)
    }

    /// Whether what was published is part of a history that was left at `switch`. A commit record that begins there
    /// is not.
    #[must_use]
    pub fn lies_before(&self, switch: Lsn) -> bool {
        match self.end_lsn {
            Some(end_lsn) => end_lsn <= switch,
            None => self.position.commit_lsn() < switch,
        }
    }
}

/// The newest message that represents the source up to `confirmed`. Messages behind it that do not are a late
/// publisher's, which readers drop. Where none is found, the stream's end is what it is.
pub(super) async fn tail_covering(
    jetstream: &Context,
    name: &str,
    confirmed: Lsn,
) -> Result<Option<Tail>, StreamError> {
    let Some(newest) = tail(jetstream, name).await? else {
        return Ok(None);
    };
    if newest.represented() >= confirmed {
        return Ok(Some(newest));
    }
    // Whoever goes on behind one of them writes again what a hole between has swallowed.
    let mut older = Backwards::from(jetstream, name, newest.stream_seq);
    for _ in 0..STRAGGLERS_MAX {
        let Some(message) = older.next().await? else {
            break;
        };
        match end(&message) {
            Some(earlier) if earlier.represented() >= confirmed => return Ok(Some(earlier)),
            _ => {}
        }
    }
    Ok(Some(newest))
}

/// The message that represents most of the source among the newest: what a late publisher left behind it does not
/// hide it. Reads up to [`STRAGGLERS_MAX`] messages one by one, so it is for rare questions.
pub(super) async fn highest(jetstream: &Context, name: &str) -> Result<Option<Tail>, StreamError> {
    let Some(newest) = tail(jetstream, name).await? else {
        return Ok(None);
    };
    let mut highest = newest.clone();
    let mut older = Backwards::from(jetstream, name, newest.stream_seq);
    for _ in 0..STRAGGLERS_MAX {
        let Some(message) = older.next().await? else {
            break;
        };
        match end(&message) {
            Some(earlier) if earlier.reach() > highest.reach() => highest = earlier,
            _ => {}
        }
    }
    Ok(Some(highest))
}

/// The highest whole message at or below a tail: nothing of the source lies between the two.
pub(super) async fn whole_at(
    jetstream: &Context,
    name: &str,
    tail: &Tail,
) -> Result<Position, StreamError> {
    let Some(row) = tail.unfinished_row else {
        return Ok(tail.position);
    };
    let mut whole = Whole::below(row);
    let mut older = Backwards::from(jetstream, name, tail.stream_seq + 1);
    loop {
        let search = match older.next().await? {
            Some(message) => whole.on_message(&message),
            None => whole.end(),
        };
        if let Search::Found(position) = search {
            return Ok(position);
        }
    }
}

pub(super) async fn tail(jetstream: &Context, name: &str) -> Result<Option<Tail>, StreamError> {
    let Some(found) = super::find(jetstream, name).await? else {
        return Ok(None);
    };
    let subjects = found.config.subjects.clone();
    let state = found.into_state();
    // A broker that lost its end may keep counting where it was: any number of sequences without a message follow
    // the newest one.
    let mut last_seq = None;
    for subject in &subjects {
        let newest = newest(jetstream, name, subject).await?;
        last_seq = last_seq.max(newest.map(|newest| newest.stream_seq));
    }
    let Some(last_seq) = last_seq else {
        return Ok(None);
    };
    let oldest = state.first_seq.max(last_seq.saturating_sub(FOREIGN_MAX));
    for stream_seq in (oldest..=last_seq).rev() {
        let Some(message) = message(jetstream, name, stream_seq).await? else {
            continue;
        };
        if let Some(tail) = end(&message) {
            return Ok(Some(tail));
        }
    }
    Ok(None)
}

/// The newest sequence from `first` to `last` whose message was stored before a time: by bisection, because times rise
/// with sequences. One without a message is as old as the next one that has one.
pub(super) async fn newest_before(
    jetstream: &Context,
    source: &str,
    before: SystemTime,
    first: u64,
    last: u64,
) -> Result<Option<u64>, StreamError> {
    let (name, all) = (subject::stream_name(source), subject::all(source));
    let (mut low, mut high) = (first, last.saturating_add(1));
    while low < high {
        let middle = low + (high - low) / 2;
        match next(jetstream, &name, &all, middle).await? {
            Some(message) if message.stored_at < before => {
                low = message.stream_seq.saturating_add(1).min(high);
            }
            _ => high = middle,
        }
    }
    Ok((low > first).then(|| low - 1))
}

/// What a message says about the stream up to itself; `None` for one that is not ours.
pub(super) fn end(message: &StoredMessage) -> Option<Tail> {
    let at = |position, end_lsn, is_start| Tail {
        stream_seq: message.stream_seq,
        position,
        stored_at: message.stored_at,
        end_lsn,
        is_start,
        unfinished_row: unfinished_row(&message.headers),
    };
    if let Some(position) = chunk_position(&message.headers) {
        return Some(at(position, None, false));
    }
    if message.subject.split('.').nth(2) == Some("_ctl") {
        let control: Control = serde_json::from_slice(&message.payload).ok()?;
        let is_start = control.kind == millrace_event::ControlKind::Start;
        return Some(at(control.position, Some(control.end_lsn), is_start));
    }
    let line = message
        .payload
        .rsplit(|byte| *byte == b'\n')
        .find(|line| !line.is_empty())?;
    let source = decode_line(line).ok()?.source;
    Some(at(source.version.into(), source.end_lsn, false))
}

/// A chunk's position: its row's where it is the last of its set, else just below.
fn chunk_position(headers: &HeaderMap) -> Option<Position> {
    let (row, is_last) = chunk(headers)?;
    // A last chunk need not close a whole set, but whoever wrote it had written the others before.
    Some(if is_last { row } else { row.just_below() })
}

/// The row of a chunk that is not the last of its set.
pub(super) fn unfinished_row(headers: &HeaderMap) -> Option<Position> {
    let (row, is_last) = chunk(headers)?;
    (!is_last).then_some(row)
}

/// A chunk's row, and whether it is the last of its set.
fn chunk(headers: &HeaderMap) -> Option<(Position, bool)> {
    let row: Position = headers.get(header::POSITION)?.as_str().parse().ok()?;
    let mut place = headers.get(header::CHUNK)?.as_str().splitn(3, '/');
    let (index, count) = (place.next()?, place.next()?);
    Some((row, index == count))
}

/// Reads the time of an answer, RFC 3339 in UTC with up to nine digits of a second's fraction.
pub(super) fn time(text: &str) -> Option<SystemTime> {
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut clock = clock.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let valid = (1970..10_000).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && fraction.len() <= 9;
    if !valid {
        return None;
    }
    // Days since 1970 with the year starting in March, so that the leap day is its last.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let nanos: u32 = format!("{fraction:0<9}").parse().ok()?;
    let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
    Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_to_the_nanosecond() {
        let at = |seconds, nanos| Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos));
        assert_eq!(time("1970-01-01T00:00:00Z"), at(0, 0));
        assert_eq!(time("2000-02-29T23:59:59.5Z"), at(951_868_799, 500_000_000));
        assert_eq!(
            time("2026-11-21T04:06:53.123456789Z"),
            at(1_795_234_013, 123_456_789)
        );
        assert_eq!(time("2026-11-21 04:06:53"), None);
    }

    #[test]
    fn of_two_messages_that_represent_as_much_the_one_of_the_higher_position_reaches_further() {
        let tail = |position, end_lsn| Tail {
            stream_seq: 1,
            position,
            stored_at: SystemTime::UNIX_EPOCH,
            end_lsn,
            is_start: false,
            unfinished_row: None,
        };
        let end = tail(Position::new(1, Lsn(100), 9), Some(Lsn(120)));
        let next = tail(Position::new(1, Lsn(120), 1), None);
        assert_eq!(end.represented(), next.represented());
        assert!(next.reach() > end.reach());
        assert!(tail(Position::new(1, Lsn(120), 2), None).reach() > next.reach());
    }

    #[test]
    fn a_commit_record_at_the_switch_point_is_not_part_of_the_old_history() {
        let tail = |end_lsn| Tail {
            stream_seq: 1,
            position: Position::new(1, Lsn(100), 3),
            stored_at: SystemTime::UNIX_EPOCH,
            end_lsn,
            is_start: false,
            unfinished_row: None,
        };
        assert!(tail(Some(Lsn(120))).lies_before(Lsn(120)));
        assert!(!tail(Some(Lsn(120))).lies_before(Lsn(119)));
        assert!(tail(None).lies_before(Lsn(101)));
        assert!(!tail(None).lies_before(Lsn(100)));
    }

    #[test]
    fn an_unfinished_set_of_chunks_counts_as_just_below_its_row() {
        let chunk = |place: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::POSITION, Position::new(1, Lsn(2), 3).to_string());
            headers.insert(header::CHUNK, place);
            chunk_position(&headers)
        };
        assert_eq!(chunk("1/2/p"), Some(Position::new(1, Lsn(2), 2)));
        assert_eq!(chunk("2/2/p"), Some(Position::new(1, Lsn(2), 3)));
        assert_eq!(chunk("nonsense"), None);
    }
}
