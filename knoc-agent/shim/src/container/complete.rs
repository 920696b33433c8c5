//! What is added to a container between the start of its runtime and that of its program.

use std::path::Path;

use knoc_contract::launch::LaunchSpec;

use super::{
    super::{environment::TerminationLog, inside, passwd, pod::Pod},
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

/// Does what is to be done in the container before its program runs. Ends the runtime on failure.
pub(super) async fn complete_inside(
    pod: &Pod,
    attempt: &Attempt,
    (folders, up): (&mut Folders, &mut Up),
    spec: &mut LaunchSpec,
) -> Result<(), AttemptError> {
    folders.message_below(up.message.take());
    let (place, abort) = ((up.identity, up.beside), &attempt.abort);
    if let Err(what) = inside::mount_folders(pod, place, folders.mounts(), abort).await {
        up.runtime.end().await;
        return Err(if abort.is_cancelled() {
            AttemptError::Aborted
        } else {
            PrepareError::Mount(what).into()
        });
    }
    spec.passwd = passwd::of_image(pod, place, spec, abort).await;
    Ok(())
}

/// The links that the launcher creates: names and targets in turn.
fn links(folders: &Folders) -> Vec<Vec<u8>> {
    let bytes = |path: &Path| path.as_os_str().as_encoded_bytes().to_vec();
    let volumes = folders.links.iter();
    let mut links: Vec<_> = volumes
        .flat_map(|link| [bytes(&link.name), bytes(&link.target)])
        .collect();
    match &folders.termination {
        TerminationLog::Link { name, target } => {
            links.extend([name.clone().into_bytes(), bytes(target)]);
        }
        TerminationLog::Mounted { .. } | TerminationLog::Bind(_) => {}
    }
    links
}
