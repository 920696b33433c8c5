//! Parts of the kubelet API that KNoC does not have. Each is rejected by name, so that clients do not look for a
//! mistake of their own.

use std::sync::Arc;

use axum::{
    Router,
    routing::{get, post},
};
use http::StatusCode;

use super::Context;

type Unsupported = (StatusCode, &'static str);

/// The routes that are rejected.
pub(super) fn routes() -> Router<Arc<Context>> {
    Router::new()
        .route("/run/{namespace}/{pod}/{container}", post(run))
        .route("/run/{namespace}/{pod}/{uid}/{container}", post(run))
        .route("/logs", get(node_logs))
        .route("/logs/", get(node_logs))
        .route("/logs/{*path}", get(node_logs))
        .route("/debug/pprof/{*path}", get(profile))
        .route("/debug/pprof/", get(profile))
        .route("/debug/flags/v", axum::routing::put(flags))
}

async fn run() -> Unsupported {
    let text = "run is not supported by this node, use exec\n";
    (StatusCode::NOT_IMPLEMENTED, text)
}

/// Answers like a Kubernetes kubelet with `enableSystemLogHandler` off.
async fn node_logs() -> Unsupported {
    (
        StatusCode::METHOD_NOT_ALLOWED,
        "logs endpoint is disabled.\n",
    )
}

/// Answers like a Kubernetes kubelet with `enableProfilingHandler` off.
async fn profile() -> Unsupported {
    (
        StatusCode::METHOD_NOT_ALLOWED,
        "profiling endpoint is disabled.\n",
    )
}

async fn flags() -> Unsupported {
    let text = "the log level is set by the kubelet's configuration (log.level)\n";
    (StatusCode::METHOD_NOT_ALLOWED, text)
}
