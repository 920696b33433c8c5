//! How long answers are cached, that errors are not cached, and that the caches stay bounded. Time is paused.

use std::sync::Mutex;

use futures::{FutureExt as _, future::BoxFuture};
use http::Method;
use k8s_openapi::api::authorization::v1::SubjectAccessReviewSpec;
use knoc_link::Origin;

use crate::server::ClusterError;

use super::*;

/// Answers as the test sets it, and records the reviews.
#[derive(Default)]
struct Scripted {
    asked: Mutex<Vec<String>>,
    allowed: Mutex<Vec<&'static str>>,
    known: Mutex<bool>,
    broken: Mutex<bool>,
}

impl Scripted {
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    #[expect(clippy::unwrap_in_result, reason = "a poisoned lock ends the test")]
    fn answer<T>(&self, answer: T) -> Result<T, ClusterError> {
        if *self.broken.lock().unwrap() {
            Err(ClusterError::Deadline { call: "review" })
        } else {
            Ok(answer)
        }
    }
}

impl Cluster for Scripted {
    fn review_access(
        &self,
        spec: SubjectAccessReviewSpec,
    ) -> BoxFuture<'_, Result<bool, ClusterError>> {
        let subresource = spec.resource_attributes.unwrap().subresource.unwrap();
        let allowed = self
            .allowed
            .lock()
            .unwrap()
            .iter()
            .any(|one| *one == subresource);
        self.asked.lock().unwrap().push(subresource);
        let answer = self.answer(allowed);
        async move { answer }.boxed()
    }

    fn review_token(&self, token: String) -> BoxFuture<'_, Result<Option<User>, ClusterError>> {
        self.asked.lock().unwrap().push(token.clone());
        let user = self.known.lock().unwrap().then(|| User {
            name: token,
            ..User::default()
        });
        let answer = self.answer(user);
        async move {
            tokio::task::yield_now().await;
            answer
        }
        .boxed()
    }

    fn client_ca(&self) -> BoxFuture<'_, Result<String, ClusterError>> {
        async { Err(ClusterError::Deadline { call: "CA" }) }.boxed()
    }
}

async fn may(access: &Access, cluster: &Scripted, path: &str) -> Result<bool, ClusterError> {
    let user = User {
        name: "eve".to_owned(),
        ..User::default()
    };
    let attributes = authz::attributes(&Method::GET, path);
    access.authorize(cluster, "node", &user, attributes).await
}

#[tokio::test(start_paused = true)]
async fn allowed_requests_are_cached_five_minutes_and_denied_ones_thirty_seconds() {
    let (access, cluster) = (Access::default(), Scripted::default());
    assert!(!may(&access, &cluster, "/pods").await.unwrap());
    assert_eq!(cluster.asked(), ["pods", "proxy"]);
    tokio::time::advance(Duration::from_secs(29)).await;
    assert!(!may(&access, &cluster, "/pods").await.unwrap());
    assert!(cluster.asked().is_empty(), "the denial is cached");
    cluster.allowed.lock().unwrap().push("proxy");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(may(&access, &cluster, "/pods").await.unwrap());
    assert_eq!(cluster.asked(), ["pods", "proxy"]);
    cluster.allowed.lock().unwrap().clear();
    tokio::time::advance(Duration::from_secs(299)).await;
    assert!(
        may(&access, &cluster, "/configz").await.unwrap(),
        "`proxy` is the same right on every path"
    );
    assert_eq!(cluster.asked(), ["configz"]);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(!may(&access, &cluster, "/pods").await.unwrap());
    assert_eq!(cluster.asked(), ["pods", "proxy"]);
}

async fn who(
    access: &Access,
    cluster: &Arc<Scripted>,
    token: &str,
) -> Result<User, Unauthenticated> {
    let cluster: Arc<dyn Cluster> = Arc::clone(cluster) as _;
    let token = Some(token.to_owned());
    access.authenticate(&cluster, &None, None, token).await
}

