//! Helpers that work in the namespaces of a container whose launcher waits for its specification. They join them as those of
//! exec do ([`enter`]).

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, net::UnixStream as StdUnixStream},
    },
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    children::Child,
    mounts::Mounts,
    pod::Pod,
    signals::{self, Identity},
};
use crate::launch::{account::PASSWD_BYTES, beside::Beside, enter};

/// How long a mount may take: the image may lie on a file system that is slow.
const MOUNT: Duration = Duration::from_mins(1);

/// A container, and the process whose PID namespace it shares.
pub(crate) type Place = (Identity, Option<Beside>);

/// What a helper is asked for.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    /// The last argument of the helper.
    pub(crate) mode: &'static str,
    pub(crate) request: &'a [u8],
    /// How long it may take.
    pub(crate) wait: Duration,
}

/// Mounts the folders of images, each over the whole of its image, which the runtime has mounted. On failure returns what could
/// not be mounted, and why.
pub(crate) async fn mount_folders(
    pod: &Pod,
    place: Place,
    mounts: &Mounts,
    abort: &CancellationToken,
) -> Result<(), String> {
    for (what, target, folder) in mounts.folders() {
        let paths = [target.as_os_str().as_bytes(), folder.as_os_str().as_bytes()];
        let question = Question {
            mode: enter::FOLDER,
            // By standard input and not as arguments: an expanded path may have a secret of the pod's.
            request: &paths.join(&0),
            wait: MOUNT,
        };
        if let Err(error) = ask(pod, place, &question, abort).await {
            return Err(format!("{what}: {}", why(&error)));
        }
    }
    Ok(())
}

/// PURE: why a folder of an image could not be mounted.
fn why(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound {
        return "the image has no such directory".to_owned();
    }
    if error.kind() == io::ErrorKind::NotADirectory {
        return "it is not a directory, and nothing else of an image can be mounted".to_owned();
    }
    error.to_string()
}

/// Starts a helper, sends it the request, and returns its answer once it has done its work.
pub(crate) async fn ask(
    pod: &Pod,
    place: Place,
    question: &Question<'_>,
    abort: &CancellationToken,
) -> io::Result<Vec<u8>> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut child = spawn(pod, place, question.mode, theirs)?;
    let mut stream = UnixStream::from_std(ours)?;
    let mut answer = Vec::new();
    let all = async {
        stream.write_all(question.request).await?;
        stream.shutdown().await?;
        let mut reading = stream.take(PASSWD_BYTES);
        reading.read_to_end(&mut answer).await?;
        io::Result::Ok(child.wait().await.code)
    };
    let ended = tokio::select! {
        biased;
        ended = timeout(question.wait, all) => ended.ok(),
        () = abort.cancelled() => None,
    };
    let Some(code) = ended else {
        signals::send(child.pid, Signal::KILL);
        return Err(io::ErrorKind::TimedOut.into());
    };
    match code? {
        0 => Ok(answer),
        errno if (1..i32::from(enter::FAILED)).contains(&errno) => {
            Err(io::Error::from_raw_os_error(errno))
        }
        code => Err(io::Error::other(format!(
            "the helper exited with code {code}"
        ))),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts these helpers"
)]
fn spawn(
    pod: &Pod,
    (container, beside): Place,
    mode: &str,
    socket: StdUnixStream,
) -> io::Result<Child> {
    let mut command = Command::new(&pod.agent);
    command
        .arg("enter")
        .args(enter::arguments(container, beside))
        .arg(mode)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    pod.children.spawn(&mut command, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_what_is_wrong_with_the_path() {
        let said = |errno| why(&io::Error::from_raw_os_error(errno));
        assert!(said(nix::libc::ENOENT).contains("no such directory"));
        assert!(said(nix::libc::ENOTDIR).contains("not a directory"));
        assert!(said(nix::libc::EIO).contains("os error 5"));
    }
}
