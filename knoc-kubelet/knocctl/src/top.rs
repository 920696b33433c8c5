//! `knocctl top`: shows what running pods and their containers use. It measures twice to compute the CPU rate.

use std::{collections::HashMap, process::ExitCode, time::Duration};

use futures::TryStreamExt as _;
use jiff::Timestamp;
use knoc_proto::pb;
use serde_json::{Value, json};

use super::{
    CtlError, Global, find,
    output::{self, Format, span, table},
    session::{DEADLINE, Session},
    view,
};

#[derive(Debug, clap::Args)]
pub(super) struct Top {
    /// Shows only this pod
    #[arg(value_name = "POD")]
    pod: Option<String>,
    /// Shows one line per container
    #[arg(short, long)]
    containers: bool,
    /// Seconds between the two measurements from which the CPU use is computed
    #[arg(long, default_value_t = 2, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
}

impl Top {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let uids = match &self.pod {
            Some(wanted) => {
                let pod = find::one(&mut session, global.namespace.as_deref(), wanted).await?;
                vec![pod.uid]
            }
            None => Vec::new(),
        };
        let first = stats(&mut session, &uids).await?;
        tokio::time::sleep(Duration::from_secs(self.interval)).await;
        let second = stats(&mut session, &uids).await?;
        let mut pods = measure(&first, second);
        if self.pod.is_none()
            && let Some(namespace) = &global.namespace
        {
            pods.retain(|pod| pod.namespace == *namespace);
        }
        if pods.is_empty() && matches!(global.output, Format::Table | Format::Wide) {
            output::complain("no running pod has been measured");
            return Ok(ExitCode::SUCCESS);
        }
        let value = || Value::Array(pods.iter().map(json_of).collect());
        output::show(global.output, value, |wide| {
            listing(&pods, self.containers, wide, Timestamp::now())
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

async fn stats(session: &mut Session, uids: &[String]) -> Result<Vec<pb::PodStats>, CtlError> {
    const WHAT: &str = "measure the pods";
    let request = pb::GetStatsRequest {
        uids: uids.to_vec(),
    };
    let asked = async {
        let answer = session.client.get_stats(request).await?;
        answer.into_inner().try_collect().await
    };
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(answer) => answer.map_err(|source| CtlError::Agent {
            what: WHAT.to_owned(),
            source,
        }),
        Err(_) => Err(CtlError::Timeout {
            what: WHAT.to_owned(),
            seconds: DEADLINE.as_secs(),
        }),
    }
}

/// The use of a pod or a container.
#[derive(Debug, Clone, PartialEq)]
struct Measured {
    name: String,
    started_at: i64,
    /// CPU time per second; `None` if it was measured only once, or restarted in between.
    nano_cores: Option<u64>,
    usage: pb::Usage,
}

#[derive(Debug, Clone, PartialEq)]
struct Pod {
    namespace: String,
    uid: String,
    whole: Measured,
    containers: Vec<Measured>,
}

/// PURE: the second measurement with the rates since the first, sorted by namespace and name.
fn measure(first: &[pb::PodStats], second: Vec<pb::PodStats>) -> Vec<Pod> {
    let known: HashMap<&str, &pb::PodStats> =
        first.iter().map(|pod| (pod.uid.as_str(), pod)).collect();
    let mut pods: Vec<Pod> = second
        .into_iter()
        .map(|pod| {
            let before = known.get(pod.uid.as_str());
            let container = |one: pb::ContainerStats| {
                let before = before.and_then(|pod| {
                    let mut same = pod.containers.iter();
                    same.find(|other| other.name == one.name)
                });
                let before = before.and_then(|one| Some((one.started_at, one.usage?)));
                measured(before, one.name, one.started_at, one.usage)
            };
            let whole = before.and_then(|pod| Some((pod.started_at, pod.usage?)));
            Pod {
                containers: pod.containers.into_iter().map(container).collect(),
                whole: measured(whole, pod.name, pod.started_at, pod.usage),
                namespace: pod.namespace,
                uid: pod.uid,
            }
        })
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.whole.name).cmp(&(&b.namespace, &b.whole.name)));
    pods
}

fn measured(
    before: Option<(i64, pb::Usage)>,
    name: String,
    started_at: i64,
    usage: Option<pb::Usage>,
) -> Measured {
    let usage = usage.unwrap_or_default();
    let nano_cores = before
        .filter(|(started, _)| *started == started_at)
        .and_then(|(_, before)| {
            let nanos = u128::try_from(usage.time - before.time).ok()?;
            let used = usage.cpu_nanoseconds.checked_sub(before.cpu_nanoseconds)?;
            let rate = (u128::from(used) * 1_000_000_000).checked_div(nanos)?;
            u64::try_from(rate).ok()
        });
    Measured {
        name,
        started_at,
        nano_cores,
        usage,
    }
}

