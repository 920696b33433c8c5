//! Reads the image's own `/etc/passwd` from a running container, by a helper in its namespaces like that of exec. This is
//! done only if the container's file may differ in what matters (see [`account`]).

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    process::{Command, Stdio},
    time::Duration,
};

use knoc_contract::launch::LaunchSpec;
use rustix::process::Signal;
use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    time::{error::Elapsed, timeout},
};

use super::{
    pod::Pod,
    signals::{self, Identity},
};
use crate::launch::{
    account::{self, PASSWD_BYTES},
    beside::Beside,
    enter,
};

/// How long the helper may take: the image may lie on a file system that hangs.
const WAIT: Duration = Duration::from_secs(5);

/// A container, and the process whose PID namespace it shares.
type Place = (Identity, Option<Beside>);

/// The text of the file, if `spec` needs it. `None` if it cannot be read, as in a container that root has set up.
pub(crate) async fn of_image(pod: &Pod, container: Place, spec: &LaunchSpec) -> Option<Vec<u8>> {
    let user = spec.user.as_ref().filter(|_| spec.settle)?;
    if !account::may_be_overwritten(user) {
        return None;
    }
    match read(pod, container).await {
        Ok(text) if !text.is_empty() => Some(text),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, "cannot read the image's own /etc/passwd; HOME comes from the container's file");
            None
        }
    }
}

async fn read(pod: &Pod, container: Place) -> io::Result<Vec<u8>> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut child = spawn(pod, container, theirs)?;
    let mut text = Vec::new();
    let reading = UnixStream::from_std(ours)?;
    let mut reading = reading.take(PASSWD_BYTES);
    let all = async {
        reading.read_to_end(&mut text).await?;
        Ok(child.wait().await.code)
    };
    let code: Result<io::Result<i32>, Elapsed> = timeout(WAIT, all).await;
    let Ok(code) = code else {
        signals::send(child.pid, Signal::KILL);
        return Err(io::ErrorKind::TimedOut.into());
    };
    match code? {
        0 => Ok(text),
        code => Err(io::Error::other(format!(
            "the helper exited with code {code}"
        ))),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts this helper"
)]
fn spawn(
    pod: &Pod,
    (container, beside): Place,
    socket: StdUnixStream,
) -> io::Result<super::children::Child> {
    let mut command = Command::new(&pod.agent);
    command
        .arg("enter")
        .args(enter::arguments(container, beside))
        .arg(enter::PASSWD)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    pod.children.spawn(&mut command, true)
}
