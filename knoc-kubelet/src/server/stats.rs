//! Resource usage, health and running pods: `/metrics*`, `/stats/summary`, `/configz`, `/runningpods/`; `/checkpoint` is
//! rejected.

use std::sync::Arc;

use axum::{
    Router,
    extract::{MatchedPath, RawQuery, Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{StatusCode, header};
use k8s_openapi::{
    List,
    api::core::v1::{Container, Pod, PodSpec},
};
use knoc_proto::pb::{self, container_status::State as Running};
use knoc_remotecommand::query::Query;
use serde_json::json;

use super::Context;
use crate::{
    metrics,
    stats::{cadvisor, resource, summary},
};

/// The routes, without the gate, which is in front of all routes.
pub(super) fn routes() -> Router<Arc<Context>> {
    Router::new()
        .route("/metrics", get(own))
        .route("/metrics/resource", get(resource_usage))
        .route("/metrics/cadvisor", get(cadvisor_usage))
        .route("/metrics/probes", get(probes))
        .route("/metrics/slis", get(health))
        .route("/stats/summary", get(stats_summary))
        .route("/configz", get(configz))
        .route("/runningpods", get(running_pods))
        .route("/runningpods/", get(running_pods))
        .route(
            "/checkpoint/{namespace}/{pod}/{container}",
            post(checkpoint),
        )
}

/// The layer that counts requests. It is outside of the gate, so that rejected requests count too.
pub(super) async fn count(
    State(context): State<Arc<Context>>,
    request: Request,
    next: Next,
) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = request.method().clone();
    let response = next.run(request).await;
    let path = route.as_ref().map_or("other", MatchedPath::as_str);
    let code = response.status().as_u16();
    context.backend.metrics().request(path, &method, code);
    response
}

async fn own(State(context): State<Arc<Context>>) -> Response {
    let mut gauges = context.backend.gauges();
    gauges.streams = context.streams.len();
    text(context.backend.metrics().render(&gauges))
}

async fn resource_usage(State(context): State<Arc<Context>>) -> Response {
    let snapshot = context.backend.stats().await;
    text(resource::render(&snapshot))
}

async fn cadvisor_usage(State(context): State<Arc<Context>>) -> Response {
    let snapshot = context.backend.stats().await;
    text(cadvisor::render(&snapshot, &context.backend.observed()))
}

async fn probes() -> Response {
    text(metrics::render_probes())
}

/// The checks of `/healthz` as a metric. They are made for each request, so there is no count of earlier ones.
async fn health(State(context): State<Arc<Context>>) -> Response {
    const NAME: &str = "kubernetes_healthcheck";
    let turns = context.backend.sync_loop().is_ok();
    let mut page = String::new();
    resource::head(
        &mut page,
        NAME,
        "The result of a check, 1 if it passes",
        "gauge",
    );
    for (check, passes) in [("log", true), ("ping", true), ("syncloop", turns)] {
        let labels = resource::braces(&[("name", check), ("type", "healthz")]);
        let value = if passes { "1" } else { "0" };
        resource::line(&mut page, NAME, &labels, value, None);
    }
    text(page)
}

fn text(text: String) -> Response {
    ([(header::CONTENT_TYPE, resource::CONTENT_TYPE)], text).into_response()
}

async fn stats_summary(State(context): State<Arc<Context>>, RawQuery(query): RawQuery) -> Response {
    let query = match Query::parse(query.as_deref().unwrap_or_default()) {
        Ok(query) => query,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    // In the Kubernetes kubelet too, every value except `true` is false.
    let only = query.first("only_cpu_and_memory") == Some("true");
    let snapshot = context.backend.stats().await;
    axum::Json(summary::render(&context.node, &snapshot, only)).into_response()
}

async fn configz(State(context): State<Arc<Context>>) -> Response {
    axum::Json(json!({"kubeletconfig": context.backend.config()})).into_response()
}

async fn running_pods(State(context): State<Arc<Context>>) -> Response {
    let observed = context.backend.observed();
    let mut items: Vec<Pod> = observed.iter().filter_map(|pod| running(pod)).collect();
    items.sort_by(|a, b| {
        let key = |pod: &Pod| (pod.metadata.namespace.clone(), pod.metadata.name.clone());
        key(a).cmp(&key(b))
    });
    let list = List {
        items,
        ..List::default()
    };
    axum::Json(list).into_response()
}

async fn checkpoint() -> Response {
    let text = "checkpoint is not supported: the containers of a Slurm job cannot be frozen\n";
    (StatusCode::NOT_IMPLEMENTED, text).into_response()
}

/// PURE: the pod with its running containers only; `None` if none runs.
fn running(observed: &pb::PodObserved) -> Option<Pod> {
    let all = observed
        .init_containers
        .iter()
        .chain(&observed.containers)
        .chain(&observed.ephemeral_containers);
    let containers: Vec<Container> = all
        .filter(|status| matches!(status.state, Some(Running::Running(_))))
        .map(|status| Container {
            name: status.name.clone(),
            image: Some(status.image.clone()).filter(|image| !image.is_empty()),
            ..Container::default()
        })
        .collect();
    if containers.is_empty() {
        return None;
    }
    let mut pod = Pod::default();
    pod.metadata.name = Some(observed.name.clone());
    pod.metadata.namespace = Some(observed.namespace.clone());
    pod.metadata.uid = Some(observed.uid.clone());
    pod.spec = Some(PodSpec {
        containers,
        ..PodSpec::default()
    });
    Some(pod)
}
