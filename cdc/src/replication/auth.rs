//! Logging in: cleartext, md5, SCRAM-SHA-256 and SCRAM-SHA-256-PLUS.

use std::io;

use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config::ChannelBinding as BindingPolicy;

use super::error::{AuthError, WalError};
use super::session::{Answer, Session, unexpected};

/// The most SCRAM iterations that are worked through for a server that may be an impostor. The SCRAM
/// implementation has the same limit; it is checked here to be able to name it.
const SCRAM_ITERATIONS_MAX: u32 = 100_000;

/// Who we are. Never printed.
pub(super) struct Credentials<'a> {
    pub(super) user: &'a str,
    pub(super) password: Option<&'a [u8]>,
    /// Whether SCRAM must, may or must not be bound to the TLS channel.
    pub(super) binding: BindingPolicy,
    /// The `tls-server-end-point` data of the connection, if it is TLS.
    pub(super) server_end_point: Option<&'a [u8]>,
}

impl<'a> Credentials<'a> {
    fn password(&self) -> Result<&'a [u8], AuthError> {
        self.password.ok_or(AuthError::PasswordMissing)
    }

    /// Refuses every way to log in that does not bind to the channel, if that is required.
    fn allow_unbound(&self) -> Result<(), AuthError> {
        match self.binding {
            BindingPolicy::Require => Err(AuthError::ChannelBindingUnavailable),
            _ => Ok(()),
        }
    }
}

/// Answers the server's questions until it lets us in.
pub(super) async fn authenticate<S: AsyncRead + AsyncWrite + Unpin>(
    session: &mut Session<S>,
    credentials: &Credentials<'_>,
) -> Result<(), WalError> {
    let method = match session.read().await? {
        Answer::Message(message) => message,
        answer => return Err(unexpected("the login", &answer)),
    };
    match method {
        Message::AuthenticationOk => {
            credentials.allow_unbound()?;
            return Ok(());
        }
        Message::AuthenticationCleartextPassword => {
            credentials.allow_unbound()?;
            let password = credentials.password()?;
            session
                .send(|out| frontend::password_message(password, out))
                .await?;
        }
        Message::AuthenticationMd5Password(body) => {
            credentials.allow_unbound()?;
            let user = credentials.user.as_bytes();
            let hash = md5_hash(user, credentials.password()?, body.salt());
            session
                .send(|out| frontend::password_message(hash.as_bytes(), out))
                .await?;
        }
        Message::AuthenticationSasl(body) => sasl(session, credentials, &body).await?,
        other => {
            let method = unsupported(&other)
                .ok_or_else(|| unexpected("the login", &Answer::Message(other)))?;
            return Err(AuthError::MethodUnsupported(method.to_owned()).into());
        }
    }
    match session.read().await? {
        Answer::Message(Message::AuthenticationOk) => Ok(()),
        answer => Err(unexpected("the login", &answer)),
    }
}

fn unsupported(message: &Message) -> Option<&'static str> {
    match message {
        Message::AuthenticationGss | Message::AuthenticationGssContinue(_) => Some("gss"),
        Message::AuthenticationKerberosV5 => Some("kerberos 5"),
        Message::AuthenticationScmCredential => Some("scm credential"),
        Message::AuthenticationSspi => Some("sspi"),
        _ => None,
    }
}

async fn sasl<S: AsyncRead + AsyncWrite + Unpin>(
    session: &mut Session<S>,
    credentials: &Credentials<'_>,
    body: &AuthenticationSaslBody,
) -> Result<(), WalError> {
    let offered: Vec<String> = body
        .mechanisms()
        .map(|mechanism| Ok(mechanism.to_owned()))
        .collect()
        .map_err(AuthError::Scram)?;
    let (mechanism, binding) = choose_mechanism(credentials, &offered)?;
    let mut scram = ScramSha256::new(credentials.password()?, binding);
    session
        .send(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))
        .await?;
    match session.read().await? {
        Answer::Message(Message::AuthenticationSaslContinue(body)) => {
            check_iterations(body.data())?;
            scram.update(body.data()).map_err(AuthError::Scram)?;
        }
        answer => return Err(unexpected("SCRAM", &answer)),
    }
    session
        .send(|out| frontend::sasl_response(scram.message(), out))
        .await?;
    match session.read().await? {
        Answer::Message(Message::AuthenticationSaslFinal(body)) => {
            Ok(scram.finish(body.data()).map_err(AuthError::Scram)?)
        }
        answer => Err(unexpected("SCRAM", &answer)),
    }
}

