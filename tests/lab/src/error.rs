//! Why a piece of the laboratory failed.

use std::io;

/// A failure of the laboratory itself, never of the product under test.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A server's binary is absent or too old; `remedy` says what to do.
    #[error("{what}: {remedy}")]
    Missing {
        /// What is absent.
        what: String,
        /// The command or setting that mends it.
        remedy: String,
    },
    /// A file, process or socket operation failed.
    #[error("cannot {what}")]
    Io {
        /// The operation, as an infinitive.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A child process ended or answered with an error.
    #[error("{what} failed: {output}")]
    Process {
        /// The command or server.
        what: String,
        /// The end of what it printed.
        output: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s: {output}")]
    Timeout {
        /// What was awaited.
        what: String,
        /// How long it was awaited.
        seconds: u64,
        /// The end of the log, where there is one.
        output: String,
    },
    /// A Postgres server refused a statement or a connection.
    #[error("postgres: {what}")]
    Postgres {
        /// The statement's purpose.
        what: String,
        /// The driver's error.
        #[source]
        source: tokio_postgres::Error,
    },
    /// A NATS server refused a connection.
    #[error("cannot connect to nats")]
    Nats(#[source] async_nats::ConnectError),
    /// Two tables cannot be compared, or a server's answer is not what its protocol promises.
    #[error("{0}")]
    Unexpected(String),
}

impl LabError {
    /// A failed system call while `what` was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// A refused statement or connection while `what` was being done.
    pub fn postgres(what: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Self {
        let what = what.into();
        move |source| Self::Postgres { what, source }
    }
}
