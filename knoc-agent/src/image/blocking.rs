//! Work on files, which may take long, away from the threads of the runtime.

use knoc_proto::error::chain;

/// Runs it on a thread that may block. Not cancel safe: what has begun goes on.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| chain(&error)).flatten()
}
