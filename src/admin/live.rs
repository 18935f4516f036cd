//! What a process tells of itself: the answer to `GET /status`, which `status` reads. Pure.

use millrace_config::Condition;
use serde::{Deserialize, Serialize};

/// What `GET /status` answers, and what `status` reads from it: the shape of `status -o json`, as far as a
/// process knows it by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Live {
    /// The whole: the worst of the parts.
    #[serde(flatten)]
    pub(crate) overall: LivePart,
    /// The release of the process.
    pub(crate) version: String,
    /// The source.
    pub(crate) source: LiveSource,
    /// The sinks that this process works for.
    pub(crate) sinks: Vec<LiveSink>,
    /// The tables that are not as their sink is, or of which an operator is told something.
    pub(crate) tables: Vec<LiveTable>,
}

/// The source, and the capture where this process has one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LiveSource {
    /// Its name.
    pub(crate) name: String,
    /// The capture's state.
    pub(crate) capture: Option<LivePart>,
}

/// One sink.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LiveSink {
    /// Its name.
    pub(crate) name: String,
    /// Its state.
    #[serde(flatten)]
    pub(crate) part: LivePart,
    /// How long ago the source wrote what it has.
    pub(crate) lag_seconds: Option<f64>,
    /// Up to where it has everything.
    pub(crate) position: Option<String>,
}

/// A part's state, without its data and with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LivePart {
    /// The state's name.
    pub(crate) state: String,
    /// Why: the reason of a retry, the message of a condition.
    pub(crate) reason: Option<String>,
    /// The condition's code.
    pub(crate) code: Option<String>,
    /// The condition's remedy.
    pub(crate) remedy: Option<String>,
}

/// One table of one sink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LiveTable {
    /// The table at the source.
    pub(crate) name: String,
    /// The sink; none: every one, because capture has parked the table.
    pub(crate) sink: Option<String>,
    /// Its state.
    #[serde(flatten)]
    pub(crate) part: LivePart,
}

impl LivePart {
    /// A state that needs no explanation.
    pub(crate) fn of(state: &str) -> Self {
        Self {
            state: state.to_owned(),
            ..Self::default()
        }
    }

    /// A state and the condition behind it.
    pub(crate) fn because(state: &str, condition: &Condition) -> Self {
        Self {
            state: state.to_owned(),
            reason: Some(condition.message.clone()),
            code: Some(condition.code.to_string()),
            remedy: Some(condition.remedy.clone()),
        }
    }
}

/// Seconds between two times in microseconds since 1970, none where nothing was ever written. Two clocks may
/// differ a little: never below zero.
pub(crate) fn lag_seconds(now_us: i64, source_ts_us: i64) -> Option<f64> {
    let micros = now_us.saturating_sub(source_ts_us).max(0);
    (source_ts_us > 0).then_some(micros as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_has_no_lag() {
        assert_eq!(lag_seconds(5_500_000, 3_000_000), Some(2.5));
        assert_eq!(lag_seconds(1, 3_000_000), Some(0.0));
        assert_eq!(lag_seconds(5_000_000, 0), None);
    }
}