/// Picks the strongest mechanism that both sides can do.
fn choose_mechanism(
    credentials: &Credentials<'_>,
    offered: &[String],
) -> Result<(&'static str, ChannelBinding), AuthError> {
    let offers = |name| offered.iter().any(|mechanism| mechanism == name);
    let end_point = match credentials.binding {
        BindingPolicy::Disable => None,
        _ => credentials.server_end_point,
    };
    match end_point {
        Some(end_point) if offers(SCRAM_SHA_256_PLUS) => {
            let binding = ChannelBinding::tls_server_end_point(end_point.to_vec());
            return Ok((SCRAM_SHA_256_PLUS, binding));
        }
        _ if !offers(SCRAM_SHA_256) => {
            let list = if offered.is_empty() {
                "SASL".to_owned()
            } else {
                offered.join(", ")
            };
            return Err(AuthError::MethodUnsupported(list));
        }
        _ => credentials.allow_unbound()?,
    }
    // A client that could bind says so, which lets the server notice if someone removed its offer.
    let binding = match end_point {
        Some(_) => ChannelBinding::unrequested(),
        None => ChannelBinding::unsupported(),
    };
    Ok((SCRAM_SHA_256, binding))
}

/// Reads the iteration count (`i=`) out of the server's first SCRAM message.
fn check_iterations(message: &[u8]) -> Result<(), AuthError> {
    let count = std::str::from_utf8(message)
        .ok()
        .and_then(|text| text.split(',').find_map(|field| field.strip_prefix("i=")))
        .and_then(|digits| digits.parse::<u32>().ok());
    match count {
        Some(found) if found > SCRAM_ITERATIONS_MAX => Err(AuthError::TooManyIterations {
            found,
            max: SCRAM_ITERATIONS_MAX,
        }),
        Some(_) => Ok(()),
        None => Err(AuthError::Scram(io::Error::other(
            "the iteration count is missing",
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(binding: BindingPolicy, end_point: Option<&[u8]>) -> Credentials<'_> {
        Credentials {
            user: "u",
            password: None,
            binding,
            server_end_point: end_point,
        }
    }

    #[test]
    fn the_strongest_common_mechanism_wins_and_require_is_never_weakened() {
        let both = [SCRAM_SHA_256.to_owned(), SCRAM_SHA_256_PLUS.to_owned()];
        let plain = [SCRAM_SHA_256.to_owned()];
        let chosen = |policy, end_point, offered: &[String]| {
            choose_mechanism(&credentials(policy, end_point), offered)
                .map(|(name, _)| name)
                .ok()
        };
        let tls: Option<&[u8]> = Some(b"hash");
        assert_eq!(
            chosen(BindingPolicy::Prefer, tls, &both),
            Some(SCRAM_SHA_256_PLUS)
        );
        assert_eq!(
            chosen(BindingPolicy::Prefer, None, &both),
            Some(SCRAM_SHA_256)
        );
        assert_eq!(
            chosen(BindingPolicy::Prefer, tls, &plain),
            Some(SCRAM_SHA_256)
        );
        assert_eq!(
            chosen(BindingPolicy::Disable, tls, &both),
            Some(SCRAM_SHA_256)
        );
        assert_eq!(
            chosen(BindingPolicy::Require, tls, &both),
            Some(SCRAM_SHA_256_PLUS)
        );
        assert_eq!(chosen(BindingPolicy::Require, tls, &plain), None);
        assert_eq!(chosen(BindingPolicy::Require, None, &both), None);
        assert_eq!(chosen(BindingPolicy::Prefer, tls, &[]), None);
    }

    #[test]
    fn an_absurd_iteration_count_is_named() {
        assert!(check_iterations(b"r=x,s=y,i=4096").is_ok());
        let error = check_iterations(b"r=x,s=y,i=100001").map_err(|error| error.to_string());
        let text = "the server asks for 100001 SCRAM iterations; at most 100000 are accepted";
        assert_eq!(error, Err(text.to_owned()));
        assert!(check_iterations(b"r=x").is_err());
    }
}
