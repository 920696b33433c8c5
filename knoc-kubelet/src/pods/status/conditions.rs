//! PURE: the conditions that the kubelet owns. `lastTransitionTime` changes only with the condition's status.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition};
use knoc_proto::{
    pb::{self, PodPhase},
    pod::RESTARTING_ALL,
};

use super::{Input, containers::Statuses, observed_generation, phase::Phase, seconds};
use crate::pods::resize::{self, RESIZE_PENDING};

/// Status, reason and message of a condition; None means True without a reason.
type Why = Option<(bool, &'static str, String)>;

pub(super) fn conditions(
    input: &Input<'_>,
    phase: Phase,
    statuses: &Statuses,
) -> Vec<PodCondition> {
    let containers_ready = containers_ready(phase, statuses);
    let ready = if input.unreachable && !matches!(phase, Phase::Succeeded | Phase::Failed) {
        Some((
            false,
            "AgentUnreachable",
            "the link to the agent is down, the job continues".to_owned(),
        ))
    } else {
        containers_ready.clone().or_else(|| gates(input))
    };
    let mut list = vec![
        condition(input, "PodReadyToStartContainers", start_containers(input)),
        condition(input, "Initialized", initialized(phase, statuses)),
        condition(input, "Ready", ready),
        condition(input, "ContainersReady", containers_ready),
        condition(input, "PodScheduled", None),
    ];
    if !matches!(phase, Phase::Succeeded | Phase::Failed) && resize::is_asked(input.pod) {
        let why = Some((true, "Infeasible", resize::INFEASIBLE.to_owned()));
        list.push(condition(input, RESIZE_PENDING, why));
    }
    if may_restart_all(input.pod) {
        let why = Some(restarting_all(phase, statuses));
        list.push(condition(input, "AllContainersRestarting", why));
    }
    let outcome = input
        .observed
        .and_then(|observed| observed.outcome.as_ref());
    if let Some(outcome) = outcome.filter(|outcome| outcome.disruption) {
        let why = Some((true, "TerminationByKubelet", outcome.message.clone()));
        list.push(condition(input, "DisruptionTarget", why));
    }
    list
}

fn condition(input: &Input<'_>, type_: &str, why: Why) -> PodCondition {
    let (value, reason, message) = match why {
        None => (true, None, None),
        Some((value, reason, message)) => (
            value,
            Some(reason.to_owned()).filter(|text| !text.is_empty()),
            Some(message).filter(|text| !text.is_empty()),
        ),
    };
    let status = if value { "True" } else { "False" };
    let before = input.pod.status.as_ref().and_then(|status| {
        status
            .conditions
            .as_ref()?
            .iter()
            .find(|before| before.type_ == type_)
    });
    let since = before
        .filter(|before| before.status == status)
        .and_then(|before| before.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason,
        message,
        last_transition_time: since.or_else(|| Some(seconds(input.now))),
        observed_generation: observed_generation(
            input,
            before.and_then(|before| before.observed_generation),
        ),
        ..PodCondition::default()
    }
}

/// True while the pod has an allocation.
fn start_containers(input: &Input<'_>) -> Why {
    let phase = input.observed.map(pb::PodObserved::phase);
    match phase {
        Some(PodPhase::Running | PodPhase::Stopping) => None,
        Some(PodPhase::Lost) | None if before_is_true(input) => None,
        Some(
            PodPhase::Unspecified
            | PodPhase::Accepted
            | PodPhase::Staging
            | PodPhase::Throttled
            | PodPhase::Submitting
            | PodPhase::Queued
            | PodPhase::Lost
            | PodPhase::Finished,
        )
        | None => Some((false, "", String::new())),
    }
}

fn before_is_true(input: &Input<'_>) -> bool {
    let conditions = input
        .pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|list| {
        list.iter()
            .any(|one| one.type_ == "PodReadyToStartContainers" && one.status == "True")
    })
}

fn initialized(phase: Phase, statuses: &Statuses) -> Why {
    if phase == Phase::Succeeded {
        return Some((true, "PodCompleted", String::new()));
    }
    // A sidecar that is being restarted does not undo the initialization.
    if statuses.any_regular_started() {
        return None;
    }
    let unfinished = names(&statuses.init, |status| !statuses.has_opened(status))?;
    let text = format!("containers with incomplete status: [{unfinished}]");
    Some((false, "ContainersNotInitialized", text))
}

/// Sidecars count as the regular containers do.
fn containers_ready(phase: Phase, statuses: &Statuses) -> Why {
    match phase {
        Phase::Succeeded => Some((false, "PodCompleted", String::new())),
        Phase::Failed => Some((false, "PodFailed", String::new())),
        Phase::Pending | Phase::Running => {
            let sidecars = statuses.init.iter();
            let sidecars = sidecars.filter(|status| statuses.is_sidecar(status));
            let unready = names(sidecars.chain(&statuses.regular), |status| !status.ready)?;
            let text = format!("containers with unready status: [{unready}]");
            Some((false, "ContainersNotReady", text))
        }
    }
}

/// Whether the exit of a container may have all containers of the pod begin anew. Only such pods have the condition.
fn may_restart_all(pod: &Pod) -> bool {
    let containers = pod.spec.iter().flat_map(|spec| {
        let init = spec.init_containers.iter().flatten();
        init.chain(&spec.containers)
    });
    let mut rules = containers.flat_map(|one| one.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == "RestartAllContainers")
}

/// True while containers are ended that begin anew.
fn restarting_all(phase: Phase, statuses: &Statuses) -> (bool, &'static str, String) {
    let reason = match phase {
        Phase::Succeeded => "PodCompleted",
        Phase::Failed => "PodFailed",
        Phase::Pending | Phase::Running => {
            let mut all = statuses.init.iter().chain(&statuses.regular);
            let ends = |status: &ContainerStatus| {
                let waiting = status
                    .state
                    .as_ref()
                    .and_then(|state| state.waiting.as_ref());
                waiting.is_some_and(|one| one.reason.as_deref() == Some(RESTARTING_ALL))
            };
            if all.any(ends) {
                let message = "container exited with restart policy rule".to_owned();
                return (true, "RestartAllContainersStarted", message);
            }
            ""
        }
    };
    (false, reason, String::new())
}

/// The pod's readiness gates, conditions that other controllers set.
fn gates(input: &Input<'_>) -> Why {
    let gates = input.pod.spec.as_ref()?.readiness_gates.as_ref()?;
    let conditions = input
        .pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    let closed: Vec<_> = gates
        .iter()
        .filter_map(|gate| {
            let kind = &gate.condition_type;
            let mut list = conditions.into_iter().flatten();
            match list.find(|one| one.type_ == *kind) {
                None => Some(format!(
                    "corresponding condition of pod readiness gate \"{kind}\" does not exist."
                )),
                Some(one) if one.status == "True" => None,
                Some(one) => Some(format!(
                    "the status of pod readiness gate \"{kind}\" is not \"True\", but {}",
                    one.status
                )),
            }
        })
        .collect();
    if closed.is_empty() {
        None
    } else {
        Some((false, "ReadinessGatesNotReady", closed.join(", ")))
    }
}

/// The names of the containers that fit, separated by spaces; None if none fits.
fn names<'a>(
    list: impl IntoIterator<Item = &'a ContainerStatus>,
    fits: impl Fn(&ContainerStatus) -> bool,
) -> Option<String> {
    let names: Vec<_> = list
        .into_iter()
        .filter(|status| fits(status))
        .map(|status| status.name.as_str())
        .collect();
    if names.is_empty() {
        None
    } else {
        Some(names.join(" "))
    }
}
