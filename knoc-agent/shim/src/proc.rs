//! Reads `/proc`: the identity of processes and the tree below one. The calls block, but touch no disk.

use std::{collections::HashMap, fs};

/// One process of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    pub(crate) session: u32,
}

/// When `pid` started, in clock ticks since boot: together with the pid it identifies a process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    field(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, 19)
}

/// Whether `pid` does not exist any more, or only until its parent takes note of its end.
pub(crate) fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    let state = stat.ok().and_then(|stat| field::<char>(&stat, 0));
    state.is_none_or(|state| matches!(state, 'Z' | 'X'))
}

/// Whether `pid` is in the network namespace of this process.
pub(crate) fn same_network(pid: u32) -> bool {
    let name = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
    name("self").is_some_and(|own| name(&pid.to_string()) == Some(own))
}

/// All processes that `/proc` shows.
pub(crate) fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some(Process {
                pid,
                parent: field(&stat, 1)?,
                session: field(&stat, 3)?,
            })
        })
        .collect()
}

/// The processes below `root`, `root` not included. Cheap if the kernel lists children, even on a
/// node with many processes.
pub(crate) fn below(root: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut queue = vec![root];
    while let Some(parent) = queue.pop() {
        let Some(below) = children(parent) else {
            // The process has ended. If it is the root, the kernel has no such lists.
            if parent == root {
                return descendants(&all(), root);
            }
            continue;
        };
        queue.extend_from_slice(&below);
        found.extend(below);
    }
    found
}

/// The children of all threads of `pid`; `None` if the kernel does not list them.
fn children(pid: u32) -> Option<Vec<u32>> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let mut all = Vec::new();
    let mut listed = false;
    for thread in threads {
        // The thread may have ended in the meantime.
        let Ok(list) = fs::read_to_string(thread.path().join("children")) else {
            continue;
        };
        listed = true;
        all.extend(
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    listed.then_some(all)
}

/// PURE: the processes below `root` in `all`, `root` not included.
pub(crate) fn descendants(all: &[Process], root: u32) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for process in all {
        children
            .entry(process.parent)
            .or_default()
            .push(process.pid);
    }
    let mut found = Vec::new();
    let mut queue = vec![root];
    while let Some(parent) = queue.pop() {
        // Removed, so that no process is visited twice even if the table has a circle.
        for child in children.remove(&parent).unwrap_or_default() {
            found.push(child);
            queue.push(child);
        }
    }
    found
}

/// PURE: a numeric field of `/proc/PID/stat`, counted from the state (0), which follows the name in parentheses.
fn field<T: std::str::FromStr>(stat: &str, index: usize) -> Option<T> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_ascii_whitespace().nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_follow_a_name_with_anything_in_it() {
        let stat = "12 (a) b) S 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 777 23";
        assert_eq!(field::<u32>(stat, 1), Some(3));
        assert_eq!(field::<u64>(stat, 19), Some(777));
        assert!(start_time(std::process::id()).is_some_and(|time| time > 0));
        assert_eq!(start_time(0), None);
        assert!(has_ended(0) && !has_ended(std::process::id()));
    }

    #[test]
    fn the_lists_of_children_and_the_table_give_the_same_tree() {
        let parent = std::os::unix::process::parent_id();
        let own = std::process::id();
        assert!(below(parent).contains(&own));
        assert!(descendants(&all(), parent).contains(&own));
        assert!(!below(own).contains(&own));
    }

    #[test]
    fn the_tree_below() {
        let process = |pid, parent| Process {
            pid,
            parent,
            session: 0,
        };
        let all = [
            process(2, 1),
            process(3, 2),
            process(4, 3),
            process(5, 1),
            process(6, 6),
        ];
        let mut found = descendants(&all, 2);
        found.sort_unstable();
        assert_eq!(found, [3, 4]);
        assert_eq!(descendants(&all, 6), [6]);
    }
}
