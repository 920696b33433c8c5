//! When certificates are renewed, and what is requested.

use jiff::SignedDuration;
use proptest::prelude::*;
use x509_parser::{
    certification_request::X509CertificationRequest, extensions::ParsedExtension,
    prelude::FromDer as _,
};

use super::*;
use crate::certs::{
    authority::{self, object},
    plan::{Facts, Step, Why, is_valid, renew_at, step},
    request,
};

fn facts(from: i64, life: i64, lot: u16) -> Facts {
    let from = Timestamp::from_second(from).unwrap();
    Facts {
        from,
        until: from
            .saturating_add(SignedDuration::from_secs(life))
            .unwrap(),
        common_name: "system:node:knoc-site".to_owned(),
        organizations: vec!["system:nodes".to_owned()],
        names: addresses(),
        lot,
    }
}

proptest! {
    #[test]
    fn renewal_is_between_70_and_90_percent_of_any_life(
        from in 0i64..4_000_000_000, life in 1i64..1_000_000_000, lot in 0u16..1000,
    ) {
        let facts = facts(from, life, lot);
        let at = renew_at(&facts).duration_since(facts.from).as_secs_f64();
        let life = facts.until.duration_since(facts.from).as_secs_f64();
        prop_assert!(at >= 0.7 * life - 1e-3 && at <= 0.9 * life + 1e-3, "{at} of {life}");
    }

    #[test]
    fn a_certificate_is_kept_until_its_time_and_never_used_past_its_end(
        from in 0i64..4_000_000_000, life in -10i64..1_000_000_000, lot in 0u16..1000, at in 0i64..8_000_000_000,
    ) {
        let facts = facts(from, life, lot);
        let now = Timestamp::from_second(at).unwrap();
        let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
        match step(Some(&facts), &wanted, now) {
            Step::Keep(until) => {
                prop_assert!(is_valid(&facts, now) && now < until && until <= facts.until);
                prop_assert!(matches!(step(Some(&facts), &wanted, until), Step::Obtain(_)));
            }
            Step::Obtain(Why::Due) => prop_assert!(is_valid(&facts, now) && renew_at(&facts) <= now),
            Step::Obtain(Why::Expired) => prop_assert!(!is_valid(&facts, now)),
            Step::Obtain(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn any_kept_text_is_a_pair_or_none(text in "\\PC{0,200}") {
        let pair = CertifiedKey { cert_pem: text.clone(), key_pem: text };
        prop_assert!(Facts::of(&pair).is_err());
    }
}

#[test]
fn other_names_or_another_node_want_another_certificate() {
    let now = Timestamp::from_second(500).unwrap();
    let facts = facts(0, 1000, 0);
    for (node, names) in [
        ("knoc-site", vec!["10.0.0.8"]),
        ("knoc-site", vec![]),
        ("knoc-site", vec!["10.0.0.7", "node.example.org"]),
        ("knoc-other", vec!["10.0.0.7"]),
    ] {
        let mut wanted = wanted(Purpose::Serving, &names);
        wanted.node = node.to_owned();
        let decided = step(Some(&facts), &wanted, now);
        assert_eq!(decided, Step::Obtain(Why::Other), "{wanted:?}");
    }
    let same = wanted(Purpose::Serving, &["10.0.0.7"]);
    assert!(matches!(step(Some(&facts), &same, now), Step::Keep(_)));
    assert_eq!(step(None, &same, now), Step::Obtain(Why::None));
}

/// What the signers of Kubernetes require of a request, see [Kubernetes
/// signers](https://kubernetes.io/docs/reference/access-authn-authz/certificate-signing-requests/#kubernetes-signers).
#[test]
fn requests_are_as_the_signers_take_them() {
    let cases: [(Purpose, &[&str], &[&str]); 2] = [
        (
            Purpose::Serving,
            &["10.0.0.7", "fd00::7", "node.example.org"],
            &["digital signature", "server auth"],
        ),
        (Purpose::Client, &[], &["digital signature", "client auth"]),
    ];
    for (purpose, names, usages) in cases {
        let wanted = wanted(purpose, names);
        let made = request::request(&wanted, &request::key().unwrap()).unwrap();
        assert!(made.pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
        let (_, pem) = x509_parser::pem::parse_x509_pem(made.pem.as_bytes()).unwrap();
        let (_, parsed) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = parsed.certification_request_info.subject.to_string();
        assert_eq!(subject, "O=system:nodes, CN=system:node:knoc-site");
        let extensions: Vec<_> = parsed
            .requested_extensions()
            .into_iter()
            .flatten()
            .collect();
        match &extensions[..] {
            [] => assert!(names.is_empty()),
            [ParsedExtension::SubjectAlternativeName(alternatives)] => {
                assert_eq!(alternatives.general_names.len(), names.len());
            }
            others => panic!("{others:?}"),
        }
        let object = object(&made);
        assert_eq!(object.spec.usages.as_deref().unwrap(), usages);
        assert_eq!(object.spec.signer_name, purpose.signer());
    }
}

#[test]
fn a_requests_name_follows_from_key_and_contents() {
    let (key, other) = (request::key().unwrap(), request::key().unwrap());
    let serving = wanted(Purpose::Serving, &["10.0.0.7"]);
    let name = |wanted: &Wanted, key: &str| request::request(wanted, key).unwrap().name;
    assert_eq!(name(&serving, &key), name(&serving, &key));
    let others = [
        name(&serving, &other),
        name(&wanted(Purpose::Serving, &["10.0.0.8"]), &key),
        name(&wanted(Purpose::Client, &[]), &key),
    ];
    for other in &others {
        assert_ne!(&name(&serving, &key), other);
    }
    let mut long = serving;
    long.node = "n.".repeat(126);
    let name = name(&long, &key);
    assert!(name.len() <= 253 && !name.contains(".-"), "{name}");
}

#[test]
fn a_name_that_a_certificate_cannot_hold_is_rejected() {
    let wanted = wanted(Purpose::Serving, &["n\u{e4}me"]);
    let error = request::request(&wanted, &request::key().unwrap()).unwrap_err();
    assert!(error.to_string().contains("n\u{e4}me"), "{error}");
}

#[test]
fn what_became_of_a_request_is_read_from_its_conditions() {
    let with = |status: serde_json::Value| {
        let object = serde_json::json!({"metadata": {}, "spec": {"request": "", "signerName": ""}, "status": status});
        authority::answer(&serde_json::from_value(object).unwrap())
    };
    let condition = |kind: &str| serde_json::json!({"conditions": [{"type": kind, "status": "True", "reason": "R", "message": "m"}]});
    assert_eq!(with(serde_json::json!({})), Answer::Waiting);
    assert_eq!(with(condition("Approved")), Answer::Waiting);
    let rejected = |kind: &str| Answer::Rejected(format!("{kind}: R: m"));
    assert_eq!(with(condition("Denied")), rejected("Denied"));
    assert_eq!(with(condition("Failed")), rejected("Failed"));
    let mut issued = condition("Approved");
    issued["certificate"] = "UEVN".into();
    assert_eq!(with(issued), Answer::Issued("PEM".to_owned()));
}

#[test]
fn conditions_say_what_to_do() {
    let until: Timestamp = "2027-01-01T00:00:00Z".parse().unwrap();
    assert_eq!(Health::Starting.condition(), None);
    let request = "knoc-serving-n-1".to_owned();
    let waiting = |until| {
        Health::Waiting {
            request: request.clone(),
            until,
        }
        .condition()
        .unwrap()
    };
    let (status, reason, text) = waiting(None);
    assert_eq!((status, reason), ("False", "AwaitingApproval"));
    assert!(
        text.contains("kubectl certificate approve knoc-serving-n-1"),
        "{text}"
    );
    let (status, _, text) = waiting(Some(until));
    assert_eq!(status, "True", "the old certificate is valid");
    assert!(text.contains("2027-01-01"), "{text}");
    let message = "Denied: no".to_owned();
    let (status, reason, text) = Health::Failing {
        message,
        until: None,
    }
    .condition()
    .unwrap();
    assert_eq!((status, reason), ("False", "RenewalFailed"));
    assert!(text.contains("Denied: no"), "{text}");
}
