//! The TLS side of the API: serving certificate and client CA, both replaced while the server runs.
//!
//! Owner: the server's reload task, which re-reads the files (and asks the cluster for the CA, where it is the source)
//! every [`RELOAD_INTERVAL`], takes the kubelet's own certificate as soon as there is a newer one, and publishes what
//! it got on two `watch` channels. What cannot be read or does not fit together is logged once and the old stays.
//!
//! A client certificate is taken from whoever presents one and proves to hold its key, whoever signed it; whether it
//! counts is decided for each request by [`super::authn`], so that a wrong one is answered 401 and logged with the
//! name it claims, and a replaced CA counts at once on open connections too.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use knoc_link::verifier::{CheckCertificate, Tls13Verifier, provider};
use knoc_proto::error::chain;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{ClientCa, Cluster, Serving};

/// How often files and ConfigMap are looked at again; a mounted Secret takes up to a minute to change anyway.
pub(super) const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

/// The kubelet's own certificate, in messages.
const OWN: &str = "the kubelet's own certificate";

/// The verifier of client certificates, or none while no CA is known.
pub(super) type Verifier = Option<Arc<dyn ClientCertVerifier>>;

/// Why certificates could not be loaded.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is not PEM, or holds no certificate or key.
    #[error("read PEM of {what}")]
    Pem {
        /// Which material.
        what: String,
        /// What the parser said.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A PEM text holds no certificate.
    #[error("no certificate in {what}")]
    Empty {
        /// Which material.
        what: String,
    },
    /// Certificate and key do not fit together, or the CA is not usable.
    #[error("use {what}")]
    Unusable {
        /// Which material.
        what: String,
        /// What rustls said.
        #[source]
        source: rustls::Error,
    },
    /// The CA's certificates cannot be trust anchors.
    #[error("use the client CA of {what}")]
    Ca {
        /// Where the CA is from.
        what: String,
        /// What rustls said.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// The cluster could not tell the client CA.
    #[error("ask the cluster for the client CA")]
    Cluster {
        /// What it said.
        #[source]
        source: super::ClusterError,
    },
}

/// What the accept loop and the routes read.
#[derive(Debug, Clone)]
pub(super) struct Tls {
    pub(super) config: watch::Receiver<Arc<ServerConfig>>,
    pub(super) verifier: watch::Receiver<Verifier>,
}

/// The task's half.
pub(super) struct Reload {
    serving: Serving,
    client_ca: ClientCa,
    cluster: Arc<dyn Cluster>,
    seen_serving: Material,
    seen_ca: Option<Vec<u8>>,
    last_problem: String,
    config: watch::Sender<Arc<ServerConfig>>,
    verifier: watch::Sender<Verifier>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Material {
    certificates: Vec<u8>,
    key: Vec<u8>,
}

impl Reload {
    /// Loads everything once; a serving certificate that cannot be used is an error at start, and so is a CA file.
    /// A CA that the cluster does not tell yet is asked for again later: until then every certificate is refused.
    pub(super) async fn start(
        serving: Serving,
        client_ca: ClientCa,
        cluster: Arc<dyn Cluster>,
    ) -> Result<(Self, Tls), TlsError> {
        let material = read_serving(&serving).await?;
        let (config, config_reader) = watch::channel(server_config(&serving, &material)?);
        let (verifier, verifier_reader) = watch::channel(None);
        let mut reload = Self {
            serving,
            client_ca,
            cluster,
            seen_serving: material,
            seen_ca: None,
            last_problem: String::new(),
            config,
            verifier,
        };
        match reload.reload_ca().await {
            Err(error @ TlsError::Cluster { .. }) => reload.complain(&error),
            other => other?,
        }
        let tls = Tls {
            config: config_reader,
            verifier: verifier_reader,
        };
        Ok((reload, tls))
    }

    /// Re-reads every `interval` until `shutdown`.
    pub(super) async fn run(mut self, interval: Duration, shutdown: CancellationToken) {
        let tick = async |reload: &mut Self| {
            tokio::select! {
                biased;
                () = newer(&mut reload.serving) => {}
                () = tokio::time::sleep(interval) => {}
            }
            reload.reload().await;
        };
        while shutdown
            .run_until_cancelled(tick(&mut self))
            .await
            .is_some()
        {}
    }

    async fn reload(&mut self) {
        let serving = self.reload_serving().await;
        let ca = self.reload_ca().await;
        match serving.and(ca) {
            Ok(()) => self.last_problem.clear(),
            Err(error) => self.complain(&error),
        }
    }

    /// Logs a problem once, until it changes or ends.
    fn complain(&mut self, error: &TlsError) {
        let problem = chain(error);
        if problem != self.last_problem {
            warn!(error = %problem, "certificates of the kubelet API were not reloaded, the old ones stay");
            self.last_problem = problem;
        }
    }

    async fn reload_serving(&mut self) -> Result<(), TlsError> {
        let material = read_serving(&self.serving).await?;
        if material != self.seen_serving {
            self.config
                .send_replace(server_config(&self.serving, &material)?);
            self.seen_serving = material;
            info!("serving certificate of the kubelet API was replaced");
        }
        Ok(())
    }

    async fn reload_ca(&mut self) -> Result<(), TlsError> {
        let (what, pem) = match &self.client_ca {
            ClientCa::File(path) => (path.display().to_string(), read(path).await?),
            ClientCa::Cluster => {
                let pem = self.cluster.client_ca().await;
                let pem = pem.map_err(|source| TlsError::Cluster { source })?;
                ("the cluster".to_owned(), pem.into_bytes())
            }
        };
        if self.seen_ca.as_ref() != Some(&pem) {
            self.verifier.send_replace(Some(verifier(&what, &pem)?));
            if self.seen_ca.is_some() {
                info!(source = %what, "client CA of the kubelet API was replaced");
            }
            self.seen_ca = Some(pem);
        }
        Ok(())
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    tokio::fs::read(path)
        .await
        .map_err(|source| TlsError::Read {
            path: path.to_owned(),
            source,
        })
}

async fn read_serving(serving: &Serving) -> Result<Material, TlsError> {
    match serving {
        Serving::Files { certificate, key } => Ok(Material {
            certificates: read(certificate).await?,
            key: read(key).await?,
        }),
        Serving::Own(pairs) => {
            let pair = pairs.borrow().clone();
            let pair = pair.ok_or_else(|| TlsError::Empty {
                what: OWN.to_owned(),
            })?;
            Ok(Material {
                certificates: pair.cert_pem.clone().into_bytes(),
                key: pair.key_pem.clone().into_bytes(),
            })
        }
    }
}

/// Until the kubelet has a newer certificate of its own; never for files, which tell nobody.
async fn newer(serving: &mut Serving) {
    let changed = match serving {
        Serving::Files { .. } => false,
        Serving::Own(pairs) => pairs.changed().await.is_ok(),
    };
    if !changed {
        std::future::pending::<()>().await;
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem {
            what: what.to_owned(),
            source,
        })?;
    if found.is_empty() {
        return Err(TlsError::Empty {
            what: what.to_owned(),
        });
    }
    Ok(found)
}

fn server_config(serving: &Serving, material: &Material) -> Result<Arc<ServerConfig>, TlsError> {
    let (what, key_what) = match serving {
        Serving::Files { certificate, key } => {
            (certificate.display().to_string(), key.display().to_string())
        }
        Serving::Own(_) => (OWN.to_owned(), OWN.to_owned()),
    };
    let chain = certificates(&what, &material.certificates)?;
    let key = PrivateKeyDer::from_pem_slice(&material.key).map_err(|source| TlsError::Pem {
        what: key_what,
        source,
    })?;
    let unusable = |source| TlsError::Unusable {
        what: what.clone(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Arc::new(Tls13Verifier(AnyClient)))
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    // Upgrades (SPDY, WebSocket) need HTTP/1.1, and every client that comes here speaks it.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn verifier(what: &str, pem: &[u8]) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(what, pem)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Unusable {
                what: what.to_owned(),
                source,
            })?;
    }
    let built = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
    let verifier: Arc<dyn ClientCertVerifier> = built.map_err(|source| TlsError::Ca {
        what: what.to_owned(),
        source,
    })?;
    Ok(verifier)
}

/// Asks for a client certificate, accepts any whose key the client holds, and does without.
#[derive(Debug)]
struct AnyClient;

impl CheckCertificate for AnyClient {
    fn mandatory(&self) -> bool {
        false
    }

    fn check(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<(), rustls::Error> {
        Ok(())
    }
}
