//! `knocctl cp`: copies files and folders to and from a container through exec, with the container's `tar`.
//!
//! A blocking thread reads and writes the archive. A bounded channel in each direction connects it with the call, so that
//! a slow disk or link slows the other side down and memory stays bounded. Nothing is written outside of the destination.

mod pack;
mod spec;
mod unpack;

use std::{path::PathBuf, process::ExitCode};

use bytes::Bytes;
use knoc_proto::pb::{
    ExecExit, ExecInput, ExecOutput, ExecStart, exec_input::Input, exec_output::Output,
};
use tokio::sync::mpsc;
use tonic::Streaming;

use self::spec::{Remote, Side};
use super::{
    CtlError, Global,
    converse::{self, QUEUE},
    find, logs, output,
    session::{Session, asked},
};

/// How many bytes of the remote `tar`'s stderr are kept for an error.
const MAX_STDERR: usize = 4 << 10;

/// The exit code for a program that does not exist, as in a shell.
const NOT_FOUND: i32 = 127;

/// At most this many of the entries that were left out are named.
const NAMED: usize = 100;

/// The entries that were left out of a copy. A container may have any number of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct LeftOut {
    named: Vec<PathBuf>,
    further: u64,
}

impl LeftOut {
    fn add(&mut self, path: PathBuf) {
        if self.named.len() < NAMED {
            self.named.push(path);
        } else {
            self.further += 1;
        }
    }

