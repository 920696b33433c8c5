//! Port-forward over SPDY: for each connection the client opens two streams, `error` and `data`, with the same
//! `requestid`. Without one, the data stream's id follows the error stream's. Many pairs share one connection.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use knoc_remotecommand::{
    ports,
    spdy::{Headers, Incoming, Stream},
    stream_writer::StreamWriter,
    streams::StreamReader,
};
use tokio::time::Instant;
use tracing::{debug, info};

use super::relay::{Connection, ForwardTarget};
use crate::server::{remote::STREAMS_DEADLINE, stop::Stop};

/// The longest `port` and `requestid` headers in bytes, which are kept and logged. Clients send a counter or a UUID.
const MAX_VALUE: usize = 64;

/// The error for half a pair whose partner does not come, as in Kubernetes.
const LATE: &str = "timed out waiting for streams";

/// Which stream of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Error,
    Data,
}

/// The parsed headers of a stream.
#[derive(Debug, PartialEq, Eq)]
struct StreamHeaders {
    id: u32,
    role: Role,
    port: u16,
    request: String,
}

/// Parses the headers of stream `id`. The errors are those of the Kubernetes kubelet, except for the length limit.
fn parse_headers(id: u32, headers: &Headers) -> Result<StreamHeaders, String> {
    let bounded = |name: &str| match headers.get(name) {
        Some(value) if value.len() > MAX_VALUE => {
            Err(format!("{name:?} header is longer than {MAX_VALUE} bytes"))
        }
        value => Ok(value.filter(|value| !value.is_empty())),
    };
    let required =
        |name: &str| bounded(name)?.ok_or_else(|| format!("{name:?} header is required"));
    let port = ports::parse(required("port")?).map_err(|bad| bad.to_string())?;
    let role = match required("streamtype")? {
        "error" => Role::Error,
        "data" => Role::Data,
        other => return Err(format!("invalid stream type {other:?}")),
    };
    let request = if let Some(named) = bounded("requestid")? {
        named.to_owned()
    } else {
        let first = match role {
            Role::Error => id,
            Role::Data => id.saturating_sub(2),
        };
        // This name cannot be equal to one that a client gave to another pair.
        format!("stream {first}")
    };
    Ok(StreamHeaders {
        id,
        role,
        port,
        request,
    })
}

/// The half of a pair that came first.
enum Half {
    Error(StreamWriter),
    Data(u16, StreamReader, StreamWriter),
}

/// The halves that wait for their partner.
#[derive(Default)]
struct Waiting {
    /// The halves by the name of their pair, each with the id of its stream.
    halves: HashMap<String, (Half, u32)>,
    /// Since when each half waits, by the id of its stream. Ids grow, so this is the order of their deadlines.
    order: BTreeMap<u32, (String, Instant)>,
}

impl Waiting {
    /// Adds a stream; returns the connection if its partner is already there.
    async fn take(
        &mut self,
        asked: StreamHeaders,
        reader: StreamReader,
        writer: StreamWriter,
    ) -> Option<Connection> {
        let StreamHeaders {
            id,
            role,
            port,
            request,
        } = asked;
        let (first, key) = match (self.remove(&request), role) {
            (Some((Half::Error(error), _)), Role::Data) => {
                let data = writer;
                return Some(Connection {
                    port,
                    reader,
                    data,
                    error,
                });
            }
            (Some((Half::Data(port, reader, data), _)), Role::Error) => {
                let error = writer;
                return Some(Connection {
                    port,
                    reader,
                    data,
                    error,
                });
            }
            (Some((Half::Error(first), key)), Role::Error) => {
                writer.reset().await;
                let text = format!(
                    "error processing stream for request {request}: error stream already assigned"
                );
                drop(first.send(text.into()).await);
                (Half::Error(first), key)
            }
            (Some((first @ Half::Data(..), key)), Role::Data) => {
                debug!(request, "data stream already assigned");
                writer.reset().await;
                (first, key)
            }
            (None, role) => {
                let half = match role {
                    Role::Error => Half::Error(writer),
                    Role::Data => Half::Data(port, reader, writer),
                };
                (half, (id, Instant::now()))
            }
        };
        self.insert(request, first, key);
        None
    }

    fn insert(&mut self, request: String, half: Half, (id, since): (u32, Instant)) {
        self.order.insert(id, (request.clone(), since));
        self.halves.insert(request, (half, id));
    }

    /// Removes a half, and returns it with its key in the order.
    fn remove(&mut self, request: &str) -> Option<(Half, (u32, Instant))> {
        let (half, id) = self.halves.remove(request)?;
        let (_, since) = self.order.remove(&id)?;
        Some((half, (id, since)))
    }

    /// Waits until the oldest half has waited too long and removes it; pending while there is none. Cancel safe.
    async fn expired(&mut self) -> (String, Half) {
        if let Some((_, (request, since))) = self.order.first_key_value() {
            let request = request.clone();
            tokio::time::sleep_until(*since + STREAMS_DEADLINE).await;
            if let Some((half, _)) = self.remove(&request) {
                return (request, half);
            }
        }
        std::future::pending().await
    }
}

