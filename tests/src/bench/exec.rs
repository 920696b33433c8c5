//! T4: runs `true` in a running container with a warm client of the API server and with a warm gRPC client. The floors are
//! Apptainer's own exec into a running container on the compute node, and the same through `srun --overlap`.

use std::time::Duration;

use anyhow::Context as _;
use knoc_proto::pb;
use knoc_proto::pb::exec_input::Input;
use knoc_proto::pb::exec_output::Output;

use super::bed::{Bed, EXEC, FOLDER};
use super::kubernetes;
use super::stats::{Series, bash_time, now, span};
use crate::{PodBuilder, wait_for};

/// The time limit for one start.
const SOON: Duration = Duration::from_mins(1);

/// The node on which the floor runs.
const NODE: &str = "c1";

/// The series of T4.
#[derive(Debug, Default)]
pub(super) struct Exec {
    /// Through the API server, from the request to the status.
    pub(super) kubernetes: Series,
    /// Over gRPC, from the request to the exit code.
    pub(super) knoc: Series,
    /// `apptainer exec instance://… true` on the compute node.
    pub(super) instance: Series,
    /// `srun --overlap` of the same, from the login node.
    pub(super) srun: Series,
}

/// Measures all series in turn, `samples` times.
pub(super) async fn measure(bed: &Bed, samples: usize) -> anyhow::Result<Exec> {
    let pod = PodBuilder::new("exec")
        .image(&Bed::image_path())
        .command(["/knoc-stamp", "3600000"]);
    let uid = bed.world.create(&pod).await?;
    bed.world.wait_phase("exec", "Running", SOON).await?;
    let job = hold(bed).await?;
    let mut figures = Exec::default();
    run(bed, &uid, "main", &["true"])
        .await
        .context("the first exec")?;
    for _ in 0..samples {
        let began = now();
        let (_, code) = run(bed, &uid, "main", &["true"]).await?;
        anyhow::ensure!(code == 0, "true answered {code}");
        figures.knoc.push(span(began, now()));
        let began = now();
        kubernetes::exec(bed, "exec", &["true"]).await?;
        figures.kubernetes.push(span(began, now()));
        let join = "apptainer --silent exec instance://knoc-bench true";
        figures.instance.push(timed(bed, NODE, join).await?);
        let srun = format!("srun --quiet --overlap --jobid={job} {join}");
        figures.srun.push(timed(bed, "login", &srun).await?);
    }
    bed.shell("login", &format!("scancel {job}")).ok().await?;
    bed.world.delete("exec", Some(0)).await?;
    bed.world.wait_gone("exec", SOON).await?;
    Ok(figures)
}

/// Runs a command in a container; returns the number of bytes of its output, and its exit code.
pub(super) async fn run(
    bed: &Bed,
    uid: &str,
    container: &str,
    command: &[&str],
) -> anyhow::Result<(u64, i32)> {
    let start = pb::ExecStart {
        uid: uid.to_owned(),
        container: container.to_owned(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        stdout: true,
        stderr: true,
        ..pb::ExecStart::default()
    };
    let input = pb::ExecInput {
        input: Some(Input::Start(start)),
    };
    // A half-close right away would mean the end of standard input, but the command has none.
    let mut outputs = bed
        .agent
        .clone()
        .exec(tokio_stream::iter([input]))
        .await?
        .into_inner();
    let mut bytes = 0;
    while let Some(message) = outputs.message().await? {
        match message.output {
            Some(Output::Stdout(data)) => bytes += u64::try_from(data.len())?,
            Some(Output::Exit(exit)) => {
                anyhow::ensure!(exit.error.is_empty(), "not started: {}", exit.error);
                return Ok((bytes, exit.code));
            }
            Some(Output::Stderr(_) | Output::Started(_)) | None => {}
        }
    }
    anyhow::bail!("the stream ended without an exit code")
}

/// Submits a job that holds an instance of our image on the node; returns its id.
async fn hold(bed: &Bed) -> anyhow::Result<String> {
    let instance = EXEC
        .replace(" exec ", " instance start ")
        .replace(" --no-init", "");
    let script = format!(
        "#!/bin/bash\n{instance} {} knoc-bench && echo ready\nsleep 3600\n",
        Bed::image_path()
    );
    let submit = format!(
        "cd {FOLDER} && rm -f hold.out && printf %s '{script}' > hold.sh && \
         sbatch --parsable -J knoc-floor -w {NODE} -c 1 --mem 256 -t 60 -o hold.out hold.sh"
    );
    let job = bed.shell("login", &submit).ok().await?.text();
    let path = bed.here(FOLDER).join("hold.out");
    wait_for("an instance by hand", SOON, async || {
        let text = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
        if text.contains("ready") {
            Ok(())
        } else {
            Err(text)
        }
    })
    .await?;
    Ok(job)
}

/// How long a command takes, measured by the node's own shell.
async fn timed(bed: &Bed, node: &str, command: &str) -> anyhow::Result<f64> {
    let text = format!("b=$EPOCHREALTIME; {command} || exit; echo $b $EPOCHREALTIME");
    let text = bed.shell(node, &text).ok().await?.text();
    let mut times = text.split(' ').map(bash_time);
    let (began, ended) = times
        .next()
        .flatten()
        .zip(times.next().flatten())
        .context(text.clone())?;
    Ok(span(began, ended))
}
