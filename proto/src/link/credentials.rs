//! CA, certificate and key of a link, re-read from their files when they change.
use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{RootCertStore, sign::CertifiedKey};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject as _},
};

use super::tls::provider;
use crate::{
    error::chain,
    pki::{self, CertificateInfo, PkiError},
};

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
    pub(super) roots: Arc<RootCertStore>,
    pub(super) key: Arc<CertifiedKey>,
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
