//! What becomes of a sink whose life has ended with a failure: it is shown, and either goes on after a pause or ends.

use std::time::Duration;

use millrace_config::{Backoff, Condition, State, limits};
use millrace_event::TableName;

use crate::error::Error;
use crate::status::Status;
use crate::waiting::Waiting;

/// How often a standby tries to take over.
const STANDBY_INTERVAL: Duration = Duration::from_secs(2);

/// The failures of a sink, over all of its lives.
pub(crate) struct Failures<'r> {
    sink: &'r str,
    status: &'r Status,
    backoff: Backoff,
    /// How many there were since changes flowed.
    in_a_row: u32,
    waiting: Waiting,
    /// The table that the target has just refused, and why.
    refused: Option<(TableName, Condition)>,
}

impl<'r> Failures<'r> {
    pub(crate) fn new(sink: &'r str, status: &'r Status) -> Self {
        Self {
            sink,
            status,
            backoff: Backoff::default(),
            in_a_row: 0,
            waiting: Waiting::default(),
            refused: None,
        }
    }

    /// The table that the next life parks.
    pub(crate) fn take_refused(&mut self) -> Option<(TableName, Condition)> {
        self.refused.take()
    }

    /// How long to pause before the next life. The last one began at `began` and ended with `error` at `now`.
    ///
    /// # Errors
    /// There is to be no other one.
    pub(crate) fn pause_after(
        &mut self,
        error: Error,
        began: Duration,
        now: Duration,
    ) -> Result<Duration, Error> {
        let (sink, status) = (self.sink, self.status);
        if !matches!(error, Error::Waiting(_)) {
            self.waiting.ended();
        }
        let snapshot = status.snapshot();
        let streamed = snapshot.state == State::Streaming;
        self.in_a_row = if streamed { 1 } else { self.in_a_row + 1 };
        match error {
            Error::Halt(condition) => {
                status.set_state(sink, State::Halted(condition.code), Some(condition.clone()));
                Err(Error::Halt(condition))
            }
            Error::Table { condition, .. } if !snapshot.begun => Err(Error::Halt(condition)),
            Error::Table { table, condition } => {
                self.refused = Some((table, condition));
                Ok(limits::BACKOFF_FIRST)
            }
            Error::Refused(_) if !snapshot.begun => Err(error),
            Error::Standby => {
                status.set_state(sink, State::Standby, None);
                Ok(STANDBY_INTERVAL)
            }
            Error::Waiting(what) => Ok(self.wait_for(&what, began, now)),
            Error::Refused(_) | Error::Retry { .. } => Ok(self.retry(error)),
        }
    }

    /// Capture has yet to do something.
    fn wait_for(&mut self, what: &str, began: Duration, now: Duration) -> Duration {
        self.in_a_row = 0;
        let look = self.waiting.look(what, began, now);
        let reason = format!("waiting for capture to {what}");
        if look.is_new {
            tracing::info!(part = "sink", sink = self.sink, "{reason}");
        }
        if look.is_long {
            let state = State::Retrying(reason);
            self.status.set_state(self.sink, state, None);
        }
        look.pause
    }

    /// A server is away, or refuses for now.
    fn retry(&self, error: Error) -> Duration {
        let sink = self.sink;
        let reason = error.chain();
        tracing::warn!(part = "sink", sink, %reason, "trying again");
        let condition = match error {
            Error::Refused(condition) => Some(condition),
            Error::Retry { condition, .. } => condition,
            _ => None,
        };
        if let Some(condition) = &condition {
            tracing::warn!(code = condition.code.as_str(), remedy = %condition.remedy, "{}", condition.message);
        }
        self.status
            .set_state(sink, State::Retrying(reason), condition);
        self.backoff.delay(self.in_a_row, rand::random())
    }
}
