//! PURE: parses sinfo's output into capacity and partitions.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use knoc_proto::pb;

use super::{
    Settings,
    parse::{minutes, unexpected},
    shape::PartitionLimits,
};

/// `sinfo -N -o`: node, partition, up or down, time limits, state, CPUs, MiB of memory, MiB of tmp,
/// gres, features.
pub(super) const SINFO_FORMAT: &str = "%N|%P|%a|%l|%L|%t|%c|%m|%d|%G|%f";
const MIB: i64 = 1 << 20;

/// One node in one partition.
struct Line<'a> {
    node: &'a str,
    partition: &'a str,
    is_default: bool,
    up: &'a str,
    max_minutes: Option<i64>,
    default_minutes: Option<i64>,
    available: bool,
    cpu: i64,
    memory: i64,
    tmp: i64,
    gres: BTreeMap<String, i64>,
    features: Vec<String>,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let columns: Vec<&str> = line.split('|').collect();
        let [
            node,
            partition,
            up,
            limit,
            default,
            state,
            cpu,
            memory,
            tmp,
            gres,
            features,
        ] = *columns
        else {
            return None;
        };
        // `+` after a number means that the nodes of a line differ; with -N each line is one node.
        let number = |text: &str| text.trim_end_matches('+').parse::<i64>().unwrap_or(0);
        let name = partition.trim_end_matches('*');
        Some(Self {
            node,
            partition: name,
            is_default: name.len() < partition.len(),
            up,
            max_minutes: minutes(limit),
            default_minutes: minutes(default),
            available: available(state),
            cpu: number(cpu),
            memory: number(memory).saturating_mul(MIB),
            tmp: number(tmp).saturating_mul(MIB),
            gres: parse_gres(gres),
            features: names(features),
        })
    }
}

/// Whether a job submitted today can start there sooner or later. Flags follow the state: `*` not
/// responding, `~` powered down (wakes up for a job), `$` maintenance.
fn available(state: &str) -> bool {
    let word = state.trim_end_matches(['*', '~', '#', '%', '$', '@', '^', '!', '-']);
    let usable = [
        "idle", "mix", "alloc", "comp", "resv", "plnd", "npc", "power",
    ];
    !state.ends_with(['*', '$']) && usable.iter().any(|usable| word.starts_with(usable))
}

/// Parses `gpu:fake:2(S:0),fpga:1` into counts by name, and by `name:type` if there is a type.
fn parse_gres(text: &str) -> BTreeMap<String, i64> {
    let mut all = BTreeMap::new();
    let mut depth = 0_u32;
    let outside = text.chars().filter(|c| match c {
        '(' => {
            depth += 1;
            false
        }
        ')' => {
            depth = depth.saturating_sub(1);
            false
        }
        _ => depth == 0,
    });
    for item in outside.collect::<String>().split(',') {
        let (name, count) = match *item.split(':').collect::<Vec<_>>() {
            [name] if !name.is_empty() => (name.to_owned(), Some(1)),
            [name, count] => (name.to_owned(), amount(count)),
            [name, kind, count] => {
                *all.entry(format!("{name}:{kind}")).or_default() += amount(count).unwrap_or(0);
                (name.to_owned(), amount(count))
            }
            _ => continue,
        };
        *all.entry(name).or_default() += count.unwrap_or(0);
    }
    all
}

/// Parses `2`, `4K`, `1M` or `16G`.
fn amount(text: &str) -> Option<i64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text.get(digits.len()..)? {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<i64>().ok()?.checked_mul(factor)
}

fn names(text: &str) -> Vec<String> {
    let names = text
        .split(',')
        .filter(|name| !name.is_empty() && *name != "(null)");
    names.map(str::to_owned).collect()
}

/// Checks that the text is sinfo's output. An empty text is: sinfo shows no nodes to a user who may
/// not see them.
pub(super) fn check(text: &str) -> Result<(), String> {
    match text.lines().find(|line| !line.trim().is_empty()) {
        Some(first) if !text.lines().any(|line| Line::parse(line).is_some()) => {
            Err(unexpected(first))
        }
        Some(_) | None => Ok(()),
    }
}

