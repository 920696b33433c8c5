//! A terminal for programs under test: a pseudo-terminal whose master we hold and whose slave is the program's
//! controlling terminal.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::process::Child;

use crate::{Run, wait_for};

/// How long the program on the terminal may take to show something.
const ANSWER: Duration = Duration::from_mins(2);

/// A program on its own terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    shown: Arc<Mutex<Vec<u8>>>,
    child: Child,
}

impl Terminal {
    /// Starts the program on a terminal of that size.
    pub fn start(program: &str, args: &[&str], rows: u16, columns: u16) -> anyhow::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = rustix::fs::open(
            &name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        resize(&master, rows, columns)?;
        // setsid makes its standard input the controlling terminal.
        let child = Run::new("setsid")
            .args(["--ctty", "--wait", program])
            .args(args)
            .env("TERM", "xterm")
            .on_terminal(&slave)
            .with_context(|| format!("start {program} on a terminal"))?;
        let master = File::from(master);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, sink) = (master.try_clone()?, Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with the last holder of the slave.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let mut shown = sink.lock().unwrap_or_else(PoisonError::into_inner);
                shown.extend_from_slice(&buffer[..count]);
            }
        });
        Ok(Self {
            master,
            shown,
            child,
        })
    }

    /// Types the text on the terminal.
    pub fn type_text(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Changes the size of the terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> anyhow::Result<()> {
        resize(&self.master, rows, columns)
    }

    /// Everything that was shown so far.
    #[must_use]
    pub fn shown(&self) -> String {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Waits until the text is shown.
    pub async fn expect(&self, text: &str) -> anyhow::Result<()> {
        wait_for(
            &format!("the terminal shows {text:?}"),
            ANSWER,
            async || {
                let shown = self.shown();
                if shown.contains(text) {
                    Ok(())
                } else {
                    Err(shown)
                }
            },
        )
        .await
    }

    /// Asks the shell on the terminal for its size until it answers `size` (rows and columns).
    pub async fn expect_size(&mut self, size: &str) -> anyhow::Result<()> {
        let what = format!("the size of the terminal is {size}");
        wait_for(&what, ANSWER, async || {
            self.type_text("stty size\n")?;
            // The shell needs a moment to answer.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let shown = self.shown();
            ensure!(shown.contains(size), "{shown}");
            Ok::<_, anyhow::Error>(())
        })
        .await
    }

    /// Interrupts a program that the shell on the terminal runs, leaves the shell with exit code 7, and returns the exit
    /// code of the program that was started.
    pub async fn interrupt_and_exit_with_7(mut self) -> anyhow::Result<Option<i32>> {
        self.type_text("echo slee''ping; sleep 300\n")?;
        self.expect("sleeping").await?;
        // On a line of its own, because the shell discards the rest of an interrupted line.
        self.type_text("\u{3}echo code=$?\n")?;
        self.expect("code=130").await?;
        self.type_text("exit 7\n")?;
        self.exit_code().await
    }

    /// Waits for the program's end and returns its exit code.
    pub async fn exit_code(mut self) -> anyhow::Result<Option<i32>> {
        let ended = tokio::time::timeout(ANSWER, self.child.wait()).await;
        let status =
            ended.with_context(|| format!("the program runs on; shown: {}", self.shown()))??;
        Ok(status.code())
    }
}

fn resize(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) -> anyhow::Result<()> {
    Ok(tcsetwinsize(
        terminal,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?)
}

impl Run {
    /// Starts it with the terminal as standard input, output and error.
    fn on_terminal(mut self, slave: &OwnedFd) -> anyhow::Result<Child> {
        let stdio = || slave.try_clone().map(std::process::Stdio::from);
        self.command_mut()
            .stdin(stdio()?)
            .stdout(stdio()?)
            .stderr(stdio()?);
        Ok(self.command_mut().spawn()?)
    }
}
