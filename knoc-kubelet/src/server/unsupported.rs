//! What a real kubelet answers here and KNoC does not have: each is refused by name, so that nobody looks for a mistake
//! of his own.

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use http::StatusCode;

use super::Context;

type Refused = (StatusCode, &'static str);

/// The routes that are refused.
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

async fn run() -> Refused {
    let text = "run is not supported by this node, use exec\n";
    (StatusCode::NOT_IMPLEMENTED, text)
}

/// As a real kubelet whose `enableSystemLogHandler` is off.
async fn node_logs() -> Refused {
    (
        StatusCode::METHOD_NOT_ALLOWED,
        "logs endpoint is disabled.\n",
    )
}

/// As a real kubelet whose `enableProfilingHandler` is off.
async fn profile() -> Refused {
    (
        StatusCode::METHOD_NOT_ALLOWED,
        "profiling endpoint is disabled.\n",
    )
}

async fn flags() -> Refused {
    let text = "the log level is set by the kubelet's configuration (log.level)\n";
    (StatusCode::METHOD_NOT_ALLOWED, text)
}
