//! The clients with which the kubelet talks to the API server.
//!
//! There are two, which are the same one for a ServiceAccount. With a node's identity (`system:node:NAME`, group
//! `system:nodes`) the Node authorizer and NodeRestriction limit the kubelet to its own Node, Lease and pods and to
//! what these pods refer to. The ServiceAccount does what a node may not do:
//!
//! | client | does |
//! |---|---|
//! | `node` | Node and its status, its Lease, pods, their ConfigMaps, Secrets and tokens, Services, reviews, its renewals |
//! | `account` | the node's taints after its creation, the leadership Lease, the Secret of the keys, the UID of `kube-system`, the CA of clients, Events |

use std::task::{Context, Poll};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use knoc_proto::error::chain;
use kube::{
    Client,
    client::Body,
    config::{AuthInfo, Config},
};
use tower::{BoxError, Service};

use crate::{api_client, certs::Pairs};

/// The clients of the API server of one kubelet.
#[derive(Clone)]
pub struct Clients {
    /// The client with the node's identity.
    pub node: Client,
    /// The client of the ServiceAccount.
    pub account: Client,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

/// A request was made before the node had a client certificate.
#[derive(Debug, thiserror::Error)]
#[error("the node has no client certificate yet")]
pub struct NoCertificate;

/// A client of the API server of `base` that uses the newest of these certificates. A new certificate opens new
/// connections; requests that are running on the old ones end there, long before the old certificate does.
#[must_use]
pub fn client(base: &Config, pairs: Pairs) -> Client {
    let mut config = base.clone();
    config.auth_info = AuthInfo::default();
    let namespace = config.default_namespace.clone();
    Client::new(
        Renewing {
            config,
            pairs,
            current: None,
        },
        namespace,
    )
}

/// The service under [`client`]. One task owns it, so it needs no lock.
struct Renewing {
    config: Config,
    pairs: Pairs,
    current: Option<Client>,
}

impl Renewing {
    /// The client with the newest certificate; a certificate that cannot be used changes nothing.
    fn newest(&mut self) -> Option<Client> {
        if self.current.is_none() || self.pairs.has_changed().unwrap_or(false) {
            let pair = self.pairs.borrow_and_update().clone();
            if let Some(pair) = pair {
                let mut config = self.config.clone();
                config.auth_info = AuthInfo {
                    client_certificate_data: Some(BASE64_STANDARD.encode(&pair.cert_pem)),
                    client_key_data: Some(BASE64_STANDARD.encode(&pair.key_pem).into()),
                    ..AuthInfo::default()
                };
                match api_client::connect(config) {
                    Ok(client) => self.current = Some(client),
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(%error, "could not use the new client certificate, keeping the old one");
                    }
                }
            }
        }
        self.current.clone()
    }
}

impl Service<Request<Body>> for Renewing {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let client = self.newest();
        async move {
            match client {
                Some(client) => client.send(request).await.map_err(BoxError::from),
                None => Err(BoxError::from(NoCertificate)),
            }
        }
        .boxed()
    }
}
