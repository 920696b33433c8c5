use std::time::Duration;

use jiff::SignedDuration;
use knoc_link::{
    Credentials,
    pki::{Ca, Validity},
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::now() + SignedDuration::from_secs(seconds)
}

fn kubelet() -> Identity {
    Identity::Kubelet { name: "k".into() }
}

fn shown(pem: &str) -> PeerCertificate {
    PeerCertificate::of(Some(&[
        CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
    ]))
    .unwrap()
}

fn trust(ca: &Ca) -> Trust {
    let pair = ca.issue(&kubelet(), &[]).unwrap();
    let credentials = Credentials::from_pem(ca.cert_pem(), &pair.cert_pem, &pair.key_pem);
    credentials.unwrap().trust().unwrap()
}

fn certificate(ca: &Ca, life: u64) -> PeerCertificate {
    let dates = Validity::starting(Timestamp::now(), Duration::from_secs(life));
    shown(&ca.issue_for(&kubelet(), &[], dates).unwrap().cert_pem)
}

fn rules(ca: &Ca, clients: &[&str], denied: &[&str]) -> Rules {
    let list = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    let policy = Policy {
        clients: list(clients),
        denied: list(denied),
        ..Policy::default()
    };
    Rules::new(&policy, Some(trust(ca)))
}

#[test]
fn each_rule_denies_by_its_own_name() {
    let (ca, other) = (Ca::generate("ca").unwrap(), Ca::generate("other").unwrap());
    let held = certificate(&ca, 100);
    let key = format!("sha256/{}", held.info().spki);
    let serial = format!("serial/{}", held.info().serial);
    let none = Renewals::default();
    let judge = |rules: &Rules, now| rules.judge(&kubelet(), &held, &none, now);
    judge(&rules(&ca, &[], &[]), at(0)).unwrap();
    judge(&rules(&ca, &["kubelet/*"], &["kubelet/k2"]), at(0)).unwrap();
    let message = |rules: &Rules, now| judge(rules, now).unwrap_err().to_string();
    assert!(message(&rules(&ca, &["ctl/*"], &[]), at(0)).contains("policy.clients"));
    for entry in [key.as_str(), &serial, "kubelet/k", "kubelet/*"] {
        let text = message(&rules(&ca, &[], &["ctl/x", entry]), at(0));
        assert!(
            text.contains("policy.denied") && text.contains(entry),
            "{text}"
        );
    }
    assert!(message(&rules(&other, &[], &[]), at(0)).contains("trusted now"));
    assert!(message(&rules(&ca, &[], &[]), at(200)).contains("expired"));
    assert!(message(&rules(&ca, &[], &[]), at(-400)).contains("compare the clocks"));
    assert!(message(&Rules::default(), at(0)).contains("no CA"));
}

#[test]
fn a_renewed_certificate_serves_what_it_opened_until_the_renewal_ends() {
    let ca = Ca::generate("ca").unwrap();
    let held = certificate(&ca, 100);
    let mut renewals = Renewals::default();
    renewals.note([held.info().spki.as_str()], at(500), at(0));
    let judge = |rules: &Rules, renewals: &Renewals, now| {
        rules.judge(&kubelet(), &held, renewals, now).is_ok()
    };
    let served = rules(&ca, &[], &[]);
    assert!(judge(&served, &renewals, at(200)));
    assert!(!judge(&served, &Renewals::default(), at(200)));
    assert!(!judge(&served, &renewals, at(501)));
    // A renewal does not bypass the other rules.
    let serial = format!("serial/{}", held.info().serial);
    assert!(!judge(&rules(&ca, &[], &[&serial]), &renewals, at(200)));
    let other = Ca::generate("other").unwrap();
    assert!(!judge(&rules(&other, &[], &[]), &renewals, at(200)));
}

#[test]
fn renewals_are_bounded_and_forget_what_has_ended() {
    let mut renewals = Renewals::default();
    for number in 0..MAX_RENEWALS + 9 {
        renewals.note([number.to_string().as_str()], at(100), at(0));
    }
    assert_eq!(renewals.0.len(), MAX_RENEWALS);
    renewals.note(["new"], at(300), at(200));
    assert_eq!(renewals.0.len(), 1);
}
