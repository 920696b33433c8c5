//! TLS 1.3 with certificates of one CA, the identity checked as a URI SAN whatever the role, PEM files re-read when
//! they change.
use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

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
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, UnixTime,
    pem::{self, PemObject as _},
};

use super::{ExpectPeer, Identity};
use crate::{
    error::chain,
    pki::{self, CertificateInfo, PkiError},
};

/// HTTP/2 only.
pub(super) const ALPN: &[u8] = b"h2";

/// Why a CA, certificate or key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("read {what} {}", path.display())]
    Read {
        /// CA, certificate or key.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// No PEM, or nothing of the kind in it.
    #[error("parse {what} {origin}")]
    Pem {
        /// CA, certificate or key.
        what: &'static str,
        /// Its path.
        origin: String,
        /// The parser's words.
        #[source]
        source: pem::Error,
    },
    /// rustls refuses them: the key is not the certificate's, or of an unknown kind.
    #[error("use {origin}")]
    Refused {
        /// The paths.
        origin: String,
        /// rustls' words.
        #[source]
        source: rustls::Error,
    },
    /// The certificate says nothing about who we are.
    #[error("use the certificate {origin}")]
    Certificate {
        /// Its path.
        origin: String,
        /// What is wrong with it.
        #[source]
        source: PkiError,
    },
}

/// A CA, a certificate and its key. From files they are re-read at the next handshake after a change; where the new
/// ones are no good the old ones stay, and that is logged once.
#[derive(Clone)]
pub struct Credentials(Arc<Shared>);

struct Shared {
    source: Source,
    /// The last good ones, and the fingerprint of the files last looked at. Held for no await.
    current: Mutex<(Fingerprint, Arc<Material>)>,
}

enum Source {
    Files {
        ca: PathBuf,
        cert: PathBuf,
        key: PathBuf,
    },
    Memory,
}

/// Modification time, inode and length of each file.
type Fingerprint = [Option<(i64, i64, u64, u64)>; 3];

/// What a handshake needs.
pub(super) struct Material {
    roots: Arc<RootCertStore>,
    key: Arc<CertifiedKey>,
    info: CertificateInfo,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.origin()).finish()
    }
}

impl Credentials {
    /// Reads the three PEM files. The first may hold several CAs, the second a chain.
    pub fn from_files(
        ca: impl Into<PathBuf>,
        cert: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Result<Self, CredentialsError> {
        let source = Source::Files {
            ca: ca.into(),
            cert: cert.into(),
            key: key.into(),
        };
        // Fingerprint first: a change between the two is then seen at the next look.
        let fingerprint = source.fingerprint();
        let material = Arc::new(source.read()?);
        Ok(Self(Arc::new(Shared {
            source,
            current: Mutex::new((fingerprint, material)),
        })))
    }

    /// The same from PEM texts, never re-read.
    pub fn from_pem(ca: &str, cert: &str, key: &str) -> Result<Self, CredentialsError> {
        let names = ["of the CA", "of the certificate", "of the key"].map(str::to_owned);
        let material = Material::parse([ca, cert, key].map(str::as_bytes), &names)?;
        let current = Mutex::new((Fingerprint::default(), Arc::new(material)));
        Ok(Self(Arc::new(Shared {
            source: Source::Memory,
            current,
        })))
    }

    /// Who we are, by whom issued, until when.
    #[must_use]
    pub fn info(&self) -> CertificateInfo {
        self.material().info.clone()
    }

    fn origin(&self) -> String {
        match &self.0.source {
            Source::Files { cert, .. } => cert.display().to_string(),
            Source::Memory => "memory".to_owned(),
        }
    }

    /// The newest good ones.
    pub(super) fn material(&self) -> Arc<Material> {
        let fingerprint = self.0.source.fingerprint();
        let mut current = self
            .0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if current.0 != fingerprint {
            current.0 = fingerprint;
            match self.0.source.read() {
                Ok(material) => {
                    tracing::info!(certificate = %self.origin(), "re-read the link's certificates");
                    current.1 = Arc::new(material);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "changed certificates are no good, the old ones stay");
                }
            }
        }
        Arc::clone(&current.1)
    }
}

impl Source {
    fn fingerprint(&self) -> Fingerprint {
        let Self::Files { ca, cert, key } = self else {
            return Fingerprint::default();
        };
        [ca, cert, key].map(|path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.len()))
        })
    }

    fn read(&self) -> Result<Material, CredentialsError> {
        let Self::Files { ca, cert, key } = self else {
            let source = rustls::Error::General("credentials in memory are never re-read".into());
            return Err(CredentialsError::Refused {
                origin: "memory".into(),
                source,
            });
        };
        let read = |what, path: &PathBuf| {
            let wrong = |source| CredentialsError::Read {
                what,
                path: path.clone(),
                source,
            };
            fs::read(path).map_err(wrong)
        };
        let texts = [
            read("the CA", ca)?,
            read("the certificate", cert)?,
            read("the key", key)?,
        ];
        let names = [ca, cert, key].map(|path| path.display().to_string());
        Material::parse([&texts[0], &texts[1], &texts[2]].map(Vec::as_slice), &names)
    }
}

impl Material {
    fn parse([ca, cert, key]: [&[u8]; 3], names: &[String; 3]) -> Result<Self, CredentialsError> {
        let pem = |what, at: usize| {
            let origin = names[at].clone();
            move |source| CredentialsError::Pem {
                what,
                origin,
                source,
            }
        };
        let refused = |source| CredentialsError::Refused {
            origin: names.join(", "),
            source,
        };
        let mut roots = RootCertStore::empty();
        for root in certificates(ca).map_err(pem("the CA", 0))? {
            roots.add(root).map_err(refused)?;
        }
        let certificates = certificates(cert).map_err(pem("the certificate", 1))?;
        let wrong = |source| CredentialsError::Certificate {
            origin: names[1].clone(),
            source,
        };
        let info = pki::inspect(&certificates[0]).map_err(wrong)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem("the key", 2))?;
        let key = CertifiedKey::from_der(certificates, key, &provider()).map_err(refused)?;
        Ok(Self {
            roots: Arc::new(roots),
            key: Arc::new(key),
            info,
        })
    }

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

/// At least one certificate.
fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let list = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>()?;
    if list.is_empty() {
        Err(pem::Error::NoItemsFound)
    } else {
        Ok(list)
    }
}

/// ring, given explicitly everywhere: nothing process-wide is installed.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
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
