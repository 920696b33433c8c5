//! CA, certificate and key of a link, re-read from their files when these change.
//!
//! A certificate that was renewed over the link is kept apart from the files, which are mounted read-only in a cluster.
//! That pair is used while it descends from the certificate in the files, so a new bundle takes effect at once.
use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use knoc_proto::error::chain;
use rustls::{RootCertStore, sign::CertifiedKey};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject as _},
};
use sha2::{Digest as _, Sha256};

use super::{PeerCertificate, Trust, verifier::provider};
use crate::pki::{self, CertificateInfo, PkiError};

/// Why a CA, certificate or key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("read {what} {}", path.display())]
    Read {
        /// The file's role: the CA, the certificate or the key.
        what: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// The error of open(2) or read(2).
        #[source]
        source: io::Error,
    },
    /// The text is not PEM, or holds no item of the expected kind.
    #[error("parse {what} {origin}")]
    Pem {
        /// The text's role: the CA, the certificate or the key.
        what: &'static str,
        /// The path of the file, or what the text is for.
        origin: String,
        /// The parser's error.
        #[source]
        source: pem::Error,
    },
    /// rustls rejects them: the key does not belong to the certificate, or is of an unknown kind.
    #[error("use {origin}")]
    Unusable {
        /// The paths of the files, joined by commas.
        origin: String,
        /// rustls' error.
        #[source]
        source: rustls::Error,
    },
    /// The certificate cannot be read, or has no identity of ours.
    #[error("use the certificate {origin}")]
    Certificate {
        /// The path of the certificate.
        origin: String,
        /// What is wrong with it.
        #[source]
        source: PkiError,
    },
}

/// A CA, a certificate and its key. If they are from files, they are re-read at the next handshake after a change; if
/// the new ones cannot be used, the old ones stay in use and one warning is logged. Cheap to clone; clones share the
/// same state.
#[derive(Clone)]
pub struct Credentials(Arc<Shared>);

struct Shared {
    source: Source,
    /// Never held across an await.
    current: Mutex<Current>,
}

struct Current {
    /// The fingerprint of the files that were read last.
    fingerprint: Fingerprint,
    /// The last usable contents of the files.
    files: Arc<Material>,
    /// The renewed pair, with the CA of the files.
    renewed: Option<Arc<Material>>,
}

impl Current {
    fn newest(&self) -> Arc<Material> {
        Arc::clone(self.renewed.as_ref().unwrap_or(&self.files))
    }

    /// The pair with the CA of the files, if it was renewed from their certificate.
    fn usable(&self, pair: &pki::CertifiedKey) -> Result<Option<Material>, CredentialsError> {
        let names = ["of the CA", "of the renewed certificate", "of its key"].map(str::to_owned);
        let (cert, key) = (pair.cert_pem.as_bytes(), pair.key_pem.as_bytes());
        let (key, info) = Material::pair(cert, key, &names)?;
        let renewed = Material {
            roots: Arc::clone(&self.files.roots),
            key: Arc::new(key),
            info,
            digest: [0; 32],
        };
        Ok(renewed.under(&self.files))
    }

    /// Uses the new contents of the files. A renewed pair stays if it descends from the new certificate.
    fn take(&mut self, files: Material) {
        self.renewed = self
            .renewed
            .take()
            .and_then(|renewed| renewed.under(&files).map(Arc::new));
        self.files = Arc::new(files);
    }
}

enum Source {
    Files {
        ca: PathBuf,
        cert: PathBuf,
        key: PathBuf,
    },
    Memory,
}

/// The modification time (seconds and nanoseconds), inode and length of each file; `None` if the file cannot be read.
type Fingerprint = [Option<(i64, i64, u64, u64)>; 3];

/// The parsed CA, certificate and key that a handshake uses.
pub(super) struct Material {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) key: Arc<CertifiedKey>,
    info: CertificateInfo,
    /// SHA-256 of the three PEM texts.
    digest: [u8; 32],
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.origin()).finish()
    }
}

