//! Tunnels that the agent carries, for compute nodes that do not reach each other.
//!
//! ```text
//!   lane ─carry─► Waiting ═ JoinMesh ═► agent ─MeshStream─► this shim: the lane that waits gets the bytes
//!                                             ─MeshStream─► the other shim: its router gets them, as if somebody had dialled
//! ```
//!
//! What the lane and the router get is a stream of bytes, over which they do the same handshake as over TCP: the agent is not
//! believed to be the other shim.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use bytes::BytesMut;
use knoc_link::{Origin, carrier::Unverified};
use knoc_proto::{
    CHUNK,
    pb::{self, mesh_bytes::Content, mesh_question::Question},
    reason::ErrorReason,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::{Status, Streaming};

use super::{Mesh, PATIENCE, Told};

/// How much may be under way in each direction between a tunnel and its call.
const BUFFER: usize = 64 << 10;

/// The bytes of a tunnel.
pub(super) type Tunnel = Unverified<DuplexStream>;

/// The stream of a tunnel's bytes to the agent.
pub(crate) type Output = mpsc::Sender<Result<pb::MeshBytes, Status>>;

/// PURE: the lanes that wait for a tunnel, by the address that they want to reach.
#[derive(Debug, Default)]
pub(super) struct Waiting(BTreeMap<Ipv4Addr, oneshot::Sender<Tunnel>>);

impl Waiting {
    /// The next question for an agent that was asked about the addresses `asked` already.
    pub(super) fn next(&self, asked: &BTreeSet<Ipv4Addr>) -> Option<Question> {
        let new = self.0.keys().find(|address| !asked.contains(*address));
        new.map(|address| Question::Carry(address.to_string()))
    }

    pub(super) fn contains(&self, address: Ipv4Addr) -> bool {
        self.0.contains_key(&address)
    }
}

impl Mesh {
    /// Asks the agent for a tunnel to the shim of the pod with this address.
    pub(super) async fn carry(&self, address: Ipv4Addr) -> Result<Tunnel, String> {
        let (sender, tunnel) = oneshot::channel();
        self.waiting
            .send_modify(|waiting| drop(waiting.0.insert(address, sender)));
        let waits = Waits {
            mesh: self,
            address,
        };
        let tunnel = timeout(PATIENCE, tunnel).await;
        drop(waits);
        match tunnel {
            Ok(Ok(tunnel)) => Ok(tunnel),
            Ok(Err(_)) | Err(_) => Err(format!("no tunnel within {} s", PATIENCE.as_secs())),
        }
    }

    /// Gives the bytes of a call to whoever waits for them. Returns this side of them, which the call copies.
    pub(crate) async fn take_carried(
        &self,
        calls: &mut Streaming<pb::MeshBytes>,
    ) -> Result<DuplexStream, Status> {
        let first = calls.message().await?.unwrap_or_default();
        let Some(Content::Carried(carried)) = first.content else {
            let message = "the first message of MeshStream is `carried`";
            return Err(ErrorReason::InvalidRequest.status(message));
        };
        let (near, far) = duplex(BUFFER);
        let tunnel = Unverified {
            io: near,
            origin: Origin::Command,
        };
        let taken = if carried.to.is_empty() {
            let router = self.arrivals.borrow().clone();
            router.is_some_and(|router| router.try_send(tunnel).is_ok())
        } else {
            self.give(&carried.to, tunnel)
        };
        if taken {
            return Ok(far);
        }
        let message = "nobody waits for this tunnel, or too many wait to be taken";
        Err(ErrorReason::NotFound.status(message))
    }

    pub(super) fn give(&self, address: &str, tunnel: Tunnel) -> bool {
        let Ok(address) = address.parse::<Ipv4Addr>() else {
            return false;
        };
        let mut waits = None;
        self.waiting
            .send_modify(|waiting| waits = waiting.0.remove(&address));
        waits.is_some_and(|waits| waits.send(tunnel).is_ok())
    }
}

impl Told {
    /// Forgets what nobody waits for, so that it is asked for again if somebody does.
    pub(super) fn follow(&mut self, waiting: &Waiting) {
        self.carried.retain(|address| waiting.contains(*address));
    }
}

/// Takes the place of a lane back that has given up, or has its tunnel.
struct Waits<'a> {
    mesh: &'a Mesh,
    address: Ipv4Addr,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.mesh
            .waiting
            .send_modify(|waiting| drop(waiting.0.remove(&self.address)));
    }
}

/// Task: copies between a tunnel and its call, until either ends.
pub(crate) async fn copy(
    tunnel: DuplexStream,
    mut calls: Streaming<pb::MeshBytes>,
    output: Output,
) {
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let to_tunnel = async {
        while let Ok(Some(message)) = calls.message().await {
            if let Some(Content::Data(data)) = message.content
                && writer.write_all(&data).await.is_err()
            {
                return;
            }
        }
    };
    let to_agent = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            match reader.read_buf(&mut buffer).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return,
            }
            let data = Content::Data(buffer.split().freeze());
            let message = pb::MeshBytes {
                content: Some(data),
            };
            if output.send(Ok(message)).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = to_tunnel => {}
        () = to_agent => {}
        () = output.closed() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

    fn question(mesh: &Mesh, told: &mut Told) -> Option<Question> {
        told.follow(&mesh.waiting.borrow());
        let question = mesh.waiting.borrow().next(&told.carried)?;
        told.note(&question, 0, None);
        Some(question)
    }

    #[tokio::test]
    async fn a_lane_gets_the_tunnel_that_it_asked_for_and_no_other() {
        let (mesh, mut told) = (Arc::new(Mesh::default()), Told::default());
        let asking = Arc::clone(&mesh);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { asking.carry(OTHER).await.map(drop) });
        let mut waiting = mesh.waiting.subscribe();
        let asked = waiting.wait_for(|waiting| waiting.contains(OTHER));
        let asked = timeout(Duration::from_secs(30), asked).await;
        drop(asked.unwrap().unwrap());
        let carry = Some(Question::Carry(OTHER.to_string()));
        assert_eq!(question(&mesh, &mut told), carry);
        assert_eq!(question(&mesh, &mut told), None, "it is asked once");
        let tunnel = || Unverified {
            io: duplex(8).0,
            origin: Origin::Command,
        };
        assert!(!mesh.give("10.200.0.8", tunnel()));
        assert!(!mesh.give("web-0", tunnel()));
        assert!(mesh.give(&OTHER.to_string(), tunnel()));
        assert_eq!(tasks.join_next().await.unwrap().unwrap(), Ok(()));
        assert!(
            !mesh.give(&OTHER.to_string(), tunnel()),
            "nobody waits any more"
        );
        assert_eq!(question(&mesh, &mut told), None);
        assert!(told.carried.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_waits_for_a_tunnel_for_a_while_only() {
        let mesh = Mesh::default();
        mesh.carry(OTHER).await.map(drop).unwrap_err();
        assert!(!mesh.waiting.borrow().contains(OTHER));
    }
}
