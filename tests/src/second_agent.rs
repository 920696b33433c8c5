//! A second agent on the login node, separate from the test bed's, with settings and a runtime of its own. It is controlled by
//! `knocctl` there, without Kubernetes.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::process::Child;

use crate::{Run, World, ports::some_port, wait_for, world::SOON};

/// The time for a conversion by Apptainer and a job, after those of other tests.
const PULLED: Duration = Duration::from_mins(5);

/// Passes everything on to the runtime of the login node.
pub const PLAIN: &str = "#!/bin/sh\nexec @APPTAINER@ \"$@\"\n";

/// The folder of the programs on the login node: those that the test bed installed, or others to be tested instead.
fn programs() -> String {
    std::env::var("KNOC_LOGIN_BIN").unwrap_or_else(|_| "/home/hpcuser/bin".to_owned())
}

/// The agent.
#[derive(Debug)]
pub struct SecondAgent<'a> {
    world: &'a World,
    home: String,
    process: Child,
    log: tempfile::TempDir,
}

impl<'a> SecondAgent<'a> {
    /// Starts it with this script as its runtime, in which `@APPTAINER@` stands for Apptainer's path, and with these lines under
    /// `[images]` of its site file.
    pub async fn start(world: &'a World, runtime: &str, images: &str) -> anyhow::Result<Self> {
        Self::start_edited(world, runtime, images, "").await
    }

    /// Starts it like [`Self::start`], with a site file that this script of sed(1) has edited; it contains no single quote.
    pub async fn start_edited(
        world: &'a World,
        runtime: &str,
        images: &str,
        edits: &str,
    ) -> anyhow::Result<Self> {
        let home = format!("/home/hpcuser/{}", world.namespace);
        let (kubelet, shim, bin) = (some_port(), some_port(), programs());
        let images = images.replace('\n', "\\n");
        let setup = format!(
            r#"set -e
mkdir -p {home}/run; cd {home}; chmod 700 run
export HOME={home}
sed "s|@APPTAINER@|$(command -v apptainer)|" >apptainer; chmod 755 apptainer
{bin}/knoc-agent init --site second --runtime apptainer --address 10.77.0.2:{kubelet} >/dev/null
sed -i 's|^kubelet = .*|kubelet = "0.0.0.0:{kubelet}"|
s|^# shim = .*|shim = "0.0.0.0:{shim}"|
s|^apptainer = .*|apptainer = "{home}/apptainer"|
s|^\[images\]$|[images]\n{images}|
s|^#* *report_grace *=.*|report_grace = "10s"|
{edits}' .config/knoc/agent.toml
printf '\n[[registry]]\nprefix = "ctl:5000"\ninsecure = true\n' >>.config/knoc/agent.toml
grep -q '^apptainer = "{home}/apptainer"' .config/knoc/agent.toml
"#
        );
        let setup = world.on("login", ["sh", "-c", &setup]);
        setup.stdin(runtime).ok().await?;
        let log = tempfile::tempdir()?;
        let process = serve(world, &home, &log)?;
        let agent = Self {
            world,
            home,
            process,
            log,
        };
        agent.answers().await?;
        Ok(agent)
    }

    async fn answers(&self) -> anyhow::Result<()> {
        wait_for("the second agent answers", SOON, async || {
            self.knocctl("info").ok().await
        })
        .await?;
        Ok(())
    }

    /// Kills it without a chance to clean up, and starts it again.
    pub async fn kill_and_start(&mut self) -> anyhow::Result<()> {
        let home = &self.home;
        let kill = format!(
            "p=$(cat {home}/pid); kill -9 $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done"
        );
        let kill = self.world.on("login", ["sh", "-c", &kill]);
        kill.deadline(SOON).ok().await?;
        self.process = serve(self.world, &self.home, &self.log)?;
        self.answers().await
    }

    /// Its home directory on the nodes.
    #[must_use]
    pub fn home(&self) -> &str {
        &self.home
    }

    /// `knocctl` with these arguments, which a shell splits.
    #[must_use]
    pub fn knocctl(&self, args: &str) -> Run {
        let command = format!("exec {}/knocctl {args}", programs());
        on_login(self.world, &self.home, &command)
    }

    /// Submits a pod with this image; returns its uid.
    pub async fn submit(&self, name: &str, image: &str) -> anyhow::Result<String> {
        let manifest = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{restartPolicy: Never, containers: [{{name: main, \
             image: '{image}', command: [sh, -c, 'echo it runs'], resources: {{requests: {{memory: 64Mi, \
             ephemeral-storage: 100Mi}}, limits: {{ephemeral-storage: 1Gi}}}}}}]}}}}"
        );
        let uid = format!("{}-{name}", self.world.namespace);
        let run = self.knocctl(&format!("run -f - --uid {uid}"));
        run.stdin(manifest).ok().await?;
        Ok(uid)
    }

    /// Waits until the pod has ended; returns what it has written.
    pub async fn ended(&self, uid: &str) -> anyhow::Result<String> {
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
        Ok(log.text())
    }

    /// Waits until the description of the pod has this text.
    pub async fn described(&self, uid: &str, text: &str) -> anyhow::Result<()> {
        wait_for(&format!("{uid}: {text}"), PULLED, async || {
            let shown = self.knocctl(&format!("describe {uid}")).ok().await?.text();
            ensure!(shown.contains(text), "{shown}");
            Ok(())
        })
        .await
    }

    /// Runs a pod with this image to its end; returns its uid and what it has written.
    pub async fn run(&self, name: &str, image: &str) -> anyhow::Result<(String, String)> {
        let uid = self.submit(name, image).await?;
        let log = self.ended(&uid).await?;
        Ok((uid, log))
    }

    /// Ends it, and removes its home directory.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let home = &self.home;
        let stop = format!(
            "p=$(cat {home}/pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.1; done; rm -rf {home}"
        );
        let stop = self.world.on("login", ["sh", "-c", &stop]);
        stop.deadline(SOON).ok().await?;
        self.process.wait().await?;
        Ok(())
    }
}

fn serve(world: &World, home: &str, log: &tempfile::TempDir) -> anyhow::Result<Child> {
    let serve = format!("echo $$ >{home}/pid; exec {}/knoc-agent serve", programs());
    on_login(world, home, &serve).spawn(&log.path().join("agent.log"))
}

fn on_login(world: &World, home: &str, command: &str) -> Run {
    let command = format!("export HOME={home} XDG_RUNTIME_DIR={home}/run; {command}");
    world.on("login", ["sh", "-c", &command])
}
