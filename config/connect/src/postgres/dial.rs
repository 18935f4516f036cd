//! Opens the socket and negotiates TLS, up to where the startup message goes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls_pki_types::{IpAddr, ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslNegotiation};
use tokio_rustls::TlsConnector;

use super::{ConnectError, Dsn, MaybeTlsStream};
use crate::tls::{TlsError, Verify, server_end_point};

/// Postgres's name in TLS's protocol negotiation; required for `sslnegotiation=direct`.
const ALPN: &[u8] = b"postgresql";

/// How a connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// Not at all.
    Plain,
    /// By TLS, or there is no connection.
    Tls,
    /// By TLS where the server offers it and the handshake succeeds, else not at all.
    TlsIfOffered,
}

/// A socket that is ready for the startup message.
#[derive(Debug)]
pub struct Dialed {
    /// The socket.
    pub stream: MaybeTlsStream,
    /// The `tls-server-end-point` data for SCRAM-SHA-256-PLUS; none without TLS.
    pub channel_binding: Option<Vec<u8>>,
    /// Host and port that answered.
    pub address: String,
}

/// Dials by the first of [`Dsn::attempts`]. Hosts are tried in order, each for at most `limit`.
///
/// `target_session_attrs` cannot be honoured before the login, and is not here.
///
/// # Errors
/// The last host's error: out of reach, or no TLS where it is demanded.
pub async fn dial(dsn: &Dsn, limit: Duration) -> Result<Dialed, ConnectError> {
    let [first, ..] = dsn.attempts() else {
        return dial_with(dsn, Attempt::Tls, limit).await;
    };
    dial_with(dsn, *first, limit).await
}

/// Dials in one of the ways of [`Dsn::attempts`]; otherwise as [`dial`].
///
/// # Errors
/// As [`dial`].
pub async fn dial_with(
    dsn: &Dsn,
    attempt: Attempt,
    limit: Duration,
) -> Result<Dialed, ConnectError> {
    let mut last = None;
    for index in 0..dsn.hosts() {
        match dial_host(dsn, index, attempt, limit).await {
            Ok(dialed) => return Ok(dialed),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| unreachable(dsn.address(), io::ErrorKind::NotFound.into())))
}

/// Dials one host of several.
pub(super) async fn dial_host(
    dsn: &Dsn,
    index: usize,
    attempt: Attempt,
    limit: Duration,
) -> Result<Dialed, ConnectError> {
    let address = dsn.host(index);
    let late = || unreachable(address.clone(), io::ErrorKind::TimedOut.into());
    timeout(limit, open(dsn, index, attempt))
        .await
        .unwrap_or_else(|_| Err(late()))
}

fn unreachable(address: String, source: io::Error) -> ConnectError {
    ConnectError::Unreachable { address, source }
}

async fn open(dsn: &Dsn, index: usize, attempt: Attempt) -> Result<Dialed, ConnectError> {
    let address = dsn.host(index);
    let failed = |source| unreachable(address.clone(), source);
    let host = dsn.config().get_hosts().get(index);
    if let Some(Host::Unix(path)) = host {
        let path = path.join(format!(".s.PGSQL.{}", dsn.port(index)));
        let stream = MaybeTlsStream::Unix(UnixStream::connect(path).await.map_err(failed)?);
        return Ok(Dialed {
            stream,
            channel_binding: None,
            address,
        });
    }
    let mut socket = tcp(dsn, index).await.map_err(failed)?;
    let direct = dsn.config().get_ssl_negotiation() == SslNegotiation::Direct;
    let offered = match attempt {
        Attempt::Plain => false,
        Attempt::Tls if direct => true,
        Attempt::Tls | Attempt::TlsIfOffered => ask(&mut socket).await.map_err(failed)?,
    };
    if !offered {
        if attempt == Attempt::Tls {
            return Err(ConnectError::Tls {
                address,
                source: TlsError::NotOffered,
            });
        }
        let stream = MaybeTlsStream::Tcp(socket);
        return Ok(Dialed {
            stream,
            channel_binding: None,
            address,
        });
    }
    match encrypt(dsn, index, socket).await {
        Ok((stream, channel_binding)) => Ok(Dialed {
            stream,
            channel_binding,
            address,
        }),
        // What is sent is not secret in this mode: anybody could have answered that there is no TLS.
        Err(TlsError::Handshake(_)) if attempt == Attempt::TlsIfOffered => {
            let stream = MaybeTlsStream::Tcp(tcp(dsn, index).await.map_err(failed)?);
            Ok(Dialed {
                stream,
                channel_binding: None,
                address,
            })
        }
        Err(source) => Err(ConnectError::Tls { address, source }),
    }
}

