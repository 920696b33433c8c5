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

/// What a container is to its pod. [`super::plan`] says what follows from it.
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
    /// All containers of the pod begin anew.
    All,
    OnFailure,
    Never,
}

impl RestartRule {
    /// What the restart policy of the pod, or the container's own, means for a container of this role.
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
            Self::Always | Self::All => true,
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

    /// Whether one of its exits may have all containers of the pod begin anew.
    pub(crate) fn may_restart_all(&self) -> bool {
        let mut rules = self.container.restart_rules.iter();
        self.restart == RestartRule::All || rules.any(|rule| rule.restart_all)
    }

    /// The rule by which the container is restarted, or not, now that its program has ended with `code`; `None`: it has not
    /// ended. The first rule about the exit code comes before every policy, but an init container that succeeded is done,
    /// unless all containers are to begin anew.
    pub(crate) fn restart_after(&self, code: Option<i32>) -> RestartRule {
        let mut rules = self.container.restart_rules.iter();
        let rule = code.and_then(|code| rules.find(|rule| rule.names(code)));
        match rule {
            Some(rule) if rule.restart_all => RestartRule::All,
            Some(_) if self.role != Role::Init || code != Some(0) => RestartRule::Always,
            Some(_) | None => self.restart,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(role: Role, policy: RestartPolicy, codes: &[i32]) -> ContainerSpec {
        ContainerSpec {
            id: SlotId::after(0),
            role,
            restart: RestartRule::of(role, policy),
            container: pb::Container {
                restart_rules: vec![pb::RestartRule {
                    not_in: false,
                    exit_codes: codes.to_vec(),
                    restart_all: false,
                }],
                ..pb::Container::default()
            },
            image: pb::ResolvedImage::default(),
        }
    }

    #[test]
    fn a_rule_about_the_exit_code_comes_before_the_policy() {
        let main = spec(Role::Main, RestartPolicy::Never, &[42, 0]);
        assert_eq!(main.restart_after(None), RestartRule::Never);
        assert_eq!(main.restart_after(Some(42)), RestartRule::Always);
        assert_eq!(main.restart_after(Some(0)), RestartRule::Always);
        assert_eq!(main.restart_after(Some(1)), RestartRule::Never);
        let always = spec(Role::Main, RestartPolicy::Always, &[42]);
        assert_eq!(always.restart_after(Some(1)), RestartRule::Always);
    }

    #[test]
    fn an_init_container_that_succeeded_is_done_whatever_the_rules_say() {
        let init = spec(Role::Init, RestartPolicy::Never, &[0, 42]);
        assert_eq!(init.restart_after(Some(42)), RestartRule::Always);
        assert_eq!(init.restart_after(Some(0)), RestartRule::Never);
    }

    #[test]
    fn the_first_rule_about_the_exit_code_says_whether_all_containers_begin_anew() {
        for role in [Role::Init, Role::Sidecar, Role::Main] {
            let mut one = spec(role, RestartPolicy::Never, &[3]);
            one.container.restart_rules.push(pb::RestartRule {
                not_in: true,
                exit_codes: vec![1],
                restart_all: true,
            });
            assert_eq!(one.restart_after(Some(3)), RestartRule::Always, "{role:?}");
            assert_eq!(one.restart_after(Some(0)), RestartRule::All, "{role:?}");
            assert_ne!(one.restart_after(Some(1)), RestartRule::All, "{role:?}");
            assert_ne!(one.restart_after(None), RestartRule::All, "{role:?}");
        }
    }
}
