//! Reads the image's own `/etc/passwd` from a running container. This is done only if the container's file may differ in what
//! matters (see [`account`]).

use std::time::Duration;

use knoc_contract::launch::LaunchSpec;
use tokio_util::sync::CancellationToken;

use super::{
    inside::{self, Place, Question},
    pod::Pod,
};
use crate::launch::{account, enter};

/// How long the helper may take: the image may lie on a file system that hangs.
const WAIT: Duration = Duration::from_secs(5);

/// The text of the file, if `spec` needs it. `None` if it cannot be read, as in a container that root has set up.
pub(crate) async fn of_image(
    pod: &Pod,
    container: Place,
    spec: &LaunchSpec,
    abort: &CancellationToken,
) -> Option<Vec<u8>> {
    let user = spec.user.as_ref().filter(|_| spec.settle)?;
    if !account::may_be_overwritten(user) {
        return None;
    }
    let question = Question {
        mode: enter::PASSWD,
        request: &[],
        wait: WAIT,
    };
    match inside::ask(pod, container, &question, abort).await {
        Ok(text) if !text.is_empty() => Some(text),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "cannot read the image's own /etc/passwd; HOME comes from the container's file");
            None
        }
    }
}
