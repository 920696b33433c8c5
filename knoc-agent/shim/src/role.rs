//! PURE: what a container is to its pod: its role, its restart rule, and the id under which the shim keeps it.

use knoc_proto::pb::{self, RestartPolicy};

/// Identifies a container for the life of the shim. Ids are given out in the order in which containers are added, and
/// never given out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotId(u32);

impl SlotId {
    /// The id of the container that is added after `others` other ones.
    pub(crate) fn after(others: usize) -> Self {
        Self(u32::try_from(others).unwrap_or(u32::MAX))
    }
}

impl std::fmt::Display for SlotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a container is to its pod. [`super::plan`] says what follows from it. So far `pod.proto` can ask for init and main
/// containers only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs to success before the next container of the startup sequence starts.
    Init,
    /// A restartable init container: starts in the same sequence, then runs beside the main containers, which it
    /// outlives.
    Sidecar,
    /// The main containers decide the pod's phase.
    Main,
    /// Added to a running pod for debugging. Runs once and decides nothing.
    Ephemeral,
}

/// Whether a container is restarted when its program has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartRule {
    Always,
    OnFailure,
    Never,
}

impl RestartRule {
    /// What the pod's restart policy means for a container of this role.
    pub(crate) fn of(role: Role, policy: RestartPolicy) -> Self {
        match (role, policy) {
            (Role::Sidecar, _)
            | (Role::Main, RestartPolicy::Always | RestartPolicy::Unspecified) => Self::Always,
            // An init container that succeeded is done, whatever the policy.
            (Role::Init, RestartPolicy::Always | RestartPolicy::Unspecified)
            | (Role::Init | Role::Main, RestartPolicy::OnFailure) => Self::OnFailure,
            (Role::Ephemeral, _) | (Role::Init | Role::Main, RestartPolicy::Never) => Self::Never,
        }
    }

    /// Whether the container is restarted after its program ended with `code`. `unhealthy`: it was stopped because a probe
    /// failed.
    pub(crate) fn restarts(self, code: i32, unhealthy: bool) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0 || unhealthy,
            Self::Never => false,
        }
    }
}

/// A container as the pod asks for it: everything about it that no attempt changes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ContainerSpec {
    pub(crate) id: SlotId,
    pub(crate) role: Role,
    pub(crate) restart: RestartRule,
    pub(crate) container: pb::Container,
    pub(crate) image: pb::ResolvedImage,
}

impl ContainerSpec {
    pub(crate) fn name(&self) -> &str {
        &self.container.name
    }
}
