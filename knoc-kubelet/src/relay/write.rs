//! Writes EndpointSlices. The watch says what the API server has, so nothing is read before a write.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use knoc_proto::{error::chain, ids::PodUid};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
};

use super::slice::{self, Change};
use crate::egress::table::Name;

/// How many writes are in flight at a time.
const AT_ONCE: usize = 8;
/// The deadline of a write.
const DEADLINE: Duration = Duration::from_secs(10);
/// No write begins after this time, so that an API server that does not answer cannot stop the rounds for long.
const ROUND: Duration = Duration::from_secs(15);
/// The most slices that are deleted when the kubelet stops. As many are published.
const MOST: u32 = 4096;
/// The longest message of the API server that is told, in characters.
const MESSAGE: usize = 512;

/// The slices whose writes were tried. Those that are missing were not: the time of the round was over.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) done: HashSet<Name>,
    pub(super) failed: HashSet<Name>,
    /// Why some of them failed, as far as that is for the owners of the pods.
    pub(super) rejected: Vec<Rejected>,
}

/// The API server does not accept the slice as it is: a quota, an admission webhook, or a right that the kubelet does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "The EndpointSlice with which Service {service} leads to the pod could not be written and is tried again: the API server rejected it \
     ({code}): {message}"
)]
pub(super) struct Rejected {
    pub(super) pod: PodUid,
    service: Name,
    code: u16,
    message: String,
}

impl Rejected {
    /// Identifies the cause: the message may contain what changes from one write to the next, such as how much of a quota is used.
    pub(super) fn cause(&self) -> String {
        format!("slice of {}: {}", self.service, self.code)
    }
}

/// Why the API server rejected the slice, by which the Service leads to the pod. `None` if it did not, or if another write of the same
/// slice may succeed.
fn rejected(joins: Option<(Name, PodUid)>, error: &WriteError) -> Option<Rejected> {
    let WriteError::Api { source, .. } = error else {
        return None;
    };
    let kube::Error::Api(status) = source else {
        return None;
    };
    if !matches!(status.code, 400 | 403 | 409 | 413 | 422) {
        return None;
    }
    let (service, pod) = joins?;
    Some(Rejected {
        pod,
        service,
        code: status.code,
        message: status.message.chars().take(MESSAGE).collect(),
    })
}

/// Makes these changes.
pub(super) async fn all(client: &Client, changes: Vec<Change>) -> Written {
    let writes = stream::iter(changes).take_until(tokio::time::sleep(ROUND));
    let writes = writes.map(|change| {
        let (name, joins) = (change.name().clone(), change.joins());
        let written = one(client.clone(), change);
        async move { (name, joins, written.await) }
    });
    let mut writes = std::pin::pin!(writes.buffer_unordered(AT_ONCE));
    let (mut all, mut last) = (Written::default(), None);
    while let Some((name, joins, written)) = writes.next().await {
        match written {
            Ok(()) => drop(all.done.insert(name)),
            Err(error) => {
                all.failed.insert(name);
                all.rejected.extend(rejected(joins, &error));
                last = Some(error);
            }
        }
    }
    if let Some(error) = last {
        tracing::warn!(
            failed = all.failed.len(),
            error = chain(&error),
            "EndpointSlices of relayed pods could not be written, trying again later"
        );
    }
    all
}

/// Why a slice was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("write EndpointSlice {name}")]
    Api { name: Name, source: kube::Error },
    #[error(
        "write EndpointSlice {name}: no answer from the API server within {} s",
        DEADLINE.as_secs()
    )]
    Late { name: Name },
}

async fn one(client: Client, change: Change) -> Result<(), WriteError> {
    let name = change.name().clone();
    let is_new = matches!(change, Change::Create(..));
    let api: Api<EndpointSlice> = Api::namespaced(client, &name.namespace);
    let written = async {
        match change {
            Change::Create(_, slice) => api.create(&PostParams::default(), &slice).await.map(drop),
            Change::Replace(name, slice) => {
                let params = PatchParams::default();
                let patch = Patch::Merge(&slice);
                api.patch(&name.name, &params, &patch).await.map(drop)
            }
            Change::Delete(name, meta) => {
                let params = DeleteParams {
                    preconditions: Some(Preconditions {
                        resource_version: meta.resource_version,
                        uid: meta.uid,
                    }),
                    ..DeleteParams::default()
                };
                api.delete(&name.name, &params).await.map(drop)
            }
        }
    };
    match tokio::time::timeout(DEADLINE, written).await {
        Ok(Ok(())) => Ok(()),
        // It is gone, or was changed in the meantime: the watch brings its present state, and a round follows. But if the name of
        // a new slice is taken, the other slice may not be ours, and the watch never brings it.
        Ok(Err(kube::Error::Api(status))) if !is_new && matches!(status.code, 404 | 409) => {
            tracing::debug!(%name, %status.message, "an EndpointSlice was changed in the meantime");
            Ok(())
        }
        Ok(Err(source)) => Err(WriteError::Api { name, source }),
        Err(_) => Err(WriteError::Late { name }),
    }
}

