//! Which jobs belong to a pod, on the real Slurm: jobs whose name or comment is changed, a wrapper around sbatch, values that print
//! help. The pods run under a separate agent on the login node, with its own state directory, ports and sbatch, and are controlled by
//! `knocctl` there. Their containers are plain processes on the compute nodes.

use anyhow::{Context as _, ensure};
use knoc_tests::{Run, World, ports::some_port, wait_for, world::SOON};
use serde_json::Value;
use tokio::process::Child;

/// The folder of the programs on the login node: those that the test bed installed, or others to be tested instead.
fn programs() -> String {
    std::env::var("KNOC_LOGIN_BIN").unwrap_or_else(|_| "/home/hpcuser/bin".to_owned())
}

/// A second agent, separate from the test bed's.
struct Agent<'a> {
    world: &'a World,
    home: String,
    /// The process of the agent; dropped last.
    _process: Child,
    _log: tempfile::TempDir,
}

impl<'a> Agent<'a> {
    /// Starts the agent with shell scripts in place of some of Slurm's commands, and with a prelude for its jobs.
    async fn start(
        world: &'a World,
        tools: &[(&str, &str)],
        prelude: &str,
    ) -> anyhow::Result<Self> {
        let home = format!("/home/hpcuser/{}", world.namespace);
        let (kubelet, shim, bin) = (some_port(), some_port(), programs());
        let setup = format!(
            r#"set -e
mkdir -p {home}/run; cd {home}; chmod 700 run
export HOME={home}
{bin}/knoc-agent init --site second --runtime process --address 10.77.0.2:{kubelet} >/dev/null
sed -i 's|^prelude = .*|prelude = "{prelude}"|
s|^kubelet = .*|kubelet = "0.0.0.0:{kubelet}"|
s|^# shim = .*|shim = "0.0.0.0:{shim}"|
s|^#* *report_grace *=.*|report_grace = "10s"|' .config/knoc/agent.toml
"#
        );
        world.on("login", ["sh", "-c", &setup]).ok().await?;
        for (tool, script) in tools {
            let put = format!(
                "cd {home}; cat >{tool}; chmod 755 {tool}; \
                 sed -i 's|^{tool} = .*|{tool} = \"{home}/{tool}\"|' .config/knoc/agent.toml"
            );
            let put = world.on("login", ["sh", "-c", &put]);
            put.stdin(format!("#!/bin/sh\n{script}\n")).ok().await?;
        }
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

    /// Runs a pod with this name; returns its uid, which equals its name.
    async fn run(&self, name: &str, annotations: &str) -> anyhow::Result<String> {
        let manifest = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{{annotations}}}}}, \
             spec: {{restartPolicy: Never, terminationGracePeriodSeconds: 1, containers: [{{name: main, \
             image: none, command: [sleep, '600'], resources: {{requests: \
             {{memory: 64Mi, ephemeral-storage: 100Mi}}, limits: {{ephemeral-storage: 1Gi}}}}}}]}}}}"
        );
        let uid = format!("{}-{name}", self.world.namespace);
        let run = self.knocctl(&format!("run -f - --uid {uid}"));
        run.stdin(manifest).ok().await?;
        Ok(uid)
    }

    /// The pod as the agent sees it.
    async fn pod(&self, uid: &str) -> anyhow::Result<Value> {
        let shown = self.knocctl("pods -o json").ok().await?;
        let pods: Value = serde_json::from_slice(&shown.stdout)?;
        let pods = pods.as_array().context("no list")?;
        let pod = pods.iter().find(|pod| pod["uid"] == uid);
        pod.cloned().with_context(|| format!("no {uid}: {pods:?}"))
    }

    /// Waits until the pod is in that phase; returns the id of its job.
    async fn wait_phase(&self, uid: &str, phase: &str) -> anyhow::Result<String> {
        wait_for(&format!("{uid} is {phase}"), SOON, async || {
            let pod = self.pod(uid).await?;
            ensure!(pod["phase"] == phase, "{pod}");
            Ok(pod["job"]["id"].as_str().unwrap_or_default().to_owned())
        })
        .await
    }

    /// Waits until the agent has queried Slurm twice from now on, because the first round may have begun before.
    async fn wait_rounds(&self) -> anyhow::Result<()> {
        let mut before = String::new();
        for _ in 0..2 {
            before = wait_for("a round", SOON, async || {
                let shown = self.knocctl("info -o json").ok().await?;
                let info: Value = serde_json::from_slice(&shown.stdout)?;
                let last = info["node"]["scheduler"]["lastRound"].to_string();
                ensure!(last != "null" && last > before, "{info}");
                Ok(last)
            })
            .await?;
        }
        Ok(())
    }

    /// Checks that the job was not reported as lost.
    async fn no_loss(&self, uid: &str) -> anyhow::Result<()> {
        let record = format!("cat {}/.local/state/knoc/pods/{uid}/record.json", self.home);
        let record = self.world.on("login", ["sh", "-c", &record]).ok().await?;
        ensure!(!record.text().contains("SlurmJobLost"), "{record}");
        Ok(())
    }

    /// Deletes the pod, and checks that its job has left the queue.
    async fn delete(&self, uid: &str, job: &str) -> anyhow::Result<()> {
        self.no_loss(uid).await?;
        self.knocctl(&format!("delete {uid}")).ok().await?;
        wait_for(&format!("job {job} has ended"), SOON, async || {
            let state = slurm_state(self.world, job).await?;
            ensure!(!["PENDING", "RUNNING"].contains(&&*state), "{state}");
            Ok(())
        })
        .await
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

async fn slurm_state(world: &World, job: &str) -> anyhow::Result<String> {
    let state = ["squeue", "-h", "-t", "all", "-o", "%T", "-j", job];
    Ok(world.on("login", state).ok().await?.text())
}

/// A job that the pods wait for.
async fn blocker(world: &World) -> anyhow::Result<String> {
    let job = [
        "sbatch",
        "--parsable",
        "--time=10",
        "--mem=50",
        "--job-name=blocker",
        "--output=/dev/null",
        "--wrap",
        "sleep 600",
    ];
    Ok(world.on("login", job).ok().await?.text())
}

#[tokio::test]
async fn a_renamed_job_belongs_to_its_pod_until_it_ends() -> anyhow::Result<()> {
    let world = World::new("renamed").await?;
    let agent = Agent::start(&world, &[], "").await?;
    let blocker = blocker(&world).await?;
    let waits = format!("'knoc.io/dependency': 'afterany:{blocker}'");
    let changes = [
        ("comment", "Comment=mine"),
        ("name", "Name=mine"),
        ("both", "Comment=mine Name=mine"),
        ("all", "Comment=mine Name=mine WorkDir=/tmp"),
        // Slurm's commands print them as they are.
        (
            "lines",
            r#"Comment="$(printf 'a\nb')" Name="$(printf 'mine\ntoo')""#,
        ),
    ];
    let mut pods = Vec::new();
    for (case, change) in changes {
        for life in ["queued", "run"] {
            let uid = agent.run(&format!("{case}-{life}"), &waits).await?;
            let job = agent.wait_phase(&uid, "Queued").await?;
            let update = format!("scontrol update JobId={job} {change}");
            world.on("login", ["sh", "-c", &update]).ok().await?;
            pods.push((life, uid, job));
        }
    }
    agent.wait_rounds().await?;
    for (_, uid, job) in pods.iter().filter(|(life, _, _)| *life == "queued") {
        agent.delete(uid, job).await?;
    }
    world.on("login", ["scancel", &blocker]).ok().await?;
    for (_, uid, job) in pods.iter().filter(|(life, _, _)| *life == "run") {
        agent.wait_phase(uid, "Running").await?;
        ensure!(slurm_state(&world, job).await? == "RUNNING");
    }
    agent.wait_rounds().await?;
    for (_, uid, job) in pods.iter().filter(|(life, _, _)| *life == "run") {
        agent.delete(uid, job).await?;
    }
    agent.stop().await?;
    world.finish().await
}

#[tokio::test]
async fn a_wrapper_of_sbatch_may_comment_and_name_jobs_and_print_no_id() -> anyhow::Result<()> {
    let world = World::new("wrapper").await?;
    // The last value of an option applies. Every second time it prints nothing.
    let wrapper = r#"[ "$1" = --parsable ] || exec /usr/bin/sbatch "$@"
echo 'Your project has 1,000 hours left.'
n=$(dirname "$0")/odd
if mkdir "$n" 2>/dev/null; then exec /usr/bin/sbatch "$@" --comment=site --job-name=site
else rmdir "$n"; /usr/bin/sbatch "$@" --comment=site --job-name=site >/dev/null; fi"#;
    let agent = Agent::start(&world, &[("sbatch", wrapper)], "").await?;
    for name in ["with-id", "without-id"] {
        let uid = agent.run(name, "").await?;
        let job = agent.wait_phase(&uid, "Running").await?;
        agent.wait_rounds().await?;
        let named = ["squeue", "-h", "-o", "%j %k", "-j", &job];
        let named = world.on("login", named).ok().await?.text();
        ensure!(named == "site site", "{named}");
        agent.delete(&uid, &job).await?;
    }
    agent.stop().await?;
    world.finish().await
}

#[tokio::test]
async fn a_value_that_makes_sbatch_print_help_is_rejected_once() -> anyhow::Result<()> {
    let world = World::new("help").await?;
    let wrapper = r#"[ "$1" = --parsable ] || exec /usr/bin/sbatch "$@"
echo call >>"$(dirname "$0")/calls"; exec /usr/bin/sbatch "$@" --gres=help"#;
    let agent = Agent::start(&world, &[("sbatch", wrapper)], "").await?;
    // It is rejected with its name before sbatch is called.
    let gres = agent.run("gres", "'knoc.io/gres': help").await;
    let gres = format!("{:#}", gres.err().context("it was accepted")?);
    ensure!(
        gres.contains("knoc.io/gres") && gres.contains("help"),
        "{gres}"
    );
    // The site's configuration can cause it too.
    let uid = agent.run("wrapped", "").await?;
    let pod = wait_for("the refusal", SOON, async || {
        let pod = agent.pod(&uid).await?;
        ensure!(pod["phase"] == "Finished", "{pod}");
        Ok(pod)
    })
    .await?;
    let outcome = pod["outcome"].to_string();
    ensure!(
        outcome.contains("Rejected") && outcome.contains("without a job id"),
        "{pod}"
    );
    let calls = format!("wc -l <{}/calls", agent.home);
    let calls = world.on("login", ["sh", "-c", &calls]).ok().await?.text();
    ensure!(calls == "1", "{calls}");
    agent.stop().await?;
    world.finish().await
}

#[tokio::test]
async fn a_queue_that_shows_jobs_late_loses_none() -> anyhow::Result<()> {
    let world = World::new("late").await?;
    // As long as `late` exists, the commands show no job.
    let late = |tool: &str| {
        format!(
            r#"[ "$1" = --version ] || [ ! -e "$(dirname "$0")/late" ] || exit 0; exec /usr/bin/{tool} "$@""#
        )
    };
    let (squeue, sacct) = (late("squeue"), late("sacct"));
    let tools = [("squeue", squeue.as_str()), ("sacct", sacct.as_str())];
    let agent = Agent::start(&world, &tools, "").await?;
    let file = format!("{}/late", agent.home);
    world.on("login", ["touch", &file]).ok().await?;
    let uid = agent.run("late", "").await?;
    let job = agent.wait_phase(&uid, "Running").await?;
    agent.wait_rounds().await?;
    agent.no_loss(&uid).await?;
    world.on("login", ["rm", &file]).ok().await?;
    agent.delete(&uid, &job).await?;
    agent.stop().await?;
    world.finish().await
}

#[tokio::test]
async fn a_prelude_that_fails_is_cannot_start() -> anyhow::Result<()> {
    let world = World::new("prelude").await?;
    let prelude = "echo no such module; exit 3";
    let agent = Agent::start(&world, &[], prelude).await?;
    let uid = agent.run("prelude", "").await?;
    let pod = wait_for("the pod has failed", SOON, async || {
        let pod = agent.pod(&uid).await?;
        ensure!(pod["phase"] == "Finished", "{pod}");
        Ok(pod)
    })
    .await?;
    let outcome = &pod["outcome"];
    let message = outcome["message"].as_str().unwrap_or_default();
    ensure!(
        outcome["reason"] == "CannotStart"
            && message.contains("code 3")
            && message.contains("no such module"),
        "{outcome}"
    );
    agent.stop().await?;
    world.finish().await
}

#[tokio::test]
async fn streams_into_a_suspended_job_fail_with_that_reason() -> anyhow::Result<()> {
    let world = World::new("suspended").await?;
    let agent = Agent::start(&world, &[], "").await?;
    let uid = agent.run("sleeps", "").await?;
    let job = agent.wait_phase(&uid, "Running").await?;
    let streams = [format!("exec {uid} -- true"), format!("attach {uid}")];
    wait_for("the shim has its link", SOON, async || {
        agent.knocctl(&streams[0]).ok().await
    })
    .await?;
    let suspend = ["scontrol", "suspend", job.as_str()];
    world.on_as_root("ctl", suspend).ok().await?;
    // Slurm stops the processes a moment later. From then on the first stream is refused before the agent knows about the
    // suspension from Slurm.
    for stream in &streams {
        wait_for("it is refused", SOON * 3, async || {
            let said = agent.knocctl(stream).deadline(SOON).output().await?;
            let all = said.to_string();
            ensure!(
                said.code != 0 && all.contains("is suspended"),
                "{stream}: {said}"
            );
            Ok(())
        })
        .await?;
    }
    let resume = ["scontrol", "resume", job.as_str()];
    world.on_as_root("ctl", resume).ok().await?;
    wait_for("it answers again", SOON, async || {
        agent.knocctl(&streams[0]).ok().await
    })
    .await?;
    agent.delete(&uid, &job).await?;
    agent.stop().await?;
    world.finish().await
}
