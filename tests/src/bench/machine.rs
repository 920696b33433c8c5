//! A description of the machine, and the memory and processor time of processes. It contains no host name and no path.

use std::{collections::HashMap, fs, path::PathBuf};

/// Describes processors, memory and kernel in one line.
pub(super) fn describe() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown processor", |rest| {
        rest.trim_start_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = memory
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let kernel = rustix::system::uname();
    let kernel = kernel.release().to_string_lossy();
    let kernel = kernel.split('-').next().unwrap_or_default().to_owned();
    format!(
        "{cores} cores ({model}), {} GiB of memory, Linux {kernel}",
        kib.div_ceil(1 << 20)
    )
}

/// A running process.
struct Process {
    folder: PathBuf,
    pid: u32,
}

impl Process {
    /// The processes of the program that have `word` among their arguments, or all if `word` is empty.
    fn all(program: &str, word: &str) -> impl Iterator<Item = Self> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(move |entry| {
            let folder = entry.path();
            let comm = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            let cmdline = fs::read(folder.join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
            let named = word.is_empty() || cmdline.split('\0').any(|argument| argument == word);
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (comm.trim_end() == program && named).then_some(Self { folder, pid })
        })
    }

    /// A value of `/proc/PID/status` in KiB.
    fn memory(&self, line: &str) -> Option<u64> {
        let status = fs::read_to_string(self.folder.join("status")).ok()?;
        let value = status
            .lines()
            .find_map(|text| text.strip_prefix(line)?.strip_prefix(':'))?;
        value.split_whitespace().next()?.parse().ok()
    }

    /// Whether its last argument ends with that text.
    fn ends_with(&self, text: &str) -> bool {
        let cmdline = fs::read(self.folder.join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline);
        cmdline.trim_end_matches('\0').ends_with(text)
    }

    /// Clock ticks spent, in user mode and in the kernel: its own, and those of its children that have ended (proc(5),
    /// `stat`, fields 14 to 17).
    fn ticks(&self) -> Option<(u64, u64)> {
        let stat = fs::read_to_string(self.folder.join("stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut next = || fields.next()?.parse::<u64>().ok();
        Some((next()? + next()?, next()? + next()?))
    }
}

/// Resident memory in KiB of each process of that program with that word in its arguments.
pub(super) fn resident(program: &str, word: &str) -> Vec<u64> {
    Process::all(program, word)
        .filter_map(|process| process.memory("VmRSS"))
        .collect()
}

/// As [`resident`], but only the memory that each process has for itself. The pages of its program are in the page
/// cache once for all of them (ADR 0085).
pub(super) fn anonymous(program: &str, word: &str) -> Vec<u64> {
    Process::all(program, word)
        .filter_map(|process| process.memory("RssAnon"))
        .collect()
}

/// The processor time of one process, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Taken {
    pub(super) own: f64,
    /// That of its children that have ended.
    pub(super) children: f64,
}

impl Taken {
    /// What was taken since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            own: self.own - before.own,
            children: self.children - before.children,
        }
    }
}

/// The processor time of the shim of the pod with this UID, if it runs. The last argument of a shim is its job directory, which has
/// the pod's UID as its name.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52 ticks")]
pub(super) fn shim(uid: &str) -> Option<Taken> {
    let mut shims = Process::all("knoc-agent", "shim");
    let (own, children) = shims.find(|shim| shim.ends_with(uid))?.ticks()?;
    let second = rustix::param::clock_ticks_per_second() as f64;
    Some(Taken {
        own: own as f64 / second,
        children: children as f64 / second,
    })
}

/// The processes that a byte passes, by program and by an argument that distinguishes them from others.
const PARTS: [(&str, &str); 4] = [
    ("knoc-agent", "shim"),
    ("knoc-agent", "serve"),
    ("knoc-kubelet", ""),
    ("controlplane", "kube-apiserver"),
];

/// The places in [`Spent`] after [`PARTS`]: this process with the programs that it runs, and all relays.
const CLIENT: usize = PARTS.len();
const RELAYS: usize = CLIENT + 1;

/// Processor time, in seconds: shims, agent, kubelet, API server, the client, all relays.
pub(super) type Spent = [f64; RELAYS + 1];

/// The ticks of each process at one moment, with the process's place in [`Spent`].
#[derive(Debug)]
pub(super) struct Clock(HashMap<u32, (usize, u64)>);

impl Clock {
    /// Reads the current ticks.
    pub(super) fn read() -> Self {
        let parts = PARTS.iter().enumerate();
        let parts = parts.flat_map(|(at, (program, word))| {
            Process::all(program, word).map(move |process| (at, process))
        });
        let ours = Process::all("knoc-bench", "").map(|process| {
            let own = process.pid == std::process::id();
            (if own { CLIENT } else { RELAYS }, process)
        });
        let ticks = |(at, process): (usize, Process)| {
            let (own, children) = process.ticks()?;
            // If kubectl is the client, it is a child of this process.
            let ticks = if at == CLIENT { own + children } else { own };
            Some((process.pid, (at, ticks)))
        };
        Self(parts.chain(ours).filter_map(ticks).collect())
    }

    /// Adds what was spent since `before` by the processes that are still there.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 ticks")]
    pub(super) fn add_since(&self, before: &Self, to: &mut Spent) {
        let second = rustix::param::clock_ticks_per_second() as f64;
        for (pid, (at, ticks)) in &self.0 {
            let earlier = before.0.get(pid).map_or(0, |(_, ticks)| *ticks);
            to[*at] += ticks.saturating_sub(earlier) as f64 / second;
        }
    }
}