#[tokio::test(start_paused = true)]
async fn tokens_are_cached_two_minutes_known_or_not() {
    let (access, cluster) = (Access::default(), Arc::new(Scripted::default()));
    assert!(
        who(&access, &cluster, "t").await.is_err(),
        "the token is not known"
    );
    *cluster.known.lock().unwrap() = true;
    tokio::time::advance(Duration::from_secs(119)).await;
    let known = who(&access, &cluster, "t").await;
    assert!(
        known.is_err(),
        "the unknown token is cached as long as in Kubernetes"
    );
    tokio::time::advance(Duration::from_secs(1)).await;
    let user = who(&access, &cluster, "t").await.unwrap();
    assert_eq!(user.groups, ["system:authenticated"]);
    tokio::time::advance(Duration::from_secs(119)).await;
    *cluster.known.lock().unwrap() = false;
    assert_eq!(who(&access, &cluster, "t").await.unwrap(), user);
    tokio::time::advance(Duration::from_secs(1)).await;
    let withdrawn = who(&access, &cluster, "t").await;
    assert!(
        withdrawn.is_err(),
        "a withdrawn token ends within two minutes"
    );
    assert_eq!(cluster.asked(), ["t", "t", "t"]);
}

#[tokio::test]
async fn of_one_token_there_is_one_review_at_a_time() {
    let (access, cluster) = (Access::default(), Arc::new(Scripted::default()));
    *cluster.known.lock().unwrap() = true;
    let all = futures::future::join_all((0..50).map(|_| who(&access, &cluster, "t")));
    let users = all.await;
    assert!(users.iter().all(Result::is_ok), "{users:?}");
    assert_eq!(cluster.asked(), ["t"]);
    // A review that nobody waits for any more does not delay a later one.
    let left = "left".to_owned();
    drop(access.review(&(Arc::clone(&cluster) as _), [0; 32], left, Source::Local));
    *cluster.broken.lock().unwrap() = true;
    let all = futures::future::join_all((0..50).map(|_| who(&access, &cluster, "u")));
    assert!(all.await.iter().all(Result::is_err));
    assert_eq!(
        cluster.asked(),
        ["u"],
        "all requests that waited get the error"
    );
    *cluster.broken.lock().unwrap() = false;
    assert!(
        who(&access, &cluster, "u").await.is_ok(),
        "the error is not cached"
    );
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_unknown_tokens_displaces_no_known_one() {
    let (access, cluster) = (Access::default(), Arc::new(Scripted::default()));
    *cluster.known.lock().unwrap() = true;
    who(&access, &cluster, "known").await.unwrap();
    *cluster.known.lock().unwrap() = false;
    for number in 0..3 * CACHE_ENTRIES {
        let guess = who(&access, &cluster, &number.to_string()).await;
        assert!(guess.is_err());
    }
    assert!(cluster.asked().len() <= 100, "reviews are bounded");
    who(&access, &cluster, "known").await.unwrap();
    assert_eq!(cluster.asked(), Vec::<String>::new());
    assert!(access.unknown.0.lock().unwrap().len() <= CACHE_ENTRIES);
}

/// A request with this token from this address.
async fn who_at(
    access: &Access,
    cluster: &Arc<Scripted>,
    token: &str,
    address: u8,
) -> Result<User, Unauthenticated> {
    let cluster: Arc<dyn Cluster> = Arc::clone(cluster) as _;
    let slots = crate::server::connections::ConnectionSlots::own();
    let origin = Origin::Address(([10, 0, 0, address], 1).into());
    let peer = Peer {
        origin,
        certificates: Arc::new([]),
        slot: Arc::new(slots.enter(origin.into(), false).unwrap()),
    };
    let token = Some(token.to_owned());
    access
        .authenticate(&cluster, &None, Some(peer), token)
        .await
}

#[tokio::test(start_paused = true)]
async fn guesses_delay_neither_a_known_token_nor_another_address() {
    let (access, cluster) = (Access::default(), Arc::new(Scripted::default()));
    *cluster.known.lock().unwrap() = true;
    who_at(&access, &cluster, "scraper", 1).await.unwrap();
    *cluster.known.lock().unwrap() = false;
    let flood = async || {
        let mut last = None;
        for number in 0..1000 {
            last = who_at(&access, &cluster, &format!("guess {number}"), 1)
                .await
                .err();
        }
        last.unwrap()
    };
    let told = flood().await;
    assert!(told.busy, "{told}");
    assert_eq!(told.into_response().status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(cluster.asked().len() <= 21);
    // The known token's entry has expired and its address is flooded, and it is still reviewed.
    tokio::time::advance(TOKEN_TTL).await;
    flood().await;
    *cluster.known.lock().unwrap() = true;
    who_at(&access, &cluster, "scraper", 1).await.unwrap();
    // So is a token that was never seen, from another address.
    who_at(&access, &cluster, "new", 2).await.unwrap();
    // A token that was withdrawn counts as a guess from then on.
    tokio::time::advance(TOKEN_TTL).await;
    *cluster.known.lock().unwrap() = false;
    assert!(who_at(&access, &cluster, "scraper", 1).await.is_err());
    assert!(
        access
            .known
            .get(&Sha256::digest(b"scraper").into())
            .is_none()
    );
}

#[tokio::test]
async fn reviews_without_an_answer_delay_neither_a_known_token_nor_another_address() {
    let access = Access::default();
    let silent: Arc<dyn Cluster> = Arc::new(Silent);
    let begin = |token: &str, address: u8| {
        let key = Sha256::digest(token.as_bytes()).into();
        let source = Source::V4([10, 0, 0, address].into());
        access.review(&silent, key, token.to_owned(), source)
    };
    access
        .known
        .put(Sha256::digest(b"known").into(), (), KNOWN_TTL);
    let open: Vec<_> = (0..100).filter_map(|n| begin(&n.to_string(), 1)).collect();
    assert_eq!(open.len(), 8);
    assert!(begin("known", 1).is_some());
    assert!(begin("new", 2).is_some());
    drop(open);
    assert!(
        begin("100", 1).is_some(),
        "those that were given up do not count"
    );
}

/// An API server that never answers.
struct Silent;

impl Cluster for Silent {
    fn review_access(
        &self,
        _: SubjectAccessReviewSpec,
    ) -> BoxFuture<'_, Result<bool, ClusterError>> {
        std::future::pending().boxed()
    }

    fn review_token(&self, _: String) -> BoxFuture<'_, Result<Option<User>, ClusterError>> {
        std::future::pending().boxed()
    }

    fn client_ca(&self) -> BoxFuture<'_, Result<String, ClusterError>> {
        std::future::pending().boxed()
    }
}

