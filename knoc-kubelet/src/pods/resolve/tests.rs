//! What is fetched, how often, and how much at once.

use futures::FutureExt as _;
use http::{Request, Response};
use jiff::SignedDuration;
use knoc_translate::TrustBundleKey;
use kube::client::Body;

use super::*;

const NOON: Timestamp = Timestamp::constant(1_800_000_000, 0);

fn at(seconds: i64) -> Timestamp {
    NOON + SignedDuration::from_secs(seconds)
}

/// How many seconds after its issue a token with this life is renewed.
fn renewed_after(life: i64, early: i64) -> i64 {
    renewal(NOON, at(life), early)
        .duration_since(NOON)
        .as_secs()
}

#[test]
fn a_token_is_renewed_after_most_of_its_life_or_after_a_day() {
    for (life, early, expected) in [
        (3607, 0, 2885),
        (3607, TOKEN_EARLY, 2875),
        (600, 0, 480),
        // A day, although it lives for ten.
        (864_000, 0, 86_400),
        (864_000, TOKEN_EARLY, 86_390),
        // What is subtracted is at most a quarter, so that a short life is not used up by it.
        (20, TOKEN_EARLY, 12),
        (10, TOKEN_EARLY, 6),
        // A token that has expired already, or is about to, is renewed at once, never in the past.
        (1, TOKEN_EARLY, 0),
        (0, TOKEN_EARLY, 0),
        (-3600, TOKEN_EARLY, 0),
    ] {
        assert_eq!(renewed_after(life, early), expected, "{life} {early}");
    }
}

#[test]
fn a_token_of_any_life_is_renewed_before_it_expires_and_within_a_day() {
    let lives = (0..7_200).chain((7_200..5_000_000).step_by(997));
    for life in lives {
        for early in [0, 1, TOKEN_EARLY / 2, TOKEN_EARLY] {
            let after = renewed_after(life, early);
            let most = (life * 4 / 5).min(TOKEN_AGE);
            // Less by the early seconds, at most a quarter, and by one that is rounded.
            let least = (most - most / 4).max(most - early) - 1;
            assert!((least..=most).contains(&after), "{life} {early}: {after}");
            assert!(after < life || life == 0, "{life} {early}: {after}");
        }
    }
}

/// The date of the expiry is by the clock of the API server, the time of the issue by that of the kubelet.
#[test]
fn a_clock_that_is_wrong_by_less_than_a_quarter_of_the_life_renews_in_time() {
    let life = 3600;
    for wrong in [-899, -60, 0, 60, 899] {
        // In seconds of the API server since the issue, where the kubelet's clock shows `wrong` more.
        let after = renewal(at(wrong), at(life), 0).duration_since(at(wrong));
        assert!((1..life).contains(&after.as_secs()), "{wrong}: {after:?}");
    }
}

#[test]
fn tokens_are_requested_that_were_never_issued_or_are_due() {
    let ask = |expiration| TokenRequestKey {
        audience: String::new(),
        expiration,
    };
    let kept = |renew_at| CachedToken {
        token: Token {
            token: "token".to_owned(),
            expires: at(1000),
        },
        renew_at,
    };
    let needs = Needs {
        tokens: vec![ask(1), ask(2), ask(3)],
        ..Needs::default()
    };
    let tokens = Tokens::from([(ask(1), kept(at(10))), (ask(2), kept(at(20)))]);
    assert_eq!(renew_at(&Tokens::new()), None);
    assert_eq!(renew_at(&tokens), Some(at(10)));
    assert_eq!(due(&needs, &tokens, at(9)), [ask(3)]);
    assert_eq!(due(&needs, &tokens, at(10)), [ask(1), ask(3)]);
    assert_eq!(due(&needs, &tokens, at(20)), needs.tokens);
}

fn not_found() -> Response<Body> {
    let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
        "reason": "NotFound", "message": "m", "metadata": {}});
    let body = Body::from(serde_json::to_vec(&status).unwrap());
    Response::builder().status(404).body(body).unwrap()
}

/// Answers each request that there is no such object, once all of its group have come.
async fn deny(
    server: &mut tower_test::mock::Handle<Request<Body>, Response<Body>>,
    mut left: usize,
) {
    while left > 0 {
        let mut group = Vec::new();
        for _ in 0..left.min(AT_ONCE) {
            let (_, send) = server.next_request().await.unwrap();
            group.push(send);
        }
        assert!(server.next_request().now_or_never().is_none());
        left -= group.len();
        for send in group {
            send.send_response(not_found());
        }
    }
}

