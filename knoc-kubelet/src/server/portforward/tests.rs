//! Pairs without HTTP and TLS, for tests with paused time.

use std::sync::Arc;

use knoc_remotecommand::spdy;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::{pairs, relay::ForwardTarget};
use crate::server::{
    limits::Limit,
    stop::Stop,
    tests::harness::{FakeBackend, Port},
    upgrade::run_session,
};

/// Serves one connection until its end.
pub(in crate::server) async fn serve<Io: AsyncRead + AsyncWrite>(io: Io, port: Port) {
    let target = ForwardTarget {
        backend: Arc::new(FakeBackend {
            ports: Some(port),
            ..FakeBackend::default()
        }),
        pod: "pod".to_owned(),
        uid: "ns-pod".parse().unwrap(),
        calls: Limit::calls(),
    };
    let (session, incoming) = spdy::session(io);
    let stop = Stop::new(CancellationToken::new(), session.activity());
    let relay = pairs::serve(incoming, &target, &stop);
    run_session(session.run(), relay, &stop, "ns/pod").await;
}
