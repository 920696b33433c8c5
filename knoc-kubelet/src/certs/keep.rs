//! The storage of keys and certificates: a Secret, or a folder of files with mode 0600. Each certificate has one entry,
//! so that key and certificate are replaced together.
//!
//! `serving.pem`, `client.pem` and `link.pem` (for the link to the agent) hold certificate chain and key;
//! `serving-next.pem` and `client-next.pem` hold the key of a pending request.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use knoc_link::pki::CertifiedKey;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use super::Purpose;

const DEADLINE: Duration = Duration::from_secs(10);
/// The entry of the link's renewed pair.
const LINK: &str = "link.pem";
const KEY: &str = "-----BEGIN PRIVATE KEY-----";

/// Why an entry could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The Secret could not be accessed; RBAC must grant get and patch on it by name.
    #[error("{what} Secret {name}, where the kubelet keeps its keys")]
    Secret {
        /// What was tried.
        what: &'static str,
        /// The name of the Secret.
        name: String,
        /// The error of the API server.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{what} Secret {name}: no answer within {} s", DEADLINE.as_secs())]
    Late {
        /// What was tried.
        what: &'static str,
        /// The name of the Secret.
        name: String,
    },
    /// A file in the folder could not be accessed.
    #[error("{what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The path of the file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: std::io::Error,
    },
}

/// Where keys and certificates are stored.
#[derive(Clone)]
pub enum Keep {
    /// A Secret in the kubelet's own namespace.
    Secret {
        /// The API of that namespace.
        api: Box<Api<Secret>>,
        /// The name of the Secret.
        name: String,
    },
    /// Files in this folder.
    Folder(PathBuf),
}

impl std::fmt::Debug for Keep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Secret { name, .. } => f.debug_tuple("Secret").field(name).finish(),
            Self::Folder(path) => f.debug_tuple("Folder").field(path).finish(),
        }
    }
}

impl Keep {
    /// Stores in the Secret `name` of a namespace.
    #[must_use]
    pub fn secret(client: Client, namespace: &str, name: &str) -> Self {
        Self::Secret {
            api: Box::new(Api::namespaced(client, namespace)),
            name: name.to_owned(),
        }
    }

    /// The stored pair of a purpose. Text that is not a pair counts as none.
    pub async fn pair(&self, purpose: Purpose) -> Result<Option<CertifiedKey>, KeepError> {
        let text = self.read(&current(purpose)).await?;
        Ok(text.and_then(|text| split(&text)))
    }

    /// The key of the pending request.
    pub async fn next_key(&self, purpose: Purpose) -> Result<Option<String>, KeepError> {
        self.read(&next(purpose)).await
    }

    /// Stores the key of a request before the request is created.
    pub async fn put_next_key(&self, purpose: Purpose, key: &str) -> Result<(), KeepError> {
        self.write(&[(next(purpose), Some(key.to_owned()))]).await
    }

    /// Deletes the key of a request.
    pub async fn drop_next_key(&self, purpose: Purpose) -> Result<(), KeepError> {
        self.write(&[(next(purpose), None)]).await
    }

    /// Stores a pair, and deletes the key of its request.
    pub async fn put_pair(&self, purpose: Purpose, pair: &CertifiedKey) -> Result<(), KeepError> {
        let changes = [
            (current(purpose), Some(joined(pair))),
            (next(purpose), None),
        ];
        self.write(&changes).await
    }

    /// The stored renewed pair of the link to the agent.
    pub async fn link_pair(&self) -> Result<Option<CertifiedKey>, KeepError> {
        Ok(self.read(LINK).await?.and_then(|text| split(&text)))
    }

    /// Stores a renewed pair of the link.
    pub async fn put_link_pair(&self, pair: &CertifiedKey) -> Result<(), KeepError> {
        self.write(&[(LINK.to_owned(), Some(joined(pair)))]).await
    }

