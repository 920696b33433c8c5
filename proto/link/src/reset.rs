//! Breaking a TCP connection off, so that the program at its other end sees a reset and never takes a part of the data for
//! all of it.

use std::{io, time::Duration};

use rustix::net::sockopt::set_socket_linger;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, tcp::OwnedWriteHalf},
};

/// Lets the end of this connection be a reset (`SO_LINGER` of zero, see socket(7)). If the option cannot be set, the
/// other side sees a regular end.
pub fn at_the_end(stream: &TcpStream) {
    set_socket_linger(stream, Some(Duration::ZERO)).ok();
}

/// The writing half of a connection, which is reset if this is dropped before its regular end.
#[derive(Debug)]
pub struct ResetUnlessEnded(Option<OwnedWriteHalf>);

impl ResetUnlessEnded {
    /// Guards this half.
    #[must_use]
    pub fn new(writer: OwnedWriteHalf) -> Self {
        Self(Some(writer))
    }

    /// The half, until its regular end.
    pub fn writer(&mut self) -> Option<&mut OwnedWriteHalf> {
        self.0.as_mut()
    }

    /// Ends this direction regularly (half-close). Once it has ended, this has no effect.
    ///
    /// # Errors
    ///
    /// If the other side has closed the connection. It is not reset afterwards.
    pub async fn end(&mut self) -> io::Result<()> {
        match self.0.take() {
            Some(mut writer) => writer.shutdown().await,
            None => Ok(()),
        }
    }

    /// Gives the half up without a reset, because the other side reads no more. What it sends still arrives.
    pub fn give_up(&mut self) {
        self.0 = None;
    }
}

impl Drop for ResetUnlessEnded {
    fn drop(&mut self) {
        if let Some(writer) = self.0.take() {
            at_the_end(writer.as_ref());
            // Dropping it would send a regular end before the reset.
            writer.forget();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpListener};

    use super::*;

    /// Both ends of a connection; the guarded half is that of the first.
    async fn pair() -> (ResetUnlessEnded, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (_, writer) = ours.unwrap().into_split();
        (ResetUnlessEnded::new(writer), theirs.unwrap().0)
    }

    #[tokio::test]
    async fn a_half_that_has_not_ended_resets_the_connection() {
        let (mut guard, mut theirs) = pair().await;
        let writer = guard.writer().unwrap();
        writer.write_all(b"a part").await.unwrap();
        let mut read = [0; 6];
        theirs.read_exact(&mut read).await.unwrap();
        drop(guard);
        let error = theirs.read(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_half_that_has_ended_or_was_given_up_resets_nothing() {
        let (mut guard, mut theirs) = pair().await;
        guard.end().await.unwrap();
        assert!(guard.writer().is_none());
        guard.end().await.unwrap();
        drop(guard);
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
        let (mut guard, mut theirs) = pair().await;
        guard.give_up();
        drop(guard);
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);
    }
}
