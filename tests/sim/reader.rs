//! A reader of the stream, as `millrace_consumer` is: what it drops, and where it resumes.

use bytes::Bytes;
use millrace_event::{Control, ControlKind, Position};

use crate::broker::{Assembly, Broker};

/// One message that is new.
pub(crate) struct Delivery {
    pub(crate) stream_seq: u64,
    pub(crate) floor: Position,
    /// Its own.
    pub(crate) position: Position,
    pub(crate) body: Body,
}

pub(crate) enum Body {
    Changes(Bytes),
    Control(Control),
}

/// A reader's consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    None,
    /// Its place was found, and there is no consumer yet: meanwhile the broker may lose its end.
    Found(u64),
    /// There is one. It ends with the broker.
    Made,
}

/// A reader.
#[derive(Debug)]
pub(crate) struct Reader {
    pub(crate) stream_seq: u64,
    highest: Position,
    assembly: Assembly,
    /// The highest row that chunks came of.
    begun: Position,
    before_chunks: u64,
    link: Link,
    /// How often its place had to be searched.
    pub(crate) searches: u64,
}

impl Reader {
    pub(crate) fn new(stream_seq: u64, position: Position) -> Self {
        Self {
            stream_seq,
            highest: position,
            assembly: Assembly::default(),
            begun: Position::ZERO,
            before_chunks: 0,
            link: Link::None,
            searches: 0,
        }
    }

    /// The broker crashed. A place that was found stays found: the next request goes to the broker that follows.
    pub(crate) fn disconnect(&mut self) {
        if self.link == Link::Made {
            self.link = Link::None;
        }
    }

    /// Older messages come again.
    pub(crate) fn rewind(&mut self, stream_seq: u64) {
        if self.link == Link::Made {
            // Never into a set of chunks that is in progress: its beginning would be missing.
            let newest = if self.assembly.is_empty() {
                self.stream_seq
            } else {
                self.before_chunks
            };
            self.stream_seq = stream_seq.min(newest);
            self.begun = Position::ZERO;
            self.assembly.clear();
        }
    }

    /// Sabotage: a message is passed over.
    pub(crate) fn skip(&mut self) {
        self.stream_seq += 1;
    }

    /// The next message that is new, if there is one.
    pub(crate) fn next(&mut self, broker: &Broker) -> Option<Delivery> {
        if self.link != Link::Made && !self.connect(broker) {
            return None;
        }
        while let Some(stored) = broker.get(self.stream_seq + 1) {
            let before = self.stream_seq;
            self.stream_seq += 1;
            let message = &stored.message;
            let payload = match &message.chunk {
                None => message.payload.clone(),
                Some((row, place)) => {
                    self.begun = self.begun.max(*row);
                    if self.assembly.is_empty() {
                        self.before_chunks = before;
                    }
                    match self.assembly.push(*place, &message.payload) {
                        Some(whole) => whole,
                        None => continue,
                    }
                }
            };
            // Below a row that is in progress a late publisher's progress tells nothing new.
            if stored.position <= self.highest || stored.position < self.begun {
                continue;
            }
            self.assembly.clear();
            let floor = std::mem::replace(&mut self.highest, stored.position);
            let body = match message.control() {
                Some(control) if message.is_control() => Body::Control(control),
                _ => Body::Changes(payload),
            };
            let stream_seq = self.stream_seq;
            return Some(Delivery {
                stream_seq,
                floor,
                position: stored.position,
                body,
            });
        }
        None
    }

    /// Finds the place; then makes a consumer there, and takes it if the place is not before it by now.
    fn connect(&mut self, broker: &Broker) -> bool {
        if !self.assembly.is_empty() {
            self.stream_seq = self.before_chunks;
            self.assembly.clear();
        }
        let same =
            self.stream_seq == 0 || broker.position_at(self.stream_seq) == Some(self.highest);
        let place = if same {
            self.stream_seq
        } else {
            resume_after(broker, self.highest)
        };
        let Link::Found(found) = self.link else {
            self.link = Link::Found(place);
            return false;
        };
        if place < found {
            self.link = Link::None;
            return false;
        }
        self.searches += u64::from(found != self.stream_seq);
        // A consumer cannot begin behind the end.
        self.stream_seq = found.min(broker.last_seq());
        self.begun = Position::ZERO;
        self.link = Link::Made;
        true
    }
}

/// After the first appearance of the newest heartbeat that is not above the reader's own position, else before the
/// oldest message.
fn resume_after(broker: &Broker, own: Position) -> u64 {
    let mut newest = (Position::ZERO, 0);
    for stream_seq in 1..=broker.last_seq() {
        let control = broker.get(stream_seq).and_then(|stored| {
            let message = Some(&stored.message).filter(|message| message.is_control());
            message?.control()
        });
        let Some(control) = control.filter(|control| control.kind == ControlKind::Heartbeat) else {
            continue;
        };
        if control.position > own {
            break;
        }
        if control.position > newest.0 {
            newest = (control.position, stream_seq);
        }
    }
    newest.1
}
