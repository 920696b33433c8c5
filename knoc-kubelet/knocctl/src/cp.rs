//! `knocctl cp`: files and folders, to and from a container, as `tar` through exec.
//!
//! The archive is read and written on a blocking thread; between it and the call stands one bounded channel each way, so
//! a slow disk or link slows the other side and nothing piles up. Never writes outside of the destination.

mod pack;
mod spec;
mod unpack;

use std::{path::PathBuf, process::ExitCode};

use bytes::Bytes;
use knoc_proto::pb::{
    ExecExit, ExecInput, ExecOutput, ExecStart, exec_input::Input, exec_output::Output,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use self::spec::{Place, Remote};
use super::{
    CtlError, Global,
    converse::QUEUE,
    find, logs, output,
    session::{Session, asked},
};

/// What of the other side's words is kept for an error.
const WORDS: usize = 4 << 10;

/// The shell's code for "no such program".
const NOT_FOUND: i32 = 127;

/// How many of the entries that were left out are named.
const NAMED: usize = 100;

/// What was left out of a copy. A container may have any number of such entries.
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

/// Arguments of `cp`.
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Cp {
    /// A local path, or POD:PATH
    source: Place,
    /// A local path, or POD:PATH
    destination: Place,
    /// The container, if the pod has several
    #[arg(short, long)]
    container: Option<String>,
}

const HELP: &str = "\
POD is a name, NAMESPACE/NAME or a uid. If the destination is a folder, the source is copied into it; otherwise the destination \
is the name of the copy. The container's image must have `tar`. Folders are copied with everything in them. A local path that \
contains a colon must begin with ./ or /.
Symbolic links are kept when copying to a pod, and skipped with a warning when copying from a pod.";

/// A place in a container.
struct Target {
    session: Session,
    uid: String,
    container: String,
    path: String,
    pod: String,
}

/// A command in the container, under way.
struct Call {
    output: Streaming<ExecOutput>,
    input: mpsc::Sender<ExecInput>,
    what: String,
}

impl Cp {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let container = self.container.as_deref();
        match (self.source, self.destination) {
            (Place::Local(from), Place::Remote(to)) => {
                let target = Target::find(global, to, container).await?;
                upload(from, target).await?;
            }
            (Place::Remote(from), Place::Local(to)) => {
                let source = Target::find(global, from, container).await?;
                download(source, to).await?;
            }
            (Place::Local(_), Place::Local(_)) | (Place::Remote(_), Place::Remote(_)) => {
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

    /// Starts a command; `stdin`: it reads what is sent.
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
        let (input, inputs) = mpsc::channel(QUEUE);
        let first = ExecInput {
            input: Some(Input::Start(start)),
        };
        if input.send(first).await.is_err() {
            return Err(CtlError::CutShort { what });
        }
        let call = self.session.client.exec(ReceiverStream::new(inputs));
        let output = asked(&what, call).await?;
        Ok(Call {
            output,
            input,
            what,
        })
    }

    /// Is the path a folder of the container?
    async fn is_folder(&mut self) -> Result<bool, CtlError> {
        let command = ["test", "-d", &self.path].map(str::to_owned).to_vec();
        let call = self.call(command, false).await?;
        let (exit, _) = call.finish(async |_| Ok(())).await?;
        Ok(exit.code == 0)
    }
}

impl Call {
    /// Takes output until the exit; answers it and the end of what was said on standard error.
    async fn finish(
        self,
        mut take: impl AsyncFnMut(Bytes) -> Result<(), CtlError>,
    ) -> Result<(ExecExit, String), CtlError> {
        let Self {
            mut output,
            // Open until the end: closing it is the end of input.
            input: _input,
            what,
        } = self;
        let mut words = Vec::new();
        loop {
            let message = output.message().await.map_err(|source| CtlError::Agent {
                what: what.clone(),
                source,
            })?;
            match message.and_then(|message| message.output) {
                Some(Output::Stdout(data)) => take(data).await?,
                Some(Output::Stderr(data)) => {
                    words.extend_from_slice(&data);
                    let excess = words.len().saturating_sub(WORDS);
                    words.drain(..excess);
                }
                Some(Output::Exit(exit)) => {
                    return Ok((exit, String::from_utf8_lossy(&words).trim().to_owned()));
                }
                Some(Output::Started(_)) => {}
                None => return Err(CtlError::CutShort { what }),
            }
        }
    }
}

/// A copy is good only where `tar` at the other end says so.
fn check(exit: &ExecExit, words: String, pod: &str) -> Result<(), CtlError> {
    match exit.code {
        0 if exit.error.is_empty() => Ok(()),
        NOT_FOUND => Err(CtlError::NoTar {
            pod: pod.to_owned(),
        }),
        code => Err(CtlError::Tar {
            pod: pod.to_owned(),
            code,
            words: if exit.error.is_empty() {
                words
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
    // Both at once: a `tar` that ends early stops the packing, and a packing that fails drops the call.
    let finishing = call.finish(async |_| Ok(()));
    let (left_out, (exit, words)) = tokio::try_join!(packing, finishing)?;
    check(&exit, words, &target.pod)?;
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
    // Where the unpacking has failed its error says more than that nobody takes the data.
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
    if let Ok((exit, words)) = &finished {
        check(exit, words.clone(), &source.pod)?;
    }
    let left_out = unpacked?;
    finished?;
    left_out.warn("is a link or a device");
    Ok(())
}

/// What a blocking task says.
fn joined<T>(result: Result<Result<T, CtlError>, tokio::task::JoinError>) -> Result<T, CtlError> {
    result.unwrap_or_else(|error| {
        Err(CtlError::Copy {
            what: "copy".to_owned(),
            source: std::io::Error::other(error),
        })
    })
}
