//! A Postgres connection string, understood.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use millrace_config::limits;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslNegotiation};

use super::dial::Attempt;
use super::keywords::Parts;
use crate::tls::{Roots, Tls, Verify};

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// `disable`: never TLS.
    Disable,
    /// `allow`: without TLS, and with it where the server refuses that.
    Allow,
    /// `prefer`: with TLS where the server offers it.
    Prefer,
    /// `require`: only with TLS; the certificate is checked only if `sslrootcert` is set.
    Require,
    /// `verify-ca`: only with a certificate of a trusted authority.
    VerifyCa,
    /// `verify-full`: only with a certificate of a trusted authority for this host.
    VerifyFull,
}

/// Where and how to connect. `Debug` and `Display` show the address only.
#[derive(Clone)]
pub struct Dsn {
    config: Config,
    ssl_mode: SslMode,
    tls: Tls,
    receive_buffer: Option<u32>,
}

/// Why a connection string is not understood. No variant holds a value of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DsnError {
    /// It is neither a `postgres://` URL nor `key=value` pairs.
    #[error("not a Postgres URL (postgres://user:password@host:port/database?key=value)")]
    Syntax,
    /// A parameter that is not known.
    #[error("unknown parameter {0:?} in the Postgres URL")]
    Unknown(String),
    /// A parameter whose value is not possible.
    #[error("parameter {parameter:?} of the Postgres URL {reason}")]
    Value {
        /// The parameter.
        parameter: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
}

/// The parameters that tokio-postgres reads.
const KNOWN: &[&str] = &[
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "sslnegotiation",
    "host",
    "hostaddr",
    "port",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "target_session_attrs",
    "channel_binding",
    "load_balance_hosts",
];

impl Dsn {
    /// Understands a URL or `key=value` pairs with libpq's parameters. libpq's environment variables, password
    /// file and service file are not consulted; certificate paths are relative to the working directory.
    ///
    /// # Errors
    /// It has another form, an unknown parameter, or a value that is not possible.
    pub fn parse(url: &str) -> Result<Self, DsnError> {
        let mut parts = Parts::parse(url)?;
        let ssl_mode = parts.take("sslmode");
        let root = parts.take("sslrootcert").filter(|path| !path.is_empty());
        let certificate = parts.take("sslcert").filter(|path| !path.is_empty());
        let key = parts.take("sslkey").filter(|path| !path.is_empty());
        if let Some((key, _)) = parts
            .parameters
            .iter()
            .find(|(key, _)| !KNOWN.contains(&key.as_str()))
        {
            return Err(DsnError::Unknown(key.clone()));
        }
        let mut config =
            Config::from_str(&parts.assemble()).map_err(|error| value_error(&error))?;
        complete(&mut config)?;
        let (ssl_mode, verify) = verification(ssl_mode.as_deref(), root.as_deref())?;
        let direct = config.get_ssl_negotiation() == SslNegotiation::Direct;
        if direct
            && matches!(
                ssl_mode,
                SslMode::Disable | SslMode::Allow | SslMode::Prefer
            )
        {
            let reason = "\"direct\" needs sslmode=require or stronger";
            return Err(DsnError::Value {
                parameter: "sslnegotiation",
                reason,
            });
        }
        let identity = match (certificate, key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((PathBuf::from(certificate), key.into())),
            _ => {
                let reason = "and sslkey must be set together";
                return Err(DsnError::Value {
                    parameter: "sslcert",
                    reason,
                });
            }
        };
        let roots = match root.as_deref() {
            None | Some("system") => Roots::System,
            Some(path) => Roots::File(PathBuf::from(path)),
        };
        Ok(Self {
            config,
            ssl_mode,
            tls: Tls {
                verify,
                roots,
                identity,
            },
            receive_buffer: None,
        })
    }

    /// User, password, database, options and the rest, as tokio-postgres knows them. Its own `ssl_mode` is not
    /// the one that counts: see [`Dsn::ssl_mode`].
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The `sslmode`.
    #[must_use]
    pub fn ssl_mode(&self) -> SslMode {
        self.ssl_mode
    }

