//! The bytes of fast ingest (NATS 2.14): reply subjects out, flow messages in. Pure.
//!
//! A message of a batch names its place in the reply subject,
//! `<inbox>.<batch>.<flow>.fail.<number>.<operation>.$FI`; the server answers to it with a flow message
//! (`ack`, `gap`, `err`) or, when the batch ends, with an ordinary publish acknowledgement.

use std::fmt::Write as _;

use async_nats::Subject;
use bytes::BytesMut;
use serde::Deserialize;

use super::PublishError;

/// JetStream's code for a message that did not follow the sequence it expected.
const WRONG_LAST_SEQUENCE: u64 = 10_071;
/// The same where the server does not say which sequence it found.
const WRONG_LAST_SEQUENCE_CONSTANT: u64 = 10_164;
/// JetStream's code for a message that the store refused; its text says why.
const STORE_FAILED: u64 = 10_077;
/// The store's reason when a stream that discards new messages has reached `max_bytes`.
const MAXIMUM_BYTES: &str = "maximum bytes exceeded";

/// Reply subjects are cut from allocations of this many bytes, about 600 at a time.
const SUBJECTS_BYTES: usize = 64 * 1024;

/// What a message does to its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// The batch's first message.
    Start,
    /// Any further message.
    Append,
    /// Ends the batch and is not stored itself.
    Commit,
    /// Asks where the batch stands.
    Ping,
}

impl Operation {
    const fn digit(self) -> char {
        match self {
            Self::Start => '0',
            Self::Append => '1',
            Self::Commit => '3',
            Self::Ping => '4',
        }
    }
}

/// Builds the reply subjects of one connection's batches without an allocation for each.
#[derive(Debug)]
pub(super) struct ReplySubjects {
    /// `<inbox>.<publisher>`; the batch's number completes its id.
    root: String,
    flow: u16,
    /// `<inbox>.<batch>.<flow>.fail.` of the batch that was named last.
    prefix: String,
    batch: u64,
    buffer: BytesMut,
}

impl ReplySubjects {
    pub(super) fn new(inbox: &str, publisher: &str, flow: u16) -> Self {
        let root = format!("{inbox}.{publisher}");
        Self {
            root,
            flow,
            prefix: String::new(),
            batch: 0,
            buffer: BytesMut::new(),
        }
    }

    /// The reply subject of message `number` (from 1) of batch `batch` (from 1).
    pub(super) fn reply(&mut self, batch: u64, number: u64, operation: Operation) -> Subject {
        if self.batch != batch {
            self.batch = batch;
            self.prefix = format!("{}-{batch}.{}.fail.", self.root, self.flow);
        }
        // The prefix, 20 digits and ".1.$FI".
        if self.buffer.capacity() < self.prefix.len() + 26 {
            self.buffer.reserve(SUBJECTS_BYTES);
        }
        self.buffer.extend_from_slice(self.prefix.as_bytes());
        write!(self.buffer, "{number}.{}.$FI", operation.digit())
            .expect("a BytesMut grows as it is written to");
        Subject::try_from(self.buffer.split().freeze()).expect("a str's bytes are UTF-8")
    }

    /// Whether a reply that arrived on `subject` belongs to batch `batch`.
    pub(super) fn belongs_to(&self, subject: &str, batch: u64) -> bool {
        self.batch == batch && subject.starts_with(&self.prefix)
    }
}

/// What the server said about a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// All messages up to number `number` are in the stream; the next of these comes after `flow` more.
    Flow { number: u64, flow: u16 },
    /// The batch ended: its first `count` messages are in the stream, the last of them at `stream_seq`.
    Ended { count: u64, stream_seq: u64 },
}

#[derive(Deserialize)]
struct Raw {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    msgs: u16,
    #[serde(default)]
    last_seq: u64,
    #[serde(default)]
    count: u64,
    error: Option<RawError>,
}

