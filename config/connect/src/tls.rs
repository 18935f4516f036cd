//! TLS client settings, with libpq's meaning of what is verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

mod end_point;

pub use end_point::server_end_point;

/// What is checked of the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Nothing: the line is encrypted, but anybody may be at its other end.
    Nothing,
    /// That it was issued by a trusted authority, whatever its name.
    Chain,
    /// That it was issued by a trusted authority for the server's name.
    Full,
}

/// Whom to trust.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// The authorities that the operating system trusts.
    System,
    /// Those in a PEM file.
    File(PathBuf),
}

/// How to make a TLS connection. Files are read when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// What is checked.
    pub verify: Verify,
    /// Whom to trust, unless nothing is checked.
    pub roots: Roots,
    /// PEM files with the client's own certificate chain and private key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds nothing of use.
    #[error("TLS file {} cannot be used", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// The operating system's authorities cannot be found.
    #[error("no trusted authority was found on this system")]
    NoSystemRoots,
    /// The certificates or the key do not fit, or the handshake failed.
    #[error("TLS failed")]
    Rustls(#[from] rustls::Error),
    /// The connection broke in the handshake, or the server's certificate was refused.
    #[error("TLS handshake failed")]
    Handshake(#[source] std::io::Error),
    /// The server speaks no TLS and the settings demand it.
    #[error("the server does not support TLS, which sslmode demands")]
    NotOffered,
    /// The host's name cannot be in a certificate.
    #[error("host {0:?} is not a name that a certificate can have")]
    HostName(String),
}

impl Tls {
    /// Reads the files and assembles the client's settings, with `alpn` as the only protocol.
    ///
    /// # Errors
    /// A file cannot be read or holds no certificate or key, or the key does not fit the certificate.
    pub fn client_config(&self, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(Verifier::new(self, &provider)?);
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let source = |source| TlsError::File {
                    path: key.clone(),
                    source,
                };
                let private = PrivateKeyDer::from_pem_file(key).map_err(source)?;
                builder.with_client_auth_cert(certificates(certificate)?, private)?
            }
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }
}

/// The certificates of a PEM file: at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |source| TlsError::File {
        path: path.to_owned(),
        source,
    };
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(error)?;
    if found.is_empty() {
        return Err(error(rustls_pki_types::pem::Error::NoItemsFound));
    }
    Ok(found)
}

/// Checks as much of the server's certificate as the settings ask for. The handshake's signature is always
/// checked: the server must own the key of the certificate it shows.
#[derive(Debug)]
struct Verifier {
    verify: Verify,
    roots: RootCertStore,
    /// The certificates of the file of roots. A server that shows one of these itself is trusted, as it is by
    /// libpq: webpki refuses a self-signed certificate as a server's because it is an authority's too.
    listed: Vec<CertificateDer<'static>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(tls: &Tls, provider: &CryptoProvider) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        let mut listed = Vec::new();
        match (&tls.roots, tls.verify) {
            (_, Verify::Nothing) => {}
            (Roots::System, _) => {
                let found = rustls_native_certs::load_native_certs().certs;
                if roots.add_parsable_certificates(found).0 == 0 {
                    return Err(TlsError::NoSystemRoots);
                }
            }
            (Roots::File(path), _) => {
                listed = certificates(path)?;
                for certificate in &listed {
                    roots.add(certificate.clone())?;
                }
            }
        }
        let algorithms = provider.signature_verification_algorithms;
        Ok(Self {
            verify: tls.verify,
            roots,
            listed,
            algorithms,
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.verify != Verify::Nothing {
            let certificate = ParsedCertificate::try_from(end_entity)?;
            if !self.listed.iter().any(|listed| listed == end_entity) {
                verify_server_cert_signed_by_trust_anchor(
                    &certificate,
                    &self.roots,
                    intermediates,
                    now,
                    self.algorithms.all,
                )?;
            }
            if self.verify == Verify::Full {
                verify_server_name(&certificate, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