/// A TCP connection to one of the host's addresses, with a peer that is known dead within seconds.
async fn tcp(dsn: &Dsn, index: usize) -> io::Result<TcpStream> {
    let config = dsn.config();
    let port = dsn.port(index);
    let addresses: Vec<SocketAddr> = match (
        config.get_hostaddrs().get(index),
        config.get_hosts().get(index),
    ) {
        (Some(address), _) => vec![SocketAddr::new(*address, port)],
        (None, Some(Host::Tcp(host))) => lookup_host((host.as_str(), port)).await?.collect(),
        (None, Some(Host::Unix(_)) | None) => Vec::new(),
    };
    let stream = match dsn.receive_buffer() {
        Some(bytes) => connect_with(bytes, &addresses).await?,
        None => TcpStream::connect(addresses.as_slice()).await?,
    };
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(config.get_tcp_user_timeout().copied())?;
    if config.get_keepalives() {
        let interval = config
            .get_keepalives_interval()
            .unwrap_or(Duration::from_secs(5));
        let keepalive = TcpKeepalive::new()
            .with_time(config.get_keepalives_idle())
            .with_interval(interval)
            .with_retries(config.get_keepalives_retries().unwrap_or(3));
        socket.set_tcp_keepalive(&keepalive)?;
    }
    Ok(stream)
}

/// The first of the addresses that answers. The buffer must be there before the connection: the sender cuts its
/// segments by the largest window that it has ever seen, and waits for a timer when one does not fit.
async fn connect_with(receive_buffer: u32, addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::ErrorKind::NotFound.into();
    for address in addresses {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_recv_buffer_size(receive_buffer)?;
        match socket.connect(*address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Sends SSLRequest; whether the server agrees.
async fn ask(socket: &mut TcpStream) -> io::Result<bool> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await?;
    // One byte and no more: what came after it unencrypted must not be taken for the server's encrypted answer.
    match socket.read_u8().await? {
        b'S' => Ok(true),
        // 'N', and the error message of a server that does not know the request.
        b'N' | b'E' => Ok(false),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "this is not a Postgres server",
        )),
    }
}

async fn encrypt(
    dsn: &Dsn,
    index: usize,
    socket: TcpStream,
) -> Result<(MaybeTlsStream, Option<Vec<u8>>), TlsError> {
    let name = server_name(dsn, index, &socket)?;
    let config = dsn.tls().client_config(ALPN)?;
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector
        .connect(name, socket)
        .await
        .map_err(TlsError::Handshake)?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let binding = certificates
        .first()
        .and_then(|end_entity| server_end_point(end_entity));
    Ok((MaybeTlsStream::Tls(Box::new(stream)), binding))
}

/// The name that the certificate must have, also sent to the server.
fn server_name(
    dsn: &Dsn,
    index: usize,
    socket: &TcpStream,
) -> Result<ServerName<'static>, TlsError> {
    let Some(Host::Tcp(host)) = dsn.config().get_hosts().get(index) else {
        let peer = socket.peer_addr().map_err(TlsError::Handshake)?;
        return Ok(ServerName::IpAddress(IpAddr::from(peer.ip())));
    };
    match ServerName::try_from(host.clone()) {
        Ok(name) => Ok(name),
        Err(_) if dsn.tls().verify != Verify::Full => {
            let peer = socket.peer_addr().map_err(TlsError::Handshake)?;
            Ok(ServerName::IpAddress(IpAddr::from(peer.ip())))
        }
        Err(_) => Err(TlsError::HostName(host.clone())),
    }
}
