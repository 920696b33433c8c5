//! PURE: what the pod requests of Slurm by its annotations and resources (summed by the rule of KEP-753).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use knoc_proto::pb;

use super::{mpi, options::split};

/// The CPU of a pod that sets none.
const DEFAULT_CPU_MILLIS: i64 = 1000;

/// The annotations whose values are further sbatch options.
const FLAGS: &[&str] = &[
    "knoc.io/flags",
    "slurm-job.knoc.io/flags",
    "slurm-job.vk.io/flags",
    "slurm.hpk.io/flags",
];

pub(super) fn request(
    pod: &Pod,
    init: &[pb::Container],
    regular: &[pb::Container],
    problems: &mut Vec<String>,
) -> pb::JobRequest {
    let empty = BTreeMap::new();
    let annotations = pod.metadata.annotations.as_ref().unwrap_or(&empty);
    let text = |name: &str| {
        annotations
            .get(&format!("knoc.io/{name}"))
            .map(|value| value.trim().to_owned())
    };
    let mut wrong = |name: &str, value: &str, allowed: &str| {
        problems.push(format!(
            "metadata.annotations[{name}]: `{value}` is not {allowed}"
        ));
    };
    let time_minutes = text("time").map_or(0, |value| {
        minutes(&value).unwrap_or_else(|| {
            wrong(
                "knoc.io/time",
                &value,
                "a time in minutes, HH:MM:SS, D-HH:MM:SS or like 90m, 2h, 1d",
            );
            0
        })
    });
    let ranks = mpi::asked(annotations, &mut wrong);
    let flags = flags(annotations, &mut wrong);
    let (cpu_millis, memory_bytes, ephemeral_storage_bytes) = totals(init, regular);
    pb::JobRequest {
        partition: text("partition").unwrap_or_default(),
        account: text("account").unwrap_or_default(),
        qos: text("qos").unwrap_or_default(),
        constraint: text("constraint").unwrap_or_default(),
        reservation: text("reservation").unwrap_or_default(),
        time_minutes,
        nodes: ranks.nodes,
        ntasks: ranks.ntasks,
        // The agent, not the kubelet, maps extended resources to `--gres`, because the mapping is in the site file.
        gres: text("gres").unwrap_or_default(),
        exclusive: text("exclusive").as_deref() == Some("true"),
        licenses: text("licenses").unwrap_or_default(),
        dependency: text("dependency").unwrap_or_default(),
        flags,
        cpu_millis,
        memory_bytes,
        ephemeral_storage_bytes,
        nice: 0,
        mpi: ranks.mpi,
    }
}

/// The options in all annotations of [`FLAGS`], in that order.
fn flags(
    annotations: &BTreeMap<String, String>,
    wrong: &mut impl FnMut(&str, &str, &str),
) -> Vec<String> {
    let mut flags = Vec::new();
    for name in FLAGS {
        let Some(value) = annotations.get(*name) else {
            continue;
        };
        match split(value) {
            Some(options) => flags.extend(options),
            None => wrong(name, value, "a list of options (a quote is not closed)"),
        }
    }
    flags
}

/// The totals of CPU (request, else limit, else 1), memory (limit, else request) and ephemeral storage (limit, else
/// request).
fn totals(init: &[pb::Container], regular: &[pb::Container]) -> (i64, i64, i64) {
    let cpu = over_containers(init, regular, |requests, limits| {
        first(requests.cpu_millis, limits.cpu_millis)
    });
    let memory = over_containers(init, regular, |requests, limits| {
        first(limits.memory_bytes, requests.memory_bytes)
    });
    let storage = over_containers(init, regular, |requests, limits| {
        first(
            limits.ephemeral_storage_bytes,
            requests.ephemeral_storage_bytes,
        )
    });
    (first(cpu, DEFAULT_CPU_MILLIS), memory, storage)
}

fn first(one: i64, other: i64) -> i64 {
    if one == 0 { other } else { one }
}