    /// How TLS connections are made.
    #[must_use]
    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    /// The ways to connect, in order: the next one is for a server that refuses the login (28000) made by the
    /// one before because of its encryption.
    #[must_use]
    pub fn attempts(&self) -> &'static [Attempt] {
        match self.ssl_mode {
            SslMode::Disable => &[Attempt::Plain],
            SslMode::Allow => &[Attempt::Plain, Attempt::Tls],
            SslMode::Prefer => &[Attempt::TlsIfOffered, Attempt::Plain],
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Attempt::Tls],
        }
    }

    /// Gives TCP connections a receive buffer of so many bytes (Linux doubles it) instead of one that the system
    /// fits to the traffic. It bounds how much the server sends before it is read, so also the rate over a long way.
    #[must_use]
    pub fn with_receive_buffer(self, bytes: u32) -> Self {
        let receive_buffer = Some(bytes);
        Self {
            receive_buffer,
            ..self
        }
    }

    pub(super) fn receive_buffer(&self) -> Option<u32> {
        self.receive_buffer
    }

    /// How long connecting to one host may take, TLS and login included.
    #[must_use]
    pub fn connect_timeout(&self) -> Duration {
        self.config
            .get_connect_timeout()
            .copied()
            .unwrap_or(limits::POSTGRES_CONNECT_TIMEOUT)
    }

    /// The hosts with their ports, and the database: `a:5432,b:5433/shop`.
    #[must_use]
    pub fn address(&self) -> String {
        let hosts: Vec<_> = (0..self.hosts()).map(|index| self.host(index)).collect();
        let database = self
            .config
            .get_dbname()
            .or(self.config.get_user())
            .unwrap_or_default();
        format!("{}/{database}", hosts.join(","))
    }

    /// How many hosts there are to try.
    #[must_use]
    pub fn hosts(&self) -> usize {
        self.config
            .get_hosts()
            .len()
            .max(self.config.get_hostaddrs().len())
    }

    /// A host's port.
    pub(super) fn port(&self, index: usize) -> u16 {
        let ports = self.config.get_ports();
        ports.get(index).or(ports.first()).copied().unwrap_or(5432)
    }

    /// A host with its port, as messages name it.
    pub(super) fn host(&self, index: usize) -> String {
        let port = self.port(index);
        match (
            self.config.get_hosts().get(index),
            self.config.get_hostaddrs().get(index),
        ) {
            (Some(Host::Unix(path)), _) => format!("{}/.s.PGSQL.{port}", path.display()),
            (Some(Host::Tcp(host)), _) if host.contains(':') => format!("[{host}]:{port}"),
            (Some(Host::Tcp(host)), _) => format!("{host}:{port}"),
            (None, Some(address)) => std::net::SocketAddr::new(*address, port).to_string(),
            (None, None) => String::new(),
        }
    }
}

impl fmt::Display for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address())
    }
}

impl fmt::Debug for Dsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dsn({})", self.address())
    }
}

/// Fills in what an operator rarely sets, and checks the number of hosts.
fn complete(config: &mut Config) -> Result<(), DsnError> {
    let (hosts, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    if hosts == 0 && addresses == 0 {
        return Err(DsnError::Value {
            parameter: "host",
            reason: "is missing",
        });
    }
    if hosts > 0 && addresses > 0 && hosts != addresses {
        let reason = "must have as many entries as host";
        return Err(DsnError::Value {
            parameter: "hostaddr",
            reason,
        });
    }
    let ports = config.get_ports().len();
    if ports > 1 && ports != hosts.max(addresses) {
        let reason = "must have one entry or as many as host";
        return Err(DsnError::Value {
            parameter: "port",
            reason,
        });
    }
    if config.get_user().is_none() {
        return Err(DsnError::Value {
            parameter: "user",
            reason: "is missing",
        });
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(limits::TCP_USER_TIMEOUT);
    }
    Ok(())
}

/// The mode, and what it checks of the server's certificate.
fn verification(mode: Option<&str>, root: Option<&str>) -> Result<(SslMode, Verify), DsnError> {
    let system = root == Some("system");
    let mode = match mode {
        Some("disable") => SslMode::Disable,
        Some("allow") => SslMode::Allow,
        Some("prefer") => SslMode::Prefer,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        None if system => SslMode::VerifyFull,
        None => SslMode::Prefer,
        Some(_) => {
            let reason = "must be disable, allow, prefer, require, verify-ca or verify-full";
            return Err(DsnError::Value {
                parameter: "sslmode",
                reason,
            });
        }
    };
    if system && mode != SslMode::VerifyFull {
        let reason = "\"system\" needs sslmode=verify-full: anybody can get a public certificate";
        return Err(DsnError::Value {
            parameter: "sslrootcert",
            reason,
        });
    }
    let verify = match (mode, root) {
        (SslMode::VerifyFull, _) => Verify::Full,
        (SslMode::VerifyCa, None) => {
            let reason = "is needed for sslmode=verify-ca";
            return Err(DsnError::Value {
                parameter: "sslrootcert",
                reason,
            });
        }
        // As in libpq, a file of roots is used by every mode.
        (_, Some(_)) => Verify::Chain,
        (_, None) => Verify::Nothing,
    };
    Ok((mode, verify))
}

/// Names the parameter whose value tokio-postgres refused. Its own text may hold a part of the URL.
fn value_error(error: &tokio_postgres::Error) -> DsnError {
    use std::error::Error;
    let text = error.source().map(ToString::to_string).unwrap_or_default();
    KNOWN
        .iter()
        .find(|key| text == format!("invalid value for option `{key}`"))
        .map_or(DsnError::Syntax, |parameter| DsnError::Value {
            parameter,
            reason: "is not valid",
        })
}

#[cfg(test)]
mod tests;
