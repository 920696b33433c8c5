//! Detects that a session's client has gone while nothing reads its socket.
//!
//! If a command does not take its input, the connection is not read any more ([`knoc_remotecommand::streams`]), and
//! neither is the end of the connection, which comes after the input: the command would go on without a client. So the
//! socket itself is checked.
//!
//! A client whose last bytes still fit into our receive window is detected by two checks. If it had more to send, its
//! FIN comes after bytes that cannot arrive; an API server that still has them to send does not notice the end of its
//! own client either.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{net::TcpStream, time::MissedTickBehavior};

/// How often a socket is checked. A session that still reads notices an end itself, long before the second check.
const LOOK: Duration = Duration::from_secs(1);

/// A duplicate of a connection's socket. It keeps the socket open, so it must be dropped together with the connection.
#[derive(Debug, Clone)]
pub(super) struct PeerWatch(Arc<OwnedFd>);

impl PeerWatch {
    pub(super) fn of(stream: &TcpStream) -> std::io::Result<Self> {
        Ok(Self(Arc::new(rustix::io::fcntl_dupfd_cloexec(stream, 0)?)))
    }

    /// Returns when the client is gone and its last bytes are not read: two checks in a row found its end and the same
    /// number of unread bytes. Cancel safe.
    pub(super) async fn abandoned(&self) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = None;
        loop {
            looks.tick().await;
            let left = self.left();
            if left.is_some() && left == last {
                return;
            }
            last = left;
        }
    }

    /// The number of unread bytes of a client that is gone; `None` while it is connected.
    fn left(&self) -> Option<u64> {
        let ends = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut looked_at = [PollFd::new(&*self.0, PollFlags::RDHUP)];
        let found = poll(&mut looked_at, Some(&Timespec::default())).unwrap_or(0);
        let ended = found > 0 && looked_at.iter().any(|it| it.revents().intersects(ends));
        ended.then(|| rustix::io::ioctl_fionread(&self.0).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    #[tokio::test]
    async fn an_end_behind_unread_bytes_is_seen() {
        let (mut client, stream) = connection().await;
        let watch = PeerWatch::of(&stream).unwrap();
        client.write_all(b"input").await.unwrap();
        stream.readable().await.unwrap();
        assert_eq!(watch.left(), None, "the client is connected");
        drop(client);
        let patience = Duration::from_secs(20);
        let seen = tokio::time::timeout(patience, watch.abandoned()).await;
        assert!(seen.is_ok(), "{:?}", watch.left());
        assert_eq!(watch.left(), Some(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_still_reads_is_not_cut() {
        let (mut client, mut stream) = connection().await;
        let watch = PeerWatch::of(&stream).unwrap();
        client.write_all(b"input").await.unwrap();
        drop(client);
        while watch.left() != Some(5) {
            tokio::task::yield_now().await;
        }
        let mut abandoned = std::pin::pin!(watch.abandoned());
        let mut time = LOOK / 2;
        for _ in 0..4 {
            let over = tokio::time::timeout(time, abandoned.as_mut()).await;
            assert!(over.is_err(), "something was read since the last check");
            stream.read_u8().await.unwrap();
            time = LOOK;
        }
        for over in [false, true] {
            let found = tokio::time::timeout(LOOK, abandoned.as_mut()).await;
            assert_eq!(found.is_ok(), over);
        }
    }
}
