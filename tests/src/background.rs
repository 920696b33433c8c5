//! A program that runs in the background of a test, with its output so far and its exit code; and a port-forward.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Child,
};

use crate::{Run, command::code_of, wait_for};

/// How long a program may take to print the expected text.
const OUTPUT_LIMIT: Duration = Duration::from_mins(2);

/// A background program with its output in a file. It is killed when this is dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
    log: PathBuf,
    _folder: tempfile::TempDir,
}

impl Background {
    /// Starts the program; its input is a file.
    pub fn start(run: Run) -> anyhow::Result<Self> {
        Self::with(|log| run.spawn(log))
    }

    /// Starts the program with an input to which [`Background::say`] adds, until [`Background::end_input`].
    pub fn start_piped(run: Run) -> anyhow::Result<Self> {
        Self::with(|log| run.spawn_piped(log))
    }

    fn with(spawn: impl FnOnce(&Path) -> anyhow::Result<Child>) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        Ok(Self {
            child: spawn(&log)?,
            log,
            _folder: folder,
        })
    }

    /// Writes text to the program's input.
    pub async fn say(&mut self, text: &str) -> anyhow::Result<()> {
        let input = self.child.stdin.as_mut();
        let input = input.context("its input is no pipe, or has ended")?;
        input.write_all(text.as_bytes()).await?;
        Ok(input.flush().await?)
    }

    /// Ends the program's input.
    pub fn end_input(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for the program's end, and leaves its input open; returns its exit code.
    pub async fn ends(&mut self, limit: Duration) -> anyhow::Result<i32> {
        wait_for("it ends", limit, async || {
            let ended = self.child.try_wait()?;
            ended.map(code_of).with_context(|| self.shown())
        })
        .await
    }

    /// The program's output so far, standard output and standard error.
    #[must_use]
    pub fn shown(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the output contains the text.
    pub async fn expect(&mut self, text: &str) -> anyhow::Result<()> {
        wait_for(&format!("it prints {text:?}"), OUTPUT_LIMIT, async || {
            let shown = self.shown();
            if shown.contains(text) {
                return Ok(());
            }
            let ended = self.child.try_wait().ok().flatten();
            Err(match ended {
                Some(status) => format!("ended, {status}: {shown}"),
                None => shown,
            })
        })
        .await
    }

    /// Waits until the program has read that many bytes of its input.
    pub async fn has_read(&mut self, bytes: usize) -> anyhow::Result<()> {
        let pid = self.child.id().context("it has ended")?;
        let wanted = format!("pos:\t{bytes}");
        wait_for("it reads its input", OUTPUT_LIMIT, async || {
            // proc_pid_fdinfo(5)
            let info = tokio::fs::read_to_string(format!("/proc/{pid}/fdinfo/0")).await?;
            anyhow::ensure!(info.lines().any(|line| line == wanted), info);
            Ok(())
        })
        .await
    }

    /// Waits for the program's end and returns its exit code.
    pub async fn exit_code(&mut self, limit: Duration) -> anyhow::Result<i32> {
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(status) => Ok(code_of(status?)),
            Err(_) => bail!("it runs on after {limit:?}; shown: {}", self.shown()),
        }
    }

    /// Sends SIGKILL and waits for the program's end.
    pub async fn kill(mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }
}

/// A running port-forward of kubectl or knocctl.
#[derive(Debug)]
pub struct Forward {
    /// kubectl or knocctl itself, with its output.
    pub program: Background,
    local: u16,
}

impl Forward {
    /// Starts it, and waits until it listens on its local port.
    pub async fn start(run: Run) -> anyhow::Result<Self> {
        let mut program = Background::start(run)?;
        program.expect(" -> ").await?;
        let shown = program.shown();
        let local = local_port(&shown).context(shown)?;
        Ok(Self { program, local })
    }

    /// The local port, with its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.local).into()
    }

    /// Opens a connection to the local port.
    pub async fn connect(&self) -> anyhow::Result<TcpStream> {
        Ok(TcpStream::connect(self.address()).await?)
    }

    /// Sends bytes and their end, and returns what came back until the other side closed.
    pub async fn exchange(&self, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (mut reader, mut writer) = self.connect().await?.into_split();
        let mut answer = Vec::new();
        let request = async {
            writer.write_all(bytes).await?;
            writer.shutdown().await
        };
        let (sent, read) = tokio::join!(request, reader.read_to_end(&mut answer));
        sent.and(read).with_context(|| self.program.shown())?;
        Ok(answer)
    }
}

/// The local port in a line such as `Forwarding from 127.0.0.1:40123 -> 7000`.
fn local_port(shown: &str) -> Option<u16> {
    let (_, rest) = shown.split_once("Forwarding from 127.0.0.1:")?;
    rest.split_once(" ->")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_port_is_found_in_the_words() {
        let shown =
            "Forwarding from 127.0.0.1:40123 -> 7000\nForwarding from [::1]:40123 -> 7000\n";
        assert_eq!(local_port(shown), Some(40123));
        assert_eq!(local_port("error: pods \"x\" not found"), None);
    }
}
