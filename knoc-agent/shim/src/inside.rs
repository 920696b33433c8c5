//! Helpers that work in the namespaces of a container whose launcher waits for its specification. They join them as those of
//! exec do ([`enter`]).

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, net::UnixStream as StdUnixStream},
    },
    path::PathBuf,
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

/// How long copying what the image has in one of its volumes may take.
const COPY: Duration = Duration::from_mins(5);

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
    /// The helper's standard output.
    pub(crate) output: Stdio,
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
            output: Stdio::null(),
        };
        if let Err(error) = ask(pod, place, question, abort).await {
            return Err(format!("{what}: {}", why(&error)));
        }
    }
    Ok(())
}

/// Copies what the image has in its volumes, whose paths in the container come first, into the folders that are mounted there. On
/// failure returns which one was not copied, and why.
pub(crate) async fn fill_volumes(
    pod: &Pod,
    place: Place,
    volumes: &[(PathBuf, PathBuf)],
    abort: &CancellationToken,
) -> Result<(), String> {
    for (target, folder) in volumes {
        let filled = async {
            let question = Question {
                mode: enter::VOLUME,
                request: target.as_os_str().as_bytes(),
                wait: COPY,
                output: File::open(folder)?.into(),
            };
            ask(pod, place, question, abort).await
        };
        if let Err(error) = filled.await {
            let why = why_not_filled(&error);
            return Err(format!("the image's volume {}: {why}", target.display()));
        }
    }
    Ok(())
}

/// PURE: why what the image has in a volume could not be copied.
fn why_not_filled(error: &io::Error) -> String {
    let too_much = error.raw_os_error() == Some(nix::libc::EFBIG);
    if too_much || error.kind() == io::ErrorKind::TimedOut {
        return "the image has more in it than can be copied (16 GiB, 1000000 files, 64 levels, 5 minutes); mount a volume of the pod \
                there, or leave readOnlyRootFilesystem out"
            .to_owned();
    }
    format!("copy what the image has in it: {error}")
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
    question: Question<'_>,
    abort: &CancellationToken,
) -> io::Result<Vec<u8>> {
    let Question {
        mode,
        request,
        wait,
        output,
    } = question;
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut child = spawn(pod, place, (mode, output), theirs)?;
    let mut stream = UnixStream::from_std(ours)?;
    let mut answer = Vec::new();
    let all = async {
        stream.write_all(request).await?;
        stream.shutdown().await?;
        let mut reading = stream.take(PASSWD_BYTES);
        reading.read_to_end(&mut answer).await?;
        io::Result::Ok(child.wait().await.code)
    };
    let ended = tokio::select! {
        biased;
        ended = timeout(wait, all) => ended.ok(),
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
    (mode, output): (&str, Stdio),
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
        .stdout(output)
        .stderr(Stdio::null());
    pod.children.spawn(&mut command, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_that_the_volume_of_an_image_is_too_large() {
        let said = |errno| why_not_filled(&io::Error::from_raw_os_error(errno));
        assert!(said(nix::libc::EFBIG).contains("mount a volume of the pod"));
        assert!(said(nix::libc::ENOSPC).contains("os error 28"));
        let slow = io::ErrorKind::TimedOut.into();
        assert!(why_not_filled(&slow).contains("5 minutes"));
    }

    #[test]
    fn the_message_says_what_is_wrong_with_the_path() {
        let said = |errno| why(&io::Error::from_raw_os_error(errno));
        assert!(said(nix::libc::ENOENT).contains("no such directory"));
        assert!(said(nix::libc::ENOTDIR).contains("not a directory"));
        assert!(said(nix::libc::EIO).contains("os error 5"));
    }
}
