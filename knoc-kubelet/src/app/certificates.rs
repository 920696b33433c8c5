//! Which certificates of its own this kubelet has, and the clients that use them.

use std::{collections::BTreeSet, sync::Arc};

use knoc_link::pki::CertifiedKey;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{App, RunError};
use crate::{
    certs::{Issuer, KubeAuthority, Pairs, Purpose, Rotator, Wanted},
    config::ServingConfig,
    identity::{self, Clients},
    node::Certificates,
    pods::events::Events,
};

/// The clients and the health of our own certificates.
pub(super) struct Own {
    pub(super) clients: Clients,
    /// The health of each certificate, for the node's conditions.
    pub(super) health: Certificates,
    /// The serving certificate, if it is not read from files.
    pub(super) serving: Option<Pairs>,
}

impl App {
    /// Starts a task for each of our own certificates. With a node's identity this waits until the client certificate
    /// is approved, however long that takes.
    pub(super) async fn certificates(
        &self,
        tasks: &mut JoinSet<()>,
        shutdown: &CancellationToken,
        events: &Events,
    ) -> Result<Own, RunError> {
        let mut health = Certificates::new();
        let account = self.account.clone();
        let mut node = account.clone();
        if let Some(bootstrap) = &self.bootstrap {
            let (newest, mut pairs) = watch::channel(None);
            node = identity::client(&self.kube_config, pairs.clone());
            let authority = KubeAuthority::new(node.clone(), Some(bootstrap.clone()));
            let issuer = Issuer::Authority(Arc::new(authority));
            let wanted = self.wanted(Purpose::Client);
            let rotator = self.rotator(wanted, issuer, events, newest).await?;
            health.push((Purpose::Client, rotator.health()));
            tasks.spawn(rotator.run(shutdown.clone()));
            // An error means that the task has ended because the kubelet stops.
            drop(pairs.wait_for(Option::is_some).await);
        }
        let clients = Clients { node, account };
        let serving = match self.config.server.serving {
            ServingConfig::Files(..) => None,
            ServingConfig::SelfSigned => Some(Issuer::SelfSigned),
            ServingConfig::Csr => {
                let authority = KubeAuthority::new(clients.node.clone(), None);
                Some(Issuer::Authority(Arc::new(authority)))
            }
        };
        let Some(issuer) = serving else {
            return Ok(Own {
                clients,
                health,
                serving: None,
            });
        };
        let wanted = self.wanted(Purpose::Serving);
        let (newest, pairs) = watch::channel(None);
        let rotator = self.rotator(wanted, issuer, events, newest).await?;
        health.push((Purpose::Serving, rotator.health()));
        tasks.spawn(rotator.run(shutdown.clone()));
        Ok(Own {
            clients,
            health,
            serving: Some(pairs),
        })
    }

    fn wanted(&self, purpose: Purpose) -> Wanted {
        Wanted {
            purpose,
            node: self.config.node.name.clone(),
            // The address that the Node publishes; a client certificate has no names.
            names: match purpose {
                Purpose::Serving => BTreeSet::from([self.internal_ip.clone()]),
                Purpose::Client => BTreeSet::new(),
            },
        }
    }

    async fn rotator(
        &self,
        wanted: Wanted,
        issuer: Issuer,
        events: &Events,
        newest: watch::Sender<Option<Arc<CertifiedKey>>>,
    ) -> Result<Rotator, RunError> {
        let purpose = wanted.purpose.name();
        Rotator::start(wanted, self.keep(), issuer, events.clone(), newest)
            .await
            .map_err(|source| RunError::Certificate { purpose, source })
    }
}
