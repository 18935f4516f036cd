//! SQL connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tokio_postgres::config::{SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::{Client, Config};

use super::dial::{Attempt, dial_host};
use super::{ConnectError, Dialed, Dsn};

/// The session settings under which a value has one text, at the source and in every target.
pub const PINNED: &[(&str, &str)] = &[
    ("datestyle", "ISO"),
    ("intervalstyle", "postgres"),
    ("timezone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("client_encoding", "UTF8"),
    ("lc_monetary", "C"),
    ("search_path", ""),
];

/// [`PINNED`] as the startup parameter `options`.
#[must_use]
pub fn pinned_options() -> String {
    options(PINNED.iter().copied())
}

fn options<'a>(settings: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let settings = settings.map(|(name, value)| {
        let value = value.replace('\\', "\\\\").replace(' ', "\\ ");
        format!("-c {name}={value}")
    });
    settings.collect::<Vec<_>>().join(" ")
}

/// What a session is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// Settings besides [`PINNED`], which win over these and over the URL's `options`.
    pub options: Vec<(String, String)>,
}

/// Opens an SQL connection with the pinned settings, and spawns the task that drives it: the task ends with the
/// connection, which ends when the client is dropped. The client's errors say when it broke.
///
/// Hosts are tried in order, each in the ways of [`Dsn::attempts`]. The client's cancel token cannot open a
/// connection of its own; use `cancel_query_raw` with a socket from [`super::dial`].
///
/// # Errors
/// The last host's error.
pub async fn connect(dsn: &Dsn, session: Session) -> Result<Client, ConnectError> {
    let config = login_config(dsn, &session);
    let mut last = None;
    for index in 0..dsn.hosts() {
        for attempt in dsn.attempts() {
            match connect_host(dsn, &config, index, *attempt).await {
                Ok(client) => return Ok(client),
                // pg_hba.conf may admit the other kind of encryption; a wrong password is wrong by both.
                Err(error) => {
                    let encryption =
                        error.sqlstate() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION);
                    last = Some(error);
                    if !encryption {
                        break;
                    }
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| ConnectError::Unreachable {
        address: dsn.address(),
        source: io::ErrorKind::NotFound.into(),
    }))
}

/// The login's parameters. The socket arrives encrypted or not as it should be: tokio-postgres is told that TLS
/// is negotiated directly, which hands the socket to [`Ready`] at once.
fn login_config(dsn: &Dsn, session: &Session) -> Config {
    let mut config = dsn.config().clone();
    let own = session
        .options
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let all = [
        config.get_options().unwrap_or_default().to_owned(),
        options(own),
        pinned_options(),
    ];
    let all: Vec<_> = all
        .into_iter()
        .filter(|options| !options.is_empty())
        .collect();
    config.options(all.join(" "));
    config.application_name(session.application_name.as_str());
    config
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct);
    config
}

async fn connect_host(
    dsn: &Dsn,
    config: &Config,
    index: usize,
    attempt: Attempt,
) -> Result<Client, ConnectError> {
    let limit = dsn.connect_timeout();
    let dialed = dial_host(dsn, index, attempt, limit).await?;
    let address = dialed.address.clone();
    let late = || ConnectError::Unreachable {
        address: address.clone(),
        source: io::ErrorKind::TimedOut.into(),
    };
    let login = timeout(limit, config.connect_raw(dialed, Ready))
        .await
        .map_err(|_| late())?;
    let (client, connection) =
        login.map_err(|error| ConnectError::login(address.clone(), error))?;
    tokio::spawn(async move {
        // The client's calls report what broke the connection; here nobody is left to tell.
        let _ = connection.await;
    });
    let wanted = config.get_target_session_attrs();
    if wanted != TargetSessionAttrs::Any {
        let check = timeout(limit, is_wanted(&client, wanted))
            .await
            .map_err(|_| late())?;
        if !check.map_err(|source| ConnectError::login(address.clone(), source))? {
            let reason = "the server is not of the kind that target_session_attrs asks for";
            return Err(ConnectError::Unreachable {
                address,
                source: io::Error::other(reason),
            });
        }
    }
    Ok(client)
}

async fn is_wanted(
    client: &Client,
    wanted: TargetSessionAttrs,
) -> Result<bool, tokio_postgres::Error> {
    let row = client.query_one("SHOW transaction_read_only", &[]).await?;
    let read_only = row.try_get::<_, &str>(0)? == "on";
    Ok(read_only == (wanted == TargetSessionAttrs::ReadOnly))
}

/// Stands in for a TLS handshake that is already done, or not wanted.
struct Ready;

impl TlsConnect<Dialed> for Ready {
    type Stream = Dialed;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Dialed>>;

    fn connect(self, stream: Dialed) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

impl TlsStream for Dialed {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.channel_binding {
            Some(hash) => ChannelBinding::tls_server_end_point(hash.clone()),
            None => ChannelBinding::none(),
        }
    }
}

impl AsyncRead for Dialed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Dialed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_escaped_and_the_pins_come_last() {
        let dsn = Dsn::parse("postgres://u@h/d?options=-c%20work_mem%3D1MB").expect("valid");
        let session = Session {
            application_name: "a".to_owned(),
            options: vec![("x.y".to_owned(), "a b\\c".to_owned())],
        };
        let config = login_config(&dsn, &session);
        let options = config.get_options().expect("options");
        let start = "-c work_mem=1MB -c x.y=a\\ b\\\\c -c datestyle=ISO -c intervalstyle=postgres ";
        assert!(
            options.starts_with(start) && options.ends_with(" -c search_path="),
            "{options}"
        );
    }
}
