//! `GET /containerLogs/{namespace}/{pod}/{container}`: a container's log, as `kubectl logs` reads it.
//!
//! The agent filters at the source. Bytes are relayed chunk by chunk, and a client that reads slowly delays only its
//! own stream. A log whose link to the agent is lost continues once the link is back, where it stopped
//! ([`knoc_link::log_reader`]). Errors before the first byte are a status with the text of the Kubernetes kubelet; a later
//! error breaks the connection, so that an incomplete log is never taken for a complete one.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    response::{IntoResponse as _, Response},
};
use futures::{FutureExt as _, TryStreamExt as _};
use http::{StatusCode, header};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb::{self, container_status::State as ContainerState};
use knoc_remotecommand::query::Query;
use tracing::{info, warn};

use super::{
    Context, PodView,
    options::{BadOptions, LogOptions},
    remote::client_message,
    target::{self, HttpError, container_status},
};
use crate::pods::status::refused;

/// Answers a request for a log.
pub(super) async fn container_logs(
    State(context): State<Arc<Context>>,
    Path((namespace, name, container)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
) -> Response {
    let prepared = options(query.as_deref())
        .and_then(|options| prepare(&context, &options, &namespace, &name, &container));
    let request = match prepared {
        Ok(request) => request,
        Err(error) => return error.into_response(),
    };
    let call = match context.calls.take() {
        Ok(call) => call,
        Err(busy) => return busy.into_response(),
    };
    let what = format!("{namespace}/{name}/{container}");
    match context.backend.read_logs(request).await {
        Ok(stream) => {
            let stream = stream.or_else(move |status| {
                // The permit is released together with the stream.
                let _call = &call;
                warn!(container = what, code = ?status.code(), error = status.message(), "a log stream failed");
                // Lets the connection flush the earlier bytes, which it would not do on an error.
                tokio::task::yield_now().map(|()| Err(status))
            });
            let plain = [(header::CONTENT_TYPE, "text/plain")];
            (plain, Body::from_stream(stream)).into_response()
        }
        Err(status) => {
            info!(container = what, code = ?status.code(), error = status.message(), "could not read a log");
            (StatusCode::BAD_REQUEST, client_message(&status)).into_response()
        }
    }
}

fn options(query: Option<&str>) -> Result<LogOptions, HttpError> {
    let undecodable = || {
        let text = r#"{"message": "Unable to decode query."}"#;
        HttpError(StatusCode::BAD_REQUEST, text.to_owned())
    };
    let query = Query::parse(query.unwrap_or_default()).map_err(|_| undecodable())?;
    LogOptions::parse(&query).map_err(|bad| match bad {
        BadOptions::Undecodable => undecodable(),
        BadOptions::Invalid => {
            let text = r#"{"message": "Invalid request."}"#;
            HttpError(StatusCode::UNPROCESSABLE_ENTITY, text.to_owned())
        }
    })
}

fn prepare(
    context: &Context,
    options: &LogOptions,
    namespace: &str,
    name: &str,
    container: &str,
) -> Result<pb::ReadLogsRequest, HttpError> {
    let not_found = |text: String| HttpError(StatusCode::NOT_FOUND, text);
    let view = context
        .backend
        .pod(namespace, name)
        .ok_or_else(|| not_found(format!("pod {name:?} does not exist\n")))?;
    if !has_container(&view.pod, container) {
        let text = format!("container {container:?} not found in pod {name:?}\n");
        return Err(not_found(text));
    }
    readable(&view, name, container, options.previous)
        .map_err(|text| HttpError(StatusCode::BAD_REQUEST, text))?;
    let uid = target::uid(&view)?;
    Ok(options.request(&uid, container, Timestamp::now()))
}

/// Is it a container of the pod, of any kind?
pub(super) fn has_container(pod: &Pod, container: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let regular = spec.containers.iter().map(|it| &it.name);
    let init = spec.init_containers.iter().flatten().map(|it| &it.name);
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    regular
        .chain(init)
        .chain(ephemeral.map(|it| &it.name))
        .any(|name| name == container)
}

/// Does the container have a log, as far as observed? The error is the text of the Kubernetes kubelet.
fn readable(view: &PodView, pod: &str, container: &str, previous: bool) -> Result<(), String> {
    let whole = format!("container {container:?} in pod {pod:?}");
    let Some(status) = view
        .observed
        .as_ref()
        .and_then(|observed| container_status(observed, container))
    else {
        return Err(unobserved(view, container, &whole, previous));
    };
    let earlier = status.last_termination.is_some();
    if previous {
        return if earlier {
            Ok(())
        } else {
            Err(format!("previous terminated {whole} not found"))
        };
    }
    match &status.state {
        Some(ContainerState::Running(_)) => Ok(()),
        Some(ContainerState::Terminated(ended)) if !ended.container_id.is_empty() => Ok(()),
        _ if earlier => Ok(()),
        Some(ContainerState::Terminated(_)) => Err(format!("{whole} is terminated")),
        Some(ContainerState::Waiting(waiting)) => Err(match waiting.reason.as_str() {
            "ErrImagePull" => format!("{whole} is waiting to start: image can't be pulled"),
            "ImagePullBackOff" => {
                format!("{whole} is waiting to start: trying and failing to pull image")
            }
            "ContainerCreating" => format!("{whole} is waiting to start: {}", creating(&view.pod)),
            reason => format!("{whole} is waiting to start: {reason}"),
        }),
        None => Err(format!("{whole} is waiting to start - no logs yet")),
    }
}

/// The text for a container that the agent has not reported.
fn unobserved(view: &PodView, container: &str, whole: &str, previous: bool) -> String {
    let phase = view.pod.status.as_ref().and_then(|it| it.phase.as_deref());
    match phase {
        _ if previous => format!("previous terminated {whole} not found"),
        None | Some("Pending") => {
            format!("{whole} is waiting to start: {}", creating(&view.pod))
        }
        Some(_) => match refused(&view.rejected, container) {
            Some(why) => format!("{whole} was rejected: {why}"),
            None => format!("{whole} is not available"),
        },
    }
}

/// Kubernetes' reason for a container that was not started yet.
fn creating(pod: &Pod) -> &'static str {
    let init = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.init_containers.as_deref());
    match init {
        None | Some([]) => "ContainerCreating",
        Some(_) => "PodInitializing",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: Option<ContainerState>, last: Option<pb::Terminated>) -> PodView {
        let status = pb::ContainerStatus {
            name: "c".to_owned(),
            state,
            last_termination: last,
            ..pb::ContainerStatus::default()
        };
        let observed = pb::PodObserved {
            containers: vec![status],
            ..pb::PodObserved::default()
        };
        PodView {
            pod: Arc::default(),
            observed: Some(Arc::new(observed)),
            ..PodView::default()
        }
    }

    fn waiting(reason: &str) -> ContainerState {
        ContainerState::Waiting(pb::Waiting {
            reason: reason.to_owned(),
            ..pb::Waiting::default()
        })
    }

    fn ended(container_id: &str) -> pb::Terminated {
        pb::Terminated {
            container_id: container_id.to_owned(),
            ..pb::Terminated::default()
        }
    }

    #[test]
    fn says_why_there_is_no_log_as_upstream() {
        let cases = [
            (
                view(Some(waiting("ContainerCreating")), None),
                r#"container "c" in pod "p" is waiting to start: ContainerCreating"#,
            ),
            (
                view(Some(waiting("ErrImagePull")), None),
                r#"container "c" in pod "p" is waiting to start: image can't be pulled"#,
            ),
            (
                view(Some(waiting("ImagePullBackOff")), None),
                r#"container "c" in pod "p" is waiting to start: trying and failing to pull image"#,
            ),
            (
                view(Some(ContainerState::Terminated(ended(""))), None),
                r#"container "c" in pod "p" is terminated"#,
            ),
            (
                view(None, None),
                r#"container "c" in pod "p" is waiting to start - no logs yet"#,
            ),
            (
                PodView::default(),
                r#"container "c" in pod "p" is waiting to start: ContainerCreating"#,
            ),
        ];
        for (view, text) in cases {
            assert_eq!(readable(&view, "p", "c", false).unwrap_err(), text);
            assert_eq!(
                readable(&view, "p", "c", true).unwrap_err(),
                r#"previous terminated container "c" in pod "p" not found"#
            );
        }
    }

    #[test]
    fn a_rejected_container_says_why_before_the_watch_shows_its_status() {
        let status = serde_json::json!({"phase": "Running"});
        let pod = serde_json::json!({"metadata": {}, "status": status});
        let mut view = PodView {
            pod: Arc::new(serde_json::from_value(pod).unwrap()),
            ..PodView::default()
        };
        let said = |view: &PodView| readable(view, "p", "debug", false).unwrap_err();
        assert!(said(&view).ends_with("is not available"), "{}", said(&view));
        let why = "spec.ephemeralContainers[debug].ports: must not be set";
        view.rejected = vec![why.to_owned()];
        let wanted = format!("container \"debug\" in pod \"p\" was rejected: {why}");
        assert_eq!(said(&view), wanted);
    }

    #[test]
    fn reads_running_ended_and_restarting_containers() {
        let running = Some(ContainerState::Running(pb::Running::default()));
        let terminated = Some(ContainerState::Terminated(ended("apptainer://1.c.0")));
        let last = Some(ended("apptainer://1.c.0"));
        for view in [
            view(running.clone(), None),
            view(terminated, None),
            view(Some(waiting("CrashLoopBackOff")), last.clone()),
        ] {
            assert_eq!(readable(&view, "p", "c", false), Ok(()));
        }
        assert_eq!(readable(&view(running, last), "p", "c", true), Ok(()));
    }
}
