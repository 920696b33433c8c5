use jiff::SignedDuration;
use knoc_link::{Identity, pki::Ca};

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

#[test]
fn a_due_renewal_does_not_wait() {
    assert_eq!(before(at(5), at(3)), Some(Duration::from_secs(2)));
    assert_eq!(before(at(5), at(5)), None);
    assert_eq!(before(at(5), at(9)), None);
}

struct Bundle {
    folder: tempfile::TempDir,
    ca: Ca,
}

impl Bundle {
    fn new() -> Self {
        let bundle = Self {
            folder: tempfile::tempdir().unwrap(),
            ca: Ca::generate("ca").unwrap(),
        };
        bundle.issue();
        bundle
    }

    /// Writes a new bundle, half of whose lifetime is over.
    fn issue(&self) {
        let now = Timestamp::now();
        let hour = SignedDuration::from_hours(1);
        let dates = Validity {
            from: now - hour * 2,
            until: now + hour,
        };
        let who = Identity::Kubelet { name: "k".into() };
        let pair = self.ca.issue_for(&who, &[], dates).unwrap();
        for (name, text) in [
            ("ca.crt", self.ca.cert_pem()),
            ("tls.crt", &pair.cert_pem),
            ("tls.key", &pair.key_pem),
        ] {
            #[expect(clippy::disallowed_methods, reason = "a file of the test")]
            std::fs::write(self.folder.path().join(name), text).unwrap();
        }
    }

    fn credentials(&self) -> Credentials {
        let [ca, cert, key] =
            ["ca.crt", "tls.crt", "tls.key"].map(|name| self.folder.path().join(name));
        Credentials::from_files(ca, cert, key).unwrap()
    }

    fn renewed(&self, credentials: &Credentials) -> CertifiedKey {
        let request = Request::generate("k").unwrap();
        let held = credentials.info();
        let cert_pem = self.ca.renew(&held, &request.der, Timestamp::now());
        CertifiedKey {
            cert_pem: cert_pem.unwrap(),
            key_pem: request.key_pem,
        }
    }
}

#[tokio::test]
async fn a_kept_pair_counts_until_another_bundle_is_mounted() {
    let bundle = Bundle::new();
    let keep = Keep::Folder(bundle.folder.path().to_owned());
    let pair = bundle.renewed(&bundle.credentials());
    keep.put_link_pair(&pair).await.unwrap();
    // The kubelet starts again.
    let credentials = bundle.credentials();
    let mounted = credentials.info();
    restore(&credentials, &keep).await;
    let renewed = credentials.info();
    assert!(renewed.validity.until > mounted.validity.until);
    assert_eq!(renewed.ancestors[0].spki, mounted.spki);
    // Another bundle is mounted, as after a theft of the key: it counts at once, and at the next start.
    bundle.issue();
    credentials.reread().unwrap();
    let now = credentials.info();
    assert!(now.ancestors.is_empty() && now.spki != mounted.spki);
    let credentials = bundle.credentials();
    restore(&credentials, &keep).await;
    assert_eq!(credentials.info().spki, now.spki);
}

/// A kubelet that waits for leadership reads the pair when it starts, and again when it leads.
#[tokio::test]
async fn a_pair_that_another_kubelet_has_renewed_meanwhile_is_used() {
    let bundle = Bundle::new();
    let keep = Keep::Folder(bundle.folder.path().to_owned());
    let (waits, leads) = (bundle.credentials(), bundle.credentials());
    restore(&waits, &keep).await;
    let pair = bundle.renewed(&leads);
    assert!(leads.renew(&pair).unwrap());
    keep.put_link_pair(&pair).await.unwrap();
    assert_ne!(waits.info().spki, leads.info().spki);
    restore(&waits, &keep).await;
    assert_eq!(waits.info().spki, leads.info().spki);
}

#[tokio::test]
async fn a_pair_of_another_ca_or_identity_is_not_used() {
    let (bundle, other) = (Bundle::new(), Bundle::new());
    let credentials = bundle.credentials();
    let foreign = other.renewed(&other.credentials());
    assert!(!credentials.would_renew(&foreign).unwrap());
    // The other CA signs a renewal of our certificate.
    let forged = other.renewed(&credentials);
    assert!(!credentials.renew(&forged).unwrap());
    let mut mixed = bundle.renewed(&credentials);
    mixed.key_pem = foreign.key_pem;
    assert!(credentials.renew(&mixed).is_err(), "another key");
    assert!(credentials.info().ancestors.is_empty());
}
