//! Sends descriptors over a unix socket (`SCM_RIGHTS`). The launcher uses it on a blocking socket, the shim on a
//! non-blocking one.

use std::{
    io::{self, IoSlice, IoSliceMut, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// How many descriptors a message carries at most: the namespaces of a container ([`super::kept`]). A program has fewer: standard
/// input, output and error, and one that it keeps.
pub(crate) const MAX_FDS: usize = 6;

/// Sends `bytes`, with `fds` attached to the first byte; returns how many bytes were sent.
pub(crate) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, rustix::io::Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::TOOBIG);
    }
    sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
}

/// Receives bytes into `buffer` and descriptors, close-on-exec, into `fds`; returns how many bytes were received.
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, rustix::io::Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let received = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(received.bytes)
}

/// Sends `body` on a blocking socket with its length first, and `fds` with it.
pub(crate) fn send_frame(
    mut socket: &UnixStream,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let message = [&length.to_be_bytes()[..], body].concat();
    let sent = send(socket, &message, fds)?;
    socket.write_all(message.get(sent..).unwrap_or_default())
}

/// Receives from a blocking socket what was sent with its length first; `None` if the peer has closed its end. A message of
/// more than `longest` bytes is an error.
pub(crate) fn receive_frame(
    socket: &UnixStream,
    longest: usize,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut fds = Vec::new();
    let mut head = [0; 4];
    if !fill(socket, &mut head, &mut fds)? {
        return Ok(None);
    }
    let length = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
    if length > longest {
        let what = format!("a message of {length} bytes is too long");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut body = vec![0; length];
    if length > 0 && !fill(socket, &mut body, &mut fds)? {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((body, fds)))
}

/// Fills `buffer`; `false` if the peer has closed its end before the first byte.
fn fill(socket: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match receive(socket, rest, fds) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // A peer must not be able to fill this process's descriptor table.
        fds.truncate(MAX_FDS);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_brings_its_descriptors_and_a_long_one_is_refused() {
        let (one, other) = UnixStream::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_frame(&one, b"body", &[null.as_fd()]).unwrap();
        send_frame(&one, b"", &[]).unwrap();
        send_frame(&one, b"too long", &[]).unwrap();
        let (body, fds) = receive_frame(&other, 4).unwrap().unwrap();
        assert_eq!((body.as_slice(), fds.len()), (&b"body"[..], 1));
        let (body, fds) = receive_frame(&other, 4).unwrap().unwrap();
        assert_eq!((body.as_slice(), fds.len()), (&b""[..], 0));
        let error = receive_frame(&other, 4).unwrap_err();
        assert_eq!(error.to_string(), "a message of 8 bytes is too long");
    }

    #[test]
    fn a_frame_that_is_cut_is_an_error_and_a_closed_socket_is_the_end() {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(&[0, 0, 0, 9, 1]).unwrap();
        drop(one);
        let error = receive_frame(&other, 100).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(receive_frame(&other, 100).unwrap().is_none());
    }
}
