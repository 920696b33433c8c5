//! Asks the API server whether a pod still exists, before a job is ended whose end nobody requested.
//!
//! Only a live answer counts, and only two prove that the pod is gone: 404, or another UID under its name. A denied
//! request, an error or a timeout proves nothing.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::ids::PodUid;
use kube::{Api, Client, api::ListParams};

const DEADLINE: Duration = Duration::from_secs(10);

/// What the API server answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// The pod exists.
    There,
    /// The pod does not exist, or another pod has its name.
    Gone,
    /// There was no usable answer.
    Unknown,
}

/// How the API server is asked whether a pod exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLookup {
    /// With a GET, which works for any pod.
    Get,
    /// With a list of one pod, on our own node. The node authorizer answers a GET of a pod that does not exist with 403
    /// instead of 404. The list is as current as a GET, since it names no resource version, but says nothing about
    /// other nodes' pods.
    OwnNode,
}

/// Asks whether the pod with this UID exists, which was last known on `node`.
pub(crate) async fn presence(
    client: &Client,
    ask: PodLookup,
    node: &str,
    (namespace, name, uid): (&str, &str, &PodUid),
) -> Presence {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let asked = async {
        match ask {
            PodLookup::Get => api.get_opt(name).await.map(Vec::from_iter),
            PodLookup::OwnNode => {
                let fields = format!("metadata.name={name},spec.nodeName={node}");
                let params = ListParams::default().fields(&fields);
                api.list(&params).await.map(|list| list.items)
            }
        }
    };
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(found)) => {
            let there = |pod: &Pod| pod.metadata.uid.as_deref() == Some(uid.as_str());
            if found.iter().any(there) {
                Presence::There
            } else {
                Presence::Gone
            }
        }
        Ok(Err(error)) => {
            let error = knoc_proto::error::chain(&error);
            tracing::debug!(%uid, %error, "could not ask the API server whether the pod exists");
            Presence::Unknown
        }
        Err(_) => Presence::Unknown,
    }
}

/// PURE: may the jobs of `gone` out of `all` pods be ended at once? If it is more, our view of the cluster is likely
/// wrong.
pub(crate) fn plausible(gone: usize, all: usize) -> bool {
    gone <= 5.max(all / 10)
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    /// Sends one request and answers it as given; returns the request's URI and the result.
    async fn asked(ask: PodLookup, code: u16, answer: Value) -> (String, Presence) {
        let (service, mut server) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        let client = Client::new(service, "default");
        let uid = "u1".parse().unwrap();
        let question = presence(&client, ask, "n", ("ns", "p", &uid));
        let answering = async {
            let (request, send) = server.next_request().await.unwrap();
            let body = Body::from(serde_json::to_vec(&answer).unwrap());
            send.send_response(Response::builder().status(code).body(body).unwrap());
            request.uri().to_string()
        };
        let (presence, uri) = tokio::join!(question, answering);
        (uri, presence)
    }

    fn pod(uid: &str) -> Value {
        json!({"metadata": {"name": "p", "uid": uid}, "spec": {"nodeName": "renamed", "containers": []}})
    }

    fn failure(code: u16) -> Value {
        let reason = if code == 404 { "NotFound" } else { "Other" };
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "m", "metadata": {}})
    }

    #[tokio::test]
    async fn only_404_or_another_uid_means_gone() {
        let get = |code, answer| asked(PodLookup::Get, code, answer);
        let (uri, said) = get(404, failure(404)).await;
        assert_eq!(said, Presence::Gone);
        assert_eq!(uri, "/api/v1/namespaces/ns/pods/p");
        assert_eq!(get(200, pod("u2")).await.1, Presence::Gone);
        // On another node, or with another name: the pod exists.
        assert_eq!(get(200, pod("u1")).await.1, Presence::There);
        assert_eq!(get(403, failure(403)).await.1, Presence::Unknown);
        assert_eq!(get(500, failure(500)).await.1, Presence::Unknown);
    }

    #[tokio::test]
    async fn a_node_asks_for_its_own_by_a_list_of_one() {
        let list = |items: Value| json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
        let ask = |items| asked(PodLookup::OwnNode, 200, list(items));
        let (uri, said) = ask(json!([])).await;
        assert_eq!(said, Presence::Gone);
        assert!(uri.contains("spec.nodeName%3Dn"), "{uri}");
        assert_eq!(ask(json!([pod("u1")])).await.1, Presence::There);
        assert_eq!(
            asked(PodLookup::OwnNode, 403, failure(403)).await.1,
            Presence::Unknown
        );
    }

    #[test]
    fn too_many_pods_that_vanish_at_once_are_implausible() {
        assert!(plausible(5, 5));
        assert!(!plausible(6, 10));
        assert!(plausible(10, 100));
        assert!(!plausible(11, 100));
        assert!(plausible(0, 0));
    }
}
