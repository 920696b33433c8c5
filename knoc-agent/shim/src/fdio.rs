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

/// As large as an ordinary user's pipe may be: fewer wake-ups for programs that write much.
const PIPE_BYTES: i32 = 1 << 20;

/// One end of a pipe, or the master of a terminal.
#[derive(Debug)]
pub(crate) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes `fd`, which becomes non-blocking.
    #[expect(
        unsafe_code,
        reason = "AsyncFd asks for a descriptor that stays open and the same: an OwnedFd does"
    )]
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd answers with the same open descriptor until it is dropped, by the AsyncFd itself.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }

    /// Waits until a read may give something.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0
            .readable()
            .await
            .map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there: `None` where nothing is, `Some(0)` at the end.
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

    /// Reads at least one byte and at most `limit`, none at the end. Memory is taken only for what is there; little of
    /// it is copied, so that a large buffer does not wait for a slow reader with a few bytes in it. Cancel safe.
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

    /// Writes all.
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

/// What a read says: `None` where nothing is there, 0 at the end.
fn ended(read: io::Result<usize>) -> io::Result<Option<usize>> {
    match read {
        Ok(count) => Ok(Some(count)),
        // A terminal whose last user is gone.
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
    // Refused where the user's pipes hold too much already: then it stays as it is.
    nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE_BYTES)).ok();
}
