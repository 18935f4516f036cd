//! Why a connection could not be made.

use std::io;

use tokio_postgres::error::SqlState;

use super::DsnError;
use crate::tls::TlsError;

/// Why a connection could not be made. Addresses are shown, passwords never.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The settings make no sense.
    #[error("the Postgres settings cannot be used")]
    Config(#[from] DsnError),
    /// There was no answer, or the connection broke before the login was done.
    #[error("Postgres at {address} cannot be reached")]
    Unreachable {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// TLS could not be set up or the certificate was refused.
    #[error("no TLS connection to Postgres at {address}")]
    Tls {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: TlsError,
    },
    /// The server refused the login (28P01, 28000), or no way of logging in was possible.
    #[error("Postgres at {address} refused the login")]
    Auth {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
    /// The server refused the connection for another reason: see [`ConnectError::sqlstate`].
    #[error("Postgres at {address} refused the connection")]
    Other {
        /// Host and port.
        address: String,
        /// Why.
        #[source]
        source: tokio_postgres::Error,
    },
}

impl ConnectError {
    /// What the server said, if it said anything.
    #[must_use]
    pub fn sqlstate(&self) -> Option<&SqlState> {
        match self {
            Self::Auth { source, .. } | Self::Other { source, .. } => source.code(),
            Self::Config(_) | Self::Unreachable { .. } | Self::Tls { .. } => None,
        }
    }

    /// Sorts an error of the login.
    pub(super) fn login(address: String, source: tokio_postgres::Error) -> Self {
        let login = [
            SqlState::INVALID_PASSWORD,
            SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
        ];
        match source.code() {
            Some(code) if login.contains(code) => return Self::Auth { address, source },
            Some(_) => return Self::Other { address, source },
            None => {}
        }
        if source.is_closed() {
            let source = io::Error::new(io::ErrorKind::UnexpectedEof, source);
            return Self::Unreachable { address, source };
        }
        let broken = std::error::Error::source(&source)
            .and_then(|cause| cause.downcast_ref::<io::Error>())
            .map(io::Error::kind);
        match broken {
            Some(kind) => Self::Unreachable {
                address,
                source: io::Error::new(kind, source),
            },
            // A password that is missing, a method we do not know, a server that fails SCRAM.
            None => Self::Auth { address, source },
        }
    }
}
