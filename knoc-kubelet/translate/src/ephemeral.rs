//! PURE: ephemeral containers, which are translated as the other containers are.

use k8s_openapi::api::core::v1 as core;

use super::carried::{EphemeralContainer, PodSpec};

/// One ephemeral container.
pub(super) struct Ephemeral {
    /// As a container, with which it has all but its target in common.
    pub(super) container: core::Container,
    /// The container whose processes it sees; empty: none.
    pub(super) target: String,
}

/// The ephemeral containers of the pod.
pub(super) fn containers(spec: PodSpec<'_>) -> Vec<Ephemeral> {
    let all = spec.ephemeral_containers.iter().flatten();
    all.map(|one| of(EphemeralContainer::from(one))).collect()
}

fn of(one: EphemeralContainer<'_>) -> Ephemeral {
    Ephemeral {
        target: one.target_container_name.clone().unwrap_or_default(),
        container: core::Container {
            args: one.args.clone(),
            command: one.command.clone(),
            env: one.env.clone(),
            env_from: one.env_from.clone(),
            image: one.image.clone(),
            image_pull_policy: one.image_pull_policy.clone(),
            name: one.name.clone(),
            security_context: one.security_context.clone(),
            stdin: *one.stdin,
            stdin_once: *one.stdin_once,
            termination_message_path: one.termination_message_path.clone(),
            termination_message_policy: one.termination_message_policy.clone(),
            tty: *one.tty,
            volume_mounts: one.volume_mounts.clone(),
            working_dir: one.working_dir.clone(),
            ..core::Container::default()
        },
    }
}
