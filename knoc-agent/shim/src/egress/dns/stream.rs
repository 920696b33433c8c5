//! Task: a connection of a container to the cluster's DNS, if the site leaves names to the resolvers of the compute node.
//!
//! Programs use one if an answer is too long for a datagram. It goes to where its first question belongs: to a resolver of the
//! node, or to the cluster like any other connection.

use std::{net::SocketAddrV4, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{net::TcpStream, time::timeout};

use super::{
    super::{
        Egress,
        tcp::{self, Guarded},
    },
    message::Question,
};

/// How long a container may take to send its first question.
const FIRST: Duration = Duration::from_secs(10);

/// The longest question that is looked at, after its length.
const LONGEST: usize = 512;
const LENGTH: usize = 2;

/// How long a resolver of the node may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(2);

/// Serves a connection until it ends.
pub(in crate::egress) async fn serve(mut stream: Guarded, target: SocketAddrV4, egress: &Egress) {
    let Ok(Some(head)) = timeout(FIRST, first(&mut stream)).await else {
        return;
    };
    let names = egress.node_names().filter(|names| {
        let question = head.get(LENGTH..LENGTH + length(&head));
        let question = question.and_then(Question::parse);
        question.is_some_and(|asked| names.answers(&asked.name, &egress.table().domain))
    });
    let Some(names) = names else {
        return tcp::serve(stream, target, head, egress).await;
    };
    for server in names.servers() {
        if let Ok(Ok(peer)) = timeout(CONNECT, TcpStream::connect(*server)).await {
            return stream.relay(peer, &head).await;
        }
    }
}

/// What the container sends first: at least one question, unless that is too long or the container has ended its direction.
/// `None` if the connection breaks.
async fn first(stream: &mut Guarded) -> Option<Bytes> {
    let mut head = BytesMut::with_capacity(LENGTH + LONGEST);
    while head.len() < LENGTH + length(&head) {
        if stream.read(&mut head).await.ok()? == 0 {
            break;
        }
    }
    Some(head.freeze())
}

/// PURE: how many bytes the first question has, as far as they are looked at.
fn length(head: &[u8]) -> usize {
    let length = head.first_chunk().map(|length| u16::from_be_bytes(*length));
    length.map_or(0, usize::from).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_bounded_and_zero_while_it_is_not_known() {
        assert_eq!([length(&[]), length(&[1])], [0, 0]);
        assert_eq!([length(&[0, 30, 7]), length(&[255, 255])], [30, LONGEST]);
    }
}
