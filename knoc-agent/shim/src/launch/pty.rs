//! A terminal inside the container. The slave becomes the program's stdio and controlling terminal; the master is sent to
//! the shim. It must be opened from the container's own devpts, or `tty` and job control would not work.

use std::os::fd::OwnedFd;

use knoc_contract::launch::Window;
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    pty::{ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// Opens a new terminal of the given size: master and slave.
pub(super) fn open_pair(window: Window) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    // A container's devpts has its own ptmx. On hosts that one is often not accessible.
    let master = open("/dev/pts/ptmx", flags, Mode::empty())
        .or_else(|_| open("/dev/ptmx", flags, Mode::empty()))?;
    unlockpt(&master)?;
    let slave = open(ptsname(&master, Vec::new())?, flags, Mode::empty())?;
    set_size(&master, window)?;
    Ok((master, slave))
}

/// Sets the window size; 0 × 0 leaves it unchanged.
pub(crate) fn set_size(master: &OwnedFd, window: Window) -> Result<(), Errno> {
    if window.cols == 0 && window.rows == 0 {
        return Ok(());
    }
    let size = Winsize {
        ws_row: window.rows,
        ws_col: window.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size)
}
