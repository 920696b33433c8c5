//! What the machine is, and what processes take of it. Names no host and no path.

use std::fs;

/// One line: processors, memory, kernel.
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

/// Resident memory in KiB of each process of that program with that word in its arguments.
pub(super) fn resident(program: &str, word: &str) -> Vec<u64> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let folder = entry.path();
        let comm = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        let cmdline = fs::read(folder.join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
        let named = word.is_empty() || cmdline.split('\0').any(|argument| argument == word);
        if comm.trim_end() != program || !named {
            continue;
        }
        let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number: Option<u64> =
            line.and_then(|text| text.split_whitespace().next()?.parse().ok());
        found.extend(number);
    }
    found
}
