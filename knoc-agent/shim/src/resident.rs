//! Task: keeps the shim small while it only waits.
//!
//! Nearly all that is resident of a shim is code: pages of the binary that were mapped on the way to the first container,
//! or by a stream, and are not needed again. They count against the job's memory, a shim for each pod. So while the
//! report does not change, the mapping of the code is told again and again that its pages are not needed; what is, is
//! mapped again at the next step, from the page cache. A ping of the link maps a third of all code, and so it has to be
//! repeated; and the kernel is asked for no huge pages there, one of which would bring 2 MiB for every step. Only code: it
//! is never written to, so nothing is lost.

use std::{path::Path, time::Duration};

use knoc_proto::pb;
use rustix::mm::Advice;
use tokio::{sync::watch, time::timeout};

/// Silence that makes a pod one that only runs, and from then on the time between two cleanings. One takes some tens of
/// microseconds.
const QUIET: Duration = Duration::from_secs(3);

/// Gives code back whenever the pod is quiet. Ends with the publisher.
pub(super) async fn keep_small(mut reports: watch::Receiver<pb::Report>) {
    let code = own_code();
    // A kernel without huge pages does not know of it.
    advise(&code, Advice::LinuxNoHugepage);
    loop {
        match timeout(QUIET, reports.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            // Unmaps the pages until they are used again.
            Err(_quiet) => advise(&code, Advice::LinuxDontNeed),
        }
    }
}

/// The mappings of our own code. None where they cannot be known.
fn own_code() -> Vec<(usize, usize)> {
    let (Ok(maps), Ok(exe)) = (
        std::fs::read_to_string("/proc/self/maps"),
        std::fs::read_link("/proc/self/exe"),
    ) else {
        return Vec::new();
    };
    code(&maps, &exe)
}

/// Tells the kernel of our own code. Where that fails the pages stay, and nothing is lost.
fn advise(code: &[(usize, usize)], advice: Advice) {
    for &(start, length) in code {
        #[expect(unsafe_code, reason = "the kernel is told of a range of addresses")]
        // SAFETY: the range is one mapping of our own executable file that nobody may write to (`r-xp`), mapped for the
        // life of the process: dropped pages are read from the file again. The file is never overwritten (versions/X.Y.Z).
        let taken = unsafe {
            rustix::mm::madvise(std::ptr::with_exposed_provenance_mut(start), length, advice)
        };
        if let Err(error) = taken {
            tracing::debug!(%error, "the code stays resident");
        }
    }
}

/// PURE: addresses and lengths of the mappings of `exe` that are code, from the text of `/proc/PID/maps`.
fn code(maps: &str, exe: &Path) -> Vec<(usize, usize)> {
    let address = |hex: &str| usize::from_str_radix(hex, 16).ok();
    maps.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (range, rights) = (words.next()?, words.next()?);
            // Offset, device, inode; the path may hold spaces.
            let path = line.split_once('/')?.1;
            if rights != "r-xp" || Path::new("/").join(path) != exe {
                return None;
            }
            let (start, end) = range.split_once('-')?;
            let (start, end) = (address(start)?, address(end)?);
            Some((start, end.checked_sub(start)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_our_own_file_is_given_back() {
        let maps = "\
7f0000000000-7f0000078000 r--p 00000000 fe:00 12 /home/a b/knoc-agent
7f0000078000-7f000061f000 r-xp 00078000 fe:00 12 /home/a b/knoc-agent
7f000061f000-7f000067f000 rw-p 0061f000 fe:00 12 /home/a b/knoc-agent
7f0000700000-7f0000701000 r-xp 00000000 00:00 0  [vdso]
7f0000800000-7f0000900000 r-xp 00000000 fe:00 13 /lib/libc.so.6
";
        let found = code(maps, Path::new("/home/a b/knoc-agent"));
        assert_eq!(found, [(0x7f00_0007_8000, 0x5a_7000)]);
    }

    #[test]
    fn what_was_given_back_is_there_when_it_is_needed() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("RssFile"));
            let kib = line.and_then(|line| line.split_ascii_whitespace().nth(1));
            kib.unwrap().parse::<u64>().unwrap()
        };
        let before = resident();
        advise(&own_code(), Advice::LinuxDontNeed);
        let after = resident();
        assert!(after < before, "{before} KiB, then {after} KiB");
        assert_eq!(code("", Path::new("/x")), []);
    }
}
