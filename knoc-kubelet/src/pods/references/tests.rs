use http::{Request, Response};
use http_body_util::Full;
use kube::client::Body;

use super::*;

mod bundles;

fn uid(name: &str) -> PodUid {
    name.parse().unwrap()
}

fn named(name: &str) -> Name {
    Name {
        namespace: "ns".to_owned(),
        name: name.to_owned(),
    }
}

fn key(name: &str) -> Key {
    Key::ConfigMap(named(name))
}

fn read(objects: &[(&str, Option<&str>)]) -> BTreeMap<Key, Version> {
    let objects = objects.iter();
    let one = |(name, version): &(&str, Option<&str>)| (key(name), version.map(str::to_owned));
    objects.map(one).collect()
}

#[test]
fn only_a_version_that_was_not_read_is_a_change() {
    let references = References::default();
    let (a, b) = (uid("a"), uid("b"));
    let level = references.level();
    references.follow(&a, read(&[("one", Some("7")), ("two", None)]));
    let observe = |name, version: Option<&str>| {
        let version = version.map(str::to_owned);
        let mut state = references.state();
        let incarnation = state.objects[&key(name)].incarnation;
        state.observe((&key(name), incarnation), version)
    };
    assert!(observe("one", Some("7")).is_empty(), "what was read");
    assert!(observe("two", None).is_empty());
    assert_eq!(references.changed_since(&a, level), None);
    let only_a = std::slice::from_ref(&a);
    assert_eq!(observe("two", Some("9")), only_a, "it appears");
    assert!(references.changed_since(&a, level).is_some());
    let level = references.level();
    references.follow(&b, read(&[("two", Some("9"))]));
    assert_eq!(references.changed_since(&b, level), None);
    assert_eq!(observe("two", Some("10")).len(), 2);
    assert!(references.changed_since(&b, level).is_some());
    assert!(references.changed_since(&b, references.level()).is_none());
    let level = references.level();
    assert_eq!(references.state().doubt((&key("one"), 1)), only_a);
    assert!(references.changed_since(&a, level).is_some());
}

#[test]
fn an_object_is_watched_as_long_as_a_pod_refers_to_it() {
    let references = References::default();
    let (a, b) = (uid("a"), uid("b"));
    references.follow(&a, read(&[("one", None), ("two", None)]));
    references.follow(&b, read(&[("one", None)]));
    let wanted = || {
        let wanted = references.wanted(&HashMap::new()).into_keys();
        wanted.collect::<HashSet<_>>()
    };
    assert_eq!(wanted(), HashSet::from([key("one"), key("two")]));
    references.follow(&a, read(&[("one", None)]));
    assert_eq!(wanted(), HashSet::from([key("one")]));
    references.forget(&a);
    assert_eq!(wanted(), HashSet::from([key("one")]));
    references.forget(&b);
    assert!(wanted().is_empty());
    assert!(references.state().pods.is_empty());
}

/// A watch that missed events meanwhile is not taken for the watch of an object that is followed again.
#[test]
fn an_object_that_is_released_and_followed_again_gets_a_new_watch() {
    let references = References::default();
    let a = uid("a");
    references.follow(&a, read(&[("one", Some("1"))]));
    let first = references.wanted(&HashMap::new())[&key("one")];
    references.state().set_watched((&key("one"), first), true);
    references.forget(&a);
    let lost = references
        .state()
        .observe((&key("one"), first), Some("2".to_owned()));
    assert!(lost.is_empty(), "nobody follows it");
    references.follow(&a, read(&[("one", Some("1"))]));
    let second = references.wanted(&HashMap::new())[&key("one")];
    assert_ne!(first, second);
    references.state().set_watched((&key("one"), first), true);
    assert!(!references.all_watched(&a), "the old watch does not count");
    let observe = |incarnation| {
        let version = Some("2".to_owned());
        references
            .state()
            .observe((&key("one"), incarnation), version)
    };
    assert!(observe(first).is_empty());
    assert_eq!(observe(second), [a]);
}

#[test]
fn the_number_of_watches_is_bounded() {
    let references = References::default();
    for number in 0..WATCHES + 10 {
        let name = format!("map-{number}");
        let uid = uid(&format!("pod-{number}"));
        references.follow(&uid, read(&[(name.as_str(), None)]));
        let incarnation = u64::try_from(number).unwrap() + 1;
        let watched = number < 5;
        references
            .state()
            .set_watched((&key(&name), incarnation), watched);
    }
    assert_eq!(references.wanted(&HashMap::new()).len(), WATCHES);
    assert!(references.all_watched(&uid("pod-4")));
    assert!(!references.all_watched(&uid("pod-5")), "it is read again");
    assert!(references.all_watched(&uid("none")));
}

/// With `rbac.watchSecrets: false` of the chart every watch of a Secret is denied, and changes of ConfigMaps still arrive at
/// once.
#[test]
fn watches_that_are_denied_keep_no_other_from_being_opened() {
    let references = References::default();
    let follow = |name: &str| {
        let uid = uid(&format!("pod-{name}"));
        references.follow(&uid, read(&[(name, Some("1"))]));
    };
    for number in 0..WATCHES {
        follow(&format!("denied-{number}"));
    }
    for (key, incarnation) in references.wanted(&HashMap::new()) {
        references.denied((&key, incarnation));
    }
    assert_eq!(references.wanted(&HashMap::new()).len(), WATCHES);
    for number in 0..WATCHES {
        follow(&format!("other-{number}"));
    }
    let wanted = references.wanted(&HashMap::new());
    assert_eq!(wanted.len(), WATCHES);
    let all_others = wanted
        .keys()
        .all(|key| matches!(key, Key::ConfigMap(of) if of.name.starts_with("other")));
    assert!(all_others, "{wanted:?}");
    // A watch that is open after all is like any other.
    let one = key("denied-0");
    let incarnation = references.state().objects[&one].incarnation;
    references.state().set_watched((&one, incarnation), true);
    assert!(!references.state().objects[&one].denied);
}

#[tokio::test]
async fn a_watch_is_opened_although_all_others_were_denied() {
    let (service, mut requests) =
        tower_test::mock::pair::<Request<Body>, Response<Full<bytes::Bytes>>>();
    let references = References::default();
    let secret = |number: usize| Key::Secret(named(&format!("secret-{number}")));
    let secrets = (0..WATCHES).map(|number| (secret(number), None));
    references.follow(&uid("a"), secrets.collect());
    let mut tasks = JoinSet::new();
    let client = Client::new(service, "default");
    let stop = CancellationToken::new();
    tasks.spawn(references.clone().run(client, Queue::default(), stop));
    let denial = r#"{"kind": "Status", "status": "Failure", "code": 403, "reason": "Forbidden"}"#;
    for _ in 0..WATCHES {
        let (request, send) = requests.next_request().await.unwrap();
        let path = request.uri().path();
        assert!(path.ends_with("/secrets"), "{path}");
        let denied = Response::builder().status(403);
        send.send_response(denied.body(Full::from(denial)).unwrap());
    }
    references.follow(&uid("b"), read(&[("one", None)]));
    let opened = tokio::time::timeout(Duration::from_secs(30), requests.next_request()).await;
    let (request, _) = opened.expect("a watch").unwrap();
    let path = request.uri().path();
    assert!(path.ends_with("/configmaps"), "{path}");
}
