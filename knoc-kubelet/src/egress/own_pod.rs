//! Connections that lead to pods of the node at addresses of their own. The kubelet does not reach these: it sends such a connection
//! back, and the shim dials the pod over the mesh, where it is decided whether the two may reach each other (ADR 0123).

use std::net::SocketAddr;

use knoc_proto::{
    capability,
    ids::PodUid,
    pb::{self, egress_control::Control},
};
use tokio::sync::mpsc;

use super::{Connections, control, decide, target};

impl Connections {
    /// What is wrong with the range of the pods' addresses: it hides Services from the pods. `None` if nothing is known to be.
    pub(super) fn hidden_services(&self) -> Option<String> {
        let range = self.setup.unit.own_range()?;
        let hidden = self.cluster.look(|state| {
            let mut services = state.around.service_ranges.iter();
            services
                .find(|one| range.meets(one))
                .map(ToString::to_string)
        });
        let hidden = hidden.flatten()?;
        Some(format!(
            "the range {range} of the pods' own addresses has addresses of the cluster's Services in it ({hidden}), which pods do not reach: \
             choose another range (spec.podCIDR of the Node, or node.podRange of the kubelet)"
        ))
    }

    /// Sends the connection back if it leads to a pod of the node. Returns whether it does.
    pub(super) fn send_back(
        &self,
        uid: &PodUid,
        attempt: &pb::EgressAttempt,
        controls: &mpsc::Sender<pb::EgressControl>,
    ) -> bool {
        let Some(pod) = self.own_pod(uid, attempt) else {
            return false;
        };
        tracing::debug!(%uid, %pod, "a pod connects to another one of the node");
        let redirect = pb::EgressRedirect {
            uid: uid.to_string(),
            id: attempt.id,
            address: pod.ip().to_string(),
            port: pod.port().into(),
        };
        // If it does not fit, the connection ends at the shim's deadline.
        let redirect = control(Control::Redirect(redirect));
        controls.try_send(redirect).ok();
        true
    }

    /// The pod of the node to which the connection leads, if it leads to one and the agent can have its shim reach it.
    fn own_pod(&self, uid: &PodUid, attempt: &pb::EgressAttempt) -> Option<SocketAddr> {
        let able = self.setup.link.borrow().serves(capability::POD_ADDRESSES);
        if !able {
            return None;
        }
        let to = (target(attempt)?, attempt.protocol());
        let (unit, random) = (&self.setup.unit, rand::random::<u64>());
        let found = self.cluster.look(|state| {
            let is_own = |address| unit.is_own_pod(address);
            decide::own_pod(&state.table, to, (uid.as_str(), random), is_own)
        });
        found.flatten()
    }
}
