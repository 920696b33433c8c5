//! The link between agent and shim: TLS 1.3 between two self-signed keys, each of which the other side pins.
//!
//! The shim dials with the key pair in its job directory and expects the agent's key, which `endpoint.json` names. The
//! agent accepts any key, learns its pin, and looks up which pod it belongs to. Neither side checks dates or names: the
//! pin is kept in a 0700 folder for the lifetime of the pod.
use std::{fmt, future::Future, io, net::SocketAddr, path::Path, sync::Arc};

use knoc_proto::error::chain;
use rustls::{CertificateError, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _};

use super::{
    CONNECT_TIMEOUT, Carrier, Connection, CredentialsError, Incoming, LinkError, Peer,
    accept::Accept,
    admission::Bounds,
    carrier::{Dial, Io, Unverified, tcp},
    tls::{self, client_config, other, readable_error, server_config},
    verifier::{CheckCertificate, Tls13Verifier, provider},
};
use crate::pki::{self, PkiError};

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
    /// Generates a new pair. `name` becomes the subject's common name, which nothing checks.
    pub fn generate(name: &str) -> Result<Self, CredentialsError> {
        let generated = pki::self_signed(name);
        let wrong = |source| CredentialsError::Certificate {
            origin: name.to_owned(),
            source,
        };
        let pair = generated.map_err(wrong)?;
        Self::from_pem(&pair.cert_pem, &pair.key_pem)
    }

    /// Parses a pair that was stored as PEM.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, CredentialsError> {
        Self::parse(
            cert_pem.to_owned(),
            key_pem.to_owned(),
            ["the pinned pair"; 2],
        )
    }

    /// Reads a pair from two PEM files. Blocking.
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
            .map_err(|source| CredentialsError::Unusable { origin, source })?;
        Ok(Self {
            cert_pem,
            key_pem,
            spki,
            key: Arc::new(key),
        })
    }

    /// The certificate as PEM.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The private key as PEM. Secret.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The pin of this pair: SHA-256 of the public key (`SubjectPublicKeyInfo`), in hexadecimal digits.
    #[must_use]
    pub fn spki(&self) -> &str {
        &self.spki
    }
}

/// Listens on `addr`. Each connection has the pin of the key that its peer proved to hold as its [`Peer::Pinned`].
pub async fn listen(addr: SocketAddr, pair: KeyPair) -> Result<Incoming, LinkError> {
    listen_within(addr, pair, Bounds::own()).await
}

/// The same within these bounds, for a process that has less memory than its limit of open files suggests. How many connections are
/// open after their handshakes is the caller's to bound.
#[expect(
    clippy::unused_async,
    reason = "a listener needs a runtime, which only an async function is sure to have"
)]
pub async fn listen_within(
    addr: SocketAddr,
    pair: KeyPair,
    bounds: Bounds,
) -> Result<Incoming, LinkError> {
    let carrier = Carrier::Tcp(addr.to_string());
    let failed = |source| LinkError::Listen { carrier, source };
    let listener = tcp::Listener::bind(addr).map_err(failed)?;
    let accept = Accept::new(listener, bounds, move |connection| {
        let pair = pair.clone();
        Box::pin(async move {
            let accepted = accept(connection, &pair).await;
            accepted.map_err(|error| chain(&error))
        })
    });
    Ok(Incoming::new(accept.local_addr(), accept))
}

async fn accept<I: Io>(
    Unverified { io, origin }: Unverified<I>,
    pair: &KeyPair,
) -> Result<Connection, LinkError> {
    let failed = |source| LinkError::Handshake {
        peer: origin.to_string(),
        claimed: None,
        source: readable_error(source),
    };
    let verifier = Arc::new(Tls13Verifier(Pin { expect: None }));
    let config =
        server_config(verifier, &pair.key).map_err(|error| failed(io::Error::other(error)))?;
    let stream = tls::accept(io, config).await.map_err(failed)?;
    let spki = match tls::peer_chain(&stream) {
        Some([certificate, ..]) => {
            pki::spki_sha256(certificate).map_err(|error| failed(io::Error::other(error)))?
        }
        Some([]) | None => {
            return Err(failed(io::Error::other(
                "the peer presented no certificate",
            )));
        }
    };
    let spki = spki.into();
    Ok(Connection::new(stream, Peer::Pinned { spki, origin }))
}

