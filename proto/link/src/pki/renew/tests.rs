use proptest::prelude::*;
use rcgen::{CertificateParams, PKCS_ECDSA_P384_SHA384};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::*;
use crate::Identity;
use crate::pki::inspect;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn kubelet() -> Identity {
    Identity::Kubelet { name: "k".into() }
}

fn info(pem: &str) -> CertificateInfo {
    inspect(&CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap()
}

fn ca() -> Ca {
    let validity = Validity::starting(at(0), super::super::CA_LIFE);
    Ca::generate_for("ca", validity).unwrap()
}

fn held(ca: &Ca, life: Duration) -> CertificateInfo {
    let pair = ca.issue_for(
        &kubelet(),
        &["localhost".into()],
        Validity::starting(at(0), life),
    );
    info(&pair.unwrap().cert_pem)
}

#[test]
fn a_renewal_has_the_same_identity_no_other_name_and_the_same_life() {
    let ca = ca();
    let day = Duration::from_hours(24);
    let held = held(&ca, day);
    let request = Request::generate("k").unwrap();
    let now = at(70 * 864);
    let new = info(&ca.renew(&held, &request.der, now).unwrap());
    assert_eq!(new.identity, Ok(kubelet()));
    assert_eq!(new.validity, Validity::starting(now, day));
    assert_ne!(new.spki, held.spki);
    let parent = Ancestor {
        serial: held.serial.clone(),
        spki: held.spki.clone(),
    };
    assert_eq!(new.ancestors, std::slice::from_ref(&parent));
    // The next renewal names both.
    let next = ca.renew(&new, &Request::generate("k").unwrap().der, at(145 * 864));
    let next = info(&next.unwrap());
    assert_eq!(next.ancestors[0], parent);
    assert_eq!(next.ancestors[1].spki, new.spki);
}

/// Everything in a request but its key is ignored.
#[test]
fn a_request_widens_nothing() {
    let ca = ca();
    let held = held(&ca, LEAF_LIFE * 5);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    params.distinguished_name = common_name("agent");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let uri = "spiffe://knoc/agent/site".try_into().unwrap();
    params.subject_alt_names.push(SanType::URI(uri));
    // rcgen does not accept a request for a CA certificate; the other attributes stay.
    params.is_ca = rcgen::IsCa::NoCa;
    let request = params.serialize_request(&key).unwrap();
    let early = ca.renew(&held, request.der(), at(4 * 365 * 86_400));
    assert!(matches!(early, Err(RenewError::Early { .. })));
    let now = at((5 * 365 - 100) * 86_400);
    let pem = ca.renew(&held, request.der(), now).unwrap();
    let new = info(&pem);
    assert_eq!(new.identity, Ok(kubelet()));
    assert_eq!(new.validity.until, Validity::starting(now, LEAF_LIFE).until);
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let parsed = super::super::parse(&der).unwrap();
    assert!(!parsed.is_ca());
    assert!(!parsed.subject().to_string().contains("agent"));
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 2, "identity and ancestor");
    let usage = parsed.key_usage().unwrap().unwrap();
    assert!(usage.value.digital_signature() && !usage.value.key_cert_sign());
}

#[test]
fn invalid_requests_are_rejected_by_name() {
    let ca = ca();
    let held = held(&ca, LEAF_LIFE);
    let now = at(300 * 86_400);
    let message = |request: &[u8]| ca.renew(&held, request, now).unwrap_err().to_string();
    assert!(message(b"nonsense").contains("signing request"));
    assert!(message(&[0; 5000]).contains("5000 bytes"));
    let other = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let request = CertificateParams::default().serialize_request(&other);
    assert!(message(request.unwrap().der()).contains("P-256"));
    // Signed by another key: the last byte of the signature differs.
    let mut forged = Request::generate("k").unwrap().der;
    *forged.last_mut().unwrap() ^= 1;
    assert!(message(&forged).contains("signing request"));
    let request = Request::generate("k").unwrap().der;
    let early = ca.renew(&held, &request, at(100)).unwrap_err();
    assert!(matches!(early, RenewError::Early { .. }), "{early}");
    let mut often = held.clone();
    let one = Ancestor {
        serial: "1".into(),
        spki: "2".into(),
    };
    often.ancestors = vec![one; MAX_ANCESTORS];
    let often = ca.renew(&often, &request, now).unwrap_err();
    assert!(matches!(often, RenewError::Often), "{often}");
}

#[test]
fn no_certificate_outlives_its_ca() {
    let ca = Ca::generate_for("ca", Validity::starting(at(0), Duration::from_secs(1000))).unwrap();
    let held = held(&ca, Duration::from_mins(15));
    let request = Request::generate("k").unwrap().der;
    let new = info(&ca.renew(&held, &request, at(700)).unwrap());
    assert_eq!(new.validity.until, at(1000));
    let error = ca.renew(&new, &request, at(999)).unwrap_err();
    assert!(matches!(error, RenewError::CaEnds { .. }), "{error}");
}

#[test]
fn the_certificate_of_a_key_is_found_in_a_bundle() {
    let (old, new) = (ca(), ca());
    let bundle = format!("{}{}", old.cert_pem(), new.cert_pem());
    let found = Ca::from_bundle(&bundle, &new.key_pem()).unwrap();
    let text = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    assert_eq!(text(found.cert_pem()), text(new.cert_pem()));
    let foreign = Ca::from_bundle(old.cert_pem(), &new.key_pem()).unwrap_err();
    assert!(matches!(foreign, PkiError::ForeignKey));
}

proptest! {
    /// For any validity period: first the certificate may be renewed, then it is due, then it ends.
    #[test]
    fn dates_are_in_order(life in 1_u64..=400 * 86_400) {
        let validity = Validity::starting(at(0), Duration::from_secs(life));
        let (may, due) = (renewable(validity), due(validity));
        prop_assert!(validity.from <= may && may <= due && due <= validity.until);
        prop_assert!(is_expiring(validity, validity.until));
        let month = validity.until.saturating_sub(WARN_BEFORE).unwrap();
        let before = month.saturating_sub(SignedDuration::from_secs(1)).unwrap();
        prop_assert!(!is_expiring(validity, before));
    }
}
