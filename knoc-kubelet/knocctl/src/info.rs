//! `knocctl info`: shows the agent that answers and the resources of its site.

use std::process::ExitCode;

use knoc_proto::pb;

use super::{
    CtlError, Global,
    output::{self, fields, size, table},
    session::{Session, asked, next},
    view,
};

pub(super) async fn run(global: &Global) -> Result<ExitCode, CtlError> {
    let mut session = Session::open(global)?;
    let info = session.info().await?;
    let what = "ask the agent for its site's capacity";
    let watch = session.client.watch_node(pb::WatchNodeRequest {});
    let mut stream = asked(what, watch).await?;
    let node = next(what, &mut stream).await?;
    let value = || serde_json::json!({"agent": view::info(&info), "node": view::node(&node)});
    output::show(global.output, value, |wide| text(&info, &node, wide))?;
    Ok(ExitCode::SUCCESS)
}

fn text(info: &pb::AgentInfo, node: &pb::NodeInfo, wide: bool) -> String {
    let started = view::nanos(info.started_at)
        .map(view::whole)
        .unwrap_or_default();
    let health = node.scheduler.as_ref().map(health).unwrap_or_default();
    let nodes = format!("{} of {} available", node.nodes_available, node.nodes_total);
    let mut list = vec![
        ("Version", info.version.clone()),
        ("Site", info.site.clone()),
        ("Host", format!("{}@{}", info.user, info.hostname)),
        (
            "Scheduler",
            version(&info.scheduler, &info.scheduler_version),
        ),
        ("Health", health),
        ("Runtime", version(&info.runtime, &info.runtime_version)),
        ("Shims", info.shim_route.clone()),
        ("Nodes", nodes),
        ("CPUs", node.cpu.to_string()),
        ("Memory", size(node.memory_bytes)),
        ("Pods", format!("at most {}", info.pod_limit)),
        ("Cluster", info.cluster_id.clone()),
        ("Started", started),
    ];
    if !info.policy_problem.is_empty() {
        list.push(("Policy", info.policy_problem.clone()));
    }
    if wide {
        list.push(("State", info.state_dir.clone()));
        list.push(("Epoch", info.epoch.to_string()));
        list.push(("Own PIDs", info.pid_isolation.to_string()));
        list.push(("Can", info.capabilities.join(", ")));
    }
    let mut text = fields(0, &list);
    if !node.partitions.is_empty() {
        text.push('\n');
        text.push_str(&partitions(&node.partitions));
    }
    text
}

/// If the scheduler cannot be reached, this includes since when: the other values shown are as old.
fn health(health: &pb::SchedulerHealth) -> String {
    if health.reachable {
        return "reachable".to_owned();
    }
    let since = view::nanos(health.since).map(|at| format!(" since {}", view::whole(at)));
    view::joined(
        &format!("NOT REACHABLE{}", since.unwrap_or_default()),
        &health.message,
    )
}

fn partitions(list: &[pb::Partition]) -> String {
    let limit = |minutes: i64| match minutes {
        0 => "-".to_owned(),
        _ => output::span(minutes * 60),
    };
    let row = |partition: &pb::Partition| {
        let star = if partition.is_default { "*" } else { "" };
        let mut gres: Vec<_> = partition
            .gres
            .iter()
            .map(|(name, count)| format!("{name}:{count}"))
            .collect();
        gres.sort();
        vec![
            format!("{}{star}", partition.name),
            partition.state.clone(),
            partition.nodes.to_string(),
            partition.cpu.to_string(),
            size(partition.memory_bytes),
            limit(partition.default_time_minutes),
            limit(partition.max_time_minutes),
            gres.join(","),
        ]
    };
    let rows: Vec<_> = list.iter().map(row).collect();
    let headings = [
        "PARTITION",
        "STATE",
        "NODES",
        "CPUS",
        "MEMORY",
        "DEFAULT-TIME",
        "MAX-TIME",
        "GRES",
    ];
    table(&headings, &rows)
}

/// Name and version, such as `slurm 24.11.5`. Some versions begin with the name, which is not repeated.
fn version(name: &str, version: &str) -> String {
    if version.starts_with(name) {
        version.to_owned()
    } else {
        format!("{name} {version}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_scheduler_is_shown_with_its_time() {
        let away = pb::SchedulerHealth {
            since: 1_700_000_000_000_000_000,
            message: "squeue: timed out".into(),
            ..pb::SchedulerHealth::default()
        };
        assert_eq!(
            health(&away),
            "NOT REACHABLE since 2023-11-14 22:13:20Z: squeue: timed out"
        );
    }

    #[test]
    fn the_agent_and_its_site_are_shown() {
        let info = pb::AgentInfo {
            version: "0.1.0".into(),
            site: "trixie".into(),
            scheduler: "slurm".into(),
            scheduler_version: "slurm 24.11.5".into(),
            runtime: "apptainer".into(),
            runtime_version: "1.4.5".into(),
            hostname: "login".into(),
            user: "ann".into(),
            pod_limit: 900,
            shim_route: "shims dial the agent".into(),
            ..pb::AgentInfo::default()
        };
        let partition = pb::Partition {
            name: "main".into(),
            is_default: true,
            state: "up".into(),
            nodes: 3,
            cpu: 12,
            memory_bytes: 24 << 30,
            max_time_minutes: 2880,
            ..pb::Partition::default()
        };
        let node = pb::NodeInfo {
            cpu: 12,
            nodes_total: 3,
            nodes_available: 2,
            partitions: vec![partition],
            scheduler: Some(pb::SchedulerHealth {
                reachable: true,
                ..Default::default()
            }),
            ..pb::NodeInfo::default()
        };
        insta::assert_snapshot!(text(&info, &node, false));
    }
}
