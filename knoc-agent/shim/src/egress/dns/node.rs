//! The resolvers of the compute node, for the names that the site leaves to them.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{net::UdpSocket, time::timeout};

use super::{
    super::DNS,
    message::{self, Question},
    suffixes::Suffixes,
};
use crate::resolver;

/// Where the node names its resolvers.
const CONFIG: &str = "/etc/resolv.conf";

/// The most resolvers that are asked, as the C library has it.
const SERVERS: usize = 3;

/// How long a resolver may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest answer.
const LONGEST: usize = 16 << 10;

/// Which names the resolvers of the compute node answer, and where they are.
#[derive(Debug, Default)]
pub(crate) struct NodeNames {
    suffixes: Suffixes,
    servers: Vec<SocketAddr>,
}

impl NodeNames {
    /// The names with these suffixes, and the resolvers of this node.
    pub(crate) fn find(suffixes: &[String]) -> Self {
        let text = fs::read_to_string(CONFIG).unwrap_or_default();
        Self::new(suffixes, servers(&text))
    }

    pub(in crate::egress) fn new(suffixes: &[String], servers: Vec<SocketAddr>) -> Self {
        Self {
            suffixes: Suffixes::new(suffixes),
            servers,
        }
    }

    /// Whether there are such names.
    pub(in crate::egress) fn are_any(&self) -> bool {
        !self.suffixes.is_empty()
    }

    /// Whether this name, as in a message, is one of them. `cluster` is the domain of the cluster.
    pub(super) fn answers(&self, name: &[u8], cluster: &str) -> bool {
        self.suffixes.contain(name, cluster)
    }

    pub(super) fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// Asks one resolver after the other. `None` if none answers.
    pub(super) async fn ask(&self, asked: &[u8], question: &Question) -> Option<Vec<u8>> {
        let id = message::id(asked)?;
        for server in &self.servers {
            let answer = timeout(PATIENCE, ask_one(*server, asked, question)).await;
            if let Ok(Ok(answer)) = answer {
                return Some(message::with_id(&answer, id));
            }
        }
        None
    }
}

/// PURE: the addresses of the resolvers in a `resolv.conf`. Without any, there is one on the node itself.
fn servers(text: &str) -> Vec<SocketAddr> {
    let named = resolver::nameservers(text);
    let named = named.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    let mut servers: Vec<_> = named
        .take(SERVERS)
        .map(|address| SocketAddr::new(address, DNS))
        .collect();
    if servers.is_empty() {
        servers.push((Ipv4Addr::LOCALHOST, DNS).into());
    }
    servers
}

/// Asks with a port and an id that nobody can guess, and takes the answer of this server to this question only.
async fn ask_one(server: SocketAddr, asked: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = rand::random();
    socket.send(&message::with_id(asked, id)).await?;
    let mut buffer = vec![0; LONGEST];
    loop {
        let count = socket.recv(&mut buffer).await?;
        // An answer that fills the buffer may be longer.
        let answer = buffer.get(..count).filter(|_| count < LONGEST);
        let answer = answer.ok_or(io::ErrorKind::InvalidData)?;
        if message::id(answer) == Some(id) && question.is_answered_by(answer) {
            return Ok(answer.to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolvers_are_those_of_the_node() {
        let text = "nameserver 127.0.0.53\nsearch x\nnameserver 2001:db8::1\nnameserver odd\n\
                    nameserver 10.0.0.2\nnameserver 10.0.0.3\n";
        let expected = ["127.0.0.53:53", "[2001:db8::1]:53", "10.0.0.2:53"];
        let expected = expected.map(|text| text.parse::<SocketAddr>().unwrap());
        assert_eq!(servers(text), expected);
        let own: SocketAddr = (Ipv4Addr::LOCALHOST, DNS).into();
        assert_eq!(servers(""), [own]);
    }
}
