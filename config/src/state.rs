//! What a running process says about itself, and how it ends.

use std::fmt;

use millrace_event::TableName;
use serde::{Serialize, Serializer};

use crate::Code;

/// What the pipeline, or one part of it, is doing. Nothing of it survives a crash: a new process is `starting`
/// and finds the rest out from the slot, the stream and the targets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Entered when the process starts: settings are checked, connections are made.
    Starting,
    /// Entered by a sink whose tables are still being copied. Finished tables stay finished after a crash.
    Snapshotting,
    /// Entered when changes flow.
    Streaming,
    /// Entered when another process holds the slot or the sink's lock; it takes over when that one ends.
    Standby,
    /// Entered when a server is out of reach or refuses for now; left by the attempt that succeeds.
    Retrying(String),
    /// Entered when somebody asked for it; holds who.
    Paused(String),
    /// Entered by one table that the target or the source made impossible; the others flow on.
    Parked(TableName),
    /// Entered when going on needs a person. The process stays alive and says which condition it met.
    Halted(Code),
}

impl State {
    /// Every state's name.
    pub const NAMES: [&'static str; 8] = [
        "starting",
        "snapshotting",
        "streaming",
        "standby",
        "retrying",
        "paused",
        "parked",
        "halted",
    ];

    /// The state without its data, as metrics label it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Snapshotting => "snapshotting",
            Self::Streaming => "streaming",
            Self::Standby => "standby",
            Self::Retrying(_) => "retrying",
            Self::Paused(_) => "paused",
            Self::Parked(_) => "parked",
            Self::Halted(_) => "halted",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match self {
            Self::Retrying(reason) => write!(f, "{name}({reason})"),
            Self::Paused(by) => write!(f, "{name}({by})"),
            Self::Parked(table) => write!(f, "{name}({table})"),
            Self::Halted(code) => write!(f, "{name}({code})"),
            Self::Starting | Self::Snapshotting | Self::Streaming | Self::Standby => {
                f.write_str(name)
            }
        }
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// 0: done, or drained after a signal.
    Ok,
    /// 1: a bug.
    Internal,
    /// 2: the command line is wrong.
    Usage,
    /// 3: a check found something.
    Finding,
    /// 4: the environment does not allow it: a precondition failed at start, or a time limit passed.
    Environment,
    /// 5: halted; an operator is needed.
    Halted,
    /// 78: the configuration is wrong (`EX_CONFIG`).
    Config,
}

impl Exit {
    /// The number that the operating system sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Internal => 1,
            Self::Usage => 2,
            Self::Finding => 3,
            Self::Environment => 4,
            Self::Halted => 5,
            Self::Config => 78,
        }
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_prints_its_data_and_has_a_plain_name() {
        let table = TableName::new("public", "orders");
        for (state, text) in [
            (State::Starting, "starting"),
            (State::Snapshotting, "snapshotting"),
            (State::Streaming, "streaming"),
            (State::Standby, "standby"),
            (State::Retrying("no route".to_owned()), "retrying(no route)"),
            (State::Paused("ann".to_owned()), "paused(ann)"),
            (State::Parked(table), "parked(public.orders)"),
            (State::Halted(Code::SlotMissing), "halted(E1102)"),
        ] {
            assert_eq!(state.to_string(), text);
            assert!(State::NAMES.contains(&state.name()));
            assert_eq!(
                serde_json::to_string(&state).expect("json"),
                format!("{text:?}")
            );
        }
    }
}
