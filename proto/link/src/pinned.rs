//! The shim hop: TLS 1.3 between two self-signed keys that know each other by their public key.
//!
//! The shim dials with the pair in its job directory and expects the agent's key, which stands in `endpoint.json`; the
//! agent takes any key, learns its pin, and looks up whose it is. Dates and names are not looked at: the pin lives in
//! a 0700 folder for the pod's life.
use std::{
    fmt, io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt as _};
use knoc_proto::error::chain;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::{
    CONNECT_TIMEOUT, Carrier, CredentialsError, LinkError,
    accept::{self, Accept},
    admission::Bounds,
    tls::{client_config, in_words, no_tls12, other, provider, server_config},
};
use crate::pki::{self, PkiError};

/// A connection of this hop, either role.
pub type TlsIo = TlsStream<TcpStream>;

/// A self-signed certificate and its key.
#[derive(Clone)]
pub struct KeyPair {
    cert_pem: String,
    key_pem: String,
    spki: String,
    key: Arc<CertifiedKey>,
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair")
            .field("spki", &self.spki)
            .finish_non_exhaustive()
    }
}

impl KeyPair {
    /// A new pair; `name` is for people.
    pub fn generate(name: &str) -> Result<Self, CredentialsError> {
        let made = pki::self_signed(name);
        let wrong = |source| CredentialsError::Certificate {
            origin: name.to_owned(),
            source,
        };
        let pair = made.map_err(wrong)?;
        Self::from_pem(&pair.cert_pem, &pair.key_pem)
    }

    /// The pair that was kept as PEM.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, CredentialsError> {
        Self::parse(
            cert_pem.to_owned(),
            key_pem.to_owned(),
            ["the pinned pair"; 2],
        )
    }

    /// The pair in two PEM files.
    pub fn from_files(cert: &Path, key: &Path) -> Result<Self, CredentialsError> {
        let read = |what, path: &Path| {
            let wrong = |source| CredentialsError::Read {
                what,
                path: path.to_owned(),
                source,
            };
            std::fs::read_to_string(path).map_err(wrong)
        };
        let names = [cert.display().to_string(), key.display().to_string()];
        let texts = (read("the certificate", cert)?, read("the key", key)?);
        Self::parse(texts.0, texts.1, [&names[0], &names[1]])
    }

    fn parse(
        cert_pem: String,
        key_pem: String,
        names: [&str; 2],
    ) -> Result<Self, CredentialsError> {
        let pem = |what, origin: &str| {
            let origin = origin.to_owned();
            move |source| CredentialsError::Pem {
                what,
                origin,
                source,
            }
        };
        let certificate = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(pem("the certificate", names[0]))?;
        let key =
            PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(pem("the key", names[1]))?;
        let origin = names[0].to_owned();
        let wrong = |source: PkiError| CredentialsError::Certificate { origin, source };
        let spki = pki::spki_sha256(&certificate).map_err(wrong)?;
        let origin = names.join(", ");
        let key = CertifiedKey::from_der(vec![certificate], key, &provider())
            .map_err(|source| CredentialsError::Refused { origin, source })?;
        Ok(Self {
            cert_pem,
            key_pem,
            spki,
            key: Arc::new(key),
        })
    }

    /// The certificate.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The key. Secret.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// What the other side pins: SHA-256 of the public key, in hex.
    #[must_use]
    pub fn spki(&self) -> &str {
        &self.spki
    }

    fn resolver(&self) -> Arc<SingleCertAndKey> {
        Arc::new(SingleCertAndKey::from(Arc::clone(&self.key)))
    }
}

/// Connections on `addr`, each with the pin of the key that its peer proved to have.
#[expect(
    clippy::unused_async,
    reason = "a listener needs a runtime, which only an async function surely has"
)]
pub async fn listen(addr: SocketAddr, pair: KeyPair) -> Result<PinnedIncoming, LinkError> {
    let carrier = Carrier::Tcp(addr.to_string());
    let failed = |source| LinkError::Listen { carrier, source };
    let listener = accept::bind(addr).map_err(failed)?;
    let accept = Accept::tcp(listener, Bounds::own(), move |stream, addr| {
        let pair = pair.clone();
        Box::pin(async move {
            let accepted = accept(stream, addr, &pair).await;
            accepted.map_err(|error| chain(&error))
        })
    });
    Ok(PinnedIncoming(accept))
}

