//! TLS 1.3 with certificates of one CA. Each side checks the identity of the other, a URI SAN, whatever its TLS role.
//!
//! webpki verifies the chain to the CA, the dates and the key usage. Host names are not checked, since they do not say
//! who answers there. No session is resumed and no tickets are sent, so every connection proves its key.
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
    ExpectPeer, Identity, Origin, Peer, PeerCertificate,
    carrier::Io,
    verifier::{CheckCertificate, Tls13Verifier, provider},
};
use crate::pki;

mod words;

pub(super) use words::readable_error;

/// The ALPN protocol of every link: HTTP/2 only.
pub(super) const ALPN: &[u8] = b"h2";

/// The configuration of the side that dials: it presents `key` and accepts a peer whose certificate was issued by a CA
/// of `roots`. `claimed` receives the identity in the peer's certificate, even if it is rejected.
pub(super) fn client(
    roots: &Arc<RootCertStore>,
    key: &Arc<CertifiedKey>,
    expect: ExpectPeer,
    claimed: ClaimedIdentity,
) -> Result<ClientConfig, rustls::Error> {
    let check = ServerChain {
        roots: Arc::clone(roots),
        identity: CheckIdentity { expect, claimed },
    };
    client_config(Arc::new(Tls13Verifier(check)), key)
}

/// The counterpart of [`client`] for the side that is dialled.
pub(super) fn server(
    roots: &Arc<RootCertStore>,
    key: &Arc<CertifiedKey>,
    expect: ExpectPeer,
    claimed: ClaimedIdentity,
) -> Result<ServerConfig, rustls::Error> {
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let check = ClientChain {
        chain,
        identity: CheckIdentity { expect, claimed },
    };
    server_config(Arc::new(Tls13Verifier(check)), key)
}

/// Runs the handshake of the side that dials.
pub(super) async fn connect<I: Io>(io: I, config: ClientConfig) -> io::Result<TlsStream<I>> {
    // The server name is neither sent nor checked: the identity is checked instead.
    let name = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let stream = TlsConnector::from(Arc::new(config)).connect(name, io);
    Ok(stream.await?.into())
}

/// Like [`connect`], and sends `name` (SNI), by which an Ingress or a load balancer that passes TLS through chooses the
/// service. The name is not checked; the peer's identity is. An IP address is not sent (RFC 6066, section 3).
pub(super) async fn connect_by_name<I: Io>(
    io: I,
    mut config: ClientConfig,
    name: ServerName<'static>,
) -> io::Result<TlsStream<I>> {
    config.enable_sni = true;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, io);
    Ok(stream.await?.into())
}

/// Runs the handshake of the side that is dialled.
pub(super) async fn accept<I: Io>(io: I, config: ServerConfig) -> io::Result<TlsStream<I>> {
    let stream = TlsAcceptor::from(Arc::new(config)).accept(io);
    Ok(stream.await?.into())
}

/// The chain that the peer presented in its handshake, its own certificate first.
pub(super) fn peer_chain<I>(stream: &TlsStream<I>) -> Option<&[CertificateDer<'static>]> {
    stream.get_ref().1.peer_certificates()
}

/// The peer of a handshake that has succeeded, whose verifier has noted its identity in `claimed`.
pub(super) fn verified<I>(
    stream: &TlsStream<I>,
    claimed: &ClaimedIdentity,
    origin: Origin,
) -> io::Result<Peer> {
    let identity = claimed.identity();
    let identity = identity.ok_or_else(|| io::Error::other("the peer presented no identity"))?;
    let certificate = PeerCertificate::of(peer_chain(stream)).map_err(io::Error::other)?;
    Ok(Peer::Tls {
        identity,
        origin,
        certificate,
    })
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

/// The identity that the peer's certificate claims in one handshake, so that an error can name it.
#[derive(Debug, Clone, Default)]
pub(super) struct ClaimedIdentity(Arc<OnceLock<Identity>>);

impl ClaimedIdentity {
    pub(super) fn identity(&self) -> Option<Identity> {
        self.0.get().cloned()
    }

    pub(super) fn text(&self) -> Option<String> {
        self.0.get().map(ToString::to_string)
    }
}

/// The peer has an identity of ours, but not one that is accepted here.
#[derive(Debug, thiserror::Error)]
#[error("the peer is {found}, not the expected {expected}")]
struct WrongPeer {
    found: Identity,
    expected: ExpectPeer,
}

/// The peer's certificate is not one of KNoC's.
#[derive(Debug, thiserror::Error)]
#[error(
    "the peer showed a foreign certificate ({subject}): either it is another service, or something on the way terminates TLS \
     (an Ingress or a load balancer that does not pass TLS through)"
)]
struct Foreign {
    subject: String,
}

/// Accepts a certificate with an expected identity. webpki checks the chain to the CA, the dates and the key usage.
#[derive(Debug)]
struct CheckIdentity {
    expect: ExpectPeer,
    claimed: ClaimedIdentity,
}

impl CheckIdentity {
    /// Records the identity in the certificate, then rejects it if its chain was not `verified` or another identity is expected.
    fn accept(
        &self,
        certificate: &CertificateDer<'_>,
        verified: Result<(), rustls::Error>,
    ) -> Result<(), rustls::Error> {
        let identity = pki::identity(certificate);
        if let Ok(identity) = &identity {
            self.claimed.0.get_or_init(|| identity.clone());
        }
        verified.map_err(|error| self.untrusted(certificate, error))?;
        let found = identity.map_err(other)?;
        if self.expect.accepts(&found) {
            return Ok(());
        }
        Err(other(WrongPeer {
            found,
            expected: self.expect.clone(),
        }))
    }

    /// The error for a chain that does not lead to the CA: [`Foreign`] if the certificate is not one of KNoC's at all.
    fn untrusted(&self, certificate: &CertificateDer<'_>, error: rustls::Error) -> rustls::Error {
        let unknown = matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadEncoding
            )
        );
        if unknown && self.claimed.0.get().is_none() {
            return other(Foreign {
                subject: pki::subject(certificate),
            });
        }
        error
    }
}

/// Wraps an error of ours in one of rustls.
pub(super) fn other(error: impl std::error::Error + Send + Sync + 'static) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

/// Checks the certificate of a server: webpki verifies the chain, then the identity is checked.
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
        self.identity.accept(end_entity, verified)
    }
}

/// Checks the certificate of a client in the same way.
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
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)
            .map(drop);
        self.identity.accept(end_entity, verified)
    }

    fn root_hints(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }
}