#[tokio::test(start_paused = true)]
async fn errors_are_not_cached() {
    let (access, cluster) = (Access::default(), Scripted::default());
    *cluster.broken.lock().unwrap() = true;
    assert!(may(&access, &cluster, "/pods").await.is_err());
    *cluster.broken.lock().unwrap() = false;
    assert!(!may(&access, &cluster, "/pods").await.unwrap());
    assert_eq!(cluster.asked(), ["pods", "pods", "proxy"]);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_tokens_leaves_the_caches_bounded() {
    let (access, cluster) = (Access::default(), Arc::new(Scripted::default()));
    *cluster.known.lock().unwrap() = true;
    for number in 0..3 * CACHE_ENTRIES {
        // As fast as unknown tokens of one source are reviewed.
        tokio::time::advance(Duration::from_millis(100)).await;
        let user = who(&access, &cluster, &number.to_string()).await.unwrap();
        let attributes = authz::attributes(&Method::GET, "/stats");
        let may = access.authorize(&*cluster, "node", &user, attributes);
        assert!(!may.await.unwrap());
    }
    assert!(access.tokens.0.lock().unwrap().len() <= CACHE_ENTRIES);
    assert!(access.rights.0.lock().unwrap().len() <= CACHE_ENTRIES);
}

#[tokio::test(start_paused = true)]
async fn a_cache_forgets_in_time_and_stays_bounded() {
    let cache = Cache::default();
    cache.put(1, true, ALLOW_TTL);
    tokio::time::advance(Duration::from_secs(299)).await;
    assert_eq!(cache.get(&1), Some(true));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(cache.get(&1), None);
    for key in 0..5 * CACHE_ENTRIES {
        cache.put(key, true, ALLOW_TTL);
    }
    assert!(cache.0.lock().unwrap().len() <= CACHE_ENTRIES);
}
