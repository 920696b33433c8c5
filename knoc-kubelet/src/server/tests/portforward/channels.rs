//! Port-forward by the channels of a WebSocket.

use super::*;

#[tokio::test]
async fn channels_carry_a_connection_for_each_port() {
    let fixture = with_ports(Box::new(echo)).await;
    let path = "/portForward/ns/pod/ns-pod?ports=80,81";
    let protocol = "v4.channel.k8s.io";
    let mut socket = websocket::open(&fixture, path, protocol, Some(protocol)).await;
    let mut heard: BTreeMap<u8, BytesMut> = BTreeMap::new();
    socket
        .say(Message::Binary(Bytes::from_static(b"\x00hello")))
        .await;
    let enough = |heard: &BTreeMap<u8, BytesMut>| {
        heard.get(&0).is_some_and(|it| it.ends_with(b"hello"))
            && heard.get(&3).is_some_and(|it| it.ends_with(b"refused"))
            && heard.len() == 4
    };
    while !enough(&heard) {
        let bytes = socket
            .next()
            .await
            .expect("the connection ended")
            .into_data();
        heard
            .entry(bytes[0])
            .or_default()
            .extend_from_slice(&bytes[1..]);
    }
    assert_eq!(&heard[&0][..], b"\x50\x0080:hello");
    assert_eq!(&heard[&1][..], b"\x50\x00");
    assert_eq!(&heard[&2][..], b"\x51\x00");
    assert_eq!(
        &heard[&3][..],
        b"\x51\x00error forwarding port 81 to pod pod, uid ns-pod: dial tcp4 127.0.0.1:81: connect: connection refused"
    );
}

/// Answers and closes, as a web server does, and waits for the client's end, which never comes.
#[expect(clippy::unnecessary_wraps, reason = "as the fixture calls it")]
fn answers_and_closes(
    mut input: mpsc::Receiver<pb::PortForwardInput>,
) -> Result<PortForwardStream, tonic::Status> {
    let outputs = [Output::Data(Bytes::from("answer")), Output::Closed(true)];
    let waits = stream::once(async move { while input.recv().await.is_some() {} });
    let waits = waits.filter_map(async |()| None);
    Ok(stream::iter(outputs.map(answer)).chain(waits).boxed())
}

#[tokio::test]
async fn channels_end_with_the_bytes_of_the_pod() {
    let fixture = with_ports(Box::new(answers_and_closes)).await;
    let protocol = "v4.channel.k8s.io";
    let path = "/portForward/ns/pod?ports=80";
    let mut socket = websocket::open(&fixture, path, protocol, Some(protocol)).await;
    let mut heard = Vec::new();
    while let Some(message) = socket.next().await {
        if message.is_close() {
            break;
        }
        heard.push(message.into_data());
    }
    assert_eq!(heard.last().map(|it| &it[..]), Some(&b"\x00answer"[..]));
}

#[tokio::test]
async fn channels_are_carried_as_base64_too() {
    let fixture = with_ports(Box::new(echo)).await;
    let protocol = "v4.base64.channel.k8s.io";
    let mut socket = websocket::open(
        &fixture,
        "/portForward/ns/pod?port=80",
        protocol,
        Some(protocol),
    )
    .await;
    for expected in ["0UAA=", "1UAA=", "0ODA6"] {
        assert_eq!(socket.next().await, Some(Message::text(expected)));
    }
    socket.say(Message::text("0aGk=")).await;
    assert_eq!(socket.next().await, Some(Message::text("0aGk=")));
}
