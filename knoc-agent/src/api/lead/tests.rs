use knoc_link::{Origin, PeerCertificate, pki::Ca};
use proptest::prelude::*;
use rustls_pki_types::{CertificateDer, pem::PemObject as _};

use super::*;

const NOW: i64 = 1_795_000_000;

/// A peer that has proved this identity over TLS.
pub(in crate::api) fn tls(identity: Identity) -> Peer {
    let pair = Ca::generate("ca").unwrap().issue(&identity, &[]).unwrap();
    let der = CertificateDer::from_pem_slice(pair.cert_pem.as_bytes()).unwrap();
    Peer::Tls {
        identity,
        origin: Origin::ThisHost,
        certificate: PeerCertificate::of(Some(&[der])).unwrap(),
    }
}

fn kubelet_of(name: &str) -> Peer {
    tls(Identity::Kubelet { name: name.into() })
}

fn unix() -> Peer {
    Peer::Unix { uid: 1, pid: None }
}

fn shim() -> Peer {
    Peer::Pinned {
        spki: "00".into(),
        origin: Origin::ThisHost,
    }
}

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn judged(peer: &Peer, node: &str, epoch: i64) -> Result<Option<String>, String> {
    let nodes = [("gpu".to_owned(), "kubelet/a".to_owned())].into();
    let claim = Claim { node, epoch };
    judge(Some(peer), claim, &nodes, now()).map_err(|denied| {
        assert_eq!(denied.reason, ErrorReason::LeadershipDenied);
        denied.message
    })
}

#[test]
fn only_the_kubelet_of_a_node_claims_it() {
    let ctl = tls(Identity::Ctl { name: "a".into() });
    for peer in [&ctl, &unix(), &kubelet_of("a"), &shim()] {
        assert_eq!(judged(peer, "a", 0), Ok(None), "no claim");
    }
    for peer in [&ctl, &unix(), &shim()] {
        let denied = judged(peer, "a", 5).unwrap_err();
        assert!(denied.contains("cannot claim leadership"), "{denied}");
    }
    assert_eq!(judged(&kubelet_of("a"), "a", 5), Ok(Some("a".into())));
    assert_eq!(judged(&kubelet_of("a"), "", 5), Ok(Some("a".into())));
    assert_eq!(judged(&kubelet_of("a"), "gpu", 5), Ok(Some("gpu".into())));
    let denied = judged(&kubelet_of("b"), "a", 5).unwrap_err();
    assert!(denied.contains("\"a\" = \"kubelet/b\""), "{denied}");
    judged(&kubelet_of("b"), "gpu", 5).unwrap_err();
}

#[test]
fn an_epoch_ahead_of_the_clock_is_denied_with_both_times() {
    let peer = kubelet_of("a");
    judged(&peer, "a", NOW + EPOCH_AHEAD).unwrap();
    let denied = judged(&peer, "a", NOW + EPOCH_AHEAD + 1).unwrap_err();
    for part in ["301 s ahead", "compare the clocks", "knoc-kubelet-a"] {
        assert!(denied.contains(part), "{denied}");
    }
    judged(&peer, "a", i64::MAX).unwrap_err();
    judged(&peer, "a", -1).unwrap_err();
    judged(&peer, "a", i64::MIN).unwrap_err();
}

proptest! {
    /// For any peer and any claim: an accepted claim is for the kubelet's own node or one assigned
    /// to it, and is at most minutes ahead.
    #[test]
    fn nothing_else_is_ever_accepted(name in "[a-c]", node in "[a-c]|gpu|", epoch in any::<i64>()) {
        if let Ok(Some(led)) = judged(&kubelet_of(&name), &node, epoch) {
            prop_assert!(led == name || (led == "gpu" && name == "a"));
            prop_assert!(epoch > 0 && epoch <= NOW + EPOCH_AHEAD);
        }
    }
}
