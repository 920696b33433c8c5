//! TLS 1.3 with certificates of one CA, the identity checked as a URI SAN whatever the role.
//!
//! The CA vouches for the chain, dates and key usage (webpki); the name of the host is not looked at, since it says
//! nothing about who answers there. Nothing is resumed and no tickets are given: every connection proves its key anew.
use std::{
    io,
    sync::{Arc, OnceLock},
};

use knoc_proto::error::chain;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::SingleCertAndKey,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{ExpectPeer, Identity, credentials::Material};
use crate::pki;

/// HTTP/2 only.
pub(super) const ALPN: &[u8] = b"h2";

/// ring, given explicitly everywhere: nothing process-wide is installed.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

impl Material {
    /// For the side that dials. `seen` gets what the peer's certificate says.
    pub(super) fn client(
        &self,
        expect: ExpectPeer,
        seen: Seen,
    ) -> Result<ClientConfig, rustls::Error> {
        let verifier = Arc::new(Verifier {
            roots: Arc::clone(&self.roots),
            expect,
            seen,
        });
        let resolver = Arc::new(SingleCertAndKey::from(Arc::clone(&self.key)));
        client_config(verifier, resolver)
    }

    /// For the side that is dialled.
    pub(super) fn server(
        &self,
        expect: ExpectPeer,
        seen: Seen,
    ) -> Result<ServerConfig, rustls::Error> {
        let chain =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        let roots = Arc::clone(&self.roots);
        let verifier = Verifier {
            roots,
            expect,
            seen,
        };
        let verifier = Arc::new(ClientVerifier { chain, verifier });
        let resolver = Arc::new(SingleCertAndKey::from(Arc::clone(&self.key)));
        server_config(verifier, resolver)
    }
}

pub(super) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    key: Arc<SingleCertAndKey>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(key);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

pub(super) fn server_config(
    verifier: Arc<dyn ClientCertVerifier>,
    key: Arc<SingleCertAndKey>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(key);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What the peer's certificate said of itself in one handshake, so that a refusal can name it.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen(Arc<OnceLock<Identity>>);

impl Seen {
    pub(super) fn identity(&self) -> Option<Identity> {
        self.0.get().cloned()
    }

    pub(super) fn text(&self) -> Option<String> {
        self.0.get().map(ToString::to_string)
    }
}

/// The peer is one of ours, but not one that is expected here.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found}, expected is {expected}")]
struct WrongPeer {
    found: Identity,
    expected: ExpectPeer,
}

/// Chain to the CA, dates and key usage by webpki; then the identity. The server's name is not looked at.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    expect: ExpectPeer,
    seen: Seen,
}

impl Verifier {
    /// Notes what the certificate says, before anything is proved.
    fn note(&self, certificate: &CertificateDer<'_>) {
        if let Ok(identity) = pki::identity(certificate) {
            self.seen.0.get_or_init(|| identity);
        }
    }

    fn check_identity(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let found = pki::identity(certificate).map_err(other)?;
        if self.expect.accepts(&found) {
            return Ok(());
        }
        Err(other(WrongPeer {
            found,
            expected: self.expect.clone(),
        }))
    }
}

/// An error of ours inside rustls'.
pub(super) fn other(error: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// A failed handshake's error in words: rustls shows errors of ours only as Rust values.
pub(super) fn in_words(error: io::Error) -> io::Error {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(ours)))) =
        inner
    {
        return io::Error::new(error.kind(), chain(ours.as_ref()));
    }
    error
}

/// TLS 1.2 is not offered, so its signatures never occur.
pub(super) fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.note(end_entity);
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        self.check_identity(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The same for the other TLS role.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    verifier: Verifier,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifier.note(end_entity);
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        self.verifier.check_identity(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
