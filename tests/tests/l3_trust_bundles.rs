//! Trust anchors on the real stack: what a projected volume shows of `ClusterTrustBundles` follows their changes.
//!
//! The API server of the test bed has them since `testbed/kube/start.sh` turns them on: a control plane that was started by an older one
//! has to be started again.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use knoc_tests::{PodBuilder, World, wait_for, world::SOON};
use rcgen::{CertificateParams, DnType, KeyPair};
use serde_json::{Value, json};

/// How long a change at the API server may take to reach a container.
const LIVE: Duration = Duration::from_secs(5);
/// How many changes are made until one is in time. A busy machine may delay some of them; a kubelet that does not watch the bundles is
/// late with nearly all.
const TRIES: usize = 5;
const SIGNER: &str = "example.com/knoc-test";
const KIND: &str = "clustertrustbundles.certificates.k8s.io";

/// A certificate authority that nobody uses.
fn authority(name: &str) -> anyhow::Result<String> {
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params.self_signed(&KeyPair::generate()?)?.pem())
}

/// The certificate without what surrounds it, on one line.
fn body(pem: &str) -> String {
    let lines = pem.lines().filter(|line| !line.starts_with('-'));
    lines.map(str::trim).collect()
}

/// The bundles of one test, and the pod that shows them.
struct Trust {
    world: World,
    uid: String,
}

impl Trust {
    /// A bundle with a name only.
    fn named(world: &World) -> String {
        world.namespace.clone()
    }

    /// A bundle of the signer.
    fn signed(world: &World, which: &str) -> String {
        format!("example.com:knoc-test:{}-{which}", world.namespace)
    }

    async fn apply(world: &World, name: &str, pem: &str) -> anyhow::Result<()> {
        let mut spec = json!({"trustBundle": pem});
        if name.contains(':') {
            spec["signerName"] = json!(SIGNER);
        }
        let bundle = json!({
            "apiVersion": "certificates.k8s.io/v1beta1", "kind": "ClusterTrustBundle",
            "metadata": {"name": name, "labels": {"knoc-test": world.namespace}}, "spec": spec,
        });
        let applied = world
            .kubectl(["apply", "-f", "-"])
            .stdin(bundle.to_string());
        let applied = applied.ok().await.map(drop);
        applied.context("create a ClusterTrustBundle; was the control plane started by this version of the test bed?")
    }

    async fn delete(world: &World, name: &str) -> anyhow::Result<()> {
        world.kubectl(["delete", KIND, name]).ok().await.map(drop)
    }

    /// Waits until the file has these certificates and no others.
    async fn shows(&self, file: &str, pems: &[&str]) -> anyhow::Result<()> {
        let script = format!("cat /trust/{file}.pem");
        let wanted: Vec<_> = pems.iter().map(|pem| body(pem)).collect();
        wait_for(&format!("the certificates of {file}"), SOON, async || {
            let shown = self.world.exec(&self.uid, "main", ["sh", "-c", &script]);
            let shown = shown.ok().await?.text();
            let count = shown.matches("BEGIN CERTIFICATE").count();
            let shown = shown.replace('\n', "");
            let all = wanted.iter().all(|one| shown.contains(one.as_str()));
            ensure!(
                all && count == wanted.len(),
                "{count} certificates: {shown}"
            );
            Ok(())
        })
        .await
    }

    /// Makes one change after the other until one arrives in time; `change` returns the certificates that the file has then.
    async fn in_time(
        &self,
        file: &str,
        change: impl AsyncFn(usize) -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<()> {
        let mut times = Vec::new();
        for number in 0..TRIES {
            let wanted = change(number).await?;
            let began = Instant::now();
            let wanted: Vec<_> = wanted.iter().map(String::as_str).collect();
            self.shows(file, &wanted).await?;
            times.push(began.elapsed());
            if began.elapsed() <= LIVE {
                return Ok(());
            }
        }
        anyhow::bail!("none of the changes of {file} arrived within {LIVE:?}: {times:?}")
    }
}

/// What selects the bundles: a name, and a signer with a label.
fn sources(world: &World) -> Value {
    let labels = json!({"matchLabels": {"knoc-test": world.namespace}});
    json!([
        {"clusterTrustBundle": {"name": Trust::named(world), "path": "named.pem"}},
        {"clusterTrustBundle": {"signerName": SIGNER, "labelSelector": labels, "path": "signed.pem"}},
    ])
}

#[tokio::test]
async fn a_changed_trust_bundle_reaches_the_container_within_five_seconds() -> anyhow::Result<()> {
    let world = World::new("trust").await?;
    let (named, first) = (Trust::named(&world), Trust::signed(&world, "first"));
    let second = Trust::signed(&world, "second");
    let (one, kept) = (authority("one")?, authority("kept")?);
    Trust::apply(&world, &named, &one).await?;
    Trust::apply(&world, &first, &kept).await?;
    let volume = json!([{"name": "trust", "projected": {"sources": sources(&world)}}]);
    let pod = PodBuilder::new("trusts").spec("volumes", volume);
    let pod = pod.set(
        "volumeMounts",
        json!([{"name": "trust", "mountPath": "/trust"}]),
    );
    let uid = world.running(&pod.sh("sleep 600")).await?;
    let trust = Trust { world, uid };
    trust.shows("named", &[&one]).await?;
    trust.shows("signed", &[&kept]).await?;

    let world = &trust.world;
    trust
        .in_time("named", async |number| {
            let next = authority(&format!("next {number}"))?;
            Trust::apply(world, &named, &next).await?;
            Ok(vec![next])
        })
        .await?;
    // A further bundle of the signer appears, and is gone again.
    trust
        .in_time("signed", async |number| {
            let more = authority(&format!("more {number}"))?;
            Trust::apply(world, &second, &more).await?;
            Ok(vec![kept.clone(), more])
        })
        .await?;
    Trust::delete(world, &second).await?;
    trust.shows("signed", &[&kept]).await?;

    for name in [&named, &first] {
        Trust::delete(world, name).await?;
    }
    trust.world.finish().await
}
