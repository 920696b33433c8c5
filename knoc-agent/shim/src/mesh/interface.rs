//! The interface over which the pod's kernel exchanges packets with other pods.

use std::{io, os::fd::OwnedFd};

use super::packet::LARGEST;
use crate::fdio::Stream;

/// The descriptor of the interface.
#[derive(Debug)]
pub(super) struct Interface(Stream);

/// Room for one packet.
#[derive(Debug)]
pub(super) struct Room(Vec<u8>);

impl Default for Room {
    fn default() -> Self {
        Self(vec![0; LARGEST])
    }
}

impl Interface {
    pub(super) fn new(packets: OwnedFd) -> io::Result<Self> {
        Stream::new(packets).map(Self)
    }

    /// Waits until the kernel may have a packet.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// The next packet that the pod sends; `None` if there is none now.
    pub(super) fn take<'a>(&self, room: &'a mut Room) -> io::Result<Option<&'a [u8]>> {
        match self.0.try_read(&mut room.0)? {
            None => Ok(None),
            // The interface has gone.
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => Ok(room.0.get(..count)),
        }
    }

    /// A packet for the pod has arrived. One that the kernel does not take is lost, as on any network.
    pub(super) fn put(&self, packet: &[u8]) {
        if let Err(error) = rustix::io::write(self.0.fd(), packet) {
            tracing::debug!("a packet of {} bytes was not taken: {error}", packet.len());
        }
    }
}
