//! What capture's caller does about a failure.

use std::error::Error as StdError;

use millrace_config::{Code, Condition};
use millrace_connect::nats::NatsError;
use millrace_connect::postgres::ConnectError;

use crate::replication::WalError;
use crate::stream::StreamError;

/// A failure of capture, by what its caller does.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operator must act. Before streaming began the process ends, later it halts.
    #[error(transparent)]
    Halt(Condition),
    /// The login was refused. Before streaming began that is for an operator; later the secret may be about
    /// to change, so it is read again and tried again.
    #[error(transparent)]
    Refused(Condition),
    /// Another process captures this source: stand by and try again.
    #[error(transparent)]
    Standby(Condition),
    /// Try again after a while.
    #[error("{reason}")]
    Retry {
        /// What failed, for `retrying(reason)`.
        reason: String,
        /// What to tell the operator meanwhile.
        condition: Option<Condition>,
        /// Why.
        #[source]
        source: Option<Box<dyn StdError + Send + Sync>>,
    },
}

impl Error {
    /// A condition that an operator must resolve.
    #[must_use]
    pub fn halt(condition: Condition) -> Self {
        Self::Halt(condition)
    }

    /// A failure that passes.
    pub fn retry(
        reason: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::Retry {
            reason: reason.into(),
            condition: None,
            source: Some(source.into()),
        }
    }

    /// A failure that passes and has no cause below it.
    pub fn retry_because(reason: impl Into<String>) -> Self {
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

impl From<Condition> for Error {
    fn from(condition: Condition) -> Self {
        Self::Halt(condition)
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(server) = error.as_db_error() else {
            return Self::retry("the source's connection failed", error);
        };
        let code = server.code().code();
        let condition = match code {
            "42501" => Some((
                Code::SourcePrivilege,
                "see `millrace init-sql` for the grants",
            )),
            "53400" => Some((
                Code::NoFreeSlot,
                "raise max_replication_slots and max_wal_senders, or drop a slot that nobody uses",
            )),
            _ => None,
        };
        match condition {
            Some((code, remedy)) => Self::Halt(Condition::new(code, server.message(), remedy)),
            None => Self::retry(
                format!("the source answered {code}: {}", server.message()),
                error,
            ),
        }
    }
}

impl From<millrace_config::SecretError> for Error {
    fn from(error: millrace_config::SecretError) -> Self {
        Self::Refused(Condition::new(
            Code::SecretUnreadable,
            error.to_string(),
            "set the environment variable or write the file that the configuration names",
        ))
    }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        match &error {
            ConnectError::Auth { source, .. } => {
                let reason = source
                    .as_db_error()
                    .map_or(String::new(), |said| format!(": {}", said.message()));
                Self::Refused(Condition::new(
                    Code::SourceAuth,
                    format!("{error}{reason}"),
                    "correct the user or password that source.url refers to, or pg_hba.conf",
                ))
            }
            ConnectError::Config(cause) => Self::Refused(Condition::new(
                Code::ConfigInvalid,
                format!("source.url cannot be used: {cause}"),
                "correct the URL that source.url refers to",
            )),
            _ => Self::retry(error.to_string(), error),
        }
    }
}

impl From<WalError> for Error {
    fn from(error: WalError) -> Self {
        match error {
            WalError::Connect { source } => source.into(),
            WalError::SlotActive { slot, pid } => Self::Standby(Condition::new(
                Code::SlotActive,
                format!("slot \"{slot}\" is read by process {}", pid.unwrap_or(0)),
                "nothing to do: this process takes over when that one ends",
            )),
            WalError::SlotUnusable { slot, source } => Self::Halt(Condition::new(
                Code::SlotLost,
                format!("slot \"{slot}\" cannot be read any more: {source}"),
                "run `millrace drop`, then `millrace run`: the tables are copied again",
            )),
            WalError::Server(said) if said.sqlstate.starts_with("28") => {
                Self::Refused(Condition::new(
                    Code::SourceAuth,
                    format!(
                        "the source refused the replication connection: {}",
                        said.message
                    ),
                    "give the user the REPLICATION attribute (see `millrace init-sql`), \
                     and correct its password or pg_hba.conf",
                ))
            }
            WalError::Server(said) if said.sqlstate == "53400" => Self::Halt(Condition::new(
                Code::NoFreeSlot,
                format!("the source has no free slot: {}", said.message),
                "raise max_replication_slots and max_wal_senders, or drop a slot that nobody uses",
            )),
            WalError::Server(said) if said.sqlstate == "42501" => Self::Halt(Condition::new(
                Code::SourcePrivilege,
                format!("the source refused: {}", said.message),
                "give the user the REPLICATION attribute (see `millrace init-sql`)",
            )),
            error => Self::retry(error.to_string(), error),
        }
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

/// JetStream's codes for storage that the server or the account does not have: of the account as a whole, of the
/// server, in memory, and on disk.
const NO_STORAGE: [u64; 4] = [10_002, 10_023, 10_028, 10_047];

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Condition(condition) => Self::Halt(condition),
            StreamError::Refused { what, source }
                if NO_STORAGE.contains(&source.error_code().0) =>
            {
                let condition = Condition::new(
                    Code::StreamStorage,
                    format!("JetStream refused {what}: {source}"),
                    "lower stream.retention.max_bytes, or raise the server's max_file_store or the account's limit; \
                     it is tried again by itself",
                );
                Self::Retry {
                    reason: format!("JetStream refused {what}"),
                    condition: Some(condition),
                    source: Some(source.into()),
                }
            }
            error => Self::retry(error.to_string(), error),
        }
    }
}
