//! Compute nodes whose runtime cannot mount what the login node compresses with zstd: pods run all the same, an Event says why they
//! start slowly, and the agent goes back to gzip. The pods run under a separate agent on the login node, whose `apptainer` is a
//! script that mounts no image. They are controlled by `knocctl` there.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{PodBuilder, Run, World, pod::some_port, wait_for, world::SOON};
use serde_json::Value;
use tokio::process::Child;

/// The time for a conversion by Apptainer and a job, after those of other tests.
const PULLED: Duration = Duration::from_mins(3);

/// Starts a container only from unpacked files, as if its squashfuse could not read zstd.
const MOUNTS_NOTHING: &str = r#"#!/bin/sh
case " $* " in
*" exec "*" --unsquash "*) ;;
*" exec "*)
    echo 'FATAL:   container creation failed: image driver squashfuse_ll instance exited with error: squashfuse_ll exited: Squashfs image uses zstd compression, this version supports only zlib.' >&2
    exit 255
    ;;
esac
exec @APPTAINER@ "$@"
"#;

/// The folder of the programs on the login node: those that the test bed installed, or others to be tested instead.
fn programs() -> String {
    std::env::var("KNOC_LOGIN_BIN").unwrap_or_else(|_| "/home/hpcuser/bin".to_owned())
}

/// A second agent, separate from the test bed's, with that script.
struct Agent<'a> {
    world: &'a World,
    home: String,
    /// The process of the agent; dropped last.
    _process: Child,
    _log: tempfile::TempDir,
}

impl<'a> Agent<'a> {
    async fn start(world: &'a World) -> anyhow::Result<Self> {
        let home = format!("/home/hpcuser/{}", world.namespace);
        let (kubelet, shim, bin) = (some_port(), some_port(), programs());
        let setup = format!(
            r#"set -e
mkdir -p {home}/run; cd {home}; chmod 700 run
export HOME={home}
sed "s|@APPTAINER@|$(command -v apptainer)|" >apptainer; chmod 755 apptainer
{bin}/knoc-agent init --site second --runtime apptainer --address 10.77.0.2:{kubelet} >/dev/null
sed -i 's|^kubelet = .*|kubelet = "0.0.0.0:{kubelet}"|
s|^# shim = .*|shim = "0.0.0.0:{shim}"|
s|^apptainer = .*|apptainer = "{home}/apptainer"|
s|^#* *report_grace *=.*|report_grace = "10s"|' .config/knoc/agent.toml
printf '\n[[registry]]\nprefix = "ctl:5000"\ninsecure = true\n' >>.config/knoc/agent.toml
grep -q '^apptainer = "{home}/apptainer"' .config/knoc/agent.toml
"#
        );
        let setup = world.on("login", ["sh", "-c", &setup]);
        setup.stdin(MOUNTS_NOTHING).ok().await?;
        let log = tempfile::tempdir()?;
        let serve = format!("echo $$ >{home}/pid; exec {bin}/knoc-agent serve");
        let process = on_login(world, &home, &serve).spawn(&log.path().join("agent.log"))?;
        let agent = Self {
            world,
            home,
            _process: process,
            _log: log,
        };
        wait_for("the second agent answers", SOON, async || {
            agent.knocctl("info").ok().await
        })
        .await?;
        Ok(agent)
    }

    fn knocctl(&self, args: &str) -> Run {
        let command = format!("exec {}/knocctl {args}", programs());
        on_login(self.world, &self.home, &command)
    }

