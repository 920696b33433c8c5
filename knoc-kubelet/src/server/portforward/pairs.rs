//! Port-forward over SPDY: for each connection the client opens two streams, `error` and `data`, which find each other by
//! their `requestid`; without one the data stream's id follows the error stream's. Many run at once on a connection.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;
use tracing::{debug, info};

use super::super::remote::STREAMS_DEADLINE;
use super::super::spdy::{Headers, Incoming, Stream};
use super::super::streams::{Inlet, Outlet};
use super::options;
use super::relay::{Connection, Goal};

/// Which of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Error,
    Data,
}

/// What a stream's headers say.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    role: Role,
    port: u16,
    request: String,
}

/// Reads the headers of stream `id`; the text says what is wrong with them, in upstream's words.
fn asked(id: u32, headers: &Headers) -> Result<Asked, String> {
    let required = |name: &str| match headers.get(name) {
        None | Some("") => Err(format!("{name:?} header is required")),
        Some(value) => Ok(value),
    };
    let port = options::parse(required("port")?).map_err(|bad| bad.to_string())?;
    let role = match required("streamtype")? {
        "error" => Role::Error,
        "data" => Role::Data,
        other => return Err(format!("invalid stream type {other:?}")),
    };
    let request = match headers.get("requestid") {
        Some(named) if !named.is_empty() => named.to_owned(),
        _ => {
            let first = match role {
                Role::Error => id,
                Role::Data => id.saturating_sub(2),
            };
            // Never the name that a client gave to another pair.
            format!("stream {first}")
        }
    };
    Ok(Asked {
        role,
        port,
        request,
    })
}

/// The half of a pair that came first.
enum Half {
    Error(Outlet),
    Data(u16, Inlet, Outlet),
}

/// Halves that wait for their partner, and since when.
#[derive(Default)]
struct Waiting {
    halves: HashMap<String, (Half, Instant)>,
    /// In order of their deadlines; may name pairs that are complete.
    order: VecDeque<(String, Instant)>,
}

impl Waiting {
    /// Takes a stream; a connection where its partner is there already.
    async fn take(&mut self, asked: Asked, inlet: Inlet, outlet: Outlet) -> Option<Connection> {
        let Asked {
            role,
            port,
            request,
        } = asked;
        let (first, since) = match (self.halves.remove(&request), role) {
            (Some((Half::Error(error), _)), Role::Data) => {
                let data = outlet;
                return Some(Connection {
                    port,
                    inlet,
                    data,
                    error,
                });
            }
            (Some((Half::Data(port, inlet, data), _)), Role::Error) => {
                let error = outlet;
                return Some(Connection {
                    port,
                    inlet,
                    data,
                    error,
                });
            }
            (Some((Half::Error(first), since)), Role::Error) => {
                outlet.reset().await;
                let text = format!(
                    "error processing stream for request {request}: error stream already assigned"
                );
                drop(first.send(text.into()).await);
                (Half::Error(first), since)
            }
            (Some((first @ Half::Data(..), since)), Role::Data) => {
                debug!(request, "data stream already assigned");
                outlet.reset().await;
                (first, since)
            }
            (None, role) => {
                let since = Instant::now();
                self.order.push_back((request.clone(), since));
                let half = match role {
                    Role::Error => Half::Error(outlet),
                    Role::Data => Half::Data(port, inlet, outlet),
                };
                (half, since)
            }
        };
        self.halves.insert(request, (first, since));
        None
    }

    /// Waits until the oldest half has waited too long, and takes it out; pending while there is none. Cancel safe.
    async fn expired(&mut self) -> (String, Half) {
        loop {
            let Some((request, since)) = self.order.front() else {
                return std::future::pending().await;
            };
            let waits = self.halves.get(request);
            if waits.is_some_and(|(_, began)| began == since) {
                tokio::time::sleep_until(*since + STREAMS_DEADLINE).await;
            }
            let Some((request, since)) = self.order.pop_front() else {
                continue;
            };
            match self.halves.remove(&request) {
                Some((half, began)) if began == since => return (request, half),
                Some(later) => drop(self.halves.insert(request, later)),
                None => {}
            }
        }
    }
}

/// Serves pairs until the client opens no more and all have ended.
pub(super) async fn serve(mut incoming: Incoming, goal: &Goal) -> Result<(), Infallible> {
    let mut waiting = Waiting::default();
    let mut relays = FuturesUnordered::new();
    loop {
        // New streams first, so that a busy relay holds up none.
        tokio::select! {
            biased;
            stream = incoming.next() => match stream {
                None => break,
                Some(stream) => {
                    let connection = taken(&mut waiting, stream).await;
                    relays.extend(connection.map(|connection| connection.serve(goal)));
                }
            },
            (request, half) = waiting.expired() => give_up(&request, half).await,
            Some(()) = relays.next() => {}
        }
    }
    while relays.next().await.is_some() {}
    Ok(())
}

async fn taken(waiting: &mut Waiting, stream: Stream) -> Option<Connection> {
    match asked(stream.id(), stream.headers()) {
        Err(error) => {
            info!(%error, "refused a stream of a port-forward");
            stream.refuse().await;
            None
        }
        Ok(asked) => {
            let (inlet, sender) = stream.accept().await;
            waiting.take(asked, inlet, Outlet::Spdy(sender)).await
        }
    }
}

/// Tells the client, where it has opened what it could hear it on.
async fn give_up(request: &str, half: Half) {
    info!(request, "half a pair of a port-forward's streams");
    match half {
        Half::Error(error) => {
            let text = format!("(request={request}) timed out waiting for streams");
            drop(error.finish(text.into()).await);
        }
        Half::Data(_, _, data) => data.reset().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Headers::of(pairs.iter().map(own))
    }

    #[test]
    fn reads_pairs_with_and_without_an_id() {
        let with = headers(&[("streamtype", "data"), ("port", "80"), ("requestid", "7")]);
        let expected = Asked {
            role: Role::Data,
            port: 80,
            request: "7".to_owned(),
        };
        assert_eq!(asked(9, &with), Ok(expected));
        let without = |kind| headers(&[("streamtype", kind), ("port", "80")]);
        let error = asked(5, &without("error")).unwrap();
        let data = asked(7, &without("data")).unwrap();
        assert_eq!(error.request, data.request);
        assert_ne!(
            error.request, "5",
            "a client may have named another pair so"
        );
    }

    #[test]
    fn says_what_is_wrong_in_upstreams_words() {
        let cases: [(&[(&str, &str)], &str); 5] = [
            (&[("streamtype", "data")], "\"port\" header is required"),
            (&[("port", "")], "\"port\" header is required"),
            (&[("port", "0")], "port \"0\" must be > 0"),
            (&[("port", "80")], "\"streamtype\" header is required"),
            (
                &[("port", "80"), ("streamtype", "x")],
                "invalid stream type \"x\"",
            ),
        ];
        for (pairs, text) in cases {
            assert_eq!(asked(1, &headers(pairs)), Err(text.to_owned()));
        }
    }
}
