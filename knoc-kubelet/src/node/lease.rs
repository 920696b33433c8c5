//! Task: renews the node's Lease in `kube-node-lease` every 10 s; its duration is 40 s. The Node owns the Lease: if the
//! Node is deleted and recreated, the garbage collector deletes the old Lease and a new one is created for the new
//! Node.
//!
//! The Lease says that this kubelet is alive and nothing about the agent: a broken link never makes the node NotReady.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::{
        coordination::v1::{Lease, LeaseSpec},
        core::v1::Node,
    },
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "kube-node-lease";
const DURATION: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// The pause after a failure.
const RETRY: Duration = Duration::from_secs(2);
const DEADLINE: Duration = Duration::from_secs(5);

/// Renews until `shutdown`.
pub(super) async fn run(client: Client, node: String, shutdown: CancellationToken) {
    let nodes: Api<Node> = Api::all(client.clone());
    let api: Api<Lease> = Api::namespaced(client, NAMESPACE);
    loop {
        let renewed = tokio::time::timeout(DEADLINE, renew(&api, &nodes, &node)).await;
        let wait = match renewed {
            Ok(Ok(())) => RENEW,
            Ok(Err(error)) => {
                let error = knoc_proto::error::chain(&error);
                tracing::warn!(%error, "could not renew the node's Lease, trying again");
                RETRY
            }
            Err(_) => {
                tracing::warn!("could not renew the node's Lease in time, trying again");
                RETRY
            }
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn renew(api: &Api<Lease>, nodes: &Api<Node>, name: &str) -> kube::Result<()> {
    let now = MicroTime(Timestamp::now());
    let patch = json!({"spec": {
        "holderIdentity": name, "leaseDurationSeconds": DURATION, "renewTime": now,
    }});
    match api
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            // A Lease that is owned by a Node that is gone would be collected again and again.
            let node = nodes.get(name).await?;
            let uid = node.metadata.uid.unwrap_or_default();
            let lease = lease(uid, name, now);
            api.create(&PostParams::default(), &lease).await.map(drop)
        }
        Err(error) => Err(error),
    }
}

fn lease(uid: String, name: &str, now: MicroTime) -> Lease {
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: name.to_owned(),
                uid,
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: Some(DURATION),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    }
}
