//! Pairs without HTTP and TLS, for tests whose time stands still.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::pairs;
use super::relay::Goal;
use crate::server::spdy;
use crate::server::tests::harness::{FakeBackend, Port};

/// Serves one connection until its end.
pub(in crate::server) async fn serve<Io: AsyncRead + AsyncWrite>(io: Io, port: Port) {
    let goal = Goal {
        backend: Arc::new(FakeBackend {
            ports: Some(port),
            ..FakeBackend::default()
        }),
        pod: "pod".to_owned(),
        uid: "ns-pod".to_owned(),
    };
    let (session, incoming) = spdy::session(io);
    let (ended, served) = tokio::join!(session.run(), pairs::serve(incoming, &goal));
    drop((ended, served));
}
