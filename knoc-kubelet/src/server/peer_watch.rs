//! Whether a session's client is still there while nobody reads its socket.
//!
//! Input that nobody takes stops the reading of its connection ([`knoc_remotecommand::streams`]), and so the
//! connection's end, which stands behind it, is not read either: the command would go on, for nobody. The socket is
//! looked at instead.
//!
//! A client whose last bytes still fit our receive window is missed within two looks. The end of one that had more to
//! say stands behind bytes that cannot come; an API server that waits to be rid of them does not even notice its own
//! client.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;

/// How often a socket is looked at. A session that still reads notices an end itself, long before the second look.
const LOOK: Duration = Duration::from_secs(1);

/// A second name for a connection's socket. It keeps the socket open: to be let go together with the connection.
#[derive(Debug, Clone)]
pub(super) struct PeerWatch(Arc<OwnedFd>);

impl PeerWatch {
    pub(super) fn of(stream: &TcpStream) -> std::io::Result<Self> {
        Ok(Self(Arc::new(rustix::io::fcntl_dupfd_cloexec(stream, 0)?)))
    }

    /// Returns when the client is gone and what it left does not move: two looks in a row found its end, and as much
    /// unread. Cancel safe.
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

    /// The bytes that nobody has read of a client that is gone; `None` while it is there.
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
        assert_eq!(watch.left(), None, "the client is there");
        drop(client);
        let patience = Duration::from_secs(20);
        let seen = tokio::time::timeout(patience, watch.abandoned()).await;
        assert!(seen.is_ok(), "{:?}", watch.left());
        assert_eq!(watch.left(), Some(5));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_takes_what_is_left_is_not_cut_short() {
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
            assert!(over.is_err(), "something was taken since the last look");
            stream.read_u8().await.unwrap();
            time = LOOK;
        }
        for over in [false, true] {
            let found = tokio::time::timeout(LOOK, abandoned.as_mut()).await;
            assert_eq!(found.is_ok(), over);
        }
    }
}
