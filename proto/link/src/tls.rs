//! TLS 1.3 with certificates of one CA, the identity checked as a URI SAN whatever the role.
//!
//! The CA vouches for the chain, dates and key usage (webpki); the name of the host is not looked at, since it says
//! nothing about who answers there. Nothing is resumed and no tickets are given: every connection proves its key anew.
use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, OnceLock},
};

use rustls::{
    CertificateError, ClientConfig, DistinguishedName, OtherError, RootCertStore, ServerConfig,
    client::{Resumption, danger::ServerCertVerifier, verify_server_cert_signed_by_trust_anchor},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier, danger::ClientCertVerifier,
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{
    ExpectPeer, Identity,
    carrier::Io,
    verifier::{CheckCertificate, Tls13Verifier, provider},
};
use crate::pki;

mod words;

pub(super) use words::in_words;

/// HTTP/2 only.
pub(super) const ALPN: &[u8] = b"h2";

/// For the side that dials: our `key`, and a peer whom the CA of `roots` vouches for. `seen` gets what the peer's
/// certificate says.
pub(super) fn client(
    roots: &Arc<RootCertStore>,
    key: &Arc<CertifiedKey>,
    expect: ExpectPeer,
    seen: Seen,
) -> Result<ClientConfig, rustls::Error> {
    let check = ServerChain {
        roots: Arc::clone(roots),
        identity: CheckIdentity { expect, seen },
    };
    client_config(Arc::new(Tls13Verifier(check)), key)
}

/// The same for the side that is dialled.
pub(super) fn server(
    roots: &Arc<RootCertStore>,
    key: &Arc<CertifiedKey>,
    expect: ExpectPeer,
    seen: Seen,
) -> Result<ServerConfig, rustls::Error> {
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let check = ClientChain {
        chain,
        identity: CheckIdentity { expect, seen },
    };
    server_config(Arc::new(Tls13Verifier(check)), key)
}

/// The handshake of the side that dials.
pub(super) async fn connect<I: Io>(io: I, config: ClientConfig) -> io::Result<TlsStream<I>> {
    // The name is neither sent nor checked: the identity is.
    let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let stream = TlsConnector::from(Arc::new(config)).connect(name, io);
    Ok(stream.await?.into())
}

/// The same, sending `name`, by which an Ingress or a load balancer that passes TLS through chooses the service. It is not
/// checked: the identity is. An IP address is not sent (RFC 6066, section 3).
pub(super) async fn connect_by_name<I: Io>(
    io: I,
    mut config: ClientConfig,
    name: ServerName<'static>,
) -> io::Result<TlsStream<I>> {
    config.enable_sni = true;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, io);
    Ok(stream.await?.into())
}

/// The handshake of the side that is dialled.
pub(super) async fn accept<I: Io>(io: I, config: ServerConfig) -> io::Result<TlsStream<I>> {
    let stream = TlsAcceptor::from(Arc::new(config)).accept(io);
    Ok(stream.await?.into())
}

/// The chain that the peer showed in its handshake, its own certificate first.
pub(super) fn peer_chain<I>(stream: &TlsStream<I>) -> Option<&[CertificateDer<'static>]> {
    stream.get_ref().1.peer_certificates()
}

pub(super) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    key: &Arc<CertifiedKey>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

pub(super) fn server_config(
    verifier: Arc<dyn ClientCertVerifier>,
    key: &Arc<CertifiedKey>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
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

/// The peer has a certificate, but none of KNoC's.
#[derive(Debug, thiserror::Error)]
#[error(
    "the peer showed a foreign certificate ({subject}): either it is another service, or something on the way terminates TLS \
     (an Ingress or a load balancer that does not pass TLS through)"
)]
struct Foreign {
    subject: String,
}

/// The identity in a certificate is one that is expected. The chain to the CA, dates and key usage are webpki's part.
#[derive(Debug)]
struct CheckIdentity {
    expect: ExpectPeer,
    seen: Seen,
}

impl CheckIdentity {
    /// Notes what the certificate says, before anything is proved.
    fn note(&self, certificate: &CertificateDer<'_>) {
        if let Ok(identity) = pki::identity(certificate) {
            self.seen.0.get_or_init(|| identity);
        }
    }

    /// The chain does not lead to the CA. If the certificate is not one of KNoC's at all, that is said instead.
    fn untrusted(&self, certificate: &CertificateDer<'_>, error: rustls::Error) -> rustls::Error {
        let unknown = matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadEncoding
            )
        );
        if unknown && self.seen.0.get().is_none() {
            return other(Foreign {
                subject: pki::subject(certificate),
            });
        }
        error
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
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

/// The certificate of a server: the chain by webpki, then the identity.
#[derive(Debug)]
struct ServerChain {
    roots: Arc<RootCertStore>,
    identity: CheckIdentity,
}

impl CheckCertificate for ServerChain {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.identity.note(end_entity);
        let algorithms = provider().signature_verification_algorithms.all;
        let verified = ParsedCertificate::try_from(end_entity).and_then(|certificate| {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &self.roots,
                intermediates,
                now,
                algorithms,
            )
        });
        verified.map_err(|error| self.identity.untrusted(end_entity, error))?;
        self.identity.check(end_entity)
    }
}

/// The same of a client.
#[derive(Debug)]
struct ClientChain {
    chain: Arc<dyn ClientCertVerifier>,
    identity: CheckIdentity,
}

impl CheckCertificate for ClientChain {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.identity.note(end_entity);
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now);
        verified.map_err(|error| self.identity.untrusted(end_entity, error))?;
        self.identity.check(end_entity)
    }

    fn root_hints(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }
}
