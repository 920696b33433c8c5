//! CA, certificate and key of a link, re-read from their files when they change.
//!
//! A certificate that was renewed over the link stands beside the files, which are mounted read-only in a cluster: that
//! pair is used as long as it descends from the certificate in the files, so that another bundle counts at once.
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

use super::{Shown, Trust, verifier::provider};
use crate::pki::{self, CertificateInfo, PkiError};

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
    /// Held for no await.
    current: Mutex<Current>,
}

struct Current {
    /// Of the files last looked at.
    fingerprint: Fingerprint,
    /// The last good ones of the files.
    files: Arc<Material>,
    /// The renewed pair, with the CA of the files.
    renewed: Option<Arc<Material>>,
}

impl Current {
    fn newest(&self) -> Arc<Material> {
        Arc::clone(self.renewed.as_ref().unwrap_or(&self.files))
    }

    /// A renewed pair with the CA of the files, if it descends from their certificate.
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

    /// Takes what the files say now. A renewed pair stays if it is still the better one.
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

/// Modification time, inode and length of each file.
type Fingerprint = [Option<(i64, i64, u64, u64)>; 3];

/// What a handshake needs.
pub(super) struct Material {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) key: Arc<CertifiedKey>,
    info: CertificateInfo,
    /// Of the three texts.
    digest: [u8; 32],
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

    /// The same from PEM texts, never re-read.
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

    /// Who we are, by whom issued, until when.
    #[must_use]
    pub fn info(&self) -> CertificateInfo {
        self.material().info.clone()
    }

    /// The CA certificates as they were last read.
    pub fn trust(&self) -> Result<Trust, rustls::Error> {
        Trust::new(Arc::clone(&self.material().roots))
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
        let mut current = self.current();
        if current.fingerprint != fingerprint {
            current.fingerprint = fingerprint;
            match self.0.source.read() {
                Ok(files) => {
                    tracing::info!(certificate = %self.origin(), "re-read the link's certificates");
                    current.take(files);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "changed certificates are no good, the old ones stay");
                }
            }
        }
        current.newest()
    }

    /// Reads the files now, whatever their attributes say: those of a network file system may be a minute old. Answers
    /// the digest of what is in effect, which tells a change whoever read it first. Blocking; on an error the old ones
    /// stay.
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

    /// Uses a renewed pair from the next handshake on. False, with nothing changed, if it was not renewed from the
    /// certificate in the files, has another identity, or is not valid under their CA.
    pub fn renew(&self, pair: &pki::CertifiedKey) -> Result<bool, CredentialsError> {
        let mut current = self.current();
        let usable = current.usable(pair)?;
        let used = usable.is_some();
        if used {
            current.renewed = usable.map(Arc::new);
        }
        Ok(used)
    }

    /// Would [`Self::renew`] use this pair?
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
            roots.add(root).map_err(|source| refused(names, source))?;
        }
        let (key, info) = Self::pair(cert, key, names)?;
        Ok(Self {
            roots: Arc::new(roots),
            key: Arc::new(key),
            info,
            digest: digest.finalize().into(),
        })
    }

    /// A certificate with its key.
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
            .map_err(|source| refused(names, source))?;
        Ok((key, info))
    }

    /// This renewed pair with the CA of `files`, if it descends from what they hold.
    fn under(&self, files: &Self) -> Option<Self> {
        let same = self.info.identity.is_ok() && self.info.identity == files.info.identity;
        let mut ancestors = self.info.ancestors.iter();
        if !same || !ancestors.any(|ancestor| ancestor.spki == files.info.spki) {
            return None;
        }
        let shown = Shown::of(Some(&self.key.cert)).ok()?;
        let trust = Trust::new(Arc::clone(&files.roots)).ok()?;
        trust.check(&shown, jiff::Timestamp::now()).ok()?;
        Some(Self {
            roots: Arc::clone(&files.roots),
            key: Arc::clone(&self.key),
            info: self.info.clone(),
            digest: self.digest,
        })
    }
}

fn refused(names: &[String; 3], source: rustls::Error) -> CredentialsError {
    CredentialsError::Refused {
        origin: names.join(", "),
        source,
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
