//! What a client sends to the process that it has started by exec, over whatever connection.

use knoc_link::bulk::Messages;
use knoc_proto::pb;

/// The messages of a client.
pub(crate) trait Inputs: Send {
    /// The next one; `None` once there are no more.
    fn next(&mut self) -> impl Future<Output = Option<pb::ExecInput>> + Send;
}

impl Inputs for Messages<pb::ExecInput> {
    async fn next(&mut self) -> Option<pb::ExecInput> {
        // A stream that fails has ended. That its client has disconnected is noticed at the output.
        self.message().await.ok().flatten()
    }
}