    fn warn(self, why: &str) {
        for path in self.named {
            output::complain(&format!("warning: {} {why}: left out", path.display()));
        }
        if self.further > 0 {
            output::complain(&format!("warning: {} more were left out", self.further));
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Cp {
    /// A local path, or POD:PATH
    source: Side,
    /// A local path, or POD:PATH
    destination: Side,
    /// The container, if the pod has several
    #[arg(short, long)]
    container: Option<String>,
}

const HELP: &str = "\
POD is a name, NAMESPACE/NAME or a uid. If the destination is a folder, the source is copied into it; otherwise the destination \
is the name of the copy. The container's image must have `tar`. Folders are copied with everything in them. A local path that \
contains a colon must begin with ./ or /.
Symbolic links are kept when copying to a pod, and skipped with a warning when copying from a pod.";

/// The container that a path belongs to.
struct Target {
    session: Session,
    uid: String,
    container: String,
    path: String,
    pod: String,
}

/// A command that runs in the container.
struct Call {
    output: Streaming<ExecOutput>,
    input: mpsc::Sender<ExecInput>,
    what: String,
}

impl Cp {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let container = self.container.as_deref();
        match (self.source, self.destination) {
            (Side::Local(from), Side::Remote(to)) => {
                let target = Target::find(global, to, container).await?;
                upload(from, target).await?;
            }
            (Side::Remote(from), Side::Local(to)) => {
                let source = Target::find(global, from, container).await?;
                download(source, to).await?;
            }
            (Side::Local(_), Side::Local(_)) | (Side::Remote(_), Side::Remote(_)) => {
                return Err(CtlError::CopySides);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Target {
    async fn find(
        global: &Global,
        remote: Remote,
        container: Option<&str>,
    ) -> Result<Self, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &remote.pod).await?;
        let container = logs::container(&pod, container);
        Ok(Self {
            session,
            uid: pod.uid,
            container,
            path: remote.path,
            pod: remote.pod,
        })
    }

    /// Starts a command. If `stdin` is set, the command reads what is sent to it.
    async fn call(&mut self, command: Vec<String>, stdin: bool) -> Result<Call, CtlError> {
        let what = format!("run {} in {}", command.join(" "), self.pod);
        let start = ExecStart {
            uid: self.uid.clone(),
            container: self.container.clone(),
            command,
            stdin,
            stdout: true,
            stderr: true,
            ..ExecStart::default()
        };
        let (input, inputs) = converse::input(Input::Start(start));
        let output = asked(&what, self.session.client.exec(inputs)).await?;
        Ok(Call {
            output,
            input,
            what,
        })
    }

    /// Whether the path is a folder of the container.
    async fn is_folder(&mut self) -> Result<bool, CtlError> {
        let command = ["test", "-d", &self.path].map(str::to_owned).to_vec();
        let call = self.call(command, false).await?;
        let (exit, _) = call.finish(async |_| Ok(())).await?;
        Ok(exit.code == 0)
    }
}

impl Call {
    /// Passes output to `take` until the command exits; returns its exit and the last part of its stderr.
    async fn finish(
        self,
        mut take: impl AsyncFnMut(Bytes) -> Result<(), CtlError>,
    ) -> Result<(ExecExit, String), CtlError> {
        let Self {
            mut output,
            // Kept open until the command exits, because dropping it would end the command's input.
            input: _input,
            what,
        } = self;
        let mut stderr = Vec::new();
        loop {
            let message = output.message().await.map_err(|source| CtlError::Agent {
                what: what.clone(),
                source,
            })?;
            match message.and_then(|message| message.output) {
                Some(Output::Stdout(data)) => take(data).await?,
                Some(Output::Stderr(data)) => {
                    stderr.extend_from_slice(&data);
                    let excess = stderr.len().saturating_sub(MAX_STDERR);
                    stderr.drain(..excess);
                }
                Some(Output::Exit(exit)) => {
                    return Ok((exit, String::from_utf8_lossy(&stderr).trim().to_owned()));
                }
                Some(Output::Started(_)) => {}
                None => return Err(CtlError::CutShort { what }),
            }
        }
    }
}

/// Turns a failed exit of the remote `tar` into an error: only its exit code says that the copy is complete.
fn check(exit: &ExecExit, stderr: String, pod: &str) -> Result<(), CtlError> {
    match exit.code {
        0 if exit.error.is_empty() => Ok(()),
        NOT_FOUND => Err(CtlError::NoTar {
            pod: pod.to_owned(),
        }),
        code => Err(CtlError::Tar {
            pod: pod.to_owned(),
            code,
            stderr: if exit.error.is_empty() {
                stderr
            } else {
                exit.error.clone()
            },
        }),
    }
}

async fn upload(from: PathBuf, mut target: Target) -> Result<(), CtlError> {
    pack::look(&from)?;
    let into = target.path.ends_with('/') || target.is_folder().await?;
    let (folder, name) = spec::destination(&target.path, &from, into)?;
    let command = ["tar", "-xmf", "-", "-C", &folder].map(str::to_owned);
    let call = target.call(command.to_vec(), true).await?;
    let sender = call.input.clone();
    let packing = tokio::task::spawn_blocking(move || pack::send(&from, &name, &sender));
    let packing = async { joined(packing.await) };
    // Both run at once: if `tar` ends early the packing stops, and if the packing fails the call is dropped.
    let finishing = call.finish(async |_| Ok(()));
    let (left_out, (exit, stderr)) = tokio::try_join!(packing, finishing)?;
    check(&exit, stderr, &target.pod)?;
    left_out.warn("is not a file or folder");
    Ok(())
}

async fn download(mut source: Target, to: PathBuf) -> Result<(), CtlError> {
    let name = spec::base(&source.path)?;
    let to = if to.is_dir() { to.join(&name) } else { to };
    let (folder, member) = spec::member(&source.path);
    let command = ["tar", "-cf", "-", "-C", &folder, "--", &member].map(str::to_owned);
    let call = source.call(command.to_vec(), false).await?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    let unpacking = tokio::task::spawn_blocking(move || unpack::receive(receiver, &member, &to));
    // If the unpacking fails, its error is reported, and not that the data could not be passed on.
    let finished = async move {
        let sent = call.finish(async |data| {
            sender.send(data).await.map_err(|_| CtlError::CutShort {
                what: "copy".to_owned(),
            })
        });
        let finished = sent.await;
        drop(sender);
        finished
    };
    let (unpacked, finished) = tokio::join!(unpacking, finished);
    let unpacked = joined(unpacked);
    if let Ok((exit, stderr)) = &finished {
        check(exit, stderr.clone(), &source.pod)?;
    }
    let left_out = unpacked?;
    finished?;
    left_out.warn("is a link or a device");
    Ok(())
}

/// The result of a blocking task, which may have panicked.
fn joined<T>(result: Result<Result<T, CtlError>, tokio::task::JoinError>) -> Result<T, CtlError> {
    result.unwrap_or_else(|error| {
        Err(CtlError::Copy {
            what: "copy".to_owned(),
            source: std::io::Error::other(error),
        })
    })
}
