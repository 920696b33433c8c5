//! A log follow and a command are open while the certificates of kubelet and agent rotate, and while the kubelet's control connection is cut
//! for a minute. The test runs alone: it restarts the agent and the kubelet, and changes the network that all tests share.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, Secret};
use knoc_link::pki::{Ca, CertifiedKey, Validity, due, inspect_pem, names_of_pem};
use knoc_tests::{Background, PodBuilder, World, stays, wait_for, world::SOON};
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// How long the control connection is cut.
const CUT: Duration = Duration::from_mins(1);

/// When the certificates are due: once the streams are open.
const DUE_IN: SignedDuration = SignedDuration::from_secs(45);

/// The kubelet looks once a minute at least, the agent every ten seconds.
const ROTATED: Duration = Duration::from_mins(3);

/// The agent's port for kubelets, and the network of its peers.
const PORT: &str = "10350";
const HOST: &str = "10.77.0.0/24";

/// Ten lines a second, more than fit into the test.
const COUNT: &str =
    "i=0; while [ $i -lt 9000 ]; do i=$((i+1)); echo line $i; sleep 0.1; done; sleep 600";

/// The certificate of one side, as files on this host.
struct Pair {
    cert: PathBuf,
    key: PathBuf,
}

impl Pair {
    fn read(&self) -> anyhow::Result<String> {
        std::fs::read_to_string(&self.cert).with_context(|| self.cert.display().to_string())
    }

    /// Replaces the pair by one with the same names that is due soon.
    fn nearly_due(&self, ca: &Ca) -> anyhow::Result<()> {
        let held = self.read()?;
        let info = inspect_pem(&held)?;
        let names = names_of_pem(&held)?;
        let life = SignedDuration::from_hours(1000);
        let now = Timestamp::now();
        let of = |from: Timestamp| -> anyhow::Result<Validity> {
            let until = from.checked_add(life)?;
            Ok(Validity { from, until })
        };
        // As much earlier as it takes to be due then.
        let early = due(of(now)?).duration_since(now) - DUE_IN;
        let validity = of(now.checked_sub(early)?)?;
        let identity = info.identity.context("the certificate has no identity")?;
        let CertifiedKey { cert_pem, key_pem } = ca.issue_for(&identity, &names, validity)?;
        self.write([&key_pem, &cert_pem])
    }