    /// Runs a pod with this image to its end; returns its uid and what it has written.
    async fn run(&self, name: &str, image: &str) -> anyhow::Result<(String, String)> {
        let manifest = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{restartPolicy: Never, containers: [{{name: main, \
             image: '{image}', command: [sh, -c, 'echo it runs'], resources: {{requests: {{memory: 64Mi, \
             ephemeral-storage: 100Mi}}, limits: {{ephemeral-storage: 1Gi}}}}}}]}}}}"
        );
        let uid = format!("{}-{name}", self.world.namespace);
        let run = self.knocctl(&format!("run -f - --uid {uid}"));
        run.stdin(manifest).ok().await?;
        wait_for(&format!("{uid} has ended"), PULLED, async || {
            let shown = self.knocctl("pods -o json").ok().await?;
            let pods: Value = serde_json::from_slice(&shown.stdout)?;
            let pods = pods.as_array().context("no list")?;
            let pod = pods.iter().find(|pod| pod["uid"] == *uid);
            ensure!(
                pod.is_some_and(|pod| pod["phase"] == "Finished"),
                "{pods:?}"
            );
            Ok(())
        })
        .await?;
        // A container that did not start has none.
        let log = self.knocctl(&format!("logs {uid}")).output().await?;
        Ok((uid, log.text()))
    }

    /// The compressions of all cached images: the number in the superblock of each squashfs, in order.
    async fn compressions(&self) -> anyhow::Result<Vec<String>> {
        let script = format!(
            "for sif in {}/.local/state/knoc/images/*.sif; do \
             start=$(apptainer sif list $sif | awk -F'|' '/Squashfs/ {{ split($4, a, \"-\"); print a[1] + 0 }}') && \
             od -An -tu2 -j $((start + 20)) -N 2 $sif || exit 1; done",
            self.home
        );
        let read = self.world.on("login", ["sh", "-c", &script]).ok().await?;
        let text = read.text();
        let mut all: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        all.sort();
        Ok(all)
    }

    async fn stop(self) -> anyhow::Result<()> {
        let home = &self.home;
        let stop = format!(
            "p=$(cat {home}/pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done; rm -rf {home}"
        );
        let stop = self.world.on("login", ["sh", "-c", &stop]);
        stop.deadline(SOON).ok().await?;
        Ok(())
    }
}

fn on_login(world: &World, home: &str, command: &str) -> Run {
    let command = format!("export HOME={home} XDG_RUNTIME_DIR={home}/run; {command}");
    world.on("login", ["sh", "-c", &command])
}

#[tokio::test]
async fn a_node_that_cannot_mount_an_image_unpacks_it_and_the_next_one_is_gzip()
-> anyhow::Result<()> {
    let world = World::new("unmounted").await?;
    let agent = Agent::start(&world).await?;
    let busybox = PodBuilder::image_name();
    let (uid, log) = agent.run("unpacks", &busybox).await?;
    ensure!(log.contains("it runs"), "{log}");
    ensure!(agent.compressions().await? == ["6"], "zstd is 6");
    let described = agent.knocctl(&format!("describe {uid}")).ok().await?.text();
    ensure!(
        described.contains("ImageUnpacked") && described.contains("zstd"),
        "{described}"
    );
    // It names the node, and so its exit code is that of an error.
    let doctor = agent.knocctl("doctor").output().await?.text();
    ensure!(
        doctor.contains("images: compression") && doctor.contains("could not mount an image"),
        "{doctor}"
    );
    // The next image is one that this runtime would have mounted, if it mounted any: the script refuses it too, and the
    // shim does not unpack what is compressed with gzip.
    let own = busybox.replace("busybox:latest", "own:1");
    let (uid, _) = agent.run("mounts", &own).await?;
    let compressions = agent.compressions().await?;
    ensure!(compressions == ["1", "6"], "{compressions:?}");
    let described = agent.knocctl(&format!("describe {uid}")).ok().await?.text();
    ensure!(!described.contains("ImageUnpacked"), "{described}");
    // Nothing that was unpacked is left on the nodes.
    let left = "ls -d /tmp/*/*/rootfs-* /tmp/rootfs-* 2>/dev/null";
    for node in ["c1", "c2", "c3"] {
        wait_for(&format!("nothing is left on {node}"), SOON, async || {
            let found = world.on(node, ["sh", "-c", left]).output().await?;
            ensure!(found.stdout.is_empty(), "{found:?}");
            Ok(())
        })
        .await?;
    }
    agent.stop().await?;
    world.finish().await
}
