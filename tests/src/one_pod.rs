//! What every way to the agent, and every way from the agent to the jobs, must carry: one pod with its log, commands with input
//! and an exit code, copies in both directions, a forwarded port, and a deletion with a grace period.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::{
    Background, Forward, PodBuilder, World,
    ports::some_port,
    world::{SOON, exit_code},
};

/// How long a command may take whose link has to be opened first.
const MINUTES: Duration = Duration::from_mins(3);

/// Says what it was told and how long it took; the pod's grace period is longer.
const POLITE: &str =
    "trap 'sleep 2; echo told; exit 3' TERM; while :; do echo tick; sleep 0.2; done";

/// The grace period of the deletion, in seconds.
const GRACE: u32 = 40;

/// The size of the file that is copied.
const COPIED: usize = 3 << 20;

/// A running pod that prints lines and serves an echo port, and its followed log.
#[derive(Debug)]
pub struct OnePod {
    uid: String,
    port: u16,
    log: Background,
}

impl OnePod {
    /// Starts the pod, follows its log and waits for the first lines.
    pub async fn start(world: &World) -> anyhow::Result<Self> {
        let port = some_port();
        let script = format!("nc -ll -p {port} -e cat & {POLITE}");
        let uid = world
            .running(&PodBuilder::new("talker").sh(&script))
            .await?;
        let mut log = Background::start(world.kubectl(["logs", "-f", "talker"]))?;
        log.expect("tick\ntick\n").await?;
        Ok(Self { uid, port, log })
    }

    /// A command with input and an exit code, copies there and back, and a forwarded port.
    pub async fn streams(&self, world: &World) -> anyhow::Result<()> {
        self.exec(world).await?;
        self.copies(world).await?;
        self.forward(world).await
    }

    /// A command with input and an exit code.
    pub async fn exec(&self, world: &World) -> anyhow::Result<()> {
        let shell = ["exec", "-i", "talker", "--", "sh", "-c", "cat; exit 7"];
        let run = world.kubectl(shell).stdin("there\n").deadline(MINUTES);
        let answer = run.output().await?;
        ensure!(answer.text().trim() == "there", "{answer}");
        ensure!(answer.to_string().contains("exit code 7"), "{answer}");
        Ok(())
    }

    /// A forwarded port.
    pub async fn forward(&self, world: &World) -> anyhow::Result<()> {
        world.wait_listens("talker", "main", self.port).await?;
        let forward = world.kubectl(["port-forward", "talker", &format!(":{}", self.port)]);
        let forward = Forward::start(forward).await?;
        let echo = forward.exchange(b"echo").await?;
        ensure!(echo == b"echo", "{echo:?}; {}", forward.program.shown());
        Ok(())
    }

    /// The pod gets its grace period, its log shows it, and nothing is left. A second pod, at which nobody looks, reports its end.
    pub async fn ends(mut self, world: &World) -> anyhow::Result<()> {
        world.delete("talker", Some(GRACE)).await?;
        self.log.expect("told").await.context("the grace period")?;
        world.wait_gone("talker", MINUTES).await?;
        world.wait_no_job(&self.uid, SOON).await?;
        let quiet = PodBuilder::new("quiet").sh("exit 5");
        let quiet = world.run(&quiet, "Failed").await?;
        ensure!(exit_code(&quiet, "main") == Some(5), "{:?}", quiet.status);
        Ok(())
    }

    /// Copies bytes of every value to the pod and back.
    pub async fn copies(&self, world: &World) -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let (from, back) = (folder.path().join("from"), folder.path().join("back"));
        let bytes: Vec<u8> = (0..=255_u8).cycle().take(COPIED).collect();
        tokio::fs::write(&from, &bytes).await?;
        let there = "talker:/tmp/copy";
        for (source, target) in [
            (from.to_string_lossy().as_ref(), there),
            (there, back.to_string_lossy().as_ref()),
        ] {
            let copy = world.kubectl(["cp", source, target]).deadline(MINUTES);
            copy.ok().await?;
        }
        ensure!(
            tokio::fs::read(&back).await? == bytes,
            "cp changed the file"
        );
        Ok(())
    }
}