#[tokio::test]
async fn very_many_objects_are_fetched_in_groups() {
    let (service, mut server) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let client = Client::new(service, "default");
    let names: Vec<String> = (0..150).map(|n| format!("m{n}")).collect();
    let found = get_all::<ConfigMap>(&client, "configmap", "ns", &names, |_, _| Ok(()));
    let (found, ()) = tokio::join!(found, deny(&mut server, names.len()));
    assert!(found.unwrap().is_empty());
}

#[tokio::test]
async fn many_pods_do_not_read_more_at_once_than_one_that_is_large() {
    let (service, mut server) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let client = Client::new(service, "default");
    let names: Vec<String> = (0..AT_ONCE).map(|n| format!("m{n}")).collect();
    let one = || get_all::<ConfigMap>(&client, "configmap", "ns", &names, |_, _| Ok(()));
    let pods = join_all([one(), one(), one(), one()]);
    let answers = async {
        let mut left = 4 * AT_ONCE;
        while left > 0 {
            let mut group = vec![server.next_request().await.unwrap()];
            // The clients of all pods run in between.
            for _ in 0..200 {
                tokio::task::yield_now().await;
                group.extend(server.next_request().now_or_never().flatten());
            }
            assert!(group.len() <= room::READS, "{} at once", group.len());
            left -= group.len();
            for (_, send) in group {
                send.send_response(not_found());
            }
        }
    };
    let (found, ()) = tokio::join!(pods, answers);
    assert!(found.into_iter().all(|found| found.unwrap().is_empty()));
}

#[test]
fn immutable_objects_are_watched_as_long_as_the_pod_lacks_something() {
    let needs = Needs {
        config_maps: ["fixed", "free", "missing", "kube-root-ca.crt"]
            .map(str::to_owned)
            .into(),
        secrets: ["fixed", "free"].map(str::to_owned).into(),
        ..Needs::default()
    };
    let immutable = |name: &str| (name == "fixed").then_some(true);
    let map = |name: &str| {
        let map = ConfigMap {
            immutable: immutable(name),
            ..ConfigMap::default()
        };
        (name.to_owned(), map)
    };
    let secret = |name: &str| {
        let secret = Secret {
            immutable: immutable(name),
            ..Secret::default()
        };
        (name.to_owned(), secret)
    };
    let resolved = Resolved {
        config_maps: ["fixed", "free", "kube-root-ca.crt"].map(map).into(),
        secrets: ["fixed", "free"].map(secret).into(),
        ..Resolved::default()
    };
    let names = |complete: bool| {
        let none = trust::AllFound::new();
        let all = versions("default", &needs, &resolved, &none, complete);
        let (mut maps, mut secrets) = (Vec::new(), Vec::new());
        for key in all.into_keys() {
            match key {
                Key::ConfigMap(of) => maps.push(of.name),
                Key::Secret(of) => secrets.push(of.name),
                Key::TrustBundles(_) => panic!("the pod has no trust bundle"),
            }
        }
        (maps.join(" "), secrets.join(" "))
    };
    let as_text = |maps: &str, secrets: &str| (maps.to_owned(), secrets.to_owned());
    assert_eq!(names(true), as_text("free missing", "free"));
    assert_eq!(names(false), as_text("fixed free missing", "fixed free"));
}

#[test]
fn a_projection_of_trust_bundles_is_watched_if_it_can_select_any() {
    let named = TrustBundleKey::Named("site".to_owned());
    let signed = |labels: Option<&str>| TrustBundleKey::Signed {
        signer: "example.com/signer".to_owned(),
        labels: labels.map(str::to_owned),
    };
    let needs = Needs {
        trust_bundles: vec![named.clone(), signed(Some("")), signed(None)],
        ..Needs::default()
    };
    let found = trust::Found {
        certificates: String::new(),
        version: Some("7".to_owned()),
    };
    let found = trust::AllFound::from([(named.clone(), found)]);
    let watched = versions("default", &needs, &Resolved::default(), &found, true);
    let expected = [
        (Key::TrustBundles(named), Some("7".to_owned())),
        (Key::TrustBundles(signed(Some(""))), None),
    ];
    assert_eq!(watched, BTreeMap::from(expected));
}