#[derive(Deserialize)]
struct RawError {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// Reads a reply's payload.
///
/// # Errors
/// What the server reports as an error, and [`PublishError::Unreadable`] for anything that is not a reply.
pub(super) fn parse(payload: &[u8]) -> Result<Reply, PublishError> {
    let raw: Raw = serde_json::from_slice(payload).map_err(PublishError::Unreadable)?;
    if let Some(error) = raw.error {
        return Err(rejection(error));
    }
    match raw.kind.as_deref() {
        Some("ack") => Ok(Reply::Flow {
            number: raw.seq,
            flow: raw.msgs,
        }),
        Some("gap") => Err(PublishError::Gap {
            expected: raw.last_seq,
            found: raw.seq,
        }),
        Some(_) => Err(rejection(RawError {
            code: 0,
            err_code: 0,
            description: String::new(),
        })),
        None => Ok(Reply::Ended {
            count: raw.count,
            stream_seq: raw.seq,
        }),
    }
}

fn rejection(error: RawError) -> PublishError {
    match error.err_code {
        WRONG_LAST_SEQUENCE | WRONG_LAST_SEQUENCE_CONSTANT => PublishError::WrongLastSequence {
            text: error.description,
        },
        STORE_FAILED if error.description.contains(MAXIMUM_BYTES) => PublishError::StreamFull,
        0 => PublishError::Rejected {
            code: error.code,
            text: error.description,
        },
        code => PublishError::Rejected {
            code,
            text: error.description,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_subject_names_batch_flow_number_and_operation() {
        let mut subjects = ReplySubjects::new("_INBOX.x", "p", 100);
        assert_eq!(
            subjects.reply(1, 1, Operation::Start).as_str(),
            "_INBOX.x.p-1.100.fail.1.0.$FI"
        );
        assert_eq!(
            subjects.reply(1, 2, Operation::Append).as_str(),
            "_INBOX.x.p-1.100.fail.2.1.$FI"
        );
        assert_eq!(
            subjects.reply(2, 9, Operation::Commit).as_str(),
            "_INBOX.x.p-2.100.fail.9.3.$FI"
        );
        assert!(subjects.belongs_to("_INBOX.x.p-2.100.fail.1.0.$FI", 2));
        assert!(!subjects.belongs_to("_INBOX.x.p-1.100.fail.1.0.$FI", 2));
        for number in 1..2_000 {
            let subject = subjects.reply(2, number, Operation::Append);
            assert_eq!(
                subject.as_str(),
                format!("_INBOX.x.p-2.100.fail.{number}.1.$FI")
            );
        }
    }

    #[test]
    fn replies_are_read_by_their_type() {
        let flow = parse(br#"{"type":"ack","seq":200,"msgs":100}"#);
        assert_eq!(
            flow.ok(),
            Some(Reply::Flow {
                number: 200,
                flow: 100
            })
        );
        let ended = parse(br#"{"stream":"S","seq":17,"batch":"b","count":7}"#);
        assert_eq!(
            ended.ok(),
            Some(Reply::Ended {
                count: 7,
                stream_seq: 17
            })
        );
        let gap = parse(br#"{"type":"gap","last_seq":3,"seq":5}"#);
        assert!(matches!(
            gap,
            Err(PublishError::Gap {
                expected: 3,
                found: 5
            })
        ));
    }

    #[test]
    fn errors_are_told_apart_by_their_code() {
        let error = |code: u64, text: &str| {
            let error = format!(r#"{{"code":400,"err_code":{code},"description":"{text}"}}"#);
            let flow = format!(r#"{{"type":"err","seq":1,"error":{error}}}"#);
            let ack = format!(r#"{{"stream":"S","seq":0,"error":{error}}}"#);
            [parse(flow.as_bytes()), parse(ack.as_bytes())]
        };
        for reply in error(10_071, "wrong last sequence: 5") {
            assert!(matches!(reply, Err(PublishError::WrongLastSequence { .. })));
        }
        for reply in error(10_077, "maximum bytes exceeded") {
            assert!(matches!(reply, Err(PublishError::StreamFull)));
        }
        for reply in error(10_208, "batch publish ID is unknown") {
            assert!(matches!(
                reply,
                Err(PublishError::Rejected { code: 10_208, .. })
            ));
        }
        assert!(matches!(
            parse(b"nonsense"),
            Err(PublishError::Unreadable(_))
        ));
    }
}
