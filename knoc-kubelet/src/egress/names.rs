//! Task: finds out whether the API server's certificate names what pods are told to use: the address of its Service, and the name
//! `kubernetes.default.svc`, which pods in the node's network have, since the address leads nowhere there. If it does not, their
//! clients fail with an error of TLS, and the node says why, in an Event and a condition.
//!
//! It looks once for each change of the addresses, and again now and then, since certificates are replaced; never for a pod. The
//! handshake is all that is sent. Who has issued the certificate is not checked: pods do that.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use knoc_link::verifier::{CheckCertificate, Tls13Verifier, provider};
use knoc_proto::{egress::AllowList, error::chain};
use rustls::{
    CertificateError, ClientConfig,
    client::{Resumption, verify_server_name},
    server::ParsedCertificate,
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use super::{
    GATHER, Setup,
    decide::{self, ApiServer},
    told::Troubles,
    watch::Cluster,
};
use crate::{
    node::{api_names::ApiNames, unit::Unit},
    pods::events::{Events, Note, about_node},
};

/// What containers in the node's network have as the API server's host, and what every cluster's DNS has.
const NAME: &str = "kubernetes.default.svc";
/// When the certificates are looked at again although no address has changed.
const AGAIN: Duration = Duration::from_mins(10);
/// The same if no endpoint has shown one.
const RETRY: Duration = Duration::from_secs(30);
/// The shortest time between two looks, however often the addresses change.
const REST: Duration = Duration::from_secs(10);
/// The most endpoints that are looked at.
const ENDPOINTS: usize = 4;
/// How long an endpoint may take to show its certificate.
const LOOK: Duration = Duration::from_secs(5);
/// The most names of a certificate that a message has.
const SHOWN: usize = 8;

/// The task.
#[derive(Debug)]
pub(super) struct Names {
    cluster: Cluster,
    allow: AllowList,
    unit: Arc<Unit>,
    events: Events,
    told: Troubles,
}

/// A name that a certificate lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Lack {
    endpoint: SocketAddr,
    name: ServerName<'static>,
    /// What it names instead.
    instead: Vec<String>,
}

impl Names {
    pub(super) fn new(setup: &Setup, cluster: Cluster) -> Self {
        Self {
            cluster,
            allow: setup.config.allow.clone(),
            unit: Arc::clone(&setup.unit),
            events: setup.events.clone(),
            told: Troubles::default(),
        }
    }

    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.follow() => {}
        }
    }

    /// Looks whenever it is due. It has no end.
    async fn follow(&mut self) {
        loop {
            let server = self.server();
            let mut due = AGAIN;
            let mut rested = Instant::now();
            if let Some(server) = &server {
                rested += REST;
                if !self.look_at(server).await {
                    due = RETRY;
                }
            }
            tokio::select! {
                () = self.changes(server.as_ref()) => {}
                () = sleep(due.mul_f64(rand::random_range(0.8..1.2))) => {}
            }
            sleep_until(rested).await;
        }
    }

    /// Where pods reach the API server, once it is known.
    fn server(&self) -> Option<ApiServer> {
        let server = self
            .cluster
            .look(|state| decide::api_server(&state.table, &state.around, &self.allow));
        server.flatten()
    }

    /// Waits until pods reach it elsewhere.
    async fn changes(&self, known: Option<&ApiServer>) {
        let mut changed = self.cluster.subscribe();
        while self.server().as_ref() == known {
            // It ends only with the process.
            changed.changed().await.ok();
            sleep(GATHER).await;
        }
    }

    /// Looks at the certificates and tells what they lack. Returns false if no endpoint has shown one: what was found before stays.
    async fn look_at(&mut self, server: &ApiServer) -> bool {
        let mut lacks = Vec::new();
        let mut is_seen = false;
        for endpoint in server.endpoints.iter().copied().take(ENDPOINTS) {
            for name in names(server.address) {
                match names_instead(endpoint, name.clone()).await {
                    Ok(None) => is_seen = true,
                    Ok(Some(instead)) => {
                        is_seen = true;
                        lacks.push(Lack {
                            endpoint,
                            name,
                            instead,
                        });
                    }
                    Err(error) => {
                        tracing::debug!(%endpoint, error = chain(&error), "no certificate of the API server was seen");
                    }
                }
            }
        }
        if !is_seen {
            return false;
        }
        let lacking = describe(&lacks);
        for message in self.told.news(lacking.iter().cloned().collect()) {
            tracing::warn!("{message}");
            let object = about_node(self.unit.name());
            let note = Note::warning(object, "ApiServerCertificateMismatch", message);
            self.events.record(note);
        }
        let found = lacking.map_or(ApiNames::Named, ApiNames::Lacking);
        self.unit.set_api_names(found);
        true
    }
}

