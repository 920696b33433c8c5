//! The watch of trust bundles, at an API server that answers what each test says.

use serde_json::{Value, json};
use tower_test::mock::{Handle, SendResponse};

use super::*;

type Answer = Response<Full<bytes::Bytes>>;
type Requests = Handle<Request<Body>, Answer>;

/// A pod that refers to a bundle of which it has read this version, and the requests of its watch.
struct Watched {
    references: References,
    requests: Requests,
    _tasks: JoinSet<()>,
}

fn start(selected: TrustBundleKey, read: Version) -> Watched {
    let (service, requests) = tower_test::mock::pair::<Request<Body>, Answer>();
    let references = References::default();
    let objects = BTreeMap::from([(Key::TrustBundles(selected), read)]);
    references.follow(&uid("a"), objects);
    let mut tasks = JoinSet::new();
    let client = Client::new(service, "default");
    let stop = CancellationToken::new();
    tasks.spawn(references.clone().run(client, Queue::default(), stop));
    Watched {
        references,
        requests,
        _tasks: tasks,
    }
}

fn site() -> TrustBundleKey {
    TrustBundleKey::Named("site".to_owned())
}

/// A bundle's metadata.
fn bundle(version: &str) -> Value {
    json!({
        "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
        "metadata": {"name": "site", "resourceVersion": version},
    })
}

/// What stands for the version of the only bundle.
fn version(version: &str) -> Version {
    let metadata = ObjectMeta {
        name: Some("site".to_owned()),
        resource_version: Some(version.to_owned()),
        ..ObjectMeta::default()
    };
    version_of_all(std::iter::once(&metadata))
}

impl Watched {
    async fn next(&mut self) -> (String, SendResponse<Answer>) {
        let next = tokio::time::timeout(Duration::from_secs(30), self.requests.next_request());
        let (request, send) = next.await.expect("a request").unwrap();
        (request.uri().to_string(), send)
    }

    /// Answers the list with bundles of these versions.
    async fn listed(&mut self, versions: &[&str]) -> String {
        let (uri, send) = self.next().await;
        let items: Vec<_> = versions.iter().map(|version| bundle(version)).collect();
        let list = json!({
            "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList",
            "metadata": {"resourceVersion": "100"}, "items": items,
        });
        send.send_response(Response::new(Full::from(list.to_string())));
        uri
    }

    async fn failed(&mut self, code: u16) -> String {
        let (uri, send) = self.next().await;
        let failure = json!({"kind": "Status", "status": "Failure", "code": code, "reason": "No"});
        let answer = Response::builder().status(code);
        send.send_response(answer.body(Full::from(failure.to_string())).unwrap());
        uri
    }

    /// Waits until its watch is counted among those that would wait for minutes.
    async fn is_hopeless(&self) {
        let hopeless = || {
            let state = self.references.state();
            state.objects.values().all(|object| object.denied)
        };
        let waiting = async {
            while !hopeless() {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
        waited.expect("the watch is neither denied nor unknown");
        assert!(!self.references.all_watched(&uid("a")));
    }

    fn changed(&self) -> bool {
        self.references.changed_since(&uid("a"), 0).is_some()
    }
}

#[test]
fn the_versions_of_several_objects_are_compared_together_whatever_their_order() {
    let metadata = |name: &str, version: &str| ObjectMeta {
        name: Some(name.to_owned()),
        resource_version: Some(version.to_owned()),
        ..ObjectMeta::default()
    };
    let (one, other) = (metadata("one", "1"), metadata("other", "2"));
    let both = version_of_all([&one, &other].into_iter());
    assert_eq!(both, version_of_all([&other, &one].into_iter()));
    assert_ne!(both, version_of_all([&one].into_iter()));
    let newer = metadata("other", "3");
    assert_ne!(both, version_of_all([&one, &newer].into_iter()));
    assert_eq!(version_of_all(std::iter::empty()), None);
}

#[tokio::test]
async fn what_was_read_is_no_change_and_each_event_after_the_list_is_one() {
    let mut watched = start(site(), version("7"));
    let list = watched.listed(&["7"]).await;
    assert!(
        list.contains("/apis/certificates.k8s.io/v1/clustertrustbundles?"),
        "{list}"
    );
    assert!(list.contains("metadata.name%3Dsite"), "{list}");
    let (watch, send) = watched.next().await;
    assert!(watch.contains("watch=true"), "{watch}");
    assert!(watch.contains("metadata.name%3Dsite"), "{watch}");
    assert!(watch.contains("resourceVersion=100"), "{watch}");
    assert!(!watched.changed());
    let event = json!({"type": "MODIFIED", "object": bundle("101")});
    send.send_response(Response::new(Full::from(format!("{event}\n"))));
    // The stream ends with the event. After a session as short as this one, the bundles are listed again.
    let (again, _send) = watched.next().await;
    assert!(!again.contains("watch=true"), "{again}");
    assert!(watched.changed());
}

#[tokio::test]
async fn a_change_between_the_reading_and_the_list_is_noticed() {
    let mut watched = start(site(), version("7"));
    watched.listed(&["8"]).await;
    let _watch = watched.next().await;
    assert!(watched.changed());
    let mut gone = start(site(), version("7"));
    gone.listed(&[]).await;
    let _watch = gone.next().await;
    assert!(gone.changed());
}

#[tokio::test]
async fn bundles_of_a_signer_are_watched_by_their_labels() {
    let signed = TrustBundleKey::Signed {
        signer: "example.com/signer".to_owned(),
        labels: Some("env=prod".to_owned()),
    };
    let mut watched = start(signed, None);
    let list = watched.listed(&[]).await;
    assert!(
        list.contains("spec.signerName%3Dexample.com%2Fsigner"),
        "{list}"
    );
    let (watch, _send) = watched.next().await;
    assert!(watch.contains("labelSelector=env%3Dprod"), "{watch}");
    assert!(!watched.changed());
}

/// The pod reads what it can once a minute, and nothing is asked for again soon.
#[tokio::test]
async fn a_cluster_without_the_api_or_the_right_leaves_the_pod_to_the_period() {
    let mut watched = start(site(), None);
    let first = watched.failed(404).await;
    assert!(first.contains("/v1/"), "{first}");
    let second = watched.failed(404).await;
    assert!(second.contains("/v1beta1/"), "{second}");
    watched.is_hopeless().await;
    let mut denied = start(site(), None);
    denied.listed(&[]).await;
    let watch = denied.failed(403).await;
    assert!(watch.contains("watch=true"), "{watch}");
    denied.is_hopeless().await;
}
