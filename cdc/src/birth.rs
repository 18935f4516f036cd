//! What a capture does at its start, from what it finds.
//!
//! Pure. The objects come into being in this order: stream, slot, and the stream's `start` message, which is
//! only published while the slot is held. So what a crash left behind in between tells itself apart from what
//! somebody removed later, and only the latter is a gap.

use millrace_config::{Code, Condition, Create};
use millrace_event::{Lsn, Position};

/// The stream as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamFound {
    /// There is none.
    Missing,
    /// It never held a message.
    Empty,
    /// It held messages and holds none any more.
    Emptied,
    /// It ends here.
    Tail(TailFound),
}

/// Where a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TailFound {
    /// The newest message's position.
    pub position: Position,
    /// Up to where the stream is complete, if that message says so.
    pub end_lsn: Option<Lsn>,
}

impl TailFound {
    /// A slot that has forgotten more than this has forgotten what the stream does not have.
    #[must_use]
    pub(crate) fn represented(self) -> Lsn {
        self.end_lsn.unwrap_or(self.position.commit_lsn())
    }
}

/// The slot as it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotFound {
    /// There is none.
    Missing,
    /// Nobody reads from it.
    Inactive {
        /// What it has forgotten.
        confirmed: Lsn,
    },
    /// Another process reads from it.
    Active {
        /// The server process.
        pid: i32,
    },
}

/// What else is known of this source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    /// The slot's name.
    pub name: &'a str,
    /// The stream.
    pub stream: StreamFound,
    /// The slot.
    pub slot: SlotFound,
    /// Whether a sink has reported a position on the stream.
    pub sink_position: bool,
    /// Whether slot and publication may be made.
    pub create: Create,
}

/// How to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// A new stream: make the slot (after dropping what a crash left), hold it, publish `start`.
    Begin {
        /// What to do about the slot first.
        slot: SlotPlan,
    },
    /// Go on behind the stream's tail.
    Resume,
    /// Another process is at it.
    Standby {
        /// The server process that reads from the slot.
        pid: i32,
    },
}

/// What to do about the slot of a new stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotPlan {
    /// There is none: make it.
    Create,
    /// It was made before a crash, and what it would stream begins earlier than anybody needs: make it anew.
    Recreate,
    /// It was made for us: take it as it is.
    Take,
}

/// Decides how to begin.
///
/// # Errors
/// A gap, or something is missing that may not be made: an operator must act.
pub(crate) fn plan(found: &Found<'_>) -> Result<Plan, Condition> {
    let Found {
        name,
        stream,
        slot,
        sink_position,
        create,
    } = *found;
    match (stream, slot) {
        (StreamFound::Tail(_), SlotFound::Missing) => Err(Condition::new(
            Code::SlotMissing,
            format!("slot \"{name}\" does not exist, but its stream does: changes since are lost"),
            "run `millrace drop`, then `millrace run`: the tables are copied again",
        )),
        (StreamFound::Tail(tail), SlotFound::Inactive { confirmed }) => {
            check_tail(name, tail, confirmed).map(|()| Plan::Resume)
        }
        (StreamFound::Emptied, _) => Err(Condition::new(
            Code::StreamTailLost,
            "the stream held messages and holds none any more",
            "run `millrace drop`, then `millrace run`: the tables are copied again",
        )),
        (StreamFound::Missing | StreamFound::Empty, _) if sink_position => Err(Condition::new(
            Code::StreamMissing,
            "sinks have positions on a stream that is gone",
            "run `millrace drop`, then `millrace run`: the tables are copied again",
        )),
        (StreamFound::Tail(_) | StreamFound::Empty, SlotFound::Active { pid }) => {
            Ok(Plan::Standby { pid })
        }
        (StreamFound::Missing | StreamFound::Empty, SlotFound::Missing) => match create {
            Create::Auto => Ok(Plan::Begin {
                slot: SlotPlan::Create,
            }),
            Create::Never => Err(Condition::new(
                Code::SlotMissing,
                format!("slot \"{name}\" does not exist"),
                crate::source::make_slot(name),
            )),
        },
        (StreamFound::Empty, SlotFound::Inactive { .. }) if create == Create::Auto => {
            Ok(Plan::Begin {
                slot: SlotPlan::Recreate,
            })
        }
        (StreamFound::Empty | StreamFound::Missing, SlotFound::Inactive { .. })
            if create == Create::Never =>
        {
            Ok(Plan::Begin {
                slot: SlotPlan::Take,
            })
        }
        (StreamFound::Missing, _) => Err(Condition::new(
            Code::StreamMissing,
            format!("slot \"{name}\" exists, but its stream does not: what it held is lost"),
            "run `millrace drop`, then `millrace run`: the tables are copied again",
        )),
        (StreamFound::Empty, SlotFound::Inactive { .. }) => {
            unreachable!("both values of create are handled above")
        }
    }
}

