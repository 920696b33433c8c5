//! A command that the shim itself runs in a container, for a probe or a hook: its exit and the beginning of its output.
//!
//! It is limited in time and output. If it takes too long, or if its caller is dropped, it is killed with everything that
//! it started.

use std::time::Duration;

use knoc_contract::launch::LaunchSpec;
use knoc_proto::pb;
use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout_at};

use super::{DRAIN, ExecError, LAUNCH, spawn, spec};
use crate::{
    children::{Child, Exit},
    container::Program,
    fdio::{self, Stream},
    handshake::{self, Launched},
    pod::Pod,
    signals::{self, Identity},
};

/// How much of the output is kept, as in Kubernetes.
const KEPT: usize = 10 << 10;

/// How the command ended.
#[derive(Debug)]
pub(crate) enum Captured {
    /// It has ended by itself.
    Ended { exit: Exit, output: Vec<u8> },
    /// It took too long, and was killed.
    TimedOut,
}

/// Kills the command with everything that it started when it is dropped, unless it has ended.
struct Killed {
    helper: u32,
    command: Option<Identity>,
    ended: bool,
}

impl Drop for Killed {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // What runs beside the container's own program has no PID namespace of its own that would end with it.
        if let Some(command) = self.command.filter(|command| command.lives()) {
            signals::kill_all(command, false);
        }
        // Not reaped yet, so the number is still its own. Its child dies with it.
        signals::send(self.helper, Signal::KILL);
    }
}

/// Runs `argv` in the container of `program` for at most `limit`.
pub(crate) async fn capture(
    pod: &Pod,
    program: &Program,
    argv: &[Vec<u8>],
    limit: Duration,
) -> Result<Captured, ExecError> {
    let until = Instant::now() + limit;
    let spec = LaunchSpec {
        argv: argv.to_vec(),
        ..spec(&program.spec, &pb::ExecStart::default())
    };
    let (output, stdio) = stdio().map_err(ExecError::Spawn)?;
    let (mut child, socket) = spawn(pod, program).map_err(ExecError::Spawn)?;
    let mut killed = Killed {
        helper: child.pid,
        command: None,
        ended: false,
    };
    let launching = launch(socket, &spec, stdio);
    let Ok(launched) = timeout_at(until, launching).await else {
        return Ok(Captured::TimedOut);
    };
    let Launched { pid, .. } = launched?;
    killed.command = pid.and_then(Identity::of);
    match timeout_at(until, finish(&mut child, &output, &mut killed)).await {
        Ok((exit, output)) => Ok(Captured::Ended { exit, output }),
        Err(_) => Ok(Captured::TimedOut),
    }
}

async fn launch(
    socket: tokio::net::UnixStream,
    spec: &LaunchSpec,
    stdio: Vec<std::os::fd::OwnedFd>,
) -> Result<Launched, ExecError> {
    tokio::select! {
        biased;
        launched = handshake::launch(socket, spec, stdio) => launched.map_err(ExecError::Launch),
        () = sleep(LAUNCH) => Err(ExecError::Slow),
    }
}

/// No input; both outputs in one pipe.
fn stdio() -> std::io::Result<(Stream, Vec<std::os::fd::OwnedFd>)> {
    let null = std::fs::File::open("/dev/null")?;
    let (ours, output) = fdio::output_pipe()?;
    let errors = output.try_clone()?;
    Ok((ours, vec![null.into(), output, errors]))
}

/// Waits for the exit, and for the end of the output, which processes that the command left behind may hold open for
/// [`DRAIN`] only.
async fn finish(child: &mut Child, output: &Stream, killed: &mut Killed) -> (Exit, Vec<u8>) {
    let mut kept = Vec::new();
    let exit = {
        let mut reading = std::pin::pin!(read(output, &mut kept));
        let (exit, at_end) = tokio::select! {
            biased;
            () = &mut reading => (child.wait().await, true),
            exit = child.wait() => (exit, false),
        };
        killed.ended = true;
        if !at_end {
            tokio::select! {
                biased;
                () = &mut reading => {}
                () = sleep(DRAIN) => {}
            }
        }
        exit
    };
    (exit, kept)
}

/// Reads to the end; keeps the beginning.
async fn read(output: &Stream, kept: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        let room = KEPT.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
}