impl Credentials {
    /// Reads the three PEM files. `ca` may hold several CAs, and `cert` a chain. Blocking.
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
        // The fingerprint is taken first, so that a change in between is noticed at the next check.
        let fingerprint = source.fingerprint();
        let files = Arc::new(source.read()?);
        Ok(Self(Arc::new(Shared {
            source,
            current: Mutex::new(Current {
                fingerprint,
                files,
                renewed: None,
            }),
        })))
    }

    /// Uses three PEM texts, which are never re-read.
    pub fn from_pem(ca: &str, cert: &str, key: &str) -> Result<Self, CredentialsError> {
        let names = ["of the CA", "of the certificate", "of the key"].map(str::to_owned);
        let material = Material::parse([ca, cert, key].map(str::as_bytes), &names)?;
        let current = Mutex::new(Current {
            fingerprint: Fingerprint::default(),
            files: Arc::new(material),
            renewed: None,
        });
        Ok(Self(Arc::new(Shared {
            source: Source::Memory,
            current,
        })))
    }

    /// What the certificate in use says: its identity, issuer and validity.
    #[must_use]
    pub fn info(&self) -> CertificateInfo {
        self.material().info.clone()
    }

    /// The CA certificates that are in use. Fails if they contain none that can be used.
    pub fn trust(&self) -> Result<Trust, rustls::Error> {
        Trust::new(Arc::clone(&self.material().roots))
    }

    fn origin(&self) -> String {
        match &self.0.source {
            Source::Files { cert, .. } => cert.display().to_string(),
            Source::Memory => "memory".to_owned(),
        }
    }

    /// The newest usable material. Re-reads the files if they have changed. Blocking.
    pub(super) fn material(&self) -> Arc<Material> {
        let fingerprint = self.0.source.fingerprint();
        let mut current = self.current();
        if current.fingerprint != fingerprint {
            current.fingerprint = fingerprint;
            match self.0.source.read() {
                Ok(files) => {
                    tracing::info!(certificate = %self.origin(), "re-read the link's certificates");
                    current.take(files);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "the changed certificate files cannot be used: the old ones stay in use");
                }
            }
        }
        current.newest()
    }

    /// Re-reads the files now, whatever their attributes say: on a network file system these may be a minute old.
    /// Returns the SHA-256 of the contents in use, which shows a change whichever call read it first. Blocking. On an
    /// error, the old contents stay in use.
    pub fn reread(&self) -> Result<[u8; 32], CredentialsError> {
        let files = match self.0.source {
            Source::Memory => None,
            Source::Files { .. } => Some(self.0.source.read()?),
        };
        let mut current = self.current();
        if let Some(files) = files.filter(|files| files.digest != current.files.digest) {
            current.take(files);
        }
        Ok(current.files.digest)
    }

    /// Uses a renewed pair from the next handshake on. Returns false and changes nothing if the pair was not renewed
    /// from the certificate in the files, has another identity, or is not valid under their CA.
    pub fn renew(&self, pair: &pki::CertifiedKey) -> Result<bool, CredentialsError> {
        let mut current = self.current();
        let usable = current.usable(pair)?;
        let used = usable.is_some();
        if used {
            current.renewed = usable.map(Arc::new);
        }
        Ok(used)
    }

    /// Whether [`Self::renew`] would use this pair. Changes nothing.
    pub fn would_renew(&self, pair: &pki::CertifiedKey) -> Result<bool, CredentialsError> {
        Ok(self.current().usable(pair)?.is_some())
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        self.0
            .current
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
            return Err(CredentialsError::Unusable {
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
        let digest = [ca, cert, key].iter().fold(Sha256::new(), |hash, text| {
            hash.chain_update(text.len().to_be_bytes())
                .chain_update(text)
        });
        let mut roots = RootCertStore::empty();
        let listed = certificates(ca).map_err(|source| CredentialsError::Pem {
            what: "the CA",
            origin: names[0].clone(),
            source,
        })?;
        for root in listed {
            roots.add(root).map_err(|source| unusable(names, source))?;
        }
        let (key, info) = Self::pair(cert, key, names)?;
        Ok(Self {
            roots: Arc::new(roots),
            key: Arc::new(key),
            info,
            digest: digest.finalize().into(),
        })
    }

    /// Parses a certificate chain with its key, and checks that they belong together.
    fn pair(
        cert: &[u8],
        key: &[u8],
        names: &[String; 3],
    ) -> Result<(CertifiedKey, CertificateInfo), CredentialsError> {
        let pem = |what, at: usize| {
            let origin = names[at].clone();
            move |source| CredentialsError::Pem {
                what,
                origin,
                source,
            }
        };
        let certificates = certificates(cert).map_err(pem("the certificate", 1))?;
        let wrong = |source| CredentialsError::Certificate {
            origin: names[1].clone(),
            source,
        };
        let info = pki::inspect(&certificates[0]).map_err(wrong)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(pem("the key", 2))?;
        let key = CertifiedKey::from_der(certificates, key, &provider())
            .map_err(|source| unusable(names, source))?;
        Ok((key, info))
    }

    /// This renewed pair with the CA of `files`, if it descends from the certificate in `files`.
    fn under(&self, files: &Self) -> Option<Self> {
        let same = self.info.identity.is_ok() && self.info.identity == files.info.identity;
        let mut ancestors = self.info.ancestors.iter();
        if !same || !ancestors.any(|ancestor| ancestor.spki == files.info.spki) {
            return None;
        }
        let certificate = PeerCertificate::of(Some(&self.key.cert)).ok()?;
        let trust = Trust::new(Arc::clone(&files.roots)).ok()?;
        trust.check(&certificate, jiff::Timestamp::now()).ok()?;
        Some(Self {
            roots: Arc::clone(&files.roots),
            key: Arc::clone(&self.key),
            info: self.info.clone(),
            digest: self.digest,
        })
    }
}

fn unusable(names: &[String; 3], source: rustls::Error) -> CredentialsError {
    CredentialsError::Unusable {
        origin: names.join(", "),
        source,
    }
}

/// The certificates in a PEM text; an error if there is none.
fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, pem::Error> {
    let list = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>()?;
    if list.is_empty() {
        Err(pem::Error::NoItemsFound)
    } else {
        Ok(list)
    }
}
