use super::*;

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn kubelet() -> Identity {
    Identity::Kubelet {
        name: "knoc-1".into(),
    }
}

#[test]
fn an_issued_certificate_says_who_it_is() {
    let ca = Ca::generate("site a").unwrap();
    let pair = ca
        .issue(&kubelet(), &["login.example".into(), "10.0.0.1".into()])
        .unwrap();
    let info = inspect(&der(&pair.cert_pem)).unwrap();
    assert_eq!(info.identity.unwrap(), kubelet());
    assert!(info.issuer.contains("site a"), "{}", info.issuer);
    let parsed_der = der(&pair.cert_pem);
    let parsed = parse(&parsed_der).unwrap();
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth);
    let now = Timestamp::now();
    assert!(info.validity.from < now - Duration::from_secs(200));
    assert!(info.validity.until > now + Duration::from_hours(300 * 24));
}

#[test]
fn a_ca_is_read_back_from_pem() {
    let ca = Ca::generate("site").unwrap();
    let again = Ca::from_pem(ca.cert_pem(), &ca.key_pem()).unwrap();
    let pair = again.issue(&kubelet(), &[]).unwrap();
    assert_eq!(identity(&der(&pair.cert_pem)).unwrap(), kubelet());
}

#[test]
fn invalid_names_are_rejected_by_name() {
    let ca = Ca::generate("site").unwrap();
    let error = ca.issue(&kubelet(), &["bäd".into()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"bäd\" cannot be a subject alternative name: it is neither a DNS name nor an IP address"
    );
}

#[test]
fn the_pin_belongs_to_the_key() {
    let (one, two) = (self_signed("a").unwrap(), self_signed("a").unwrap());
    let pin = spki_sha256_of_pem(&one.cert_pem).unwrap();
    assert_eq!(pin.len(), 64);
    assert_eq!(pin, spki_sha256(&der(&one.cert_pem)).unwrap());
    assert_ne!(pin, spki_sha256_of_pem(&two.cert_pem).unwrap());
    identity(&der(&one.cert_pem)).unwrap_err();
}

#[test]
fn keys_do_not_show_in_debug() {
    let pair = self_signed("a").unwrap();
    assert!(!format!("{pair:?}").contains("PRIVATE"));
}
