//! The accept loop: TCP, then TLS, then HTTP/1.1 with upgrades; each connection a task that the server joins.
//!
//! Shutdown: no new connections, idle ones close at once, requests under way get [`DRAIN`], what is left (a followed
//! log never ends by itself) is cut.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use futures::FutureExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use rustls_pki_types::CertificateDer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;
use tracing::{debug, info, warn};

use super::authn::Peer;
use super::separate_end::SeparateEnd;
use super::tls::Tls;
use super::wire::Wire;

/// A handshake takes two round trips; a peer that needs longer holds a slot for nothing.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// The real kubelet's idle time; hyper counts it while it waits for a request's head.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// A client host that dies says nothing: after so long without a byte it is asked,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// then so often,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and where it leaves so many unanswered, its connection ends, and what runs on it.
const KEEPALIVE_PROBES: u32 = 3;
/// Connections at once: a stream each, so 200 execs, 100 followers and a scraper fit many times over.
const MAX_CONNECTIONS: usize = 2048;
/// How long requests under way may go on after shutdown began.
pub(super) const DRAIN: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors left) the loop must not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves until `shutdown`, then drains.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Tls,
    router: Router,
    drain: Duration,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Shutdown first; ended connections before new ones, so that the set does not grow.
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => {
                    let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                        warn!(peer = %address, limit = MAX_CONNECTIONS, "refused a connection, too many are open");
                        continue;
                    };
                    let connection = Connection {
                        tls: tls.clone(),
                        router: router.clone(),
                        address,
                        shutdown: shutdown.clone(),
                    };
                    connections.spawn(connection.run(stream).map(|()| drop(slot)));
                }
                Err(error) => {
                    warn!(%error, "accept on the kubelet API's port");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let drained = tokio::time::timeout(drain, async {
        while connections.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        info!(
            cut = connections.len(),
            "kubelet API drained, streams that went on were cut"
        );
        connections.shutdown().await;
    }
}

struct Connection {
    tls: Tls,
    router: Router,
    address: std::net::SocketAddr,
    shutdown: CancellationToken,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let stream = match self.handshake(stream).await {
            Ok(stream) => stream,
            // A port probe: connects and closes.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                debug!(peer = %self.address, %error, "handshake");
                return;
            }
            Err(error) => {
                info!(peer = %self.address, %error, "refused a TLS handshake");
                return;
            }
        };
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = Peer {
            address: self.address,
            certificates: certificates
                .iter()
                .map(|it| CertificateDer::clone(it).into_owned())
                .collect(),
        };
        let wire = match Wire::of(stream.get_ref().0) {
            Ok(wire) => wire,
            Err(error) => {
                warn!(peer = %self.address, %error, "duplicate a connection's descriptor");
                return;
            }
        };
        let router = self.router;
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(peer.clone());
            request.extensions_mut().insert(wire.clone());
            router.clone().oneshot(request.map(Body::new))
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .serve_connection(TokioIo::new(SeparateEnd(stream)), service)
            .with_upgrades();
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            biased;
            ended = connection.as_mut() => ended,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(peer = %self.address, %error, "connection ended");
        }
    }

    async fn handshake(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        prepare(&stream)?;
        let config = self.tls.config.borrow().clone();
        let accepted = TlsAcceptor::from(config).accept(stream);
        tokio::time::timeout(HANDSHAKE_DEADLINE, accepted)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Sets a connection's options. There is no `TCP_USER_TIMEOUT`: Linux counts it while a client that is alive does not
/// read, so it would end `kubectl logs -f` in a pager.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

#[cfg(test)]
mod tests {
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
