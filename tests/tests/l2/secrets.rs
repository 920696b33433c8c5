//! Level 2: a Secret's value is never in a log (at any log level), in a command line, or in a file that others can read.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use knoc_tests::{
    site::{Kubelet, Options, Site, processes_naming},
    wait_for,
};
use serde_json::json;

use super::state::holding;

const SOON: Duration = Duration::from_mins(2);

const SECRET: &str = "s3cr3t-that-nobody-is-to-see";

/// Checks that only the owner can read the files that contain the value, and that no log and no command line contains it.
fn nobody_sees(site: &Site, uid: &str) -> anyhow::Result<()> {
    let values = site.jobdir(uid).join("values");
    for text in [SECRET.to_owned(), BASE64_STANDARD.encode(SECRET)] {
        for path in holding(&site.path(""), &text)? {
            ensure!(Path::new(&path).starts_with(&values), "{path} has it");
            // A file that was removed meanwhile cannot be read.
            let mode = fs::metadata(&path).map_or(0, |file| file.permissions().mode());
            ensure!(mode.trailing_zeros() >= 6, "{path}: mode {mode:o}");
        }
        let shown = processes_naming(Path::new(&text));
        ensure!(shown.is_empty(), "{shown:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_secret_is_in_no_log_no_command_line_and_no_file_of_others() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[("KNOC_LOG", "debug")]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _process = kubelet.start(&site, &[("KNOC_LOG_LEVEL", "debug")]).await?;
    let secret = json!({
        "metadata": {"name": "login"}, "type": "Opaque",
        "data": {"token": BASE64_STANDARD.encode(SECRET)},
    });
    kubelet.api.create("v1", "secrets", "default", secret)?;
    // The command does not contain the secret: it checks only the length.
    let (seen, gate) = (site.path("seen"), site.path("gate"));
    let script = format!(
        "[ ${{#TOKEN}} = {} ] && : >{} && while [ ! -e {} ]; do sleep 0.05; done",
        SECRET.len(),
        seen.display(),
        gate.display()
    );
    let uid = kubelet.create_pod(
        "secret",
        json!({"containers": [{
            "name": "main", "image": "none", "command": ["/bin/sh", "-c", script],
            "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "login", "key": "token"}}}],
        }]}),
    )?;
    wait_for("the program has the secret", SOON, async || {
        let pod = kubelet.api.get("v1", "pods", "default", "secret");
        let pod = pod.map_err(|error| error.to_string())?;
        nobody_sees(&site, &uid).map_err(|error| format!("{error:#}"))?;
        if seen.exists() {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    })
    .await
    .with_context(|| site.log())?;
    nobody_sees(&site, &uid)?;
    site.put("gate", "")?;
    kubelet.phase("secret", "Succeeded", SOON).await?;
    nobody_sees(&site, &uid)?;
    let log = fs::read_to_string(site.path("agent.log"))?;
    ensure!(log.contains("DEBUG"), "little is logged: {}", site.log());
    // The search does find values that are there.
    site.put("told", SECRET)?;
    ensure!(nobody_sees(&site, &uid).is_err(), "the search is blind");
    Ok(())
}
