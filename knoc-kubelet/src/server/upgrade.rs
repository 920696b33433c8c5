//! Turns a request into a connection that carries streams: finds the requested carrier, answers 101, and starts the
//! task that serves the connection until the client or the kubelet ends it.

use std::{error::Error, sync::Arc};

use axum::{
    extract::Request,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use knoc_proto::error::chain;
use knoc_remotecommand::{
    protocol::{ACCEPTED_HEADER, NoVersion, VERSION_HEADER, negotiate},
    websocket::handshake::{self, BadHandshake},
};
use tracing::{debug, info};

use super::{Context, limits::Permit, peer_watch::PeerWatch, stop::Stop, target::HttpError};

/// A connection after the upgrade.
pub(super) type Io = TokioIo<Upgraded>;

/// The protocol that carries the streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    Spdy,
    WebSocket,
}

/// The carrier that a request asks for; 400 if it is not a known one.
pub(super) fn carrier(request: &Request) -> Result<Carrier, HttpError> {
    let headers = request.headers();
    let names = |name: HeaderName, wanted: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(wanted))
    };
    let upgrades = names(header::CONNECTION, "upgrade");
    if upgrades && names(header::UPGRADE, "spdy/3.1") {
        return Ok(Carrier::Spdy);
    }
    if upgrades && names(header::UPGRADE, "websocket") && request.method() == Method::GET {
        return Ok(Carrier::WebSocket);
    }
    Err(HttpError::bad_request(
        "unable to upgrade: missing upgrade headers in request, SPDY/3.1 and websocket (by GET) are spoken here\n",
    ))
}

/// The answer 101.
#[derive(Debug)]
pub(super) struct Answer {
    headers: Vec<(HeaderName, HeaderValue)>,
    /// The carrier and its subprotocol, for the metrics.
    protocol: String,
}

/// What a session is for, in logs and limits.
#[derive(Debug)]
pub(super) struct Purpose {
    /// exec, attach or portforward, as RBAC names them.
    pub(super) verb: &'static str,
    /// Namespace, pod and container.
    pub(super) target: String,
    /// The permit for a call to the agent, if the session itself is one.
    pub(super) call: Option<Permit>,
}

/// An answer other than 101.
pub(super) type ErrorResponse = Box<Response>;

/// Negotiates the protocol version of a SPDY request.
pub(super) fn spdy<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
) -> Result<(Answer, T), ErrorResponse> {
    let (name, version) = negotiate(headers, ours).map_err(|no| Box::new(no_version(no, ours)))?;
    let headers = vec![
        (header::UPGRADE, HeaderValue::from_static("SPDY/3.1")),
        (
            HeaderName::from_static(VERSION_HEADER),
            HeaderValue::from_static(name),
        ),
    ];
    let protocol = format!("spdy/{name}");
    Ok((Answer { headers, protocol }, version))
}

