//! One shim's end: sends it the cluster's network whenever that changes, and announces what its containers dial.
//!
//! It runs as a part of the task that follows the shim's link, and ends with it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use knoc_proto::{egress::is_port, ids::PodUid, pb};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Client, Node, counts::Reason};

/// How many messages to a shim may wait. A refusal beyond them is dropped: its connection then ends at the shim's own
/// deadline.
const CONTROLS: usize = 256;
/// The pause after the shim has ended the call, although its link is up.
const AGAIN: Duration = Duration::from_secs(1);

/// Follows the shim until this is dropped.
pub(super) async fn follow(node: Arc<Node>, uid: PodUid, mut client: Client) {
    loop {
        if let Err(status) = session(&node, &uid, &mut client).await {
            tracing::debug!(%uid, error = status.message(), "the shim's WatchEgress ended");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn session(node: &Node, uid: &PodUid, client: &mut Client) -> Result<(), Status> {
    let mut network = node.network.subscribe();
    let known = network.wait_for(Option::is_some).await;
    let first = known.ok().and_then(|known| known.clone());
    let Some(first) = first else { return Ok(()) };
    let (controls, sent) = mpsc::channel(CONTROLS);
    // The channel is empty.
    controls.send(control(&first)).await.ok();
    let answer = client.watch_egress(ReceiverStream::new(sent)).await?;
    let mut attempts = answer.into_inner();
    let _registered = node.register(uid, controls.clone());
    loop {
        tokio::select! {
            attempt = attempts.message() => match attempt? {
                Some(attempt) => announce(node, uid, &attempt, &controls),
                None => return Ok(()),
            },
            changed = network.changed() => {
                let newest = network.borrow_and_update().clone();
                let (Ok(()), Some(newest)) = (changed, newest) else { return Ok(()) };
                if controls.send(control(&newest)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// Puts the connection into the queue, or refuses it.
fn announce(
    node: &Node,
    uid: &PodUid,
    attempt: &pb::EgressAttempt,
    controls: &mpsc::Sender<pb::EgressControl>,
) {
    let announced = match checked(uid, attempt) {
        Some(attempt) => node
            .announce(attempt)
            .map_err(|full| (full.to_string(), full.reason())),
        None => Err((
            "the shim announced it with an address, a port or a protocol that does not exist"
                .to_owned(),
            Reason::Malformed,
        )),
    };
    if let Err((why, reason)) = announced {
        node.counts.refused(reason);
        node.log_refusal(uid, &why);
        controls.try_send(super::refused(attempt.id)).ok();
    }
}

/// PURE: the attempt as the kubelet gets it.
fn checked(uid: &PodUid, attempt: &pb::EgressAttempt) -> Option<pb::EgressAttempt> {
    let address: IpAddr = attempt.address.parse().ok()?;
    let is_known = attempt.protocol() != pb::EgressProtocol::Unspecified;
    (is_port(attempt.port) && is_known).then(|| pb::EgressAttempt {
        uid: uid.to_string(),
        address: address.to_string(),
        ..*attempt
    })
}

fn control(network: &pb::EgressNetwork) -> pb::EgressControl {
    pb::EgressControl {
        control: Some(pb::egress_control::Control::Network(network.clone())),
        caller: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_names_its_pod_and_a_target_that_can_exist() {
        let uid = PodUid::try_from("u").unwrap();
        let good = pb::EgressAttempt {
            uid: "another".to_owned(),
            id: 7,
            protocol: pb::EgressProtocol::Tcp.into(),
            address: "10.96.0.1".to_owned(),
            port: 443,
        };
        let named = checked(&uid, &good).unwrap();
        assert_eq!((&*named.uid, named.id), ("u", 7));
        let wrong = [
            pb::EgressAttempt {
                address: "kubernetes".to_owned(),
                ..good.clone()
            },
            pb::EgressAttempt {
                port: 0,
                ..good.clone()
            },
            pb::EgressAttempt {
                port: 65_536,
                ..good.clone()
            },
            pb::EgressAttempt {
                protocol: 9,
                ..good
            },
        ];
        for attempt in wrong {
            assert_eq!(checked(&uid, &attempt), None, "{attempt:?}");
        }
    }
}
