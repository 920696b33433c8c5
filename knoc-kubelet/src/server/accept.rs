//! The connections: TCP, then TLS, then HTTP/1.1 with upgrades. Each connection is a task that the server joins.
//!
//! [`knoc_link::accept`] accepts connections and does the handshakes; [`super::connections`] limits how many stay open
//! after that, with and without an identity.
//!
//! At shutdown no new connections are accepted and idle ones close at once. Running requests get [`DRAIN`] to finish;
//! then the rest is cut, since a followed log never ends by itself.

use std::{io, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use futures::{FutureExt as _, StreamExt as _, TryFutureExt as _};
use hyper::{body::Incoming as RequestBody, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use knoc_link::{
    Connection, Origin,
    accept::Accept,
    admission::{Bounds, Source},
    carrier::{Unverified, tcp},
};
use knoc_proto::error::chain;
use rustix::net::sockopt;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{net::TcpStream, task::JoinSet};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, info};

use super::{
    authn::{self, Peer},
    connections::ConnectionSlots,
    peer_watch::PeerWatch,
    separate_end::SeparateEnd,
    tls::Tls,
};

/// The idle timeout of the Kubernetes kubelet; hyper applies it while it waits for a request's head.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// A host that dies sends nothing: a connection is probed after so long without a byte,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// then at this interval,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and is closed after so many unanswered probes, with everything that runs on it.
const KEEPALIVE_PROBES: u32 = 3;
/// How long running requests may take after the shutdown began.
pub(super) const DRAIN: Duration = Duration::from_secs(5);

/// What a handshake tells about a client.
#[derive(Debug)]
pub(super) struct Client {
    origin: Origin,
    /// The certificates that the client presented, end-entity certificate first.
    certificates: Arc<[CertificateDer<'static>]>,
    watch: PeerWatch,
}

impl Client {
    fn of(stream: &TlsStream<TcpStream>, origin: Origin) -> io::Result<Self> {
        let (socket, tls) = stream.get_ref();
        let certificates = tls.peer_certificates().unwrap_or_default().iter();
        let certificates = certificates.map(|it| CertificateDer::clone(it).into_owned());
        Ok(Self {
            origin,
            certificates: certificates.collect(),
            watch: PeerWatch::of(socket)?,
        })
    }
}

/// The connections of the kubelet API's port.
pub(super) type Incoming = Accept<tcp::Listener, Connection<Client>>;

/// Accepts on `listener`, with the newest certificate.
pub(super) fn listen(listener: tcp::Listener, tls: &Tls) -> Incoming {
    let config = tls.config.clone();
    Accept::new(listener, Bounds::own(), move |Unverified { io, origin }| {
        let config = config.borrow().clone();
        let secured = async move {
            prepare(&io)?;
            let stream = TlsAcceptor::from(config).accept(io).await?;
            let client = Client::of(&stream, origin)?;
            Ok::<_, io::Error>(Connection::new(stream, client))
        };
        secured.map_err(|error| chain(&error)).boxed()
    })
}

/// Serves until `shutdown`, then drains.
pub(super) async fn serve(
    mut incoming: Incoming,
    tls: Tls,
    router: Router,
    drain: Duration,
    shutdown: CancellationToken,
) {
    let slots = ConnectionSlots::own();
    let mut connections = JoinSet::new();
    loop {
        // Shutdown comes first, and ended connections come before new ones so that the set does not grow.
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = incoming.next() => accepted,
        };
        let Some(Ok(connection)) = accepted else {
            continue;
        };
        let verifier = tls.verifier.borrow().clone();
        let client = connection.peer();
        let identified = matches!(
            authn::user(&client.certificates, &verifier, UnixTime::now()),
            Some(Ok(_))
        );
        let Some(slot) = slots.enter(Source::from(client.origin), identified) else {
            continue;
        };
        let serving = Serving {
            peer: Peer {
                origin: client.origin,
                certificates: Arc::clone(&client.certificates),
                slot: Arc::new(slot),
            },
            router: router.clone(),
            shutdown: shutdown.clone(),
        };
        connections.spawn(serving.run(connection));
    }
    drop(incoming);
    let drained = tokio::time::timeout(drain, async {
        while connections.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        info!(
            cut = connections.len(),
            "the kubelet API has stopped, the remaining streams were cut"
        );
        connections.shutdown().await;
    }
}

/// A connection that is being served.
struct Serving {
    peer: Peer,
    router: Router,
    shutdown: CancellationToken,
}

impl Serving {
    async fn run(self, connection: Connection<Client>) {
        let origin = self.peer.origin;
        let watch = connection.peer().watch.clone();
        let (router, peer) = (self.router, self.peer.clone());
        let service = service_fn(move |mut request: hyper::Request<RequestBody>| {
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(watch.clone());
            router.clone().oneshot(request.map(Body::new))
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .serve_connection(TokioIo::new(SeparateEnd(connection)), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            biased;
            ended = connection.as_mut() => ended,
            () = self.peer.slot.revoked() => return,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(peer = %origin, %error, "connection ended");
        }
    }
}

/// Sets a connection's options. `TCP_USER_TIMEOUT` is not used: Linux also counts it while a live client does not read,
/// so it would end `kubectl logs -f` in a pager.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_connection_asks_whether_its_client_is_alive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, _) = accepted.unwrap();
        assert!(client.is_ok() && !sockopt::socket_keepalive(&stream).unwrap());
        prepare(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap() && stream.nodelay().unwrap());
        let times = [
            sockopt::tcp_keepidle(&stream).unwrap(),
            sockopt::tcp_keepintvl(&stream).unwrap(),
        ];
        assert_eq!(times, [Duration::from_secs(30), Duration::from_secs(10)]);
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), 3);
    }
}
