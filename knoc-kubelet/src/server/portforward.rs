//! `/portForward/{namespace}/{pod}[/{uid}]`: connections to ports of a pod, for `kubectl port-forward`.
//!
//! Three forms: SPDY, where the client opens a pair of streams for each connection ([`pairs`]); the same within binary
//! messages of a WebSocket (`SPDY/3.1+portforward.k8s.io`); and WebSocket channels, a pair for each of the ports named
//! in the query and one connection on each. What runs on a pair is [`relay`].

mod pairs;
mod relay;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;

use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::future::join_all;

use knoc_remotecommand::ports::ports;
use knoc_remotecommand::query::Query;
use knoc_remotecommand::stream_writer::StreamWriter;
use knoc_remotecommand::websocket::tunnel::Tunnel;
use knoc_remotecommand::websocket::{Channels, Encoding};
use knoc_remotecommand::{spdy, websocket};

use super::Context;
use super::stop::Stop;
use super::target::{Refusal, Target};
use super::upgrade::{self, Carrier, Io, Purpose, Refused, together};
use relay::{Connection, Goal};

/// The protocol over SPDY.
const SPDY_PROTOCOLS: [(&str, ()); 1] = [("portforward.k8s.io", ())];
/// The protocols over WebSocket, newest first.
const WEBSOCKET_PROTOCOLS: [(&str, Form); 3] = [
    ("SPDY/3.1+portforward.k8s.io", Form::Tunnel),
    ("v4.channel.k8s.io", Form::Channels(Encoding::Binary)),
    ("v4.base64.channel.k8s.io", Form::Channels(Encoding::Base64)),
];
/// What a WebSocket client speaks that names nothing.
const WEBSOCKET_UNNAMED: Form = Form::Channels(Encoding::Binary);

/// What a WebSocket carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Tunnel,
    Channels(Encoding),
}

/// `/portForward/{namespace}/{pod}[/{uid}]`
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
        .map_err(|error| Refusal::bad_request(format!("{error}\n")))
        .and_then(|query| {
            let uid = target.port_forward(context)?;
            Ok((query, uid, upgrade::carrier(&request)?))
        });
    let (query, uid, carrier) = match prepared {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal.into_response(),
    };
    let goal = Goal {
        backend: Arc::clone(&context.backend),
        pod: target.pod.clone(),
        uid,
        calls: context.calls.clone(),
    };
    let purpose = Purpose {
        // Each of its connections is a call.
        call: None,
        verb: "portforward",
        target: format!("{}/{}", target.namespace, target.pod),
    };
    let answered = match carrier {
        Carrier::Spdy => over_spdy(context, request, goal, purpose),
        Carrier::WebSocket => over_websocket(context, request, goal, &query, purpose),
    };
    answered.unwrap_or_else(|refused| *refused)
}

fn over_spdy(
    context: &Arc<Context>,
    request: Request,
    goal: Goal,
    purpose: Purpose,
) -> Result<Response, Refused> {
    let (answer, ()) = upgrade::spdy(request.headers(), &SPDY_PROTOCOLS)?;
    let (name, cut) = (purpose.target.clone(), context.cut.clone());
    let serve = async move |io: Io| {
        let (session, incoming) = spdy::session(io);
        let stop = Stop::new(cut, session.activity());
        let relay = pairs::serve(incoming, &goal, &stop);
        together(session.run(), relay, &stop, &name).await;
    };
    Ok(upgrade::switch(context, request, answer, purpose, serve))
}

fn over_websocket(
    context: &Arc<Context>,
    request: Request,
    goal: Goal,
    query: &Query,
    purpose: Purpose,
) -> Result<Response, Refused> {
    let headers = request.headers();
    let (answer, form) = upgrade::websocket(headers, &WEBSOCKET_PROTOCOLS, WEBSOCKET_UNNAMED)?;
    let (name, cut) = (purpose.target.clone(), context.cut.clone());
    match form {
        Form::Tunnel => {
            let serve = async move |io: Io| {
                let (session, incoming) = spdy::session(Tunnel::new(io));
                let stop = Stop::new(cut, session.activity());
                let relay = pairs::serve(incoming, &goal, &stop);
                together(session.run(), relay, &stop, &name).await;
            };
            Ok(upgrade::switch(context, request, answer, purpose, serve))
        }
        Form::Channels(encoding) => {
            let ports = ports(query).map_err(|bad| {
                Box::new(Refusal::bad_request(format!("{bad}\n")).into_response())
            })?;
            let serve = async move |io: Io| {
                // Data, which the client may write, then errors, which it may not; for each port.
                let writable: Vec<bool> = ports.iter().flat_map(|_| [true, false]).collect();
                let (session, channels) = websocket::session(io, encoding, &writable);
                let stop = Stop::new(cut, session.activity());
                let relay = on_channels(channels, &ports, &goal, &stop);
                together(session.run(), relay, &stop, &name).await;
            };
            Ok(upgrade::switch(context, request, answer, purpose, serve))
        }
    }
}

/// One connection a port: on channel 2i its bytes, on 2i + 1 what goes wrong. Both begin with the port.
async fn on_channels(
    mut channels: Channels,
    ports: &[u16],
    goal: &Goal,
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
        relays.push(connection.serve(goal, stop));
    }
    drop(channels);
    join_all(relays).await;
    Ok(())
}