fn no_version<T>(no: NoVersion, ours: &[(&'static str, T)]) -> Response {
    match no {
        NoVersion::Unnamed => {
            let text = format!("unable to upgrade: {VERSION_HEADER} is required\n");
            (StatusCode::BAD_REQUEST, text).into_response()
        }
        NoVersion::Foreign => {
            let text = "unable to upgrade: none of the protocol versions is spoken here\n";
            let mut response = (StatusCode::FORBIDDEN, text).into_response();
            for (name, _) in ours {
                response.headers_mut().append(
                    HeaderName::from_static(ACCEPTED_HEADER),
                    HeaderValue::from_static(name),
                );
            }
            response
        }
    }
}

/// Negotiates the subprotocol of a WebSocket request; `unnamed` is used for a client that offers none.
pub(super) fn websocket<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
    unnamed: T,
) -> Result<(Answer, T), ErrorResponse> {
    let agreed = handshake::accept(headers)
        .and_then(|accept| Ok((accept, handshake::agree(headers, ours, unnamed)?)));
    let (accept, (name, meaning)) = agreed.map_err(|bad| Box::new(bad_handshake(&bad)))?;
    let mut headers = vec![
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    if let Some(name) = name {
        let name = HeaderValue::from_static(name);
        headers.push((header::SEC_WEBSOCKET_PROTOCOL, name));
    }
    let answer = Answer {
        headers,
        protocol: format!("websocket/{}", name.unwrap_or("none")),
    };
    Ok((answer, meaning))
}

fn bad_handshake(bad: &BadHandshake) -> Response {
    let text = format!("{bad}\n");
    match bad {
        BadHandshake::Version => {
            let version = [(header::SEC_WEBSOCKET_VERSION, handshake::VERSION)];
            (StatusCode::BAD_REQUEST, version, text).into_response()
        }
        BadHandshake::Key => (StatusCode::BAD_REQUEST, text).into_response(),
        BadHandshake::Subprotocol { .. } => (StatusCode::FORBIDDEN, text).into_response(),
    }
}

/// Answers 101, or 503 if there are too many sessions. A task of the server counts and serves the connection until its
/// client has gone; if the kubelet ends the session, `serve` does so, by [`run_session`].
pub(super) fn switch<S, F>(
    context: &Arc<Context>,
    mut request: Request,
    answer: Answer,
    purpose: Purpose,
    serve: S,
) -> Response
where
    S: FnOnce(Io) -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let slot = match context.sessions.take() {
        Ok(slot) => slot,
        Err(busy) => return busy.into_response(),
    };
    let upgraded = hyper::upgrade::on(&mut request);
    let watch = request.extensions_mut().remove::<PeerWatch>();
    let Answer { headers, protocol } = answer;
    let Purpose {
        verb,
        target: what,
        call,
    } = purpose;
    let backend = Arc::clone(&context.backend);
    debug!(verb, stream = what, protocol, "upgraded");
    context.streams.spawn(async move {
        let _permits = (slot, call);
        match upgraded.await {
            Ok(io) => {
                backend.metrics().session(verb, protocol);
                tokio::select! {
                    biased;
                    () = serve(TokioIo::new(io)) => {}
                    () = abandoned(watch) => info!(stream = what, "the client has gone while its input was not read, ending the session"),
                }
            }
            Err(error) => debug!(%error, stream = what, "the client left before the upgrade"),
        }
    });
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let own = response.headers_mut();
    own.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    own.extend(headers);
    response
}

/// Returns when the client has gone; never for a connection without a socket, which ends by itself.
async fn abandoned(watch: Option<PeerWatch>) {
    match watch {
        Some(watch) => watch.abandoned().await,
        None => std::future::pending().await,
    }
}

/// Runs a session with the relay of its streams. It ends with the client's connection, or when the relay has dropped
/// its streams and everything is written. If the kubelet ends it, the relay writes the reason first; unwritten bytes
/// are cut.
pub(super) async fn run_session<S, R>(
    session: impl Future<Output = Result<(), S>>,
    relay: impl Future<Output = Result<(), R>>,
    stop: &Stop,
    what: &str,
) where
    S: Error + 'static,
    R: Error + 'static,
{
    let (mut session, mut relay) = (std::pin::pin!(session), std::pin::pin!(relay));
    let both = async {
        tokio::select! {
            biased;
            ended = session.as_mut() => (ended, Ok(())),
            relayed = relay.as_mut() => (session.await, relayed),
        }
    };
    let (ended, relayed) = tokio::select! {
        // Polled before the relay, whose last message would count as activity.
        biased;
        why = stop.overdue() => {
            info!(stream = what, why, "the stream was cut");
            return;
        }
        both = both => both,
    };
    if let Err(error) = ended {
        debug!(stream = what, error = %chain(&error), "the client's connection ended");
    }
    if let Err(error) = relayed {
        info!(stream = what, error = %chain(&error), "could not set up the stream");
    }
}
