//! `/portForward/{namespace}/{pod}[/{uid}]`: connections to ports of a pod, for `kubectl port-forward`.
//!
//! There are three forms: SPDY, in which the client opens a pair of streams for each connection ([`pairs`]); the same
//! inside binary messages of a WebSocket (`SPDY/3.1+portforward.k8s.io`); and WebSocket channels, with a pair of
//! channels and one connection for each port in the query. [`relay`] serves the connection of a pair.

mod pairs;
mod relay;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;

use axum::{
    extract::{Path, RawQuery, Request, State},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::future::join_all;
use knoc_remotecommand::{
    ports::ports,
    query::Query,
    spdy,
    stream_writer::StreamWriter,
    websocket::{self, Channels, Encoding, tunnel::Tunnel},
};

use super::{
    Context,
    stop::Stop,
    target::{HttpError, Target},
    upgrade::{self, Carrier, ErrorResponse, Io, Purpose, run_session},
};
use relay::{Connection, ForwardTarget};

/// The protocol over SPDY.
const SPDY_PROTOCOLS: [(&str, ()); 1] = [("portforward.k8s.io", ())];
/// The protocols over WebSocket, newest first.
const WEBSOCKET_PROTOCOLS: [(&str, Form); 3] = [
    ("SPDY/3.1+portforward.k8s.io", Form::Tunnel),
    ("v4.channel.k8s.io", Form::Channels(Encoding::Binary)),
    ("v4.base64.channel.k8s.io", Form::Channels(Encoding::Base64)),
];
/// The protocol of a WebSocket client that names none.
const WEBSOCKET_UNNAMED: Form = Form::Channels(Encoding::Binary);

/// What the messages of a WebSocket carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Tunnel,
    Channels(Encoding),
}

/// Handles `/portForward/{namespace}/{pod}[/{uid}]`.
pub(super) async fn port_forward(
    State(context): State<Arc<Context>>,
    Path(target): Path<Target>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Response {
    answer(&context, &target, query.as_deref(), request)
}

fn answer(
    context: &Arc<Context>,
    target: &Target,
    query: Option<&str>,
    request: Request,
) -> Response {
    let prepared = Query::parse(query.unwrap_or_default())
        .map_err(|error| HttpError::bad_request(format!("{error}\n")))
        .and_then(|query| {
            let uid = target.port_forward(context)?;
            Ok((query, uid, upgrade::carrier(&request)?))
        });
    let (query, uid, carrier) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return error.into_response(),
    };
    let forward = ForwardTarget {
        backend: Arc::clone(&context.backend),
        pod: target.pod.clone(),
        uid,
        calls: context.calls.clone(),
    };
    let purpose = Purpose {
        // Each of its connections counts as a call.
        call: None,
        verb: "portforward",
        target: format!("{}/{}", target.namespace, target.pod),
    };
    let answered = match carrier {
        Carrier::Spdy => over_spdy(context, request, forward, purpose),
        Carrier::WebSocket => over_websocket(context, request, forward, &query, purpose),
    };
    answered.unwrap_or_else(|error| *error)
}

fn over_spdy(
    context: &Arc<Context>,
    request: Request,
    forward: ForwardTarget,
    purpose: Purpose,
) -> Result<Response, ErrorResponse> {
    let (answer, ()) = upgrade::spdy(request.headers(), &SPDY_PROTOCOLS)?;
    let (name, cut) = (purpose.target.clone(), context.cut.clone());
    let serve = async move |io: Io| {
        let (session, incoming) = spdy::session(io);
        let stop = Stop::new(cut, session.activity());
        let relay = pairs::serve(incoming, &forward, &stop);
        run_session(session.run(), relay, &stop, &name).await;
    };
    Ok(upgrade::switch(context, request, answer, purpose, serve))
}

fn over_websocket(
    context: &Arc<Context>,
    request: Request,
    forward: ForwardTarget,
    query: &Query,
    purpose: Purpose,
) -> Result<Response, ErrorResponse> {
    let headers = request.headers();
    let (answer, form) = upgrade::websocket(headers, &WEBSOCKET_PROTOCOLS, WEBSOCKET_UNNAMED)?;
    let (name, cut) = (purpose.target.clone(), context.cut.clone());
    match form {
        Form::Tunnel => {
            let serve = async move |io: Io| {
                let (session, incoming) = spdy::session(Tunnel::new(io));
                let stop = Stop::new(cut, session.activity());
                let relay = pairs::serve(incoming, &forward, &stop);
                run_session(session.run(), relay, &stop, &name).await;
            };
            Ok(upgrade::switch(context, request, answer, purpose, serve))
        }
        Form::Channels(encoding) => {
            let ports = ports(query).map_err(|bad| {
                Box::new(HttpError::bad_request(format!("{bad}\n")).into_response())
            })?;
            let serve = async move |io: Io| {
                // For each port a data channel, which the client may write, and an error channel, which it may not.
                let writable: Vec<bool> = ports.iter().flat_map(|_| [true, false]).collect();
                let (session, channels) = websocket::session(io, encoding, &writable);
                let stop = Stop::new(cut, session.activity());
                let relay = on_channels(channels, &ports, &forward, &stop);
                run_session(session.run(), relay, &stop, &name).await;
            };
            Ok(upgrade::switch(context, request, answer, purpose, serve))
        }
    }
}

/// Serves one connection for each port: channel 2i carries its bytes, 2i + 1 its error. Both begin with the port.
async fn on_channels(
    mut channels: Channels,
    ports: &[u16],
    forward: &ForwardTarget,
    stop: &Stop,
) -> Result<(), std::convert::Infallible> {
    let mut relays = Vec::new();
    for (number, port) in (0u8..).zip(ports) {
        let (data, error) = (2 * number, 2 * number + 1);
        let Some(reader) = channels.reader(data) else {
            continue;
        };
        let connection = Connection {
            port: *port,
            reader,
            data: StreamWriter::Channel(channels.sender(data)),
            error: StreamWriter::Channel(channels.sender(error)),
        };
        let greeting = Bytes::copy_from_slice(&port.to_le_bytes());
        for writer in [&connection.data, &connection.error] {
            // A client that has gone ends the session.
            drop(writer.send(greeting.clone()).await);
        }
        relays.push(connection.serve(forward, stop));
    }
    drop(channels);
    join_all(relays).await;
    Ok(())
}