/// Dials `address` (`HOST:PORT`) and accepts only a peer that holds the key with the pin `expect_spki`. Takes at most
/// [`CONNECT_TIMEOUT`]. Cancel safe: dropping the future closes the connection.
pub async fn dial(
    address: &str,
    pair: &KeyPair,
    expect_spki: &str,
) -> Result<Connection, LinkError> {
    let carrier = Carrier::Tcp(address.to_owned());
    let dialler = tcp::Dialler { address };
    let connecting = dial_over(&dialler, &carrier, pair, expect_spki);
    tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .unwrap_or(Err(LinkError::Timeout {
            carrier: carrier.clone(),
        }))
}

async fn dial_over(
    dialler: &impl Dial,
    carrier: &Carrier,
    pair: &KeyPair,
    expect_spki: &str,
) -> Result<Connection, LinkError> {
    let connection = dialler.dial().await?;
    connect_over(connection, &carrier.to_string(), pair, expect_spki).await
}

/// The shim's side of the handshake over a connection that somebody else has carried to it: accepts only a peer that
/// holds the key with the pin `expect_spki`. `peer` names it in errors. Takes at most [`CONNECT_TIMEOUT`]. Cancel safe.
pub async fn over(
    connection: Unverified<impl Io>,
    peer: &str,
    pair: &KeyPair,
    expect_spki: &str,
) -> Result<Connection, LinkError> {
    in_time(peer, connect_over(connection, peer, pair, expect_spki)).await
}

/// The agent's side of the handshake over a connection that it has carried to a shim itself. The connection has the pin
/// of the key that its peer proved to hold as its [`Peer::Pinned`]. `peer` names it in errors. Takes at most
/// [`CONNECT_TIMEOUT`]. Cancel safe.
pub async fn accept_over(
    connection: Unverified<impl Io>,
    peer: &str,
    pair: &KeyPair,
) -> Result<Connection, LinkError> {
    in_time(peer, accept(connection, pair)).await
}

async fn in_time(
    peer: &str,
    handshake: impl Future<Output = Result<Connection, LinkError>>,
) -> Result<Connection, LinkError> {
    let late = |_| {
        Err(LinkError::Handshake {
            peer: peer.to_owned(),
            claimed: None,
            source: io::ErrorKind::TimedOut.into(),
        })
    };
    tokio::time::timeout(CONNECT_TIMEOUT, handshake)
        .await
        .unwrap_or_else(late)
}

async fn connect_over(
    Unverified { io, origin }: Unverified<impl Io>,
    peer: &str,
    pair: &KeyPair,
    expect_spki: &str,
) -> Result<Connection, LinkError> {
    let failed = |source| LinkError::Handshake {
        peer: peer.to_owned(),
        claimed: None,
        source: readable_error(source),
    };
    let verifier = Arc::new(Tls13Verifier(Pin {
        expect: Some(expect_spki.to_owned()),
    }));
    let config =
        client_config(verifier, &pair.key).map_err(|error| failed(io::Error::other(error)))?;
    let stream = tls::connect(io, config).await.map_err(failed)?;
    let spki = expect_spki.into();
    Ok(Connection::new(stream, Peer::Pinned { spki, origin }))
}

/// The peer's key is not the pinned one.
#[derive(Debug, thiserror::Error)]
#[error("the peer's key is {found}, not the pinned key {expected}")]
struct WrongKey {
    found: String,
    expected: String,
}

/// Accepts a certificate whose key has the expected pin, or any certificate if none is expected. Dates and names are
/// not checked.
#[derive(Debug)]
struct Pin {
    expect: Option<String>,
}

impl CheckCertificate for Pin {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let found = pki::spki_sha256(end_entity)
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

/// A verifier that accepts any key, for tests of clients that present no certificate.
#[cfg(test)]
pub(super) fn any_key() -> Arc<dyn rustls::client::danger::ServerCertVerifier> {
    Arc::new(Tls13Verifier(Pin { expect: None }))
}
