//! PURE: what the pod requests of Slurm by its annotations and resources (summed by the rule of KEP-753).

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::api::resource::Quantity};
use knoc_proto::pb;

use super::{
    carried::{PodSpec, ResourceRequirements},
    container::shape_resources,
    mpi,
    options::split,
};

/// The CPU of a pod that sets none.
const DEFAULT_CPU_MILLIS: i64 = 1000;

/// The annotations whose values are further sbatch options.
const FLAGS: &[&str] = &[
    "knoc.io/flags",
    "slurm-job.knoc.io/flags",
    "slurm-job.vk.io/flags",
    "slurm.hpk.io/flags",
];

/// What the pod asks for as a whole (KEP-2837), and its overhead. `None`: nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Whole {
    pub(super) requests: Option<pb::Resources>,
    pub(super) limits: Option<pb::Resources>,
    pub(super) overhead: Option<pb::Resources>,
}

impl Whole {
    pub(super) fn of(spec: PodSpec<'_>, problems: &mut Vec<String>) -> Self {
        let own = spec.resources.as_ref().map(ResourceRequirements::from);
        let mut list = |path: &str, list: Option<&BTreeMap<String, Quantity>>| {
            let mut relative = Vec::new();
            let resources = list.map(|list| shape_resources(list, &mut relative));
            let absolute = relative.iter();
            problems.extend(absolute.map(|problem| format!("spec.{path}: {problem}")));
            let extended = resources.iter().flat_map(|list| list.extended.keys());
            problems.extend(extended.map(|name| {
                format!("spec.{path}: {name} can be asked for by containers only, remove it here")
            }));
            resources.filter(|resources| *resources != pb::Resources::default())
        };
        Self {
            requests: list("resources", own.and_then(|own| own.requests.as_ref())),
            limits: list("resources", own.and_then(|own| own.limits.as_ref())),
            overhead: list("overhead", spec.overhead.as_ref()),
        }
    }
}

