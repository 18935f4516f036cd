//! Connections for the verbs, and their failures as conditions.

use async_nats::jetstream;
use millrace_config::{Code, Condition, Secret, SecretError, Stream};
use millrace_connect::nats::{NatsError, Reconnect};
use millrace_connect::postgres::{ConnectError, Dsn, Session};
use tokio_postgres::Client;

/// Whose database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The captured one.
    Source,
    /// A sink's.
    Target,
}

pub(crate) use millrace_config::chain;

/// Opens an SQL connection, with the secret read now.
///
/// # Errors
/// Why there is none, for the operator; never with the password.
pub(crate) async fn postgres(url: &Secret, side: Side, name: &str) -> Result<Client, Condition> {
    let dsn = dsn(url, "the setting")?;
    let session = Session {
        application_name: name.to_owned(),
        ..Session::default()
    };
    let connected = millrace_connect::postgres::connect(&dsn, session).await;
    connected.map_err(|error| postgres_condition(side, &error))
}

/// Where a database is, with the secret read now. `setting` is what refers to it.
///
/// # Errors
/// The secret cannot be read, or holds no URL.
pub(crate) fn dsn(url: &Secret, setting: &str) -> Result<Dsn, Condition> {
    let url = url.read().map_err(|error| unreadable(&error))?;
    Dsn::parse(url.expose()).map_err(|error| {
        Condition::new(
            Code::ConfigInvalid,
            error.to_string(),
            format!("correct the URL that {setting} refers to"),
        )
    })
}

fn postgres_condition(side: Side, error: &ConnectError) -> Condition {
    let (unreachable, auth) = match side {
        Side::Source => (Code::SourceUnreachable, Code::SourceAuth),
        Side::Target => (Code::SinkUnreachable, Code::TargetAuth),
    };
    let (code, remedy) = match error {
        ConnectError::Config(_) => (
            Code::ConfigInvalid,
            "correct the URL that the setting refers to",
        ),
        ConnectError::Auth { .. } => (auth, "check user, password and pg_hba.conf"),
        ConnectError::Tls { .. } => (
            unreachable,
            "check sslmode, sslrootcert and the server's certificate",
        ),
        ConnectError::Unreachable { .. } | ConnectError::Other { .. } => (
            unreachable,
            "check the address, the network, and whether the server runs",
        ),
    };
    Condition::new(code, chain(error), remedy)
}

/// Connects to NATS, with the secrets read now. Nothing is retried.
///
/// # Errors
/// Why there is no connection, for the operator.
pub(crate) async fn nats(stream: &Stream, name: &str) -> Result<jetstream::Context, Condition> {
    let client = millrace_connect::nats::connect(stream, name, INBOX, Reconnect::Never).await;
    client
        .map(jetstream::new)
        .map_err(|error| nats_condition(&error))
}

/// Why there is no connection to NATS, for the operator.
pub(crate) fn nats_condition(error: &NatsError) -> Condition {
    let (code, remedy) = match error {
        NatsError::Unreachable { .. } => (
            Code::StreamUnreachable,
            "check stream.servers, the network, and whether the server runs",
        ),
        NatsError::Tls { .. } => (
            Code::StreamUnreachable,
            "check tls_ca, tls_cert and tls_key",
        ),
        NatsError::Auth { .. } => (Code::StreamAuth, "check the credentials"),
        NatsError::Secret(error) => return unreadable(error),
    };
    Condition::new(code, chain(error), remedy)
}

/// A secret that cannot be read, for the operator.
fn unreadable(error: &SecretError) -> Condition {
    Condition::new(
        Code::SecretUnreadable,
        chain(error),
        "set the variable or provide the file",
    )
}

/// Where replies to the verbs that only look, and to `drop`, arrive.
pub(crate) const INBOX: &str = "_INBOX_millrace_status";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_is_already_told_is_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Outer(#[source] std::io::Error);
        assert_eq!(
            chain(&Outer(std::io::Error::other("inner"))),
            "outer: inner"
        );
        let error = std::io::Error::other("inner");
        let error = NatsError::Unreachable {
            servers: "nats://h".to_owned(),
            source: Box::new(error),
        };
        assert_eq!(chain(&error), "NATS cannot be reached at nats://h: inner");
    }
}