    async fn read(&self, entry: &str) -> Result<Option<String>, KeepError> {
        match self {
            Self::Secret { api, name } => {
                let found = bounded("get", name, api.get_opt(name)).await?;
                let data = found.and_then(|secret| secret.data);
                let value = data.and_then(|mut data| data.remove(entry));
                Ok(value.and_then(|ByteString(bytes)| String::from_utf8(bytes).ok()))
            }
            Self::Folder(folder) => {
                let path = folder.join(entry);
                match tokio::fs::read_to_string(&path).await {
                    Ok(text) => Ok(Some(text)),
                    Err(source) if source.kind() == ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(file("read", &path, source)),
                }
            }
        }
    }

    async fn write(&self, changes: &[(String, Option<String>)]) -> Result<(), KeepError> {
        match self {
            Self::Secret { api, name } => write_secret(api, name, changes).await,
            Self::Folder(folder) => {
                for (entry, text) in changes {
                    let path = folder.join(entry);
                    match text {
                        Some(text) => replace(&path, text)
                            .await
                            .map_err(|source| file("write", &path, source))?,
                        None => match tokio::fs::remove_file(&path).await {
                            Err(source) if source.kind() != ErrorKind::NotFound => {
                                return Err(file("remove", &path, source));
                            }
                            Ok(()) | Err(_) => {}
                        },
                    }
                }
                Ok(())
            }
        }
    }
}

fn current(purpose: Purpose) -> String {
    format!("{}.pem", purpose.name())
}

fn next(purpose: Purpose) -> String {
    format!("{}-next.pem", purpose.name())
}

fn joined(pair: &CertifiedKey) -> String {
    format!("{}\n{}", pair.cert_pem.trim_end(), pair.key_pem)
}

/// Splits the text into certificates and key, which come in this order.
fn split(text: &str) -> Option<CertifiedKey> {
    let at = text.find(KEY)?;
    let (certificates, key) = text.split_at(at);
    Some(CertifiedKey {
        cert_pem: certificates.to_owned(),
        key_pem: key.to_owned(),
    })
}

async fn write_secret(
    api: &Api<Secret>,
    name: &str,
    changes: &[(String, Option<String>)],
) -> Result<(), KeepError> {
    let encoded = |text: &String| ByteString(text.clone().into_bytes());
    let data: serde_json::Map<_, _> = changes
        .iter()
        .map(|(entry, text)| (entry.clone(), json!(text.as_ref().map(encoded))))
        .collect();
    let patch = json!({"data": data});
    let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
    let patched = bounded("patch", name, api.patch(name, &params, &patch)).await;
    let Err(KeepError::Secret { source, .. }) = &patched else {
        return patched.map(drop);
    };
    if !matches!(&**source, kube::Error::Api(status) if status.code == 404) {
        return patched.map(drop);
    }
    // The chart creates the Secret; other installations do not.
    let mut secret = Secret::default();
    secret.metadata.name = Some(name.to_owned());
    let kept = changes
        .iter()
        .filter_map(|(entry, text)| Some((entry.clone(), encoded(text.as_ref()?))));
    secret.data = Some(kept.collect());
    let params = PostParams::default();
    bounded("create", name, api.create(&params, &secret))
        .await
        .map(drop)
}

async fn bounded<T>(
    what: &'static str,
    name: &str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, KeepError> {
    let name = name.to_owned();
    match tokio::time::timeout(DEADLINE, call).await {
        Err(_) => Err(KeepError::Late { what, name }),
        Ok(Err(source)) => Err(KeepError::Secret {
            what,
            name,
            source: Box::new(source),
        }),
        Ok(Ok(answer)) => Ok(answer),
    }
}

fn file(what: &'static str, path: &Path, source: std::io::Error) -> KeepError {
    KeepError::File {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Replaces a file atomically: writes another file, syncs it and renames it.
async fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let aside = path.with_extension("pem.new");
    let mut options = tokio::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut to = options.open(&aside).await?;
    to.write_all(text.as_bytes()).await?;
    to.sync_all().await?;
    drop(to);
    tokio::fs::rename(&aside, path).await
}
