//! The issuer of certificates: Kubernetes, by CertificateSigningRequests. Only this module accesses those objects.

use std::time::Duration;

use futures::{FutureExt as _, future::BoxFuture};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};

use super::request::Request;

const DEADLINE: Duration = Duration::from_secs(10);

/// Why the API server gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The API server denied the request or failed.
    #[error("{what} CertificateSigningRequest {name}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The name of the CertificateSigningRequest.
        name: String,
        /// The error of the API server.
        #[source]
        source: Box<kube::Error>,
    },
    /// The API server did not answer in time.
    #[error("{what} CertificateSigningRequest {name}: no answer within {} s", DEADLINE.as_secs())]
    Late {
        /// What was tried.
        what: &'static str,
        /// The name of the CertificateSigningRequest.
        name: String,
    },
}

/// The state of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The request does not exist, or no longer.
    Absent,
    /// It is neither approved nor denied, or approved but not signed yet.
    Waiting,
    /// It was denied, or the signer could not sign it.
    Rejected(String),
    /// The certificate was issued; this is its PEM.
    Issued(String),
}

/// The issuer as the rotator needs it; tests use a fake.
pub trait Authority: Send + Sync + 'static {
    /// Returns the state of the request.
    fn look(&self, name: &str) -> BoxFuture<'_, Result<Answer, AuthorityError>>;
    /// Creates the request; succeeds if it already exists.
    fn ask(&self, request: &Request) -> BoxFuture<'_, Result<(), AuthorityError>>;
}

/// The CertificateSigningRequests of a cluster.
pub struct KubeAuthority {
    client: Client,
    /// Used if `client` is denied or has no certificate yet, for the first request of a node.
    bootstrap: Option<Client>,
}

impl std::fmt::Debug for KubeAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubeAuthority").finish_non_exhaustive()
    }
}

impl KubeAuthority {
    /// Requests as `client`, and as `bootstrap` if that fails.
    #[must_use]
    pub fn new(client: Client, bootstrap: Option<Client>) -> Self {
        Self { client, bootstrap }
    }

    async fn get(client: &Client, name: &str) -> Result<Answer, AuthorityError> {
        let api: Api<CertificateSigningRequest> = Api::all(client.clone());
        let found = bounded("get", name, api.get_opt(name)).await?;
        Ok(found.map_or(Answer::Absent, |object| answer(&object)))
    }

    async fn create(client: &Client, request: &Request) -> Result<(), AuthorityError> {
        let api: Api<CertificateSigningRequest> = Api::all(client.clone());
        let object = object(request);
        let params = PostParams::default();
        let made = api.create(&params, &object);
        match bounded("create", &request.name, made).await {
            Ok(_) => Ok(()),
            Err(AuthorityError::Call { source, .. }) if is_conflict(&source) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

impl Authority for KubeAuthority {
    fn look(&self, name: &str) -> BoxFuture<'_, Result<Answer, AuthorityError>> {
        let name = name.to_owned();
        async move {
            match (Self::get(&self.client, &name).await, &self.bootstrap) {
                (Err(_), Some(other)) => Self::get(other, &name).await,
                (answer, _) => answer,
            }
        }
        .boxed()
    }

    fn ask(&self, request: &Request) -> BoxFuture<'_, Result<(), AuthorityError>> {
        let request = request.clone();
        async move {
            match (Self::create(&self.client, &request).await, &self.bootstrap) {
                (Err(_), Some(other)) => Self::create(other, &request).await,
                (answer, _) => answer,
            }
        }
        .boxed()
    }
}

async fn bounded<T>(
    what: &'static str,
    name: &str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, AuthorityError> {
    let name = name.to_owned();
    match tokio::time::timeout(DEADLINE, call).await {
        Err(_) => Err(AuthorityError::Late { what, name }),
        Ok(Err(source)) => Err(AuthorityError::Call {
            what,
            name,
            source: Box::new(source),
        }),
        Ok(Ok(answer)) => Ok(answer),
    }
}

/// The object of a request.
#[must_use]
pub fn object(request: &Request) -> CertificateSigningRequest {
    CertificateSigningRequest {
        metadata: ObjectMeta {
            name: Some(request.name.clone()),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.pem.clone().into_bytes()),
            signer_name: request.purpose.signer().to_owned(),
            usages: Some(request.purpose.usages().map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    }
}

/// PURE: the state of the request, from its object.
#[must_use]
pub fn answer(object: &CertificateSigningRequest) -> Answer {
    let Some(status) = &object.status else {
        return Answer::Waiting;
    };
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let rejected = conditions
        .iter()
        .find(|one| matches!(one.type_.as_str(), "Denied" | "Failed"));
    if let Some(condition) = rejected {
        let parts = [&condition.reason, &condition.message];
        let parts: Vec<_> = parts.into_iter().flatten().map(String::as_str).collect();
        return Answer::Rejected(format!("{}: {}", condition.type_, parts.join(": ")));
    }
    match &status.certificate {
        Some(ByteString(pem)) if !pem.is_empty() => {
            Answer::Issued(String::from_utf8_lossy(pem).into_owned())
        }
        Some(_) | None => Answer::Waiting,
    }
}
