//! What a sink's caller does about a failure.

use millrace_config::{Code, Condition, SecretError};
use millrace_connect::nats::NatsError;
use millrace_consumer::ReadError;
use millrace_event::TableName;

use crate::sink::{Cause, SinkError};

/// A failure of a sink, by what its caller does.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operator must act. Before the sink ever worked the process ends, later the sink halts.
    #[error(transparent)]
    Halt(Condition),
    /// The login was refused. Before the sink ever worked that is for an operator; later the secret may be
    /// about to change, so it is read again and tried again.
    #[error(transparent)]
    Refused(Condition),
    /// The target refuses one table. Before the sink ever worked that is for an operator; later the table is
    /// parked and the others go on.
    #[error("the target refuses table {table}: {condition}")]
    Table {
        /// The table.
        table: TableName,
        /// What to tell the operator.
        condition: Condition,
    },
    /// Another process is this sink's worker: stand by and try again.
    #[error("another process is the sink's worker")]
    Standby,
    /// Capture has not made something yet that a sink begins with: look again soon.
    #[error("waiting for capture to {0}")]
    Waiting(String),
    /// Try again after a while.
    #[error("{reason}")]
    Retry {
        /// What failed, for `retrying(reason)`.
        reason: String,
        /// What to tell the operator meanwhile.
        condition: Option<Condition>,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
}

impl Error {
    /// A failure that passes.
    pub(crate) fn retry(reason: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self::Retry {
            reason: reason.into(),
            condition: None,
            source: Some(source.into()),
        }
    }

    /// A failure that passes and has no cause below it.
    pub(crate) fn retry_because(reason: impl Into<String>) -> Self {
        Self::Retry {
            reason: reason.into(),
            condition: None,
            source: None,
        }
    }

    /// The failure and its causes in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        millrace_config::chain(self)
    }
}

impl From<SinkError> for Error {
    fn from(error: SinkError) -> Self {
        match error {
            SinkError::Fenced => Self::Standby,
            SinkError::Fatal { condition, .. } => Self::Halt(*condition),
            SinkError::Transient {
                condition: Some(condition),
                source,
                ..
            } if matches!(condition.code, Code::TargetAuth | Code::SecretUnreadable) => {
                let (code, remedy) = (condition.code, condition.remedy.clone());
                Self::Refused(Condition::new(
                    code,
                    format!("{}: {source}", condition.message),
                    remedy,
                ))
            }
            SinkError::Transient {
                what,
                condition,
                source,
            } => {
                let condition = condition.map(|condition| *condition);
                Self::Retry {
                    reason: format!("{what} failed"),
                    condition,
                    source: Some(source),
                }
            }
            SinkError::Table {
                table, condition, ..
            } => Self::Table {
                table,
                condition: *condition,
            },
        }
    }
}

impl From<SecretError> for Error {
    fn from(error: SecretError) -> Self {
        Self::Refused(Condition::new(
            Code::SecretUnreadable,
            error.to_string(),
            "set the environment variable or write the file that the configuration names",
        ))
    }
}

impl From<NatsError> for Error {
    fn from(error: NatsError) -> Self {
        match error {
            NatsError::Auth { .. } => Self::Refused(Condition::new(
                Code::StreamAuth,
                millrace_config::chain(&error),
                "correct the credentials under [stream]",
            )),
            NatsError::Secret(error) => error.into(),
            error => Self::retry(error.to_string(), error),
        }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        Self::Halt(Condition::new(
            Code::StreamGap,
            error.to_string(),
            "the replica must be copied again: drop its tables and its row in millrace.position, \
             then start the sink",
        ))
    }
}
