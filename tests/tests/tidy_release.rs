//! What `make release` collects. The test needs cargo, git and the static binaries: those of `KNOC_BIN`, else of `make build`.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use knoc_tests::{Run, guide::root};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

/// Where `make build` puts the binaries.
fn built() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root().join("target"), PathBuf::from);
    target.join("x86_64-unknown-linux-musl/release")
}

/// The names and contents of the files of a folder.
fn contents(folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let entries = std::fs::read_dir(folder)?;
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        anyhow::Ok((name, std::fs::read(entry.path())?))
    };
    entries.map(file).collect()
}

#[tokio::test]
async fn a_release_is_complete_and_reproducible_and_lists_what_is_in_it() -> anyhow::Result<()> {
    let bin = std::env::var_os("KNOC_BIN").map_or_else(built, PathBuf::from);
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    for folder in &folders {
        Run::new(root().join("packaging/release.sh"))
            .env("KNOC_BIN", &bin)
            .arg(folder.path().join("release"))
            .deadline(std::time::Duration::from_mins(5))
            .ok()
            .await?;
    }
    let [first, again] = folders.map(|folder| contents(&folder.path().join("release")));
    let (first, again) = (first?, again?);
    let names: Vec<_> = first.keys().map(String::as_str).collect();
    ensure!(first == again, "two runs gave different bytes: {names:?}");
    for ending in [
        "-x86_64-linux.tar.gz",
        ".oci.tar",
        "-ssh.oci.tar",
        ".tgz",
        ".cdx.json",
        "CHANGES.md",
        "THIRD-PARTY-LICENSES.txt",
    ] {
        ensure!(
            names.iter().any(|name| name.ends_with(ending)),
            "no {ending}: {names:?}"
        );
    }
    let text = |name: &str| -> anyhow::Result<String> {
        let found = first.iter().find(|(file, _)| file.ends_with(name));
        let (_, bytes) = found.with_context(|| format!("no {name}"))?;
        Ok(String::from_utf8(bytes.clone())?)
    };
    let sums = text("SHA256SUMS")?;
    for (name, bytes) in first.iter().filter(|(name, _)| *name != "SHA256SUMS") {
        let mut digest = String::new();
        for byte in Sha256::digest(bytes) {
            write!(digest, "{byte:02x}")?;
        }
        ensure!(
            sums.contains(&format!("{digest}  {name}")),
            "{name}: {sums}"
        );
    }
    let list: Value = serde_json::from_str(&text(".cdx.json")?)?;
    let crates = list["components"].as_array().context("components")?;
    let rustls = crates.iter().find(|one| one["name"] == "rustls");
    let rustls = rustls.context("rustls is not listed")?;
    ensure!(
        rustls["licenses"][0]["expression"].is_string()
            && rustls["hashes"][0]["content"].is_string(),
        "{rustls}"
    );
    // What only tests use is not in the programs.
    ensure!(crates.iter().all(|one| one["name"] != "proptest"));
    ensure!(text("THIRD-PARTY-LICENSES.txt")?.contains("rustls "));
    Ok(())
}