pub(super) fn request(
    pod: &Pod,
    containers: (&[pb::Container], &[pb::Container]),
    whole: &Whole,
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
    let (cpu_millis, memory_bytes, ephemeral_storage_bytes) = totals(containers, whole);
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
/// request): those of the pod as a whole, or else those of its containers. If the pod as a whole only requests memory, the limits
/// of its containers may be higher. The overhead is added to what is asked for.
fn totals((init, regular): (&[pb::Container], &[pb::Container]), whole: &Whole) -> (i64, i64, i64) {
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
    let nothing = pb::Resources::default();
    let requests = whole.requests.as_ref().unwrap_or(&nothing);
    let limits = whole.limits.as_ref().unwrap_or(&nothing);
    let overhead = whole.overhead.as_ref().unwrap_or(&nothing);
    let own_cpu = first(requests.cpu_millis, limits.cpu_millis);
    let cpu = first(first(own_cpu, cpu), DEFAULT_CPU_MILLIS);
    let memory = first(limits.memory_bytes, memory.max(requests.memory_bytes));
    // Where nothing is asked for, the site's default counts.
    let with = |amount: i64, more: i64| match amount {
        0 => 0,
        asked => asked.saturating_add(more),
    };
    (
        with(cpu, overhead.cpu_millis),
        with(memory, overhead.memory_bytes),
        with(storage, overhead.ephemeral_storage_bytes),
    )
}

/// What the pod requests of one resource by Kubernetes' rule: as a whole, or else its containers together; with the overhead.
/// `amount` computes the amount in a list of requests.
pub fn requested(shape: &pb::PodSpec, amount: impl Fn(&pb::Resources) -> i64) -> i64 {
    let of = |list: &Option<pb::Resources>| list.as_ref().map_or(0, &amount);
    let (init, regular) = (&shape.init_containers, &shape.containers);
    let base = match of(&shape.requests) {
        0 => over_containers(init, regular, |requests, _| amount(requests)),
        own => own,
    };
    base.saturating_add(of(&shape.overhead))
}

fn first(one: i64, other: i64) -> i64 {
    if one == 0 { other } else { one }
}

/// The most that runs at the same time (KEP-753): all containers together with the sidecars, or an init container together
/// with the sidecars before it. `amount` computes the amount of one container from its requests and limits.
fn over_containers(
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

    #[test]
    fn what_the_pod_asks_for_as_a_whole_comes_before_its_containers() {
        const MI: i64 = 1 << 20;
        let list = |cpu_millis, memory_bytes| {
            Some(pb::Resources {
                cpu_millis,
                memory_bytes,
                ..pb::Resources::default()
            })
        };
        let containers = [pb::Container {
            requests: list(500, 100 * MI),
            limits: list(0, 300 * MI),
            ..pb::Container::default()
        }];
        let of = |requests, limits, overhead| {
            let whole = Whole {
                requests,
                limits,
                overhead,
            };
            let (cpu, memory, storage) = totals((&[], &containers), &whole);
            assert_eq!(storage, 0);
            (cpu, memory / MI)
        };
        assert_eq!(of(None, None, None), (500, 300));
        assert_eq!(of(list(2000, 200 * MI), None, None), (2000, 300));
        assert_eq!(of(list(2000, 400 * MI), None, None), (2000, 400));
        assert_eq!(of(None, list(3000, 1000 * MI), None), (3000, 1000));
        assert_eq!(
            of(list(2000, 0), list(3000, 1000 * MI), list(250, 24 * MI)),
            (2250, 1024)
        );
        // A pod that asks for nothing has the site's default of memory.
        let whole = Whole {
            overhead: list(250, 24 * MI),
            ..Whole::default()
        };
        assert_eq!(totals((&[], &[]), &whole), (1250, 0, 0));
    }

    #[test]
    fn only_containers_ask_for_extended_resources() {
        let spec = serde_json::json!({
            "containers": [],
            "overhead": {"cpu": "1", "example.com/fpga": "1"},
            "resources": {"requests": {"nvidia.com/gpu": "1", "memory": "1Gi"}},
        });
        let spec: k8s_openapi::api::core::v1::PodSpec = serde_json::from_value(spec).unwrap();
        let mut problems = Vec::new();
        let whole = Whole::of((&spec).into(), &mut problems);
        let end = "can be asked for by containers only, remove it here";
        let expected = [
            format!("spec.resources: nvidia.com/gpu {end}"),
            format!("spec.overhead: example.com/fpga {end}"),
        ];
        assert_eq!(problems, expected);
        assert_eq!(whole.requests.unwrap().memory_bytes, 1 << 30);
        assert_eq!(whole.overhead.unwrap().cpu_millis, 1000);
    }

    #[test]
    fn an_annotation_that_sbatch_cannot_be_started_with_is_rejected_by_name() {
        let problems = |name: &str, value: &str| {
            let pod = serde_json::json!({
                "metadata": {"name": "p", "uid": "u", "annotations": {name: value}},
                "spec": {"containers": [{"name": "main", "image": "x"}]},
            });
            let pod: Pod = serde_json::from_value(pod).unwrap();
            crate::shape(&pod).map_or_else(|problems| problems, |_| Vec::new())
        };
        let long = "x".repeat(128 << 10);
        for (name, value) in [
            ("knoc.io/partition", "a\0b"),
            ("knoc.io/constraint", long.as_str()),
            ("knoc.io/dependency", "afterok:1\nx"),
            ("knoc.io/gres", "gpu:\u{1b}[2J"),
            ("knoc.io/flags", "'--mail-user=a\0b'"),
        ] {
            let found = problems(name, value);
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert!(found[0].starts_with(name), "{found:?}");
            assert!(found[0].len() < 300, "{name}: {}", found[0].len());
        }
        // Line breaks separate options, and blanks around a value are none of it.
        assert_eq!(problems("knoc.io/flags", "--a=1\n--b=2\n").len(), 0);
        assert_eq!(problems("knoc.io/qos", " high\n").len(), 0);
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