/// Serves pairs until the client opens no more and all have ended, or until the session is stopped.
pub(super) async fn serve(
    mut incoming: Incoming,
    target: &ForwardTarget,
    stop: &Stop,
) -> Result<(), Infallible> {
    let mut waiting = Waiting::default();
    let mut relays = FuturesUnordered::new();
    loop {
        // The stop comes first, then new streams, so that a busy relay does not delay them.
        tokio::select! {
            biased;
            why = stop.why() => {
                for (request, (half, _)) in waiting.halves.drain() {
                    while_polling(&mut relays, give_up(&request, half, &why)).await;
                }
                break;
            }
            stream = incoming.next() => match stream {
                None => break,
                Some(stream) => {
                    let connection = while_polling(&mut relays, taken(&mut waiting, stream)).await;
                    relays.extend(connection.map(|connection| connection.serve(target, stop)));
                }
            },
            (request, half) = waiting.expired() => {
                while_polling(&mut relays, give_up(&request, half, LATE)).await;
            }
            Some(()) = relays.next() => {}
        }
    }
    while relays.next().await.is_some() {}
    Ok(())
}

/// Runs `work`, which may wait for a slot in the session's queue, and polls the relays meanwhile. The relays wait for
/// slots of the same queue: a relay that was given a slot but is not polled would keep it without using it.
async fn while_polling<T>(
    relays: &mut FuturesUnordered<impl Future<Output = ()>>,
    work: impl Future<Output = T>,
) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = work.as_mut() => return done,
            Some(()) = relays.next() => {}
        }
    }
}

async fn taken(waiting: &mut Waiting, stream: Stream) -> Option<Connection> {
    match parse_headers(stream.id(), stream.headers()) {
        Err(error) => {
            info!(%error, "rejected a stream of a port-forward");
            stream.refuse().await;
            None
        }
        Ok(asked) => {
            let (reader, sender) = stream.accept().await;
            waiting
                .take(asked, reader, StreamWriter::Spdy(sender))
                .await
        }
    }
}

/// Reports the reason to the client, if it has opened the error stream.
async fn give_up(request: &str, half: Half, why: &str) {
    info!(
        request,
        why, "a port-forward has only half a pair of streams"
    );
    match half {
        Half::Error(error) => {
            let text = format!("(request={request}) {why}");
            drop(error.finish(text.into()).await);
        }
        Half::Data(_, _, data) => data.reset().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use knoc_remotecommand::spdy;
    use knoc_remotecommand::spdy::peer::Peer;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Headers::of(pairs.iter().map(own))
    }

    #[test]
    fn reads_pairs_with_and_without_an_id() {
        let with = headers(&[("streamtype", "data"), ("port", "80"), ("requestid", "7")]);
        let expected = StreamHeaders {
            id: 9,
            role: Role::Data,
            port: 80,
            request: "7".to_owned(),
        };
        assert_eq!(parse_headers(9, &with), Ok(expected));
        let without = |kind| headers(&[("streamtype", kind), ("port", "80")]);
        let error = parse_headers(5, &without("error")).unwrap();
        let data = parse_headers(7, &without("data")).unwrap();
        assert_eq!(error.request, data.request);
        assert_ne!(
            error.request, "5",
            "a client may have given this name to another pair"
        );
    }

    #[test]
    fn reports_what_is_wrong_with_the_texts_of_a_kubelet() {
        let long = "7".repeat(MAX_VALUE + 1);
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("streamtype", "data")], "\"port\" header is required"),
            (&[("port", "")], "\"port\" header is required"),
            (&[("port", "0")], "port \"0\" must be > 0"),
            (&[("port", "80")], "\"streamtype\" header is required"),
            (
                &[("port", "80"), ("streamtype", "x")],
                "invalid stream type \"x\"",
            ),
            (
                &[("port", &long)],
                "\"port\" header is longer than 64 bytes",
            ),
            (
                &[("port", "80"), ("streamtype", "data"), ("requestid", &long)],
                "\"requestid\" header is longer than 64 bytes",
            ),
        ];
        for (pairs, text) in cases {
            assert_eq!(parse_headers(1, &headers(pairs)), Err(text.to_owned()));
        }
    }

    #[tokio::test]
    async fn what_is_kept_is_what_waits() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (session, mut incoming) = spdy::session(near);
        let mut waiting = Waiting::default();
        let pairs = async {
            let mut peer = Peer::new(far);
            peer.open(1, &named("error", "lonely")).await;
            assert!(next(&mut waiting, &mut incoming).await.is_none());
            for id in (3..400).step_by(4) {
                let request = id.to_string();
                peer.open(id, &named("data", &request)).await;
                assert!(next(&mut waiting, &mut incoming).await.is_none());
                peer.open(id + 2, &named("error", &request)).await;
                assert!(next(&mut waiting, &mut incoming).await.is_some());
            }
        };
        tokio::select! {
            _ = session.run() => panic!("the session ended"),
            () = pairs => {}
        }
        assert_eq!((waiting.halves.len(), waiting.order.len()), (1, 1));
    }

    fn named<'a>(kind: &'a str, request: &'a str) -> [(&'a str, &'a str); 3] {
        [("streamtype", kind), ("port", "80"), ("requestid", request)]
    }

    async fn next(waiting: &mut Waiting, incoming: &mut Incoming) -> Option<Connection> {
        let stream = incoming.next().await.unwrap();
        taken(waiting, stream).await
    }
}
