//! The TLS configuration of the API: serving certificate and client CA, both replaced while the server runs.
//!
//! Owner: the server's reload task. Every [`RELOAD_INTERVAL`] it reads the files again, or asks the cluster for the CA;
//! it uses the kubelet's own certificate as soon as there is a newer one, and publishes both on `watch` channels. If
//! something cannot be read or does not match, this is logged once and the old certificates stay.
//!
//! The handshake accepts any client certificate whose key the client holds, whoever signed it. [`super::authn`] decides
//! for each request whether it is valid, so that a wrong one is answered 401 and logged with the name that it claims,
//! and a replaced CA applies at once to open connections too.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use knoc_link::verifier::{CheckCertificate, Tls13Verifier, provider};
use knoc_proto::error::chain;
use rustls::{
    RootCertStore, ServerConfig,
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{ClientCa, Cluster, Serving};

/// How often files and ConfigMap are read again; a mounted Secret takes up to a minute to change anyway.
pub(super) const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

/// The name of the kubelet's own certificate in messages.
const OWN: &str = "the kubelet's own certificate";

/// The verifier of client certificates; None while no CA is known.
pub(super) type Verifier = Option<Arc<dyn ClientCertVerifier>>;

/// Why certificates could not be loaded.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system.
        #[source]
        source: std::io::Error,
    },
    /// The data is not PEM, or holds no certificate or key.
    #[error("read PEM of {what}")]
    Pem {
        /// The name of the file or certificate.
        what: String,
        /// The error of the parser.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// The PEM data holds no certificate.
    #[error("no certificate in {what}")]
    Empty {
        /// The name of the file or certificate.
        what: String,
    },
    /// Certificate and key do not match, or the CA cannot be used.
    #[error("{what} cannot be used")]
    Unusable {
        /// The name of the file or certificate.
        what: String,
        /// The error of rustls.
        #[source]
        source: rustls::Error,
    },
    /// The CA's certificates cannot be trust anchors.
    #[error("the client CA of {what} cannot be used")]
    Ca {
        /// Where the CA comes from.
        what: String,
        /// The error of rustls.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// The client CA could not be read from the cluster.
    #[error("read the client CA from the cluster")]
    Cluster {
        /// The error of the call.
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

/// The state of the reload task.
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
    /// Loads everything once. A serving certificate or CA file that cannot be used is an error at start. A CA that
    /// cannot be read from the cluster yet is requested again later; until then every client certificate is rejected.
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
            Err(error @ TlsError::Cluster { .. }) => reload.log_once(&error),
            other => other?,
        }
        let tls = Tls {
            config: config_reader,
            verifier: verifier_reader,
        };
        Ok((reload, tls))
    }

    /// Reloads every `interval`, and for each new certificate of the kubelet's own, until `shutdown`.
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
            Err(error) => self.log_once(&error),
        }
    }

    /// Logs a problem once, until it changes or ends.
    fn log_once(&mut self, error: &TlsError) {
        let problem = chain(error);
        if problem != self.last_problem {
            warn!(error = %problem, "could not reload the certificates of the kubelet API, the old ones stay");
            self.last_problem = problem;
        }
    }

    async fn reload_serving(&mut self) -> Result<(), TlsError> {
        let material = read_serving(&self.serving).await?;
        if material != self.seen_serving {
            self.config
                .send_replace(server_config(&self.serving, &material)?);
            self.seen_serving = material;
            info!("the serving certificate of the kubelet API was replaced");
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
                info!(source = %what, "the client CA of the kubelet API was replaced");
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

/// Returns when the kubelet has a newer certificate of its own; never for files, which do not notify.
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

/// Requests a client certificate, accepts any whose key the client holds, and also none.
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
