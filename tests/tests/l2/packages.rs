//! The packages, built from the binaries under test: the agent's tarball, installed by an ordinary user, and the kubelet's image.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use knoc_tests::Run;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// The time to make a package, or to install one.
const BUILT: Duration = Duration::from_mins(6);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a packaging script into a fresh folder.
async fn package(script: &str) -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let mut words = script.split(' ');
    Run::new(
        root()
            .join("packaging")
            .join(words.next().unwrap_or_default()),
    )
    .args(words)
    .arg(folder.path())
    .deadline(BUILT)
    .ok()
    .await?;
    Ok(folder)
}

fn only(folder: &Path, ending: &str) -> anyhow::Result<PathBuf> {
    std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(ending))
        .with_context(|| format!("no *{ending} in {}", folder.display()))
}

#[tokio::test]
async fn the_tarball_is_reproducible_and_installs_without_root() -> anyhow::Result<()> {
    let first = package("agent/build-tarball.sh").await?;
    let again = package("agent/build-tarball.sh").await?;
    let tarball = only(first.path(), ".tar.gz")?;
    ensure!(
        std::fs::read(&tarball)? == std::fs::read(only(again.path(), ".tar.gz")?)?,
        "two runs gave different bytes"
    );
    let test = root().join("packaging/agent/test-install.sh");
    Run::new(test).arg(&tarball).deadline(BUILT).ok().await?;
    Ok(())
}

/// A blob of the layout, checked against its digest.
fn blob(layout: &Path, digest: &Value) -> anyhow::Result<Vec<u8>> {
    let digest = digest.as_str().context("a digest")?;
    let hex = digest.strip_prefix("sha256:").context("sha256")?;
    let data = std::fs::read(layout.join("blobs/sha256").join(hex))?;
    let mut found = String::new();
    for byte in Sha256::digest(&data) {
        write!(found, "{byte:02x}")?;
    }
    ensure!(found == hex, "{digest} holds {found}");
    Ok(data)
}

#[tokio::test]
async fn the_image_is_reproducible_and_runs_as_nobody() -> anyhow::Result<()> {
    let first = package("kubelet/build-image.sh").await?;
    let again = package("kubelet/build-image.sh").await?;
    let (layout, other) = (
        first.path().join("knoc-kubelet-oci"),
        again.path().join("knoc-kubelet-oci"),
    );
    let index = std::fs::read(layout.join("index.json"))?;
    ensure!(
        index == std::fs::read(other.join("index.json"))?,
        "two runs gave different images"
    );
    let index: Value = serde_json::from_slice(&index)?;
    let manifest: Value =
        serde_json::from_slice(&blob(&layout, &index["manifests"][0]["digest"])?)?;
    let config: Value = serde_json::from_slice(&blob(&layout, &manifest["config"]["digest"])?)?;
    ensure!(config["config"]["User"] == "65532:65532", "{config}");
    ensure!(
        config["config"]["Entrypoint"][0] == "/knoc-kubelet",
        "{config}"
    );
    let layer = blob(&layout, &manifest["layers"][0]["digest"])?;
    let names = Run::new("tar")
        .args(["-tzf", "-"])
        .stdin(layer)
        .ok()
        .await?
        .text();
    ensure!(names == "LICENSE\nknoc-kubelet", "{names}");
    only(first.path(), ".oci.tar")?;
    Ok(())
}

/// ssh refuses to run as a user without a line in /etc/passwd, and reaches a jump host through /bin/sh.
#[tokio::test]
async fn the_variant_with_openssh_contains_what_ssh_needs() -> anyhow::Result<()> {
    let built = package("kubelet/build-image.sh --ssh").await?;
    let layout = built.path().join("knoc-kubelet-ssh-oci");
    let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
    let entry = &index["manifests"][0];
    let manifest: Value = serde_json::from_slice(&blob(&layout, &entry["digest"])?)?;
    let tag = &entry["annotations"]["org.opencontainers.image.ref.name"];
    ensure!(
        tag.as_str().is_some_and(|tag| tag.ends_with("-ssh")),
        "{tag}"
    );
    let layer = blob(&layout, &manifest["layers"][1]["digest"])?;
    let tar = |arguments: &[&str]| Run::new("tar").args(arguments).stdin(layer.clone());
    let names = tar(&["-tzf", "-"]).ok().await?.text();
    for name in ["usr/bin/ssh", "bin/sh", "etc/nsswitch.conf"] {
        ensure!(names.lines().any(|found| found == name), "{name}: {names}");
    }
    ensure!(
        names.contains("libcrypto") && names.contains("/copyright"),
        "{names}"
    );
    let passwd = tar(&["-xzOf", "-", "etc/passwd"]).ok().await?.text();
    ensure!(passwd.starts_with("nonroot:x:65532:65532:"), "{passwd}");
    only(built.path(), "-ssh.oci.tar")?;
    Ok(())
}
