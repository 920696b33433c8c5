//! `/exec/{namespace}/{pod}[/{uid}]/{container}` runs a command in a container, for `kubectl exec` and `kubectl cp`.
//! `/attach/…` attaches to the running program of a container, for `kubectl attach` and `kubectl run -it`.
//!
//! The request is checked and the upgrade is answered here; a task of the server then relays between the client's
//! streams ([`super::remote`]) and the agent. Errors before the upgrade are an HTTP status with the text of the
//! Kubernetes kubelet; later errors go onto the error stream.

use std::sync::Arc;

use axum::{
    extract::{Path, RawQuery, Request, State},
    response::{IntoResponse as _, Response},
};
use knoc_proto::pb;
use knoc_remotecommand::{
    protocol::{SPDY_VERSIONS, WEBSOCKET_UNNAMED, WEBSOCKET_VERSIONS, Wanted},
    query::Query,
    spdy, websocket,
};

use super::{
    Context,
    remote::{self, RemoteError, Start, Streams},
    stop::Stop,
    target::{Attachable, ContainerTarget, HttpError},
    upgrade::{self, Carrier, ErrorResponse, Io, Purpose, run_session},
};

/// Handles `/exec/{namespace}/{pod}[/{uid}]/{container}`.
pub(super) async fn exec(
    State(context): State<Arc<Context>>,
    Path(of): Path<ContainerTarget>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Response {
    answer(&context, &of, exec_start, query.as_deref(), request)
}

/// Handles `/attach/{namespace}/{pod}[/{uid}]/{container}`.
pub(super) async fn attach(
    State(context): State<Arc<Context>>,
    Path(of): Path<ContainerTarget>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Response {
    answer(&context, &of, attach_start, query.as_deref(), request)
}

/// Makes the first message to the agent, or returns why the request is rejected.
type Prepare = fn(&Context, &ContainerTarget, &Query, Wanted) -> Result<Start, HttpError>;

fn exec_start(
    context: &Context,
    ContainerTarget { target, container }: &ContainerTarget,
    query: &Query,
    wanted: Wanted,
) -> Result<Start, HttpError> {
    Ok(Start::Exec(pb::ExecStart {
        uid: target.exec(context, container)?.into(),
        container: container.clone(),
        command: query.all("command").map(str::to_owned).collect(),
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        tty: wanted.tty,
        size: None,
        rank: 0,
    }))
}

/// As in Kubernetes, the container decides whether there is a terminal.
fn attach_start(
    context: &Context,
    ContainerTarget { target, container }: &ContainerTarget,
    _query: &Query,
    wanted: Wanted,
) -> Result<Start, HttpError> {
    let (uid, Attachable { stdin, tty }) = target.attach(context, container)?;
    Ok(Start::Attach(pb::AttachStart {
        uid: uid.into(),
        container: container.clone(),
        stdin: wanted.stdin && stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr && !tty,
        tty,
        size: None,
    }))
}

fn answer(
    context: &Arc<Context>,
    of: &ContainerTarget,
    prepare: Prepare,
    query: Option<&str>,
    request: Request,
) -> Response {
    let prepared = options(query).and_then(|(query, wanted)| {
        let start = prepare(context, of, &query, wanted)?;
        Ok((start, wanted, upgrade::carrier(&request)?))
    });
    let (start, wanted, carrier) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return error.into_response(),
    };
    let call = match context.calls.take() {
        Ok(call) => Some(call),
        Err(busy) => return busy.into_response(),
    };
    let ContainerTarget { target, container } = of;
    let purpose = Purpose {
        call,
        verb: start.verb(),
        target: format!("{}/{}/{container}", target.namespace, target.pod),
    };
    let answered = match carrier {
        Carrier::Spdy => over_spdy(context, request, start, wanted, purpose),
        Carrier::WebSocket => over_websocket(context, request, start, wanted, purpose),
    };
    answered.unwrap_or_else(|error| *error)
}

fn options(query: Option<&str>) -> Result<(Query, Wanted), HttpError> {
    let query = Query::parse(query.unwrap_or_default())
        .map_err(|error| HttpError::bad_request(format!("{error}\n")))?;
    let wanted = Wanted::parse(&query).ok_or_else(|| {
        HttpError::bad_request("you must specify at least 1 of stdin, stdout, stderr")
    })?;
    Ok((query, wanted))
}

fn over_spdy(
    context: &Arc<Context>,
    request: Request,
    start: Start,
    wanted: Wanted,
    purpose: Purpose,
) -> Result<Response, ErrorResponse> {
    let (answer, version) = upgrade::spdy(request.headers(), &SPDY_VERSIONS)?;
    let (backend, cut) = (Arc::clone(&context.backend), context.cut.clone());
    let name = purpose.target.clone();
    let serve = async move |io: Io| {
        let (session, incoming) = spdy::session(io);
        let stop = Stop::new(cut, session.activity());
        let relay = async {
            let streams = Streams::of_spdy(incoming, wanted, version).await?;
            remote::serve(&*backend, start, streams, version, &stop).await;
            Ok::<(), RemoteError>(())
        };
        run_session(session.run(), relay, &stop, &name).await;
    };
    Ok(upgrade::switch(context, request, answer, purpose, serve))
}

fn over_websocket(
    context: &Arc<Context>,
    request: Request,
    start: Start,
    wanted: Wanted,
    purpose: Purpose,
) -> Result<Response, ErrorResponse> {
    let (answer, (version, encoding)) =
        upgrade::websocket(request.headers(), &WEBSOCKET_VERSIONS, WEBSOCKET_UNNAMED)?;
    let (backend, cut) = (Arc::clone(&context.backend), context.cut.clone());
    let name = purpose.target.clone();
    let serve = async move |io: Io| {
        let (session, channels) = websocket::session(io, encoding, &wanted.writable());
        let stop = Stop::new(cut, session.activity());
        let relay = async {
            let streams = Streams::of_websocket(channels, wanted).await;
            remote::serve(&*backend, start, streams, version, &stop).await;
            Ok::<(), RemoteError>(())
        };
        run_session(session.run(), relay, &stop, &name).await;
    };
    Ok(upgrade::switch(context, request, answer, purpose, serve))
}
