//! Task: one tunnel that the shim of another pod has dialled.
//!
//! Everybody who reaches the node can open a connection, so nothing that it says is believed before the agent has said the same:
//! that the pod whose address the tunnel is greeted with has the key that the TLS handshake proved, and that both may reach each
//! other. Afterwards each packet must be from that address, for this pod; one that is not ends the tunnel, because the shim at
//! the other end should not have sent it.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use knoc_link::{Connection, Peer};
use tokio::{sync::watch, time::timeout};

use super::{
    Mesh, Wanted,
    interface::Interface,
    members::Members,
    notes::Notes,
    packet::{Header, header},
    tunnel::{IDLE, Packets, greeted},
    unproven::Place,
};

/// How long whoever has dialled may take for its greeting.
const GREETING: Duration = Duration::from_secs(2);
/// How long the agent's answer about it may take. A shim that dials had its own answer already.
const PROOF: Duration = Duration::from_secs(3);

/// What a tunnel from another pod needs.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) mesh: Arc<Mesh>,
    /// This pod's address.
    pub(super) own: Ipv4Addr,
    pub(super) interface: Arc<Interface>,
    pub(super) notes: Arc<Notes>,
}

/// A tunnel whose other end is known.
struct Proven {
    from: Ipv4Addr,
    spki: Arc<str>,
    /// Of all tunnels from there, the newest one goes on.
    number: u64,
    members: watch::Receiver<Members>,
    connection: Connection,
    wanted: Wanted,
}

impl Inbound {
    /// Takes the packets of a tunnel to its end. It needs `place` until it is known whose it is.
    pub(super) async fn run(self, connection: Connection, mut place: Place) {
        let proven = tokio::select! {
            biased;
            () = place.lost() => return,
            proven = self.prove(connection) => proven,
        };
        let Some(proven) = proven else { return };
        drop(place);
        self.take(proven).await;
    }

    /// Finds out who has dialled. `None` if it is nobody whom the agent names.
    async fn prove(&self, mut connection: Connection) -> Option<Proven> {
        let Peer::Pinned { spki, .. } = connection.peer().clone() else {
            return None;
        };
        let from = timeout(GREETING, greeted(&mut connection))
            .await
            .ok()?
            .ok()?;
        if from == self.own || !self.mesh.reaches(from) {
            return None;
        }
        let wanted = self.mesh.want(from)?;
        let mut members = self.mesh.members.subscribe();
        // An answer from before may be about a pod that had the address then.
        let has = |members: &Members| members.has(from, &spki);
        let known = timeout(PROOF, members.wait_for(has)).await;
        if !known.is_ok_and(|known| known.is_ok()) {
            self.notes.refused(from);
            return None;
        }
        let mut number = 0;
        self.mesh
            .members
            .send_modify(|members| number = members.enter(from));
        Some(Proven {
            from,
            spki,
            number,
            members,
            connection,
            wanted,
        })
    }

    async fn take(&self, proven: Proven) {
        let Proven {
            from,
            spki,
            number,
            mut members,
            connection,
            wanted,
        } = proven;
        let over =
            |members: &Members| !members.has(from, &spki) || !members.is_newest(from, number);
        let mut packets = Packets::of(connection);
        let taking = async {
            // An end, an error and a silence are all the same: the other side dials again.
            while let Ok(Ok(packet)) = timeout(IDLE * 2, packets.next()).await {
                if !is_right(packet, from, self.own) {
                    self.notes.wrong_packet(from);
                    return;
                }
                self.interface.put(packet);
            }
        };
        tokio::select! {
            biased;
            _ = members.wait_for(over) => {}
            () = taking => {}
        }
        drop(wanted);
    }
}

/// PURE: is this a packet from there for this pod?
fn is_right(packet: &[u8], from: Ipv4Addr, own: Ipv4Addr) -> bool {
    let expected = Header {
        source: from,
        target: own,
    };
    header(packet) == Some(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_from_the_tunnels_pod_for_this_pod_are_taken() {
        let (from, own) = (Ipv4Addr::new(10, 200, 0, 3), Ipv4Addr::new(10, 200, 0, 7));
        let packet = |source: Ipv4Addr, target: Ipv4Addr| {
            let mut packet = vec![0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0];
            packet.extend(source.octets());
            packet.extend(target.octets());
            packet
        };
        assert!(is_right(&packet(from, own), from, own));
        let third = Ipv4Addr::new(10, 200, 0, 9);
        for (source, target) in [
            (third, own),
            (from, third),
            (own, from),
            (from, Ipv4Addr::LOCALHOST),
            (Ipv4Addr::LOCALHOST, own),
        ] {
            assert!(!is_right(&packet(source, target), from, own));
        }
        assert!(!is_right(b"", from, own));
    }
}
