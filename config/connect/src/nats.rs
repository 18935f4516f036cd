//! Connections to NATS.

use std::error::Error;
use std::io;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr};
use millrace_config::limits::{NATS_CONNECT_TIMEOUT, NATS_PING_INTERVAL};
use millrace_config::{Auth, SecretError, Stream};

use crate::percent;

/// How often a client tries each server by itself: for about two minutes.
const RECONNECTS_MAX: usize = 30;

/// What a client does when its connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconnect {
    /// It gives up after at most one round over the servers; async-nats cannot be told less. Its owner drops it
    /// at the first sign of a disconnect, connects anew, and looks at what the server has.
    Never,
    /// It connects again by itself, with the secrets it was made with, for longer than its owner waits for it: an owner
    /// that has dropped it cannot tell it to stop.
    Itself,
}

/// Why there is no connection. Addresses are shown without user and password.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// No server answered.
    #[error("NATS cannot be reached at {servers}")]
    Unreachable {
        /// The addresses that were tried.
        servers: String,
        /// Why, for the last one.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The login was refused, or the credentials cannot be used.
    #[error("NATS at {servers} refused the login")]
    Auth {
        /// The addresses that were tried.
        servers: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// No encrypted connection could be made.
    #[error("no TLS connection to NATS at {servers}")]
    Tls {
        /// The addresses that were tried.
        servers: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The credentials cannot be read.
    #[error("the NATS credentials cannot be read")]
    Secret(#[from] SecretError),
}

/// Connects, reading the secrets anew. `name` is what the server's monitoring shows; replies arrive below
/// `inbox_prefix`, so that permissions can name it.
///
/// # Errors
/// No server can be reached, TLS fails, the login is refused, or a secret cannot be read. Nothing is retried.
pub async fn connect(
    stream: &Stream,
    name: &str,
    inbox_prefix: &str,
    reconnect: Reconnect,
) -> Result<Client, NatsError> {
    let options = ConnectOptions::new()
        .name(name)
        .custom_inbox_prefix(inbox_prefix)
        .connection_timeout(NATS_CONNECT_TIMEOUT)
        .ping_interval(NATS_PING_INTERVAL)
        .retain_servers_order();
    // The limit also holds for the first connect, which must try every server; zero would mean no limit.
    let options = match reconnect {
        Reconnect::Never => options.max_reconnects(Some(stream.servers.len())),
        Reconnect::Itself => options.max_reconnects(Some(stream.servers.len() * RECONNECTS_MAX)),
    };
    let options = authenticate(encrypt(options, stream), stream)?;
    // Without user and password, which the options have: the client logs the addresses that it tries.
    let servers: Vec<String> = stream.servers.iter().map(ToString::to_string).collect();
    options
        .connect(servers.as_slice())
        .await
        .map_err(|error| sort(stream, error))
}

fn encrypt(mut options: ConnectOptions, stream: &Stream) -> ConnectOptions {
    if let Some(authorities) = &stream.tls_ca {
        // Whoever names an authority expects TLS even where the server would do without.
        options = options
            .add_root_certificates(authorities.clone())
            .require_tls(true);
    }
    if let (Some(certificate), Some(key)) = (&stream.tls_cert, &stream.tls_key) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
        options = options.require_tls(true);
    }
    options
}

fn authenticate(options: ConnectOptions, stream: &Stream) -> Result<ConnectOptions, NatsError> {
    Ok(match &stream.auth {
        Auth::None => from_url(options, stream),
        Auth::Nkey(seed) => options.nkey(seed.read()?.expose().trim().to_owned()),
        Auth::Token(token) => options.token(token.read()?.expose().to_owned()),
        Auth::Creds(creds) => {
            let creds = creds.read()?;
            // The parser wants the last line ended, and a secret is read without its last line break.
            options
                .credentials(&format!("{}\n", creds.expose()))
                .map_err(|source| NatsError::Auth {
                    servers: servers(stream),
                    // The parser's own text may quote the file.
                    source: Box::new(io::Error::new(source.kind(), "not a NATS credentials file")),
                })?
        }
    })
}

/// The user and password, or the token, of the first server that names one: async-nats does not look there.
fn from_url(options: ConnectOptions, stream: &Stream) -> ConnectOptions {
    let addresses = stream
        .servers
        .iter()
        .filter_map(|url| url.expose().parse::<ServerAddr>().ok());
    let Some(address) = addresses.into_iter().find(ServerAddr::has_user_pass) else {
        return options;
    };
    let decoded = |text: &str| percent::decode(text).unwrap_or_else(|| text.to_owned());
    let user = decoded(address.username().unwrap_or_default());
    match address.password() {
        Some(password) => options.user_and_password(user, decoded(password)),
        None => options.token(user),
    }
}

fn servers(stream: &Stream) -> String {
    let servers: Vec<_> = stream.servers.iter().map(ToString::to_string).collect();
    servers.join(", ")
}

fn sort(stream: &Stream, error: async_nats::ConnectError) -> NatsError {
    let servers = servers(stream);
    // async-nats reports a refused certificate as an I/O error.
    let refused = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::get_ref)
        .is_some_and(|inner| inner.is::<rustls::Error>());
    match error.kind() {
        ConnectErrorKind::Io if refused => NatsError::Tls {
            servers,
            source: Box::new(error),
        },
        ConnectErrorKind::AuthorizationViolation => NatsError::Auth {
            servers,
            source: Box::new(error),
        },
        // Nothing was sent: what should sign the server's challenge is no seed.
        ConnectErrorKind::Authentication => NatsError::Auth {
            servers,
            source: Box::new(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not the seed of an nkey",
            )),
        },
        ConnectErrorKind::Tls => NatsError::Tls {
            servers,
            source: Box::new(error),
        },
        // The parser's own text may quote the URL with its password.
        ConnectErrorKind::ServerParse => NatsError::Unreachable {
            servers,
            source: Box::new(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a NATS URL",
            )),
        },
        ConnectErrorKind::Dns
        | ConnectErrorKind::TimedOut
        | ConnectErrorKind::Io
        | ConnectErrorKind::MaxReconnects => NatsError::Unreachable {
            servers,
            source: Box::new(error),
        },
    }
}
