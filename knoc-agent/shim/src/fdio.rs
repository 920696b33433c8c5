//! Pipes and terminals as asynchronous byte streams.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use bytes::Bytes;
use rustix::{
    buffer::spare_capacity,
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

/// The largest pipe that an unprivileged user may have by default: fewer wake-ups for programs that write much.
const PIPE_BYTES: i32 = 1 << 20;

/// One end of a pipe, or the master of a terminal.
#[derive(Debug)]
pub(crate) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes ownership of `fd` and makes it non-blocking.
    #[expect(
        unsafe_code,
        reason = "AsyncFd asks for a descriptor that stays open and the same: an OwnedFd does"
    )]
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd answers with the same open descriptor until it is dropped, by the AsyncFd itself.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// The underlying descriptor.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Waits until a read may give something. Each call counts against the task's budget, so that a program which always has
    /// more to say cannot keep the other tasks from running.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        tokio::task::coop::consume_budget().await;
        self.0
            .readable()
            .await
            .map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there: `None` if nothing is, `Some(0)` at the end.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let read = self.0.try_io(Interest::READABLE, |fd| {
            let count = rustix::io::read(fd, &mut *buffer)?;
            Ok(count)
        });
        ended(read)
    }

    /// Reads at least one byte, 0 at the end. Cancel safe.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.readable().await?;
            if let Some(count) = self.try_read(buffer)? {
                return Ok(count);
            }
        }
    }

    /// Reads at least one byte and at most `limit`; none at the end. A short read is copied into a buffer of its size, so
    /// that no large buffer with a few bytes in it waits for a slow reader. Cancel safe.
    pub(crate) async fn read_chunk(&self, limit: usize) -> io::Result<Bytes> {
        loop {
            self.readable().await?;
            let mut buffer = Vec::with_capacity(limit);
            let read = self.0.try_io(Interest::READABLE, |fd| {
                Ok(rustix::io::read(fd, spare_capacity(&mut buffer))?)
            });
            match ended(read)? {
                None => {}
                Some(count) if count < limit / 8 => return Ok(Bytes::copy_from_slice(&buffer)),
                Some(_) => return Ok(Bytes::from(buffer)),
            }
        }
    }

    /// Writes all of `data`.
    pub(crate) async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd, data)?)) {
                Ok(written) => data = data.get(written?..).unwrap_or_default(),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

/// The result of a read: `None` if nothing is there, 0 at the end.
fn ended(read: io::Result<usize>) -> io::Result<Option<usize>> {
    match read {
        Ok(count) => Ok(Some(count)),
        // The last process has closed the terminal.
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(Some(0)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// A pipe of which this process keeps the reading end.
pub(crate) fn output_pipe() -> io::Result<(Stream, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    enlarge(&reader);
    Ok((Stream::new(reader.into())?, writer.into()))
}

/// A pipe of which this process keeps the writing end.
pub(crate) fn input_pipe() -> io::Result<(OwnedFd, Stream)> {
    let (reader, writer) = io::pipe()?;
    enlarge(&writer);
    Ok((reader.into(), Stream::new(writer.into())?))
}

fn enlarge(pipe: impl AsFd) {
    // The kernel refuses if the user's pipes are too large already: the pipe then keeps its size.
    nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)).ok();
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_stream_that_never_runs_dry_lets_other_tasks_run() {
        let (stream, writer) = output_pipe().unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::write(&writer, &[0; 4096]).unwrap(), 4096);
        // From now on it is known that there is something to read.
        stream.read(&mut byte).await.unwrap();
        let ran = Arc::new(AtomicBool::new(false));
        let runs = Arc::clone(&ran);
        let mut other = JoinSet::new();
        other.spawn(async move { runs.store(true, Ordering::Relaxed) });
        for _ in 1..4096 {
            stream.read(&mut byte).await.unwrap();
        }
        assert!(ran.load(Ordering::Relaxed), "the reader never gave way");
    }
}