fn listing(pods: &[Pod], containers: bool, wide: bool, now: Timestamp) -> String {
    let mut headings = vec!["NAMESPACE", "NAME"];
    if containers {
        headings.push("CONTAINER");
    }
    headings.extend(["CPU", "MEMORY", "CPU TIME", "MEASURED"]);
    if wide {
        headings.extend(["RSS", "SWAP", "PROCESSES", "UID"]);
    }
    let mut rows = Vec::new();
    for pod in pods {
        let shown = if containers {
            pod.containers.as_slice()
        } else {
            std::slice::from_ref(&pod.whole)
        };
        for one in shown {
            let mut row = vec![pod.namespace.clone(), pod.whole.name.clone()];
            if containers {
                row.push(one.name.clone());
            }
            row.extend(cells(one, now));
            if wide {
                row.extend([
                    mebibytes(one.usage.rss_bytes),
                    mebibytes(one.usage.swap_bytes),
                    one.usage.process_count.to_string(),
                    pod.uid.clone(),
                ]);
            }
            rows.push(row);
        }
    }
    table(&headings, &rows)
}

fn cells(one: &Measured, now: Timestamp) -> [String; 4] {
    let cpu = one
        .nano_cores
        .map(|cores| format!("{}m", cores.div_ceil(1_000_000)));
    let spent = i64::try_from(one.usage.cpu_nanoseconds / 1_000_000_000).unwrap_or(i64::MAX);
    let ago = view::nanos(one.usage.time).map(|at| now.duration_since(at).as_secs());
    [
        cpu.unwrap_or_else(|| "-".to_owned()),
        mebibytes(one.usage.working_set_bytes),
        span(spent),
        ago.map_or_else(|| "-".to_owned(), |ago| format!("{} ago", span(ago.max(0)))),
    ]
}

fn mebibytes(bytes: u64) -> String {
    format!("{}Mi", bytes.div_ceil(1 << 20))
}

fn json_of(pod: &Pod) -> Value {
    let mut value = usage_of(&pod.whole);
    value["namespace"] = pod.namespace.as_str().into();
    value["uid"] = pod.uid.as_str().into();
    let containers: Vec<Value> = pod.containers.iter().map(usage_of).collect();
    value["containers"] = containers.into();
    value
}

fn usage_of(one: &Measured) -> Value {
    let usage = &one.usage;
    let time = |at: i64| view::nanos(at).map(|at| at.to_string());
    let mut value = json!({
        "name": one.name,
        "time": time(usage.time),
        "startedAt": time(one.started_at),
        "cpu": {"coreNanoSeconds": usage.cpu_nanoseconds},
        "memory": {
            "workingSetBytes": usage.working_set_bytes,
            "usageBytes": usage.usage_bytes,
            "rssBytes": usage.rss_bytes,
            "swapBytes": usage.swap_bytes,
            "pageFaults": usage.page_faults,
            "majorPageFaults": usage.major_page_faults,
        },
        "processes": usage.process_count,
    });
    if let Some(cores) = one.nano_cores {
        value["cpu"]["nanoCores"] = cores.into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn usage(time: i64, cpu: u64) -> pb::Usage {
        pb::Usage {
            time,
            cpu_nanoseconds: cpu,
            working_set_bytes: (10 << 20) + 1,
            rss_bytes: 4 << 20,
            process_count: 2,
            ..pb::Usage::default()
        }
    }

    fn pod(name: &str, time: i64, cpu: u64, started_at: i64) -> pb::PodStats {
        pb::PodStats {
            uid: format!("uid-{name}"),
            namespace: "team".to_owned(),
            name: name.to_owned(),
            started_at: SECOND,
            usage: Some(usage(time, cpu)),
            containers: vec![pb::ContainerStats {
                name: "main".to_owned(),
                started_at,
                usage: Some(usage(time, cpu / 2)),
            }],
        }
    }

    fn sample() -> Vec<Pod> {
        let first = [
            pod("web", 100 * SECOND, 0, 1),
            pod("cut", 50 * SECOND, 7, 1),
        ];
        let second = vec![
            pod("web", 102 * SECOND, 3_000_000_001, 1),
            pod("new", 102 * SECOND, 5, 1),
            pod("cut", 50 * SECOND, 7, 1),
        ];
        measure(&first, second)
    }

    #[test]
    fn rates_need_two_measurements_of_the_same_attempt() {
        let rates: Vec<_> = sample().iter().map(|pod| pod.whole.nano_cores).collect();
        // "cut" has no connected shim, so both measurements are the same; "new" was measured only once.
        assert_eq!(rates, [None, None, Some(1_500_000_000)]);
        let restarted = measure(
            &[pod("web", SECOND, 10, 1)],
            vec![pod("web", 2 * SECOND, 20, 2)],
        );
        assert_eq!(restarted[0].containers[0].nano_cores, None);
        assert_eq!(restarted[0].whole.nano_cores, Some(10));
    }

    #[test]
    fn each_pod_or_container_has_one_line() {
        let now = Timestamp::from_second(105).unwrap();
        insta::assert_snapshot!(listing(&sample(), false, false, now));
        insta::assert_snapshot!(listing(&sample(), true, true, now));
    }

    #[test]
    fn a_pod_is_complete_in_json() {
        insta::assert_snapshot!(serde_json::to_string_pretty(&json_of(&sample()[2])).unwrap());
    }
}