    /// Replaces key and certificate in place, with owner and mode as they are.
    fn write(&self, texts: [&str; 2]) -> anyhow::Result<()> {
        for (path, text) in [&self.key, &self.cert].into_iter().zip(texts) {
            #[expect(clippy::disallowed_methods, reason = "a file of the test bed")]
            std::fs::write(path, text).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// The files of the test bed.
struct Files {
    kubelet: Pair,
    agent: Pair,
    ca: Ca,
}

impl Files {
    fn of_the_bed() -> anyhow::Result<Self> {
        let variable =
            |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
        let run = Path::new(&variable("KNOC_BED")?).join("run/kubelet");
        let home = Path::new(&variable("HPC_PREFIX")?).join("shared/home/hpcuser");
        let tls = home.join(".config/knoc/tls");
        let read = |name: &str| {
            let path = tls.join(name);
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        Ok(Self {
            kubelet: Pair {
                cert: run.join("agent-tls.crt"),
                key: run.join("agent-tls.key"),
            },
            agent: Pair {
                cert: tls.join("agent.crt"),
                key: tls.join("agent.key"),
            },
            ca: Ca::from_bundle(&read("ca.crt")?, &read("ca.key")?)?,
        })
    }
}

/// The ports of the host from which connections to the agent are open.
async fn connections(world: &World) -> anyhow::Result<BTreeSet<String>> {
    let list = ["ss", "-Htn", "state", "established", "sport", "=", ":10350"];
    let list = world.on_as_root("login", list).ok().await?.text();
    let peers = list
        .lines()
        .filter_map(|line| line.split_whitespace().last());
    let ports = peers.filter_map(|peer| peer.rsplit_once(':'));
    Ok(ports.map(|(_, port)| port.to_owned()).collect())
}

/// The connections of a kubelet that has found the agent that was just started. The node's condition does not say so: for a
/// moment it is still about the agent before.
async fn control(world: &World) -> anyhow::Result<BTreeSet<String>> {
    wait_for("the kubelet has connected again", SOON, async || {
        let open = connections(world).await?;
        ensure!(!open.is_empty(), "no connection to the agent");
        anyhow::Ok(open)
    })
    .await
}

/// A rule of the login node's routing table for what leaves the agent's port: added or deleted.
async fn rule(world: &World, action: &str, rest: &[&str]) -> anyhow::Result<()> {
    let mut words = vec![
        "ip", "rule", action, "to", HOST, "ipproto", "tcp", "sport", PORT,
    ];
    words.extend(rest);
    let run = world.on_as_root("login", ["env"]).args(words);
    run.ok().await?;
    Ok(())
}

/// A command in the pod that repeats what it is told, over one stream that stays open.
struct Echo {
    input: Box<dyn AsyncWrite + Unpin>,
    output: Box<dyn AsyncRead + Unpin>,
    _process: AttachedProcess,
}

impl Echo {
    async fn start(world: &World) -> anyhow::Result<Self> {
        let how = AttachParams::default().stdin(true).stderr(false);
        let mut process = world.api::<Pod>().exec("counter", ["cat"], &how).await?;
        Ok(Self {
            input: Box::new(process.stdin().context("no input")?),
            output: Box::new(process.stdout().context("no output")?),
            _process: process,
        })
    }

    async fn repeats(&mut self, word: &str) -> anyhow::Result<()> {
        self.input.write_all(word.as_bytes()).await?;
        self.input.flush().await?;
        let mut heard = vec![0; word.len()];
        let reading = tokio::time::timeout(SOON, self.output.read_exact(&mut heard));
        let read = reading
            .await
            .with_context(|| format!("no answer to {word}"))?;
        read.with_context(|| format!("the command has ended before {word}"))?;
        ensure!(heard == word.as_bytes(), "{heard:?}");
        Ok(())
    }
}

/// Checks that the follower has every line once, in order; returns how many.
fn lines(shown: &str) -> anyhow::Result<usize> {
    let whole = shown.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut last = 0;
    for line in whole.lines() {
        ensure!(
            line == format!("line {}", last + 1),
            "{line:?} after {last}"
        );
        last += 1;
    }
    Ok(last)
}

/// The pair that the kubelet renewed, in its Secret.
async fn kept(world: &World) -> anyhow::Result<Option<Vec<u8>>> {
    let secret = world.api_in::<Secret>("knoc-system");
    let data = secret.get("knoc-kubelet-keys").await?.data;
    Ok(data.unwrap_or_default().remove("link.pem").map(|pem| pem.0))
}

#[tokio::test]
async fn a_log_and_a_command_go_on_while_certificates_rotate_and_control_is_cut()
-> anyhow::Result<()> {
    let world = World::new("cut-control").await?;
    let files = Files::of_the_bed()?;
    let (cert, key) = (
        files.agent.read()?,
        std::fs::read_to_string(&files.agent.key)?,
    );
    let rotated = rotated_and_cut(&world, &files).await;
    // The agent has the certificate of its site again; the kubelet reads its bundle from the cluster when it starts.
    for (script, action) in [("kubelet.sh", "down"), ("agent.sh", "down")] {
        world.service(script, action).ok().await?;
    }
    files.agent.write([&key, &cert])?;
    for script in ["agent.sh", "kubelet.sh"] {
        world.service(script, "up").ok().await?;
    }
    rotated?;
    world.finish().await
}

/// Gives both sides new certificates that are due soon; they read them when they connect again. Returns what the agent and
/// the kubelet's Secret have then.
async fn connect_with_nearly_due_pairs(
    world: &World,
    files: &Files,
) -> anyhow::Result<(String, Option<Vec<u8>>)> {
    world.service("agent.sh", "down").ok().await?;
    files.agent.nearly_due(&files.ca)?;
    files.kubelet.nearly_due(&files.ca)?;
    let before = (files.agent.read()?, kept(world).await?);
    world.service("agent.sh", "up").ok().await?;
    world.wait_node_condition("AgentConnected", "True").await?;
    Ok(before)
}

/// Waits until the agent and the kubelet's Secret have other certificates than `before`.
async fn both_renewed(
    world: &World,
    files: &Files,
    (agent_before, kept_before): &(String, Option<Vec<u8>>),
) -> anyhow::Result<()> {
    wait_for("both certificates are renewed", ROTATED, async || {
        let (agent, kept) = (files.agent.read()?, kept(world).await?);
        ensure!(agent != *agent_before, "the agent's is as before");
        ensure!(
            kept.is_some() && kept != *kept_before,
            "the kubelet's is as before"
        );
        anyhow::Ok(())
    })
    .await
}

async fn rotated_and_cut(world: &World, files: &Files) -> anyhow::Result<()> {
    world.running(&PodBuilder::new("counter").sh(COUNT)).await?;
    let before = connect_with_nearly_due_pairs(world, files).await?;
    let control = control(world).await?;

    let mut echo = wait_for("a command repeats what it is told", SOON, async || {
        let mut echo = Echo::start(world).await?;
        echo.repeats("before").await?;
        anyhow::Ok(echo)
    })
    .await?;
    let log = Background::start(world.kubectl(["logs", "-f", "counter"]))?;
    let bulk: Vec<String> = connections(world)
        .await?
        .difference(&control)
        .cloned()
        .collect();
    ensure!(
        !bulk.is_empty(),
        "streams have no connection of their own: {control:?}"
    );

    both_renewed(world, files, &before).await?;
    echo.repeats("rotated").await?;
    let rotated = lines(&log.shown())?;

    let cut = without_control(world, &bulk, async || {
        stays("the log has every line once", CUT, async || {
            lines(&log.shown()).map(drop)
        })
        .await?;
        world.wait_node_condition("AgentConnected", "False").await?;
        world.wait_node_condition("Ready", "True").await?;
        echo.repeats("cut").await?;
        wait_for("the log has gone on", SOON, async || {
            let now = lines(&log.shown())?;
            ensure!(now > rotated + 60, "{now} lines, {rotated} before the cut");
            Ok(())
        })
        .await
    });
    cut.await?;
    let during = lines(&log.shown())?;
    world.wait_node_condition("AgentConnected", "True").await?;
    echo.repeats("after").await?;
    wait_for("the log goes on", SOON, async || {
        let now = lines(&log.shown())?;
        ensure!(
            now > during + 20,
            "{now} lines, {during} at the end of the cut"
        );
        anyhow::Ok(())
    })
    .await?;
    drop((echo, log));
    Ok(())
}

/// Runs `meanwhile` while nothing of the link passes but the connection of the streams.
async fn without_control(
    world: &World,
    bulk: &[String],
    meanwhile: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let rules = |action: &'static str| async move {
        for port in bulk {
            let passes = ["dport", port, "priority", "8", "lookup", "main"];
            rule(world, action, &passes).await?;
        }
        rule(world, action, &["priority", "9", "prohibit"]).await
    };
    rules("add").await?;
    let seen = meanwhile().await;
    rules("del").await?;
    seen
}