/// The most that runs at the same time (KEP-753): all containers together with the sidecars, or an init container together
/// with the sidecars before it. `amount` computes the amount of one container from its requests and limits.
pub fn over_containers(
    init: &[pb::Container],
    regular: &[pb::Container],
    amount: impl Fn(&pb::Resources, &pb::Resources) -> i64,
) -> i64 {
    let of = |container: &pb::Container| {
        let nothing = pb::Resources::default();
        amount(
            container.requests.as_ref().unwrap_or(&nothing),
            container.limits.as_ref().unwrap_or(&nothing),
        )
    };
    let (mut sidecars, mut most) = (0i64, 0i64);
    for container in init {
        let needs = sidecars.saturating_add(of(container));
        most = most.max(needs);
        if container.is_sidecar() {
            sidecars = needs;
        }
    }
    let sum = regular.iter().map(of).fold(sidecars, i64::saturating_add);
    most.max(sum)
}

/// Parses a time in minutes, rounded up: Slurm's forms (`M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`; sbatch(1)) and
/// `90m`, `2h`, `1d`, `30s`.
fn minutes(text: &str) -> Option<i64> {
    let seconds = seconds(text)?;
    (seconds > 0).then(|| super::quantity::ceil_div(seconds, 60))
}

fn seconds(text: &str) -> Option<i64> {
    if let Some(last) = text.chars().last().filter(char::is_ascii_alphabetic) {
        let unit = match last {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return None,
        };
        return number(&text[..text.len() - 1])?.checked_mul(unit);
    }
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(number(days)?), rest),
        None => (None, text),
    };
    let parts = rest.split(':').map(number).collect::<Option<Vec<_>>>()?;
    let seconds = match (days.is_some(), parts.as_slice()) {
        (false, [m]) => m.checked_mul(60)?,
        (false, [m, s]) => m.checked_mul(60)?.checked_add(*s)?,
        (true, [h]) => h.checked_mul(3600)?,
        (true, [h, m]) => h.checked_mul(3600)?.checked_add(m.checked_mul(60)?)?,
        (_, [h, m, s]) => h
            .checked_mul(3600)?
            .checked_add(m.checked_mul(60)?)?
            .checked_add(*s)?,
        _ => return None,
    };
    days.unwrap_or(0).checked_mul(86_400)?.checked_add(seconds)
}

fn number(text: &str) -> Option<i64> {
    text.chars()
        .all(|c| c.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_every_form() {
        for (text, expected) in [
            ("90", Some(90)),
            ("1:30", Some(2)),
            ("2:00:00", Some(120)),
            ("1-0", Some(1440)),
            ("1-2:30", Some(1590)),
            ("1-00:00:01", Some(1441)),
            ("90m", Some(90)),
            ("2h", Some(120)),
            ("1d", Some(1440)),
            ("30s", Some(1)),
            ("0", None),
            ("", None),
            ("-5", None),
            ("1h30m", None),
            ("1:2:3:4", None),
            ("abc", None),
        ] {
            assert_eq!(minutes(text), expected, "{text}");
        }
    }

    #[test]
    fn sidecars_count_beside_the_containers_and_beside_what_starts_after_them() {
        let container = |cpu_millis, policy: pb::RestartPolicy| pb::Container {
            requests: Some(pb::Resources {
                cpu_millis,
                ..pb::Resources::default()
            }),
            restart_policy: policy.into(),
            ..pb::Container::default()
        };
        let init = |cpu| container(cpu, pb::RestartPolicy::Unspecified);
        let sidecar = |cpu| container(cpu, pb::RestartPolicy::Always);
        let total = |init: &[pb::Container], cpu| {
            over_containers(init, &[regular(cpu)], |requests, _| requests.cpu_millis)
        };
        assert_eq!(total(&[init(5), init(3)], 4), 5);
        assert_eq!(total(&[sidecar(2), init(5)], 4), 7);
        assert_eq!(total(&[init(5), sidecar(2)], 4), 6);
        assert_eq!(total(&[sidecar(2), init(1), sidecar(3)], 4), 9);
        assert_eq!(total(&[sidecar(2), sidecar(3), init(9)], 4), 14);
    }

    fn regular(cpu_millis: i64) -> pb::Container {
        pb::Container {
            requests: Some(pb::Resources {
                cpu_millis,
                ..pb::Resources::default()
            }),
            ..pb::Container::default()
        }
    }
}