/// Deletes the slices of the node that lead to this address, so that clients are refused instead of waiting for an address that
/// nobody has. Those of a newer kubelet of the node lead elsewhere.
pub(super) async fn withdraw(client: &Client, node: &str, address: IpAddr) {
    let api: Api<EndpointSlice> = Api::all(client.clone());
    let own = ListParams::default()
        .labels(&slice::of_node(node))
        .limit(MOST);
    let listed = match api.list(&own).await {
        Ok(listed) => listed.items,
        Err(error) => {
            tracing::warn!(
                error = chain(&error),
                "the EndpointSlices of relayed pods could not be deleted: their clients time out until the kubelet is back"
            );
            return;
        }
    };
    let ours = listed
        .into_iter()
        .filter(|one| slice::is_own(one, node) && slice::is_at(one, address));
    let changes = ours.filter_map(|one| {
        let name = crate::egress::table::slice_name(&one)?;
        Some(Change::Delete(name, one.metadata))
    });
    all(client, changes.collect()).await;
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use kube::{client::Body, core::Status};
    use serde_json::json;
    use tower_test::mock;

    use super::*;

    #[tokio::test]
    async fn a_name_that_is_taken_is_tried_again_and_a_slice_that_has_changed_is_not() {
        let (service, mut requests) = mock::pair::<Request<Body>, Response<Body>>();
        let client = Client::new(service, "default");
        let conflicts = async {
            while let Some((_, send)) = requests.next_request().await {
                let status =
                    json!({"status": "Failure", "code": 409, "message": "m", "reason": "r"});
                let body = Body::from(status.to_string().into_bytes());
                send.send_response(Response::builder().status(409).body(body).unwrap());
            }
        };
        let name = |name: &str| Name::new("team", name);
        let changes = vec![
            Change::Create(name("new"), EndpointSlice::default()),
            Change::Replace(name("changed"), EndpointSlice::default()),
            Change::Delete(name("gone"), ObjectMeta::default()),
        ];
        let written = tokio::select! {
            written = all(&client, changes) => written,
            () = conflicts => panic!("the client is gone"),
        };
        assert_eq!(written.done, [name("changed"), name("gone")].into());
        assert_eq!(written.failed, [name("new")].into());
    }

    #[test]
    fn what_the_api_server_rejects_is_told_by_its_cause() {
        let failed = |code, message: &str| WriteError::Api {
            name: Name::new("team", "web-1"),
            source: kube::Error::Api(Box::new(Status {
                code,
                message: message.to_owned(),
                ..Status::default()
            })),
        };
        let joins = || Some((Name::new("team", "web"), "u-1".parse().unwrap()));
        let quota = rejected(joins(), &failed(403, "exceeded quota: q, used: 5")).unwrap();
        let later = rejected(joins(), &failed(403, "exceeded quota: q, used: 6")).unwrap();
        assert_eq!(quota.cause(), later.cause());
        assert_eq!(quota.pod.as_str(), "u-1");
        let text = quota.to_string();
        for part in ["Service team/web", "(403): exceeded quota: q, used: 5"] {
            assert!(text.contains(part), "{text}");
        }
        let long = rejected(joins(), &failed(422, &"ü".repeat(10_000))).unwrap();
        assert!(long.to_string().chars().count() < 1024);
        assert_ne!(long.cause(), quota.cause());
        assert_eq!(rejected(None, &failed(403, "it is deleted")), None);
        let late = WriteError::Late {
            name: Name::new("team", "web-1"),
        };
        assert_eq!(rejected(joins(), &late), None);
        for code in [401, 404, 429, 500, 503] {
            assert_eq!(rejected(joins(), &failed(code, "later")), None, "{code}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_tried_has_not_failed() {
        let (service, _requests) = mock::pair::<Request<Body>, Response<Body>>();
        let client = Client::new(service, "default");
        let names = (0..4 * AT_ONCE).map(|number| Name::new("team", &number.to_string()));
        let changes = names.map(|name| Change::Create(name, EndpointSlice::default()));
        let written = all(&client, changes.collect()).await;
        assert!(written.done.is_empty());
        assert_eq!(
            written.failed.len(),
            2 * AT_ONCE,
            "until the round was over"
        );
    }
}
