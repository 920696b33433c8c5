//! Finds the container or pod that a stream is for: the checks before the upgrade, with the errors of the Kubernetes
//! kubelet.

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::{
    ids::PodUid,
    pb::{self, container_status::State},
};
use serde::Deserialize;

use super::{Context, PodView};

/// An error answer: status and text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HttpError(pub(super) StatusCode, pub(super) String);

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl HttpError {
    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    pub(super) fn internal(text: impl Into<String>) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, text.into())
    }
}

/// The pod that a path names.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Target {
    pub(super) namespace: String,
    pub(super) pod: String,
    /// If the path has a UID, it must be that of the pod.
    pub(super) uid: Option<String>,
}

/// What a container has for an attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attachable {
    pub(super) stdin: bool,
    pub(super) tty: bool,
}

/// The container that a path names.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ContainerTarget {
    #[serde(flatten)]
    pub(super) target: Target,
    pub(super) container: String,
}

impl Target {
    /// The pod's name as in the errors of the Kubernetes kubelet.
    fn full_name(&self) -> String {
        format!("{}_{}", self.pod, self.namespace)
    }

    /// The pod; 404 if it is not known.
    pub(super) fn pod(&self, context: &Context) -> Result<PodView, HttpError> {
        context
            .backend
            .pod(&self.namespace, &self.pod)
            .ok_or_else(|| HttpError(StatusCode::NOT_FOUND, "pod does not exist".to_owned()))
    }

    fn is_uid_of(&self, pod: &Pod) -> bool {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        self.uid.as_deref().is_none_or(|asked| asked == uid)
    }

    /// The UID of the pod, if the container runs, for an exec.
    pub(super) fn exec(&self, context: &Context, container: &str) -> Result<PodUid, HttpError> {
        let view = self.pod(context)?;
        if self.is_uid_of(&view.pod) && runs(&view, container) {
            return uid(&view);
        }
        Err(HttpError::internal(format!(
            "container not found ({container:?})"
        )))
    }

    /// The UID of the pod and what the container has, if it runs, to attach to it.
    pub(super) fn attach(
        &self,
        context: &Context,
        container: &str,
    ) -> Result<(PodUid, Attachable), HttpError> {
        let view = self.pod(context)?;
        let name = self.full_name();
        if !self.is_uid_of(&view.pod) {
            return Err(HttpError::internal(format!("pod {name} not found")));
        }
        match streams(&view.pod, container) {
            Some(streams) if runs(&view, container) => Ok((uid(&view)?, streams)),
            Some(_) | None => Err(HttpError::internal(format!(
                "container {container} not found in pod {name}"
            ))),
        }
    }

    /// The UID of the pod, if it runs, for connections to its ports.
    pub(super) fn port_forward(&self, context: &Context) -> Result<PodUid, HttpError> {
        let view = self.pod(context)?;
        if !self.is_uid_of(&view.pod) {
            return Err(HttpError(StatusCode::NOT_FOUND, "pod not found".to_owned()));
        }
        let observed = view.observed.as_deref();
        let statuses = observed
            .iter()
            .flat_map(|it| it.init_containers.iter().chain(&it.containers));
        let mut states = statuses.map(|status| &status.state);
        if states.any(|state| matches!(state, Some(State::Running(_)))) {
            return uid(&view);
        }
        Err(HttpError::internal(format!(
            "pod not found ({:?})",
            self.full_name()
        )))
    }
}

/// The pod's UID, which is its key at the agent.
pub(super) fn uid(view: &PodView) -> Result<PodUid, HttpError> {
    let uid = view.pod.metadata.uid.as_deref().unwrap_or_default();
    PodUid::try_from(uid).map_err(|invalid| HttpError::internal(invalid.to_string()))
}

fn runs(view: &PodView, container: &str) -> bool {
    let observed = view.observed.as_deref();
    observed
        .and_then(|observed| container_status(observed, container))
        .is_some_and(|status| matches!(status.state, Some(State::Running(_))))
}

/// What a container of the pod, of whatever kind, has for an attach.
fn streams(pod: &Pod, name: &str) -> Option<Attachable> {
    let spec = pod.spec.as_ref()?;
    let init = spec.init_containers.iter().flatten();
    let mut lasting = spec.containers.iter().chain(init);
    let lasting = lasting
        .find(|one| one.name == name)
        .map(|one| (one.stdin, one.tty));
    let mut ephemeral = spec.ephemeral_containers.iter().flatten();
    let ephemeral = ephemeral
        .find(|one| one.name == name)
        .map(|one| (one.stdin, one.tty));
    let (stdin, tty) = lasting.or(ephemeral)?;
    Some(Attachable {
        stdin: stdin == Some(true),
        tty: tty == Some(true),
    })
}

/// The observed status of a container.
pub(super) fn container_status<'a>(
    observed: &'a pb::PodObserved,
    container: &str,
) -> Option<&'a pb::ContainerStatus> {
    observed
        .containers
        .iter()
        .chain(&observed.init_containers)
        .chain(&observed.ephemeral_containers)
        .find(|status| status.name == container)
}
