//! Tests sessions with a client that writes frames, over an in-memory pipe.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncWriteExt as _, DuplexStream},
    task::JoinSet,
};

use super::{
    IDLE, Incoming, SessionError,
    frame::{self, Frame},
    peer::Peer,
    session,
};
use crate::streams::{End, RECEIVE_BYTES};

const PATIENCE: Duration = Duration::from_secs(20);

type Ended = JoinSet<Result<(), SessionError>>;

fn connected() -> (Peer<DuplexStream>, Incoming, Ended) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (session, incoming) = session(near);
    let mut tasks = JoinSet::new();
    tasks.spawn(session.run());
    (Peer::new(far), incoming, tasks)
}

async fn ended(mut tasks: Ended) -> Result<(), SessionError> {
    let joined = tokio::time::timeout(PATIENCE, tasks.join_next()).await;
    joined.expect("the session did not end").unwrap().unwrap()
}

#[tokio::test]
async fn bytes_pass_both_ways_and_the_session_ends_normally() {
    let (mut peer, mut incoming, tasks) = connected();
    peer.open(1, &[("streamtype", "data")]).await;
    let stream = incoming.next().await.unwrap();
    assert_eq!(stream.headers().get("streamtype"), Some("data"));
    let (mut receiver, sender) = stream.accept().await;
    assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
    peer.data(1, b"up", false).await;
    peer.data(1, b"", true).await;
    assert_eq!(receiver.next().await.unwrap(), "up");
    let end = receiver.next().await;
    assert_eq!(end, Err(End::Fin), "FIN is the end of our reading");
    sender.send(Bytes::from("down")).await.unwrap();
    sender.finish(Bytes::from("last")).await.unwrap();
    drop((incoming, receiver));
    let mut down = BytesMut::new();
    loop {
        let frame = peer.next().await;
        let Some(Frame::Data { id: 1, data, fin }) = frame else {
            panic!("{frame:?}");
        };
        down.extend_from_slice(&data);
        if fin {
            break;
        }
    }
    assert_eq!(down, "downlast");
    assert_eq!(peer.next().await, Some(Frame::GoAway));
    drop(peer);
    assert!(ended(tasks).await.is_ok());
}

#[tokio::test]
async fn pings_are_answered_and_answers_are_not() {
    let (mut peer, _incoming, _tasks) = connected();
    let mut wire = BytesMut::new();
    frame::ping(&mut wire, 2);
    frame::ping(&mut wire, 3);
    peer.write(&wire).await;
    assert_eq!(peer.next().await, Some(Frame::Ping { id: 3 }));
}

#[tokio::test]
async fn a_refused_stream_does_not_break_the_header_compression() {
    let (mut peer, mut incoming, _tasks) = connected();
    peer.open(1, &[("streamtype", "nonsense")]).await;
    incoming.next().await.unwrap().refuse().await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 1 }));
    // The session itself refuses an id that does not grow, and an even one.
    peer.open(1, &[("streamtype", "again")]).await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 1 }));
    peer.open(4, &[("streamtype", "even")]).await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 4 }));
    peer.open(5, &[("streamtype", "error")]).await;
    let stream = incoming.next().await.unwrap();
    assert_eq!(stream.headers().get("streamtype"), Some("error"));
}

/// spdystream behaves in this way: it sends nothing about a stream that was reset.
#[tokio::test]
async fn streams_that_we_reset_release_their_permits() {
    let (mut peer, mut incoming, _tasks) = connected();
    let opened = u32::try_from(super::MAX_STREAMS).unwrap() + 1;
    let ids = (0..opened).map(|number| 2 * number + 1);
    for id in ids {
        peer.open(id, &[("streamtype", &format!("nonsense {id}"))])
            .await;
        let stream = incoming.next().await.unwrap();
        if id % 4 == 1 {
            stream.refuse().await;
        } else {
            stream.accept().await.1.reset().await;
            assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
        }
        assert_eq!(peer.next().await, Some(Frame::Reset { id }));
    }
    peer.open(9001, &[("streamtype", "error")]).await;
    let stream = incoming.next().await.unwrap();
    assert_eq!(stream.headers().get("streamtype"), Some("error"));
    let (mut reader, _sender) = stream.accept().await;
    assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
    // Data that still arrives on one of the others is dropped.
    peer.data(1, b"late", true).await;
    peer.data(9001, b"good", true).await;
    assert_eq!(reader.next().await.unwrap(), "good");
}

