//! Tests the bounds of a session with a client that writes frames, over an in-memory pipe.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::JoinSet,
};

use super::{Channels, SocketError, channel::Encoding, session};
use crate::streams::{Budget, End, IDLE, RECEIVE_BYTES};

const PATIENCE: Duration = Duration::from_secs(20);

type Ended = JoinSet<Result<(), SocketError>>;

fn connected() -> (DuplexStream, Channels, Budget, Ended) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (session, channels) = session(near, Encoding::BinaryWithClose, &[true, false, true]);
    let budget = session.budget();
    let mut tasks = JoinSet::new();
    tasks.spawn(session.run());
    (far, channels, budget, tasks)
}

/// A message whose mask changes nothing.
fn message(payload: &[u8]) -> BytesMut {
    let mut wire = BytesMut::from(&[0x82, 0xff][..]);
    wire.put_u64(u64::try_from(payload.len()).unwrap());
    wire.put_u32(0);
    wire.put_slice(payload);
    wire
}

#[tokio::test]
async fn unread_data_of_a_client_is_bounded() {
    let (mut far, mut channels, budget, _tasks) = connected();
    let _nobody = (channels.reader(0), channels.reader(2));
    let wire = message(&vec![0; 64 << 20]);
    let stuck = tokio::time::timeout(Duration::from_millis(500), far.write_all(&wire));
    assert!(stuck.await.is_err());
    assert!(budget.held() <= RECEIVE_BYTES, "{}", budget.held());
}

#[tokio::test]
async fn a_client_that_never_reads_stalls_the_writer_and_uses_no_memory() {
    let (_far, channels, _, _tasks) = connected();
    let sender = channels.sender(1);
    let mut accepted = 0;
    let piece = Bytes::from(vec![0; 1 << 20]);
    let endless = async {
        loop {
            sender.send(piece.clone()).await.unwrap();
            accepted += piece.len();
        }
    };
    let waited = tokio::time::timeout(Duration::from_millis(500), endless).await;
    assert!(waited.is_err());
    assert!(accepted <= 4 << 20, "{accepted} bytes accepted for nobody");
}

#[tokio::test]
async fn pings_whose_answers_are_not_read_cost_nothing() {
    let (mut far, _channels, _, mut tasks) = connected();
    let ping = [0x89, 0x84, 0, 0, 0, 0, 1, 2, 3, 4];
    let wire = ping.repeat(200_000);
    // All pings are read although the peer reads no answer: answers are never queued without bound.
    let taken = tokio::time::timeout(PATIENCE, far.write_all(&wire)).await;
    assert!(taken.is_ok() && tasks.try_join_next().is_none());
}

#[tokio::test]
async fn channels_end_separately_and_with_the_connection() {
    let (mut far, mut channels, _, mut tasks) = connected();
    let mut first = channels.reader(0).unwrap();
    let mut second = channels.reader(2).unwrap();
    assert!(
        channels.reader(0).is_none()
            && channels.reader(1).is_none()
            && channels.reader(9).is_none()
    );
    far.write_all(&message(b"\x00a")).await.unwrap();
    far.write_all(&message(b"\xff\x00")).await.unwrap();
    far.write_all(&message(b"\x00late")).await.unwrap();
    far.write_all(&message(b"\x02b")).await.unwrap();
    assert_eq!(first.next().await.unwrap(), "a");
    assert_eq!(first.next().await, Err(End::Fin));
    assert_eq!(second.next().await.unwrap(), "b");
    drop(far);
    assert_eq!(second.next().await, Err(End::Lost));
    assert!(tasks.join_next().await.unwrap().unwrap().is_ok());
}

#[tokio::test]
async fn the_end_loses_no_data_and_sends_a_close_frame() {
    let (mut far, channels, _, mut tasks) = connected();
    let sender = channels.sender(1);
    drop(channels);
    sender.ready().await.unwrap();
    sender.send(Bytes::from("last")).await.unwrap();
    drop(sender);
    let mut heard = Vec::new();
    far.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"\x82\x01\x01\x82\x05\x01last\x88\x02\x03\xe8");
    assert!(tasks.join_next().await.unwrap().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn pings_do_not_keep_a_session_open() {
    let (mut far, _channels, _, mut tasks) = connected();
    let ping = [0x89, 0x80, 0, 0, 0, 0];
    let began = tokio::time::Instant::now();
    let error = loop {
        tokio::select! {
            ended = tasks.join_next() => break ended.unwrap().unwrap().unwrap_err(),
            () = tokio::time::sleep(Duration::from_mins(10)) => far.write_all(&ping).await.unwrap(),
        }
    };
    assert!(matches!(error, SocketError::Idle), "{error:?}");
    assert!(began.elapsed() >= IDLE && began.elapsed() < IDLE + Duration::from_mins(1));
}
