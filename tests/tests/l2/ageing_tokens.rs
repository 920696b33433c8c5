//! Level 2: tokens of service accounts that live for seconds, from the fake API server to the file that programs read. Without a
//! container runtime nothing is mounted, so the programs read the volume where the shim has it.
//!
//! These tests wait for longest. Tests begin in the order of their names, and the others fill the time of these.

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use knoc_tests::{
    site::{Daemon, Kubelet, Options, Site},
    wait_for,
};
use serde_json::json;

use crate::egress::{SOON, log};

/// How many seconds tokens live. They are renewed after 37 to 48 seconds, so a machine that is busy has 12 seconds to bring the new one.
const LIFE: i64 = 60;

/// Reads the token of the volume again and again until it has had so many of them, and says which they are, or that one has
/// expired. Between two looks the file is replaced together with its folder, so it may be missing for a moment.
const READER: &str = r#"
import os, sys, time
scratch, wanted = sys.argv[1], int(sys.argv[2])
places = [os.path.join(base, name, "secrets/v0/token") for name in os.listdir(scratch) for base in ("/dev/shm", scratch)]
found = [place for place in places if os.path.exists(place)]
seen = set()
while found and len(seen) < wanted:
    try:
        with open(found[0]) as file: token = file.read()
    except FileNotFoundError:
        continue
    number, expires = token.split("-")[-3::2]
    left = int(expires) / 1000 - time.time()
    if left <= 0:
        print("expired", number, flush=True)
        break
    if number not in seen:
        seen.add(number)
        print("token", number, "with", round(left, 1), "s left", flush=True)
    time.sleep(0.05)
if not found: print("nothing at", places, flush=True)
print("end", flush=True)
"#;

/// A site whose jobs begin with `prelude`, and a kubelet of a cluster whose tokens live for [`LIFE`].
async fn start(prelude: &str) -> anyhow::Result<(Site, Kubelet, [Daemon; 2])> {
    let options = Options {
        prelude: prelude.to_owned(),
        tables: "[values]\nmemory_fallback = \"disk\"".to_owned(),
        ..Options::default()
    };
    let (site, agent, _) = Site::start(options).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    kubelet.api.token_life(LIFE);
    let process = kubelet.start(&site, &[]).await?;
    Ok((site, kubelet, [agent, process]))
}

/// Creates a pod that reads so many tokens; returns its uid.
fn reader(site: &Site, kubelet: &Kubelet, tokens: u32) -> anyhow::Result<String> {
    let scratch = site.path("scratch").display().to_string();
    let argv = json!(["python3", "-c", READER, scratch, tokens.to_string()]);
    let source = json!({"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}});
    kubelet.create_pod(
        "reader",
        json!({
            "containers": [{"name": "main", "image": "none", "command": argv}],
            "volumes": [{"name": "token", "projected": {"sources": [source]}}],
        }),
    )
}

#[tokio::test]
async fn a_running_pod_has_a_new_token_before_the_old_one_expires() -> anyhow::Result<()> {
    let (site, kubelet, _running) = start("").await?;
    let uid = reader(&site, &kubelet, 2)?;
    let log = log(&site, &uid).await.with_context(|| site.log())?;
    let issued = kubelet.api.tokens_issued();
    ensure!(
        log.matches("token ").count() == 2 && !log.contains("expired"),
        "{log}{issued:?}"
    );
    Ok(())
}

/// As in a queue, the job is submitted with the first token and begins long after.
#[tokio::test]
async fn a_pod_that_waited_for_longer_than_a_token_lives_starts_with_a_fresh_one()
-> anyhow::Result<()> {
    let gate = "while [ ! -e \"$HOME/gate\" ]; do sleep 0.05; done\n";
    let (site, kubelet, _running) = start(gate).await?;
    let uid = reader(&site, &kubelet, 1)?;
    wait_for("the first token has expired", SOON, async || {
        let issued = kubelet.api.tokens_issued();
        let first = issued.first().context("there is none")?;
        ensure!(first.expires <= Timestamp::now(), "{issued:?}");
        Ok::<_, anyhow::Error>(())
    })
    .await?;
    let begun = std::fs::read_dir(site.path("scratch"))?.count();
    ensure!(begun == 0, "the job did not wait");
    site.put("gate", "")?;
    let log = log(&site, &uid).await.with_context(|| site.log())?;
    let issued = kubelet.api.tokens_issued();
    ensure!(
        log.matches("token ").count() == 1 && !log.contains("token 0 ") && !log.contains("expired"),
        "{log}{issued:?}"
    );
    Ok(())
}