/// The capacity of all partitions that the site offers (each node counted once), and the
/// partitions.
#[must_use]
pub(super) fn node_info(text: &str, site: &Settings) -> pb::NodeInfo {
    let lines: Vec<Line<'_>> = text.lines().filter_map(Line::parse).collect();
    let offered = |line: &&Line<'_>| offered(line, site);
    let mut info = pb::NodeInfo::default();
    let mut seen = HashMap::new();
    for line in lines.iter().filter(offered) {
        // A node counts if any of its partitions can use it now.
        let usable = line.available && line.up == "up";
        *seen.entry(line.node).or_insert(false) |= usable;
    }
    // Resources that the site has none of are included too: from these names the kubelet knows which ones are the site's.
    let mapped = site.gres.keys().map(|resource| (resource.clone(), 0));
    info.extended.extend(mapped);
    let mut counted = BTreeSet::new();
    for line in lines.iter().filter(offered) {
        if !counted.insert(line.node) {
            continue;
        }
        info.nodes_total += 1;
        if seen.get(line.node).copied().unwrap_or(false) {
            info.nodes_available += 1;
            info.cpu += line.cpu;
            info.memory_bytes += line.memory;
            info.ephemeral_storage_bytes += line.tmp;
            for (resource, name) in &site.gres {
                let amount = line.gres.get(name).copied().unwrap_or(0);
                *info.extended.entry(resource.clone()).or_default() += amount;
            }
        }
    }
    info.partitions = partitions(lines.iter().filter(offered));
    info
}

fn partitions<'a>(lines: impl Iterator<Item = &'a Line<'a>>) -> Vec<pb::Partition> {
    let mut all: BTreeMap<&str, pb::Partition> = BTreeMap::new();
    for line in lines {
        let partition = all.entry(line.partition).or_insert_with(|| pb::Partition {
            name: line.partition.to_owned(),
            is_default: line.is_default,
            state: line.up.to_owned(),
            max_time_minutes: line.max_minutes.unwrap_or(0),
            default_time_minutes: line.default_minutes.unwrap_or(0),
            ..Default::default()
        });
        partition.nodes += 1;
        if !line.available {
            continue;
        }
        partition.cpu += line.cpu;
        partition.memory_bytes += line.memory;
        for (name, amount) in &line.gres {
            *partition.gres.entry(name.clone()).or_default() += amount;
        }
        for feature in &line.features {
            if !partition.features.contains(feature) {
                partition.features.push(feature.clone());
            }
        }
    }
    all.into_values().collect()
}

/// What a job needs to know about the partitions: time limits, and the largest `TmpDisk`.
#[must_use]
pub(super) fn limits(text: &str, site: &Settings) -> Vec<PartitionLimits> {
    let mut all: BTreeMap<&str, PartitionLimits> = BTreeMap::new();
    let lines = text.lines().filter_map(Line::parse);
    for line in lines.filter(|line| offered(line, site)) {
        let limits = all
            .entry(line.partition)
            .or_insert_with(|| PartitionLimits {
                name: line.partition.to_owned(),
                is_default: line.is_default,
                default_minutes: line.default_minutes.filter(|minutes| *minutes > 0),
                max_minutes: line.max_minutes.filter(|minutes| *minutes > 0),
                tmp_mib: 0,
            });
        // Nodes that are down count too, since they will be back.
        limits.tmp_mib = limits.tmp_mib.max(line.tmp / MIB);
    }
    all.into_values().collect()
}

/// Whether the site offers the line's partition.
fn offered(line: &Line<'_>, site: &Settings) -> bool {
    let policy = site.policy.now();
    let names = &policy.partitions;
    names.is_empty() || names.iter().any(|name| name == line.partition)
}

#[cfg(test)]
mod tests;
