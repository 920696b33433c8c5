//! `WatchEgress`: the kubelet that leads a node describes the cluster's network and learns what the node's pods dial.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use knoc_link::Peer;
use knoc_proto::{
    egress,
    pb::{self, egress_control::Control},
    reason::ErrorReason,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Answers, Asks, Service, lead};
use crate::{config::Policy, egress::Call, site::Site};

/// How long the first message may take.
const FIRST: Duration = Duration::from_secs(10);

/// Serves the call until its caller ends it, a newer call replaces it, or the agent stops.
pub(super) async fn watch(
    service: &Service,
    request: Request<Streaming<pb::EgressControl>>,
) -> Result<Response<Answers<pb::EgressAttempt>>, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    let mut controls = request.into_inner();
    let first = tokio::time::timeout(FIRST, controls.message()).await;
    let first =
        first.map_err(|_| ErrorReason::InvalidRequest.status("no first message in time"))?;
    let first = first?.unwrap_or_default();
    let caller = first.caller.unwrap_or_default();
    may_watch(peer.as_ref(), caller.leadership_epoch)?;
    let asks = Asks {
        node: &caller.node_name,
        cluster_id: &caller.cluster_id,
        epoch: caller.leadership_epoch,
    };
    let checked = service.check(peer.as_ref(), asks).await?;
    let Some(Control::Network(network)) = first.control else {
        return Err(ErrorReason::InvalidRequest.status("the first message has the `network`"));
    };
    let site = Arc::clone(&service.0.site);
    let network = acceptable(network, &site.policy.now())?;
    service.claim(&checked).await?;
    let node = checked.leads.unwrap_or(caller.node_name);
    let call = site.egress.call(&node, peer)?;
    call.set_network(network);
    let watch = Watch {
        call,
        controls,
        site,
        stop: service.0.stop.clone(),
    };
    let attempts = stream::unfold(Some(watch), async |watch| watch?.step().await);
    Ok(Response::new(attempts.boxed()))
}

/// PURE: may this peer follow the connections of a node? Unlike other requests, this one keeps the leader from its work, so
/// whoever has a certificate has to be a kubelet that leads.
fn may_watch(peer: Option<&Peer>, epoch: i64) -> Result<(), Status> {
    let leads = match peer {
        Some(Peer::Tls { .. }) => lead::kubelet(peer).is_some() && epoch != 0,
        Some(Peer::Unix { .. }) => true,
        Some(Peer::Pinned { .. } | Peer::Command) | None => false,
    };
    if leads {
        return Ok(());
    }
    let message = "only the kubelet that leads a node may follow the connections of its pods";
    Err(ErrorReason::LeadershipDenied.status(message))
}

/// PURE: the network as pods of this site see it, if it is one.
fn acceptable(
    mut network: pb::EgressNetwork,
    policy: &Policy,
) -> Result<pb::EgressNetwork, Status> {
    let checked = egress::check_network(&network);
    checked.map_err(|why| ErrorReason::InvalidRequest.status(format!("network.{why}")))?;
    let service = &network.dns_service;
    if !service.is_empty() && !policy.permits_egress(service) {
        // A server that refuses every question would leave pods without any names.
        network.dns.clear();
    }
    Ok(network)
}

/// A call that is being served.
struct Watch {
    call: Call,
    controls: Streaming<pb::EgressControl>,
    site: Arc<Site>,
    stop: CancellationToken,
}

type Step = Option<(Result<pb::EgressAttempt, Status>, Option<Watch>)>;

impl Watch {
    /// Takes what the caller sends, until there is a connection for it.
    async fn step(mut self) -> Step {
        loop {
            let Self {
                call,
                controls,
                site,
                stop,
            } = &mut self;
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    let stopping = ErrorReason::ShuttingDown.status("the agent is stopping");
                    return Some((Err(stopping), None));
                }
                control = controls.message() => match control.transpose()?.and_then(|control| take(call, &site.policy.now(), control)) {
                    Ok(()) => {}
                    Err(status) => return Some((Err(status), None)),
                },
                attempt = call.next() => return Some(if let Some(attempt) = attempt { (Ok(attempt), Some(self)) } else {
                    let message = "a newer call of WatchEgress follows the connections of this node";
                    (Err(ErrorReason::StaleLeader.status(message)), None)
                }),
            }
        }
    }
}

fn take(call: &Call, policy: &Policy, control: pb::EgressControl) -> Result<(), Status> {
    match control.control {
        Some(Control::Network(network)) => call.set_network(acceptable(network, policy)?),
        Some(Control::Refusal(refusal)) => call.refuse(&refusal),
        // Between pods of a node `policy.pod_traffic` decides, which the mesh applies.
        Some(Control::Redirect(redirect)) => call.redirect(redirect),
        // Of a newer kubelet.
        None => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use knoc_link::Identity;

    use super::{super::lead::tests::tls, *};

    #[test]
    fn nobody_but_a_leader_takes_the_connections_of_a_node() {
        let unix = Peer::Unix { uid: 1, pid: None };
        may_watch(Some(&unix), 0).unwrap();
        let kubelet = tls(Identity::Kubelet { name: "k".into() });
        may_watch(Some(&kubelet), 1).unwrap();
        let ctl = tls(Identity::Ctl { name: "c".into() });
        let others = [
            (None, 1),
            (Some(Peer::Command), 1),
            // It leads nothing.
            (Some(kubelet), 0),
            (Some(ctl), 1),
        ];
        for (other, epoch) in others {
            let denied = may_watch(other.as_ref(), epoch).unwrap_err();
            assert_eq!(
                ErrorReason::of(&denied),
                Some(ErrorReason::LeadershipDenied)
            );
        }
    }

    #[test]
    fn a_network_with_a_mistake_is_refused_by_its_field() {
        let network = pb::EgressNetwork {
            ranges: vec!["10.96.0.0".to_owned()],
            ..pb::EgressNetwork::default()
        };
        let refused = acceptable(network, &Policy::default()).unwrap_err();
        assert!(
            refused.message().starts_with("network.ranges: "),
            "{refused}"
        );
    }

    #[test]
    fn pods_ask_the_clusters_dns_only_if_the_site_lets_them() {
        let network = pb::EgressNetwork {
            ranges: vec!["10.96.0.0/12".to_owned()],
            dns: "10.96.0.10".to_owned(),
            dns_service: "kube-system/kube-dns".to_owned(),
            ..pb::EgressNetwork::default()
        };
        let listed = |services: &[&str]| Policy {
            egress: services.iter().map(|&text| text.to_owned()).collect(),
            ..Policy::default()
        };
        let dns = |policy: &Policy| acceptable(network.clone(), policy).unwrap().dns;
        assert_eq!(dns(&Policy::default()), "10.96.0.10");
        assert_eq!(dns(&listed(&["default/kubernetes"])), "");
        assert_eq!(dns(&listed(&["kube-system/*"])), "10.96.0.10");
        // Nor do they by a network that follows.
        let egress = crate::egress::Egress::default();
        let call = egress.call("n", None).unwrap();
        let control = pb::EgressControl {
            control: Some(Control::Network(network.clone())),
            caller: None,
        };
        take(&call, &listed(&["default/kubernetes"]), control).unwrap();
        assert_eq!(egress.network("n").unwrap().dns, "");
    }
}