#[tokio::test]
async fn a_full_queue_stops_reading_and_loses_nothing() {
    const PIECES: usize = 100;
    let (mut peer, mut incoming, _tasks) = connected();
    peer.open(1, &[]).await;
    let (mut receiver, _sender) = incoming.next().await.unwrap().accept().await;
    let mut wire = BytesMut::new();
    for number in 0..PIECES {
        frame::data(
            &mut wire,
            1,
            &vec![u8::try_from(number).unwrap(); 64 << 10],
            false,
        );
    }
    frame::data(&mut wire, 1, &[], true);
    let mut tasks = JoinSet::new();
    let total = wire.len();
    tasks.spawn(async move {
        let mut sent = 0;
        while sent < wire.len() {
            let wrote =
                tokio::time::timeout(Duration::from_millis(300), peer.io.write(&wire[sent..]));
            match wrote.await {
                Ok(wrote) => sent += wrote.unwrap(),
                Err(_) => break,
            }
        }
        let stopped_at = sent;
        peer.io.write_all(&wire[sent..]).await.unwrap();
        (stopped_at, peer)
    });
    // Nobody reads until the peer is stalled.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let mut whole = BytesMut::new();
    while let Ok(piece) = receiver.next().await {
        whole.extend_from_slice(&piece);
    }
    assert_eq!(whole.len(), PIECES << 16);
    for (number, piece) in whole.chunks(64 << 10).enumerate() {
        assert!(
            piece.iter().all(|byte| usize::from(*byte) == number),
            "piece {number}"
        );
    }
    let (stopped_at, _peer) = tasks.join_next().await.unwrap().unwrap();
    assert!(stopped_at < total / 2, "{stopped_at} bytes went to nobody");
}

#[tokio::test]
async fn ten_thousand_streams_are_refused_past_the_limit() {
    let (mut peer, mut incoming, _tasks) = connected();
    let mut taker = JoinSet::new();
    taker.spawn(async move {
        let mut held = Vec::new();
        while let Some(stream) = incoming.next().await {
            held.push(stream.accept().await);
        }
    });
    let (mut replies, mut resets) = (0, 0);
    for number in 0..10_000_u32 {
        peer.open(2 * number + 1, &[]).await;
        if matches!(peer.next().await, Some(Frame::SynReply { .. })) {
            replies += 1;
        } else {
            resets += 1;
        }
    }
    assert_eq!(
        (replies, resets),
        (super::MAX_STREAMS, 10_000 - super::MAX_STREAMS)
    );
}

#[tokio::test]
async fn a_protocol_violation_ends_the_session_and_its_streams() {
    let (mut peer, mut incoming, tasks) = connected();
    peer.open(1, &[]).await;
    let (mut receiver, sender) = incoming.next().await.unwrap().accept().await;
    peer.write(&[0x80, 3, 0, 1, 0, 0, 0, 12]).await;
    peer.write(&[0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0xff, 0xff])
        .await;
    let error = ended(tasks).await.unwrap_err();
    assert!(matches!(error, SessionError::Headers { .. }), "{error:?}");
    assert_eq!(receiver.next().await, Err(End::Lost));
    assert!(sender.send(Bytes::from("x")).await.is_err());
}

#[tokio::test]
async fn a_peer_that_leaves_ends_everything() {
    let (mut peer, mut incoming, tasks) = connected();
    peer.open(1, &[]).await;
    let (mut receiver, _sender) = incoming.next().await.unwrap().accept().await;
    drop(peer);
    assert!(ended(tasks).await.is_ok());
    assert_eq!(receiver.next().await, Err(End::Lost));
    assert!(incoming.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_idle_session_ends_in_time() {
    let (mut peer, _incoming, tasks) = connected();
    let almost = IDLE.checked_sub(Duration::from_mins(1)).unwrap();
    tokio::time::sleep(almost).await;
    peer.open(1, &[]).await;
    tokio::time::sleep(almost).await;
    assert!(!tasks.is_empty() && peer.io.write_all(&[]).await.is_ok());
    tokio::time::sleep(Duration::from_mins(2)).await;
    let mut tasks = tasks;
    let error = tasks.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, SessionError::Idle), "{error:?}");
}

