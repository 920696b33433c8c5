//! Serves gRPC on the connections of a listener, or on a single one.
use std::io;

use futures::{future::BoxFuture, stream::BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;

use super::Connection;

/// Serves `router` on the connections of `incoming` until `incoming` ends or `stop` is cancelled. Calls that are under way
/// are completed first.
///
/// All types are concrete, and the future is boxed here. The whole HTTP/2 server is generic code, which the compiler would
/// otherwise repeat in every crate that serves something: agent and shim, which are one binary.
#[must_use]
pub fn serve(
    router: Router,
    incoming: BoxStream<'static, io::Result<Connection>>,
    stop: CancellationToken,
) -> BoxFuture<'static, Result<(), tonic::transport::Error>> {
    Box::pin(async move {
        router
            .serve_with_incoming_shutdown(incoming, stop.cancelled())
            .await
    })
}
