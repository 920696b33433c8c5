//! `/exec/{namespace}/{pod}[/{uid}]/{container}`: a command in a container, for `kubectl exec` and `kubectl cp`.
//!
//! The request is checked and the upgrade answered here; a task of the server then relays between the client's
//! streams ([`super::remote`]) and the agent. What fails before the upgrade is a status with upstream's words, what
//! fails later goes onto the error stream.

use std::sync::Arc;

use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, StatusCode, header};
use hyper_util::rt::TokioIo;
use knoc_proto::error::chain;
use knoc_proto::pb;
use knoc_proto::pb::container_status::State as ContainerState;
use tracing::{debug, info};

use super::query::Query;
use super::remote;
use super::remotecommand::{
    ACCEPTED_HEADER, NoVersion, SPDY_VERSIONS, VERSION_HEADER, Version, Wanted, negotiate,
};
use super::{Context, logs, spdy};

/// What is asked for, by its path.
#[derive(Debug, Clone)]
pub(super) struct Target {
    namespace: String,
    pod: String,
    uid: Option<String>,
    container: String,
}

/// `/exec/{namespace}/{pod}/{container}`
pub(super) async fn exec(
    State(context): State<Arc<Context>>,
    Path((namespace, pod, container)): Path<(String, String, String)>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Response {
    let target = Target {
        namespace,
        pod,
        uid: None,
        container,
    };
    answer(&context, &target, query.as_deref(), request)
}

/// `/exec/{namespace}/{pod}/{uid}/{container}`
pub(super) async fn exec_by_uid(
    State(context): State<Arc<Context>>,
    Path((namespace, pod, uid, container)): Path<(String, String, String, String)>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Response {
    let target = Target {
        namespace,
        pod,
        uid: Some(uid),
        container,
    };
    answer(&context, &target, query.as_deref(), request)
}

fn answer(
    context: &Arc<Context>,
    target: &Target,
    query: Option<&str>,
    request: Request,
) -> Response {
    let start = match start(context, target, query) {
        Ok(start) => start,
        Err(refusal) => return refusal.into_response(),
    };
    upgrade(context, start, request)
}

type Refusal = (StatusCode, String);

/// Checks the request: what is asked, and is there somebody to ask?
fn start(
    context: &Context,
    target: &Target,
    query: Option<&str>,
) -> Result<pb::ExecStart, Refusal> {
    let query = Query::parse(query.unwrap_or_default())
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}\n")))?;
    let wanted = Wanted::parse(&query).ok_or_else(|| {
        let text = "you must specify at least 1 of stdin, stdout, stderr";
        (StatusCode::BAD_REQUEST, text.to_owned())
    })?;
    let view = context
        .backend
        .pod(&target.namespace, &target.pod)
        .ok_or_else(|| (StatusCode::NOT_FOUND, "pod does not exist".to_owned()))?;
    let uid = view.pod.metadata.uid.clone().unwrap_or_default();
    let runs = view
        .observed
        .as_ref()
        .and_then(|observed| logs::container_status(observed, &target.container))
        .is_some_and(|status| matches!(status.state, Some(ContainerState::Running(_))));
    if !runs || target.uid.as_ref().is_some_and(|asked| *asked != uid) {
        let text = format!("container not found ({:?})", target.container);
        return Err((StatusCode::INTERNAL_SERVER_ERROR, text));
    }
    Ok(pb::ExecStart {
        uid,
        container: target.container.clone(),
        command: query.all("command").map(str::to_owned).collect(),
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        tty: wanted.tty,
        size: None,
    })
}

fn upgrades_to_spdy(headers: &HeaderMap) -> bool {
    let names = |name: header::HeaderName, wanted: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(wanted))
    };
    names(header::CONNECTION, "upgrade") && names(header::UPGRADE, "spdy/3.1")
}

fn upgrade(context: &Arc<Context>, start: pb::ExecStart, mut request: Request) -> Response {
    if !upgrades_to_spdy(request.headers()) {
        let text =
            "unable to upgrade: missing upgrade headers in request, SPDY/3.1 is spoken here\n";
        return (StatusCode::BAD_REQUEST, text).into_response();
    }
    let (name, version) = match negotiate(request.headers()) {
        Ok(agreed) => agreed,
        Err(NoVersion::Unnamed) => {
            let text = format!("unable to upgrade: {VERSION_HEADER} is required\n");
            return (StatusCode::BAD_REQUEST, text).into_response();
        }
        Err(NoVersion::Foreign) => return foreign(),
    };
    let upgraded = hyper::upgrade::on(&mut request);
    let relay = Arc::clone(context);
    let what = format!("{}/{}", start.uid, start.container);
    context.streams.spawn(async move {
        match upgraded.await {
            Ok(io) => relay_spdy(&relay, TokioIo::new(io), start, version, &what).await,
            Err(error) => debug!(%error, exec = what, "the client left before the upgrade"),
        }
    });
    let headers = [
        (header::CONNECTION, "Upgrade"),
        (header::UPGRADE, "SPDY/3.1"),
        (header::HeaderName::from_static(VERSION_HEADER), name),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

fn foreign() -> Response {
    let mut response = (
        StatusCode::FORBIDDEN,
        "unable to upgrade: none of the protocol versions is spoken here\n",
    )
        .into_response();
    for (name, _) in SPDY_VERSIONS {
        response.headers_mut().append(
            header::HeaderName::from_static(ACCEPTED_HEADER),
            header::HeaderValue::from_static(name),
        );
    }
    response
}

async fn relay_spdy(
    context: &Context,
    io: TokioIo<hyper::upgrade::Upgraded>,
    start: pb::ExecStart,
    version: Version,
    what: &str,
) {
    let (session, incoming) = spdy::session(io);
    let relay = remote::spdy(context, incoming, start, version);
    // The session ends when the client does, or when the relay has let go of its streams and all is written.
    let work = async {
        let mut session = std::pin::pin!(session.run());
        let mut relay = std::pin::pin!(relay);
        tokio::select! {
            biased;
            ended = session.as_mut() => (ended, Ok(())),
            relayed = relay.as_mut() => (session.await, relayed),
        }
    };
    // Shutdown: what still runs is cut when its time is over.
    let cut = context.cut.cancelled();
    tokio::select! {
        biased;
        () = cut => info!(exec = what, "the stream was cut by our shutdown"),
        (ended, relayed) = work => {
            if let Err(error) = ended {
                debug!(exec = what, error = %chain(&error), "the client's connection ended");
            }
            if let Err(error) = relayed {
                info!(exec = what, error = %chain(&error), "exec was not set up");
            }
        }
    }
}
