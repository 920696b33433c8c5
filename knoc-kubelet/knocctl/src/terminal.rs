//! The user's terminal: its size and its raw mode, which is undone however the command ends.

use std::{
    io::{self, IsTerminal as _},
    os::fd::AsFd as _,
};

use knoc_proto::pb::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::CtlError;

/// Whether standard input is a terminal.
pub(super) fn is_one() -> bool {
    io::stdin().is_terminal()
}

/// The terminal's size, if it has one.
pub(super) fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(io::stdin().as_fd()).ok()?;
    let known = size.ws_col > 0 && size.ws_row > 0;
    known.then(|| TerminalSize {
        width: size.ws_col.into(),
        height: size.ws_row.into(),
    })
}

/// Raw mode: as long as this value exists, every key is a byte, so that `^C`, `^Z` and `^D` go to the remote program.
/// Dropping it restores the terminal, also if a panic unwinds.
pub(super) struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts the terminal of standard input in raw mode.
    pub(super) fn enter() -> Result<Self, CtlError> {
        let stdin = io::stdin();
        let failed = |error: rustix::io::Errno| CtlError::Terminal {
            what: "set the mode",
            source: error.into(),
        };
        let before = tcgetattr(stdin.as_fd()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // If the terminal is gone, there is nothing to restore.
        tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, &self.before).unwrap_or_default();
    }
}
