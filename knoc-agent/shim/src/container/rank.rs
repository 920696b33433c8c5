//! One attempt of one rank, in the rank's helper on its node: as the attempt of any other container, except that its output
//! is the helper's own, which srun carries to the shim, and that Slurm's variables about the rank are added.

use std::{os::fd::OwnedFd, sync::Arc};

use knoc_contract::logs::writer::Losses;
use tokio::sync::oneshot;

use super::{
    super::{attach::hub, environment, measure, pod::Pod, ranks::step},
    Attempt, AttemptError, Done, Ended, Program, by_kernel,
    complete::{complete, complete_inside},
    end, ended, environment_of, launch, launched, message, prepare, up, used_since,
};
use crate::launch::kept::Kept;

/// What the rank has from Slurm.
#[derive(Debug)]
pub(crate) struct Own {
    /// Names and values.
    pub(crate) variables: Vec<(Vec<u8>, Vec<u8>)>,
    /// Standard input, output and error.
    pub(crate) stdio: Vec<OwnedFd>,
    /// Its connection to PMI, if Slurm has given it one as a descriptor.
    pub(crate) pmi: Option<OwnedFd>,
}

/// Runs the rank to its end; `started` is told once its program runs.
pub(crate) async fn run(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    own: Own,
    started: oneshot::Sender<Arc<Program>>,
) -> Ended {
    let outcome = Box::pin(try_run(pod, attempt, own, started)).await;
    ended(attempt, outcome)
}

async fn try_run(
    pod: &Arc<Pod>,
    attempt: &Attempt,
    own: Own,
    started: oneshot::Sender<Arc<Program>>,
) -> Result<Done, AttemptError> {
    let container = &attempt.spec.container;
    let config = attempt.spec.image.config.clone().unwrap_or_default();
    let values = environment_of(pod, attempt).await?;
    let mut spec = environment::launch_spec(container, &config, &values, &pod.facts);
    if spec.argv.is_empty() {
        return Err(AttemptError::NoCommand);
    }
    let mut descriptors = own.stdio;
    if let Some(pmi) = own.pmi {
        spec.descriptor = Some(step::PMI_FD.as_bytes().to_vec());
        descriptors.push(pmi);
    }
    let mut folders = prepare(pod, attempt, values).await?;
    complete(&mut spec, &folders);
    let kills_before = pod.oom.unclaimed();
    let mut up = up::bring_up(pod, attempt, &folders, container).await?;
    let isolated = pod.runtime.isolates() && up.beside.is_none();
    let others = pod
        .shared
        .as_ref()
        .is_some_and(|all| all.processes.is_some());
    step::with_rank(&mut spec.env, &own.variables, isolated && others);
    complete_inside(pod, attempt, (&mut folders, &mut up), &mut spec).await?;
    let launching = launch(up.socket, &spec, descriptors, &attempt.abort);
    launched(&mut up.runtime, launching, &Kept::default()).await?;
    let used_before = measure::used(up.runtime.child.pid).unwrap_or_default();
    // No client attaches to it, but commands beside it must end with it.
    let keeper = hub::open(false, false, None, None);
    let program = Program {
        identity: up.identity,
        beside: up.beside,
        // Its output is srun's, so nobody would notice when to let go of them.
        kept: Kept::default(),
        ids: Vec::new(),
        shown: false,
        isolated,
        spec,
        hub: keeper.hub(),
        ranks: None,
    };
    // The helper waits for it as long as the rank runs.
    started.send(Arc::new(program)).ok();
    let exit = end(&mut up.runtime, attempt, up.identity, isolated).await;
    keeper.end(exit);
    let by_us = attempt.abort.is_cancelled();
    let killed = by_kernel(exit, by_us, || pod.oom.claim(kills_before));
    let message = message(folders, None).await;
    let message = up.runtime.message(message);
    let used = used_since(pod, used_before, &up.runtime);
    Ok((exit, message, Losses::default(), killed, used))
}
