//! What can go wrong on a replication connection.

use std::io;

use millrace_connect::postgres::ConnectError;

use super::framing::FramingError;

/// Why a replication connection could not do what it was asked, or ended.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The server could not be reached, or TLS failed.
    #[error("the replication connection could not be opened")]
    Connect {
        /// Why, with the address that was tried.
        #[from]
        source: ConnectError,
    },
    /// The two sides could not agree on how to log in.
    #[error("logging in to the replication connection failed")]
    Auth(#[from] AuthError),
    /// Postgres refused the command, or ended the connection with an error.
    #[error("postgres refused the replication command")]
    Server(#[from] ServerError),
    /// Another connection reads the slot.
    #[error("slot \"{slot}\" is active{}", pid.map_or_else(String::new, |pid| format!(" for pid {pid}")))]
    SlotActive {
        /// The slot.
        slot: String,
        /// The server process that holds it, where the server said so.
        pid: Option<u32>,
    },
    /// The slot does not exist.
    #[error("slot \"{slot}\" does not exist")]
    SlotMissing {
        /// The slot.
        slot: String,
    },
    /// The slot exists but can never be read again (invalidated), or not from this database.
    #[error("slot \"{slot}\" cannot be read")]
    SlotUnusable {
        /// The slot.
        slot: String,
        /// What Postgres said.
        #[source]
        source: ServerError,
    },
    /// The server shuts down, or an administrator ended the connection.
    #[error("the server ended the replication connection")]
    ServerShutdown,
    /// The connection was closed without a word.
    #[error("the replication connection was closed by the other side")]
    Closed,
    /// The socket failed.
    #[error("the replication connection failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// The server sent bytes that are not its protocol.
    #[error("the server broke the framing of the replication stream")]
    Framing(#[from] FramingError),
    /// The server sent something else than the command's answer.
    #[error("the server answered {command} with {found}")]
    Unexpected {
        /// What was asked.
        command: &'static str,
        /// What came.
        found: String,
    },
    /// The thread that owns the connection is gone: it panicked, or the connection was abandoned.
    #[error("the thread of the replication connection is gone")]
    ThreadGone,
    /// The thread had not ended by the deadline that it was given.
    #[error("the replication connection did not end by its deadline")]
    StopTimedOut,
}

/// Why no login was possible, apart from the server saying no (that is a [`ServerError`], class 28).
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The server asked for a password and none is configured.
    #[error("the server asks for a password and none is configured")]
    PasswordMissing,
    /// The server asks for a method that we do not speak.
    #[error("the server asks for the authentication method {0}, which is not supported")]
    MethodUnsupported(String),
    /// More SCRAM iterations than any honest server asks for.
    #[error("the server asks for {found} SCRAM iterations; at most {max} are accepted")]
    TooManyIterations {
        /// What the server asks for.
        found: u32,
        /// The most that are accepted.
        max: u32,
    },
    /// `channel_binding=require` is set and this server or connection cannot do it.
    #[error("channel binding is required, and the server or the connection does not offer it")]
    ChannelBindingUnavailable,
    /// The SCRAM exchange failed; the server may not know the password either.
    #[error("the SCRAM exchange failed")]
    Scram(#[source] io::Error),
}

/// An ErrorResponse of the server's.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("{message} (SQLSTATE {sqlstate})")]
pub struct ServerError {
    /// The five-letter code.
    pub sqlstate: String,
    /// The primary message, in the server's language.
    pub message: String,
    /// More about the problem.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

/// The server shuts down by an administrator's command.
const ADMIN_SHUTDOWN: &str = "57P01";

impl ServerError {
    /// Reads the body of an ErrorResponse. Fields that cannot be read stay empty: what the server could say
    /// is worth more than an error about how it said it.
    pub(super) fn from_body(body: &[u8]) -> Self {
        let mut error = Self::default();
        for field in body.split(|byte| *byte == 0) {
            let Some((kind, value)) = field.split_first() else {
                break;
            };
            let value = || String::from_utf8_lossy(value).into_owned();
            match kind {
                b'C' => error.sqlstate = value(),
                b'M' => error.message = value(),
                b'D' => error.detail = Some(value()),
                b'H' => error.hint = Some(value()),
                _ => {}
            }
        }
        error
    }
}

impl WalError {
    /// An ErrorResponse, which is a shutdown if it says so.
    pub(super) fn server(error: ServerError) -> Self {
        if error.sqlstate == ADMIN_SHUTDOWN {
            Self::ServerShutdown
        } else {
            Self::Server(error)
        }
    }

    /// An ErrorResponse to START_REPLICATION on `slot`.
    pub(super) fn start(error: ServerError, slot: &str) -> Self {
        let slot = slot.to_owned();
        match error.sqlstate.as_str() {
            "55006" => {
                let pid = active_pid(&error.message, &slot);
                Self::SlotActive { slot, pid }
            }
            "42704" => Self::SlotMissing { slot },
            "55000" => Self::SlotUnusable {
                slot,
                source: error,
            },
            _ => Self::server(error),
        }
    }

    /// Whether the connection is still in step with the server after this error.
    pub(super) fn keeps_session(&self) -> bool {
        matches!(
            self,
            Self::Server(_) | Self::SlotActive { .. } | Self::SlotMissing { .. }
        )
    }
}

/// The process id in `replication slot "x" is active for PID 4711`, in any language.
fn active_pid(message: &str, slot: &str) -> Option<u32> {
    let rest = message.replace(slot, "");
    let start = rest.find(|c: char| c.is_ascii_digit())?;
    let digits = rest.get(start..)?;
    let end = digits
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(digits.len());
    digits.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(sqlstate: &str, message: &str) -> ServerError {
        ServerError {
            sqlstate: sqlstate.into(),
            message: message.into(),
            ..Default::default()
        }
    }

    #[test]
    fn errors_of_start_are_told_apart() {
        let message = "replication slot \"cdc2\" is active for PID 4711";
        let active = WalError::start(server("55006", message), "cdc2");
        assert!(
            matches!(
                active,
                WalError::SlotActive {
                    pid: Some(4711),
                    ..
                }
            ),
            "{active:?}"
        );
        assert_eq!(active.to_string(), "slot \"cdc2\" is active for pid 4711");
        let start = |sqlstate| WalError::start(server(sqlstate, "text"), "s");
        assert!(matches!(
            start("55006"),
            WalError::SlotActive { pid: None, .. }
        ));
        assert!(matches!(start("42704"), WalError::SlotMissing { .. }));
        assert!(matches!(start("55000"), WalError::SlotUnusable { .. }));
        assert!(matches!(start("57P01"), WalError::ServerShutdown));
        assert!(matches!(start("XX000"), WalError::Server(_)));
    }
}