#[tokio::test]
async fn unread_data_of_a_client_is_bounded_over_all_streams() {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (session, mut incoming) = session(near);
    let budget = session.budget();
    let mut tasks: Ended = JoinSet::new();
    tasks.spawn(session.run());
    let mut peer = Peer::new(far);
    let mut held = Vec::new();
    for number in 0..500 {
        peer.open(2 * number + 1, &[]).await;
        held.push(incoming.next().await.unwrap());
    }
    let mut wire = BytesMut::new();
    for number in 0..500 {
        frame::data(&mut wire, 2 * number + 1, &vec![7; 32 << 10], false);
    }
    // This is half of each stream's queue, but more than the budget of all: the client is stalled.
    let stuck = tokio::time::timeout(Duration::from_millis(500), peer.io.write_all(&wire));
    assert!(stuck.await.is_err(), "{} bytes went to nobody", wire.len());
    assert!(budget.held() <= RECEIVE_BYTES, "{}", budget.held());
    assert!(budget.held() > RECEIVE_BYTES / 2, "{}", budget.held());
    drop(held);
    let freed = async {
        while budget.held() > 0 {
            tokio::task::yield_now().await;
        }
    };
    let freed = tokio::time::timeout(PATIENCE, freed).await;
    assert!(freed.is_ok(), "{} bytes are still held", budget.held());
}

#[tokio::test]
async fn a_client_that_never_reads_stalls_the_writer_and_uses_no_memory() {
    let (mut peer, mut incoming, _tasks) = connected();
    peer.open(1, &[]).await;
    let (_inlet, sender) = incoming.next().await.unwrap().accept().await;
    let mut accepted = 0;
    let piece = Bytes::from(vec![0; 1 << 20]);
    let endless = async {
        loop {
            sender.send(piece.clone()).await.unwrap();
            accepted += piece.len();
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_millis(500), endless)
            .await
            .is_err()
    );
    let most = (super::SEND_QUEUE + 4) * frame::MAX_DATA + (1 << 20);
    assert!(accepted <= most, "{accepted} bytes accepted for nobody");
}

#[tokio::test]
async fn streams_that_the_client_has_ended_count_while_we_hold_them() {
    let (mut peer, mut incoming, _tasks) = connected();
    let mut held = Vec::new();
    for number in 0..u32::try_from(super::MAX_STREAMS).unwrap() {
        peer.open(2 * number + 1, &[]).await;
        peer.data(2 * number + 1, &[], true).await;
        held.push(incoming.next().await.unwrap().accept().await);
        assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
    }
    peer.open(9001, &[]).await;
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 9001 }));
    held.pop();
    peer.open(9003, &[]).await;
    assert!(incoming.next().await.is_some(), "one place is free again");
}

#[tokio::test]
async fn a_goaway_of_the_peer_ends_only_the_opening_of_streams() {
    let (mut peer, mut incoming, tasks) = connected();
    peer.open(1, &[]).await;
    let (mut reader, sender) = incoming.next().await.unwrap().accept().await;
    peer.go_away().await;
    assert!(incoming.next().await.is_none());
    drop(incoming);
    peer.open(3, &[]).await;
    peer.data(1, b"still", true).await;
    assert_eq!(reader.next().await.unwrap(), "still");
    assert!(matches!(peer.next().await, Some(Frame::SynReply { .. })));
    assert_eq!(peer.next().await, Some(Frame::Reset { id: 3 }));
    sender.finish(Bytes::from("here")).await.unwrap();
    drop(reader);
    let last = peer.next().await;
    assert!(
        matches!(
            last,
            Some(Frame::Data {
                id: 1,
                fin: true,
                ..
            })
        ),
        "{last:?}"
    );
    assert_eq!(peer.next().await, Some(Frame::GoAway));
    drop(peer);
    assert!(ended(tasks).await.is_ok());
}