/// PURE: what pods are told to use for the API server.
fn names(address: IpAddr) -> impl Iterator<Item = ServerName<'static>> {
    let name = ServerName::try_from(NAME).ok();
    [ServerName::from(address)].into_iter().chain(name)
}

/// PURE: one sentence about what is missing, whom it concerns and what to do; `None` if nothing is missing.
fn describe(lacks: &[Lack]) -> Option<String> {
    let is_address = |lack: &&Lack| matches!(lack.name, ServerName::IpAddress(_));
    let address = lacks.iter().find(is_address);
    let name = lacks.iter().find(|lack| !is_address(lack));
    let first = lacks.first()?;
    let missing: Vec<_> = [
        address.map(|lack| {
            format!(
                "{}, by which pods in a network of their own reach it",
                lack.name.to_str()
            )
        }),
        name.map(|_| format!("{NAME}, by which pods in the node's network reach it")),
    ]
    .into_iter()
    .flatten()
    .collect();
    let instead = match (address, name) {
        (Some(_), None) => format!(
            ", or set KUBERNETES_SERVICE_HOST to {NAME} in these pods, if they ask the cluster's DNS"
        ),
        (None, Some(_)) => {
            ", or give these pods a network of their own (annotation knoc.io/network: private)"
                .to_owned()
        }
        (Some(_), Some(_)) | (None, None) => String::new(),
    };
    let mut shown: Vec<_> = first
        .instead
        .iter()
        .take(SHOWN)
        .map(|one| plain(one))
        .collect();
    if first.instead.len() > SHOWN {
        shown.push("…");
    }
    if shown.is_empty() {
        shown.push("nothing");
    }
    Some(format!(
        "the certificate of the API server at {} does not name {}, so Kubernetes clients in these pods fail with an error of TLS: add \
         what is missing to its subject alternative names (kubeadm: apiServer.certSANs; k3s: tls-san){instead}. It names {}",
        first.endpoint,
        missing.join(", nor "),
        shown.join(", "),
    ))
}

/// PURE: the name in rustls's text `DnsName("name")` or `IpAddress(address)`.
fn plain(presented: &str) -> &str {
    let inner = presented
        .split_once('(')
        .map_or(presented, |(_, inner)| inner);
    inner.trim_end_matches(')').trim_matches('"')
}

/// Which names the certificate of an endpoint has, if `name` is none of them.
async fn names_instead(
    endpoint: SocketAddr,
    name: ServerName<'static>,
) -> io::Result<Option<Vec<String>>> {
    let connector = TlsConnector::from(Arc::new(config(name.clone())?));
    let shown = async {
        let stream = TcpStream::connect(endpoint).await?;
        connector.connect(name, stream).await
    };
    match timeout(LOOK, shown).await {
        Ok(Ok(_)) => Ok(None),
        Ok(Err(error)) => match presented(&error) {
            Some(presented) => Ok(Some(presented)),
            None => Err(error),
        },
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// PURE: the names of a certificate that was rejected because it lacks one.
fn presented(error: &io::Error) -> Option<Vec<String>> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let rustls::Error::InvalidCertificate(error) = error else {
        return None;
    };
    if let CertificateError::NotValidForNameContext { presented, .. } = error {
        Some(presented.clone())
    } else {
        (*error == CertificateError::NotValidForName).then(Vec::new)
    }
}

/// Without a client's certificate and without sessions: in a resumed one the server shows none. Every API server speaks TLS 1.3.
fn config(name: ServerName<'static>) -> io::Result<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Tls13Verifier(Named(name))))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Accepts every certificate that has this name, whoever has issued it.
#[derive(Debug)]
struct Named(ServerName<'static>);

impl CheckCertificate for Named {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<(), rustls::Error> {
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.0)
    }
}

#[cfg(test)]
mod tests;
