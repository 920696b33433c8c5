//! What is added to a container between the start of its runtime and that of its program.

use std::path::Path;

use knoc_contract::launch::{LaunchSpec, MESSAGE};

use super::{
    super::{
        environment::TerminationLog,
        inside::{self, Place},
        passwd,
        pod::Pod,
    },
    Attempt, AttemptError,
    folders::{Folders, PrepareError},
    up::Up,
};

/// Adds what the launcher is to prepare in the container.
pub(super) fn complete(spec: &mut LaunchSpec, folders: &Folders) {
    let temporary = folders.temporary.iter();
    spec.temporary = temporary
        .map(|folder| folder.clone().into_bytes())
        .collect();
    spec.links = links(folders);
    spec.settle = folders.settle;
}

/// Does what is to be done in the container before its program runs. Ends the runtime on failure. Returns the number of the group, if
/// the image names one.
pub(super) async fn complete_inside(
    pod: &Pod,
    attempt: &Attempt,
    (folders, up): (&mut Folders, &mut Up),
    spec: &mut LaunchSpec,
) -> Result<Option<u32>, AttemptError> {
    folders.message_below(up.message.take());
    let place = (up.identity, up.beside);
    let done = work_inside(pod, attempt, (&*folders, place), spec).await;
    if done.is_err() {
        up.runtime.end().await;
    }
    done
}

async fn work_inside(
    pod: &Pod,
    attempt: &Attempt,
    (folders, place): (&Folders, Place),
    spec: &mut LaunchSpec,
) -> Result<Option<u32>, AttemptError> {
    let abort = &attempt.abort;
    let failed = |what| {
        if abort.is_cancelled() {
            AttemptError::Aborted
        } else {
            PrepareError::Mount(what).into()
        }
    };
    let mounted = inside::mount_folders(pod, place, folders.mounts(), abort).await;
    mounted.map_err(failed)?;
    // A container that root has set up is not accessible: its volumes stay empty.
    if !pod.mounting.by_name() {
        let filled = inside::fill_volumes(pod, place, &folders.image_volumes, abort).await;
        filled.map_err(failed)?;
    }
    let wanted = (&*spec, &attempt.spec.container);
    let account = passwd::of_image(pod, place, wanted, abort).await?;
    spec.passwd = account.passwd;
    Ok(account.gid)
}

/// The links that the launcher creates, and the termination message that it looks for: names and targets in turn.
fn links(folders: &Folders) -> Vec<Vec<u8>> {
    let bytes = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
    let volumes = folders.links.iter();
    let mut links: Vec<_> = volumes
        .flat_map(|link| [bytes(&link.name), bytes(&link.target)])
        .collect();
    if folders.isolated {
        links.extend(match &folders.termination {
            TerminationLog::Link { name, target } => [name.clone().into_bytes(), bytes(target)],
            TerminationLog::Mounted { path, .. } => [bytes(path), Vec::new()],
            TerminationLog::Bind(path) => [bytes(path), MESSAGE.as_bytes().to_vec()],
        });
    }
    links
}
