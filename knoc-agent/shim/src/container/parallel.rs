//! One attempt of a container of several ranks, in the shim: starts srun, lets the [`conductor`] talk to the helpers that
//! srun starts, and concludes from the ends of the ranks how the container ended ([`outcome`]).
//!
//! The output is what srun writes: each line begins with the number of its rank, and srun's own messages have none.

mod begins;
mod conductor;
mod outcome;

use std::{
    ffi::OsString,
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use knoc_contract::{host::node_name, logs::cri};
use knoc_link::{
    Incoming,
    pinned::{self, KeyPair},
};
use knoc_proto::error::chain;
use tokio_util::sync::CancellationToken;

use self::conductor::Conductor;
use super::{
    super::{
        attach::hub,
        children::Child,
        environment, fdio,
        output::{self, Source},
        pod::Pod,
        ranks::{
            step::{self, Step},
            table::Loss,
        },
        role::{ContainerSpec, Role},
    },
    Attempt, AttemptError, Done, log,
};

/// PURE: whether srun starts this container.
pub(super) fn has_ranks(pod: &Pod, spec: &ContainerSpec) -> bool {
    let job = pod.spec().job.as_ref();
    spec.role == Role::Main && job.is_some_and(|job| job.mpi.is_some())
}

fn cannot_run(message: String) -> AttemptError {
    AttemptError::Ranks {
        reason: "ContainerCannotRun",
        message,
    }
}

/// Runs all ranks to their ends. Returns as well how the rank that decides was lost, if it was.
pub(super) async fn try_run(
    pod: &Arc<Pod>,
    attempt: &Attempt,
) -> Result<(Done, Option<Loss>), AttemptError> {
    let container = &attempt.spec.container;
    let config = attempt.spec.image.config.clone().unwrap_or_default();
    let spec = environment::launch_spec(container, &config, &attempt.values, &pod.facts);
    if spec.argv.is_empty() {
        return Err(AttemptError::NoCommand);
    }
    let (cert, key) = pod.jobdir.link_pair();
    let pair = KeyPair::from_files(&cert, &key);
    let pair = pair.map_err(|error| cannot_run(chain(&error)))?;
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let incoming = pinned::listen(any, pair.clone()).await;
    let mut incoming = incoming.map_err(|error| cannot_run(chain(&error)))?;
    let argv = argv(pod, attempt, &incoming)?;
    let keeper = hub::open(false, false, None, None);
    let hub = keeper.hub();
    let conductor = Conductor::new(pod, attempt, &pair, (spec, Arc::clone(&hub)))?;
    let started = spawn(pod, &argv);
    let (mut srun, sources) =
        started.map_err(|error| cannot_run(format!("start {}: {error}", pod.job.srun)))?;
    let live = pod.jobdir.log_path(&container.name, attempt.number);
    let over = CancellationToken::new();
    let pump = output::pump(sources, log(pod, attempt, &live), over.clone(), &hub);
    let conducting = async {
        let conducted = conductor.conduct(&mut srun, &mut incoming).await;
        over.cancel();
        conducted
    };
    let (losses, conducted) = tokio::join!(pump, conducting);
    let exit = conducted.srun;
    let outcome = outcome::of(conducted, attempt, losses, live).await;
    keeper.end(outcome.as_ref().map_or(exit, |(done, _)| done.0));
    outcome
}

/// The argv of srun.
fn argv(pod: &Pod, attempt: &Attempt, incoming: &Incoming) -> Result<Vec<OsString>, AttemptError> {
    if pod.job.srun.is_empty() {
        return Err(cannot_run(
            "the agent names no srun, which starts the ranks (knoc.io/mpi); the pod needs a site with Slurm".to_owned(),
        ));
    }
    let port = incoming.local_addr().map_or(0, |address| address.port());
    let own = pod.facts.fields.host_ip.parse::<IpAddr>();
    let mut addresses = Vec::new();
    if let Ok(ip) = own {
        addresses.push(SocketAddr::new(ip, port).to_string());
    }
    addresses.push(format!("{}:{port}", node_name()));
    let job = pod.spec().job.clone().unwrap_or_default();
    let cpus = std::env::var("SLURM_CPUS_PER_TASK").ok();
    let step = Step {
        srun: Path::new(&pod.job.srun),
        agent: &pod.agent,
        jobdir: pod.jobdir.path(),
        attempt: attempt.number,
        addresses: &addresses,
        job: &job,
        cpus_per_task: cpus.and_then(|cpus| cpus.parse().ok()),
    };
    Ok(step.argv())
}

/// Starts srun, with what Slurm tells the batch step, and nothing of the pod.
#[expect(
    clippy::disallowed_methods,
    reason = "srun is the parent of the containers of all ranks"
)]
fn spawn(pod: &Pod, argv: &[OsString]) -> io::Result<(Child, Vec<Source>)> {
    let [program, arguments @ ..] = argv else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let (ours_out, stdout) = fdio::output_pipe()?;
    let (ours_err, stderr) = fdio::output_pipe()?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(&pod.job.runtime_env)
        .envs(step::of_slurm(std::env::vars_os()))
        // Its messages are read by people, and by the tests.
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    let child = pod.children.spawn(&mut command, true)?;
    // The command still holds the writing ends, and the shim would never see the end of the output.
    drop(command);
    let sources = vec![
        Source::new(ours_out, cri::Stream::Stdout),
        Source::new(ours_err, cri::Stream::Stderr),
    ];
    Ok((child, sources))
}