async fn accept(
    stream: TcpStream,
    addr: SocketAddr,
    pair: &KeyPair,
) -> Result<(String, TlsIo), LinkError> {
    let failed = |source| LinkError::Handshake {
        peer: addr.to_string(),
        claimed: None,
        source: in_words(source),
    };
    stream.set_nodelay(true).map_err(failed)?;
    let config = server_config(Arc::new(Pin256 { expect: None }), pair.resolver())
        .map_err(|error| failed(io::Error::other(error)))?;
    let stream = TlsAcceptor::from(Arc::new(config))
        .accept(stream)
        .await
        .map_err(failed)?;
    let spki = match stream.get_ref().1.peer_certificates() {
        Some([certificate, ..]) => {
            pki::spki_sha256(certificate).map_err(|error| failed(io::Error::other(error)))?
        }
        Some([]) | None => return Err(failed(io::Error::other("the peer showed no certificate"))),
    };
    Ok((spki, stream.into()))
}

/// Dials `address` (`host:port`) and accepts only the key of this pin there.
pub async fn dial(address: &str, pair: &KeyPair, expect_spki: &str) -> Result<TlsIo, LinkError> {
    let carrier = Carrier::Tcp(address.to_owned());
    let connecting = async {
        let failed = |source| LinkError::Connect {
            carrier: carrier.clone(),
            source,
        };
        let stream = TcpStream::connect(address).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let name = ServerName::IpAddress(stream.peer_addr().map_err(failed)?.ip().into());
        let handshake = |source| LinkError::Handshake {
            peer: carrier.to_string(),
            claimed: None,
            source: in_words(source),
        };
        let verifier = Arc::new(Pin256 {
            expect: Some(expect_spki.to_owned()),
        });
        let config = client_config(verifier, pair.resolver())
            .map_err(|error| handshake(io::Error::other(error)))?;
        let connector = TlsConnector::from(Arc::new(config));
        Ok(connector
            .connect(name, stream)
            .await
            .map_err(handshake)?
            .into())
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .unwrap_or_else(|_| {
            Err(LinkError::Timeout {
                carrier: carrier.clone(),
            })
        })
}

/// See [`listen`]. Never ends by itself.
pub struct PinnedIncoming(Accept<(String, TlsIo)>);

impl PinnedIncoming {
    /// The address listened on.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.0.local_addr()
    }
}

impl fmt::Debug for PinnedIncoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PinnedIncoming")
            .field(&self.local_addr())
            .finish()
    }
}

impl Stream for PinnedIncoming {
    type Item = io::Result<(String, TlsIo)>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(cx)
    }
}

/// The other side's key is not the pinned one.
#[derive(Debug, thiserror::Error)]
#[error("the peer's key is {found}, pinned is {expected}")]
struct WrongKey {
    found: String,
    expected: String,
}

/// Proof of the key, and its pin where one is expected.
#[derive(Debug)]
struct Pin256 {
    expect: Option<String>,
}

impl Pin256 {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let found = pki::spki_sha256(certificate)
            .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
        match &self.expect {
            Some(expected) if *expected != found => Err(other(WrongKey {
                found,
                expected: expected.clone(),
            })),
            Some(_) | None => Ok(()),
        }
    }
}

impl ServerCertVerifier for Pin256 {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)?;
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

impl ClientCertVerifier for Pin256 {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)?;
        Ok(ClientCertVerified::assertion())
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

/// Takes any key: for tests of a client that shows none itself.
#[cfg(test)]
pub(super) fn any_key() -> Arc<dyn ServerCertVerifier> {
    Arc::new(Pin256 { expect: None })
}