/// Checks that the slot has not forgotten what the stream does not hold.
///
/// # Errors
/// It has: a gap that the slot cannot repair.
pub(crate) fn check_tail(name: &str, tail: TailFound, confirmed: Lsn) -> Result<(), Condition> {
    if confirmed <= tail.represented() {
        return Ok(());
    }
    Err(Condition::new(
        Code::SlotAhead,
        format!(
            "slot \"{name}\" is confirmed up to {confirmed}, but the stream ends at {}: \
             the changes between are lost",
            tail.represented()
        ),
        "run `millrace drop`, then `millrace run`: the tables are copied again",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: StreamFound = StreamFound::Tail(TailFound {
        position: Position::new(1, Lsn(100), 3),
        end_lsn: Some(Lsn(140)),
    });
    const INACTIVE: SlotFound = SlotFound::Inactive {
        confirmed: Lsn(140),
    };
    const ACTIVE: SlotFound = SlotFound::Active { pid: 7 };

    fn decide(stream: StreamFound, slot: SlotFound) -> Result<Plan, Code> {
        let found = Found {
            name: "s",
            stream,
            slot,
            sink_position: false,
            create: Create::Auto,
        };
        plan(&found).map_err(|condition| condition.code)
    }

    #[test]
    fn a_crash_at_each_step_of_birth_is_made_good() {
        let begin = |slot| Ok(Plan::Begin { slot });
        assert_eq!(
            decide(StreamFound::Missing, SlotFound::Missing),
            begin(SlotPlan::Create)
        );
        assert_eq!(
            decide(StreamFound::Empty, SlotFound::Missing),
            begin(SlotPlan::Create)
        );
        assert_eq!(
            decide(StreamFound::Empty, INACTIVE),
            begin(SlotPlan::Recreate)
        );
        assert_eq!(
            decide(StreamFound::Empty, ACTIVE),
            Ok(Plan::Standby { pid: 7 })
        );
        assert_eq!(decide(TAIL, INACTIVE), Ok(Plan::Resume));
        assert_eq!(decide(TAIL, ACTIVE), Ok(Plan::Standby { pid: 7 }));
    }

    #[test]
    fn what_was_removed_later_is_a_gap() {
        assert_eq!(decide(TAIL, SlotFound::Missing), Err(Code::SlotMissing));
        assert_eq!(
            decide(StreamFound::Missing, INACTIVE),
            Err(Code::StreamMissing)
        );
        assert_eq!(
            decide(StreamFound::Missing, ACTIVE),
            Err(Code::StreamMissing)
        );
        assert_eq!(
            decide(StreamFound::Emptied, INACTIVE),
            Err(Code::StreamTailLost)
        );
        let ahead = SlotFound::Inactive {
            confirmed: Lsn(141),
        };
        assert_eq!(decide(TAIL, ahead), Err(Code::SlotAhead));
        let found = Found {
            name: "s",
            stream: StreamFound::Empty,
            slot: SlotFound::Missing,
            sink_position: true,
            create: Create::Auto,
        };
        assert_eq!(plan(&found).map_err(|c| c.code), Err(Code::StreamMissing));
    }

    #[test]
    fn what_may_not_be_created_is_taken_or_asked_for() {
        let never = |stream, slot| {
            let found = Found {
                name: "s",
                stream,
                slot,
                sink_position: false,
                create: Create::Never,
            };
            plan(&found).map_err(|condition| condition.code)
        };
        assert_eq!(
            never(StreamFound::Missing, SlotFound::Missing),
            Err(Code::SlotMissing)
        );
        let take = Ok(Plan::Begin {
            slot: SlotPlan::Take,
        });
        assert_eq!(never(StreamFound::Missing, INACTIVE), take);
        assert_eq!(never(StreamFound::Empty, INACTIVE), take);
    }

    #[test]
    fn a_tail_inside_a_transaction_represents_everything_before_it() {
        let tail = TailFound {
            position: Position::new(1, Lsn(100), 3),
            end_lsn: None,
        };
        assert!(check_tail("s", tail, Lsn(100)).is_ok());
        assert!(check_tail("s", tail, Lsn(101)).is_err());
    }
}
