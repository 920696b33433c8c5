//! The client of a node with renewed certificates, against a server that answers which user it sees; and a server with
//! a certificate of its own.

use std::sync::Arc;

use knoc_link::pki::CertifiedKey;
use tokio::sync::watch;

use super::harness::*;
use crate::identity;

fn certified(pair: &Pair) -> Arc<CertifiedKey> {
    Arc::new(CertifiedKey {
        cert_pem: pair.certificate.clone(),
        key_pem: pair.key.clone(),
    })
}

/// The server's answer to this client.
async fn said(client: &kube::Client) -> String {
    let request = http::Request::get("/pods").body(Vec::new()).unwrap();
    match client.request_text(request).await {
        Ok(text) => text,
        Err(error) => knoc_proto::error::chain(&error),
    }
}

#[tokio::test]
async fn a_new_client_certificate_counts_from_the_next_request_on() {
    let fixture = Fixture::new(FakeBackend::default(), FakeCluster::default()).await;
    let url = format!("https://{}", fixture.address);
    let mut base = kube::Config::new(url.parse().unwrap());
    let (_, root) = x509_parser::pem::parse_x509_pem(fixture.ca.pem.as_bytes()).unwrap();
    base.root_cert = Some(vec![root.contents]);
    let (newest, pairs) = watch::channel(None);
    let client = identity::client(&base, pairs);
    let text = said(&client).await;
    assert!(text.contains("no client certificate yet"), "{text}");
    for name in ["system:node:one", "system:node:two"] {
        let pair = fixture.ca.client(name, &["system:nodes"]);
        newest.send_replace(Some(certified(&pair)));
        let text = said(&client).await;
        assert!(text.contains(&format!("user={name}")), "{text}");
    }
    // A certificate that cannot be used changes nothing.
    let bad = Pair {
        certificate: "none".to_owned(),
        key: "none".to_owned(),
    };
    newest.send_replace(Some(certified(&bad)));
    let text = said(&client).await;
    assert!(text.contains("user=system:node:two"), "{text}");
}

#[tokio::test]
async fn a_certificate_of_its_own_is_swapped_as_soon_as_there_is_a_newer_one() {
    let ca = TestCa::new("cluster");
    let (newest, pairs) = watch::channel(Some(certified(&ca.server())));
    let cluster = FakeCluster {
        ca: Some(ca.pem.clone()).into(),
        ..FakeCluster::default()
    };
    let fixture = Fixture::with_own(ca, pairs, cluster).await;
    let identity = fixture.master();
    let before = fixture.connect(Some(&identity)).await.served_by;
    let mut open = fixture.connect(Some(&identity)).await;
    newest.send_replace(Some(certified(&fixture.ca.server())));
    let wait = async {
        while fixture.connect(Some(&identity)).await.served_by == before {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "the server still has the old certificate");
    assert_eq!(open.get("/healthz").await.0, 200, "open connections stay");
}

#[tokio::test]
async fn the_ca_of_the_cluster_counts_from_when_it_is_known_and_changes() {
    let ca = TestCa::new("cluster");
    let (_newest, pairs) = watch::channel(Some(certified(&ca.server())));
    let fixture = Fixture::with_own(ca, pairs, FakeCluster::default()).await;
    let next = TestCa::new("next");
    let (old, new) = (
        fixture.master(),
        next.client("kube-apiserver", &["system:masters"]),
    );
    let mut open = fixture.connect(Some(&old)).await;
    assert_eq!(open.get("/healthz").await.0, 401, "no CA is known yet");
    for (pem, taken, refused) in [(&fixture.ca.pem, &old, &new), (&next.pem, &new, &old)] {
        *fixture.cluster.ca.lock().unwrap() = Some(pem.clone());
        let mut client = fixture.connect(Some(taken)).await;
        let wait = async {
            while client.get("/healthz").await.0 != 200 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, wait).await;
        assert!(waited.is_ok(), "the CA is not used");
        let mut other = fixture.connect(Some(refused)).await;
        assert_eq!(other.get("/healthz").await.0, 401);
    }
    // While the cluster does not answer, the last CA stays.
    *fixture.cluster.ca.lock().unwrap() = None;
    let mut client = fixture.connect(Some(&new)).await;
    assert_eq!(client.get("/healthz").await.0, 200);
}
