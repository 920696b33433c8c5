//! The router of all paths. Every path goes through the gate, including those without a handler.

use std::sync::Arc;

use axum::{
    Router,
    extract::{RawQuery, State},
    middleware::from_fn_with_state,
    response::{IntoResponse as _, Response},
    routing::get,
};
use http::{StatusCode, header};
use k8s_openapi::{List, api::core::v1::Pod};
use knoc_remotecommand::query::Query;

use super::{Context, access, exec, logs, portforward, stats, unsupported};

/// All routes behind the gate.
pub(super) fn router(context: Arc<Context>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/healthz/ping", get(ok))
        .route("/healthz/log", get(ok))
        .route("/healthz/syncloop", get(syncloop))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route(
            "/containerLogs/{namespace}/{pod}/{container}",
            get(logs::container_logs),
        )
        .merge(streams())
        .merge(unsupported::routes())
        .merge(stats::routes())
        .fallback(async || (StatusCode::NOT_FOUND, "404 page not found\n"))
        .layer(from_fn_with_state(Arc::clone(&context), access::gate))
        .layer(from_fn_with_state(Arc::clone(&context), stats::count))
        .with_state(context)
}

/// The routes of streams, by GET (for WebSockets) and POST.
fn streams() -> Router<Arc<Context>> {
    Router::new()
        .route(
            "/exec/{namespace}/{pod}/{container}",
            get(exec::exec).post(exec::exec),
        )
        .route(
            "/exec/{namespace}/{pod}/{uid}/{container}",
            get(exec::exec).post(exec::exec),
        )
        .route(
            "/attach/{namespace}/{pod}/{container}",
            get(exec::attach).post(exec::attach),
        )
        .route(
            "/attach/{namespace}/{pod}/{uid}/{container}",
            get(exec::attach).post(exec::attach),
        )
        .route(
            "/portForward/{namespace}/{pod}",
            get(portforward::port_forward).post(portforward::port_forward),
        )
        .route(
            "/portForward/{namespace}/{pod}/{uid}",
            get(portforward::port_forward).post(portforward::port_forward),
        )
}

async fn ok() -> &'static str {
    "ok"
}

async fn healthz(State(context): State<Arc<Context>>, RawQuery(query): RawQuery) -> Response {
    let sync = context.backend.sync_loop();
    let query = Query::parse(query.as_deref().unwrap_or_default()).unwrap_or_default();
    let list = match &sync {
        Ok(()) => "[+]ping ok\n[+]log ok\n[+]syncloop ok\n",
        Err(_) => "[+]ping ok\n[+]log ok\n[-]syncloop failed: reason withheld\n",
    };
    match sync {
        Ok(()) if query.first("verbose").is_none() => "ok".into_response(),
        Ok(()) => format!("{list}healthz check passed\n").into_response(),
        Err(_) => {
            let text = format!("{list}healthz check failed\n");
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}

async fn syncloop(State(context): State<Arc<Context>>) -> Response {
    match context.backend.sync_loop() {
        Ok(()) => "ok".into_response(),
        Err(reason) => {
            let text = format!("internal server error: {reason}\n");
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
    }
}

async fn pods(State(context): State<Arc<Context>>) -> Response {
    let items: Vec<Pod> = context
        .backend
        .pods()
        .iter()
        .map(|pod| Pod::clone(pod))
        .collect();
    let list = List {
        items,
        ..List::default()
    };
    match serde_json::to_vec(&list) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
