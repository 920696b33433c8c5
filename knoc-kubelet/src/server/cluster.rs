//! The cluster as the API needs it: reviews of tokens and of access, and the CA of client certificates.
//!
//! Every call has a deadline; nothing is cached here (see [`super::access`]).

use std::{collections::BTreeMap, time::Duration};

use futures::{FutureExt as _, future::BoxFuture};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    authorization::v1::{SubjectAccessReview, SubjectAccessReviewSpec},
    core::v1::ConfigMap,
};
use kube::api::{Api, PostParams};
use thiserror::Error;

use super::user::User;
use crate::identity::Clients;

/// The API server answers reviews in milliseconds; after this time the caller gets an error instead of a hang.
const REVIEW_DEADLINE: Duration = Duration::from_secs(10);

/// Why the cluster gave no answer.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The call failed.
    #[error("{call}")]
    Call {
        /// The call, for example "create TokenReview".
        call: &'static str,
        /// The error of the client.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{call}: no answer in {} s", REVIEW_DEADLINE.as_secs())]
    Deadline {
        /// The call, for example "create TokenReview".
        call: &'static str,
    },
    /// The answer lacks a required field.
    #[error("{call}: the answer has no {missing}")]
    Incomplete {
        /// The call, for example "create TokenReview".
        call: &'static str,
        /// The field that is missing.
        missing: &'static str,
    },
}

/// The cluster as the API needs it; tests use a fake.
pub trait Cluster: Send + Sync + 'static {
    /// Is the user allowed to do this?
    fn review_access(
        &self,
        spec: SubjectAccessReviewSpec,
    ) -> BoxFuture<'_, Result<bool, ClusterError>>;

    /// The user of the token; `None` if the cluster does not know it.
    fn review_token(&self, token: String) -> BoxFuture<'_, Result<Option<User>, ClusterError>>;

    /// The CA of client certificates, as PEM.
    fn client_ca(&self) -> BoxFuture<'_, Result<String, ClusterError>>;
}

/// The cluster behind our clients: the node's client creates reviews, and the ServiceAccount reads the client CA.
#[derive(Clone)]
pub struct KubeCluster {
    clients: Clients,
}

impl std::fmt::Debug for KubeCluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubeCluster").finish_non_exhaustive()
    }
}

impl KubeCluster {
    /// A cluster behind these clients.
    #[must_use]
    pub fn new(clients: Clients) -> Self {
        Self { clients }
    }
}

async fn bounded<T>(
    call: &'static str,
    answer: impl Future<Output = kube::Result<T>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(REVIEW_DEADLINE, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => Err(ClusterError::Call {
            call,
            source: Box::new(source),
        }),
        Err(_) => Err(ClusterError::Deadline { call }),
    }
}

impl Cluster for KubeCluster {
    fn review_access(
        &self,
        spec: SubjectAccessReviewSpec,
    ) -> BoxFuture<'_, Result<bool, ClusterError>> {
        async move {
            const CALL: &str = "create SubjectAccessReview";
            let review = SubjectAccessReview {
                spec,
                ..SubjectAccessReview::default()
            };
            let api: Api<SubjectAccessReview> = Api::all(self.clients.node.clone());
            let answer = bounded(CALL, api.create(&PostParams::default(), &review)).await?;
            let status = answer.status.ok_or(ClusterError::Incomplete {
                call: CALL,
                missing: "status",
            })?;
            Ok(status.allowed && status.denied != Some(true))
        }
        .boxed()
    }

    fn review_token(&self, token: String) -> BoxFuture<'_, Result<Option<User>, ClusterError>> {
        async move {
            const CALL: &str = "create TokenReview";
            let review = TokenReview {
                spec: TokenReviewSpec {
                    token,
                    audiences: None,
                },
                ..TokenReview::default()
            };
            let api: Api<TokenReview> = Api::all(self.clients.node.clone());
            let answer = bounded(CALL, api.create(&PostParams::default(), &review)).await?;
            let status = answer.status.ok_or(ClusterError::Incomplete {
                call: CALL,
                missing: "status",
            })?;
            Ok(status
                .user
                .filter(|_| status.authenticated == Some(true))
                .map(user))
        }
        .boxed()
    }

    fn client_ca(&self) -> BoxFuture<'_, Result<String, ClusterError>> {
        async move {
            const CALL: &str = "get ConfigMap kube-system/extension-apiserver-authentication";
            let api: Api<ConfigMap> = Api::namespaced(self.clients.account.clone(), "kube-system");
            let answer = bounded(CALL, api.get("extension-apiserver-authentication")).await?;
            answer
                .data
                .and_then(|mut data| data.remove("client-ca-file"))
                .ok_or(ClusterError::Incomplete {
                    call: CALL,
                    missing: "client-ca-file",
                })
        }
        .boxed()
    }
}

fn user(info: UserInfo) -> User {
    User {
        name: info.username.unwrap_or_default(),
        uid: info.uid.unwrap_or_default(),
        groups: info.groups.unwrap_or_default(),
        extra: info
            .extra
            .map(|extra| extra.into_iter().collect::<BTreeMap<_, _>>())
            .unwrap_or_default(),
    }
}
