//! The writer of one log series. It appends batches, rotates the files, and tolerates failing
//! writes.
//!
//! It blocks on file I/O: the shim calls it on a blocking thread. A batch that cannot be written
//! completely is removed again, so that no line is torn. The lost lines are counted, and once
//! writing works again a line in the log says how many are missing. A failing write never stops the
//! program whose output this is.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::{
    cri::{self, Cutter, Stream},
    rotated,
};

/// How many attempts of a container keep their logs: the current one and the one before, as with a
/// kubelet.
pub const KEPT_ATTEMPTS: usize = 2;

/// The maximum size of one file and of the series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A file is rotated once it is larger than this, in bytes.
    pub max_bytes: u64,
    /// The maximum number of files in a series, including the live one.
    pub max_files: u32,
    /// The maximum size of all files of a series in bytes, not counting the batch that is being
    /// written.
    pub max_total: u64,
}

impl Limits {
    /// The size at which a file is rotated. It leaves something to drop before the whole series is
    /// too large.
    fn file(&self) -> u64 {
        self.max_bytes.min(self.max_total / 2)
    }
}

/// Removes the logs of all attempts before the previous one; `live` is the current attempt's log.
/// Readers keep the files that they have open.
pub fn forget_older(live: &Path) -> io::Result<()> {
    let current = live.file_name().and_then(attempt_of);
    let (Some(folder), Some(current)) = (live.parent(), current) else {
        return Ok(());
    };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let kept = |attempt: u32| {
            let after = u32::try_from(KEPT_ATTEMPTS).unwrap_or(u32::MAX);
            attempt.saturating_add(after) > current
        };
        if attempt_of(&name).is_some_and(|attempt| !kept(attempt)) {
            fs::remove_file(folder.join(name))?;
        }
    }
    Ok(())
}

/// PURE: the attempt number in `3.log` and `3.log.17`.
fn attempt_of(name: &OsStr) -> Option<u32> {
    let (attempt, rest) = name.to_str()?.split_once(".log")?;
    let rotated = |rest: &str| rest.strip_prefix('.')?.parse::<u32>().ok();
    if rest.is_empty() || rotated(rest).is_some() {
        attempt.parse().ok()
    } else {
        None
    }
}

/// What has been lost so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// Lines that could not be written.
    pub lines: u64,
    /// Rotated files that were dropped because of the limit.
    pub files: u64,
    /// The system's last error message.
    pub error: Option<String>,
}

/// Appends to and rotates one series; see the module's documentation.
#[derive(Debug)]
pub struct Writer {
    live: PathBuf,
    limits: Limits,
    file: Option<File>,
    size: u64,
    /// Lines lost since the last successful write.
    unmarked: u64,
    losses: Losses,
}

impl Writer {
    /// Opens the live file. A failure is not reported before the first batch.
    #[must_use]
    pub fn open(live: &Path, limits: Limits) -> Self {
        let mut writer = Self {
            live: live.to_owned(),
            limits,
            file: None,
            size: 0,
            unmarked: 0,
            losses: Losses::default(),
        };
        if let Err(error) = writer.reopen() {
            writer.losses.error = Some(error.to_string());
        }
        writer
    }

    /// Writes whole lines; `lines` is their number.
    pub fn append(&mut self, batch: &[u8], lines: u64) {
        if let Err(error) = self.try_append(batch) {
            self.losses.error = Some(error.to_string());
            self.lose(lines);
        }
    }

    /// Counts lines that were lost before they could be written.
    pub fn lose(&mut self, lines: u64) {
        self.unmarked += lines;
        self.losses.lines += lines;
    }

    /// What has been lost so far.
    #[must_use]
    pub fn losses(&self) -> &Losses {
        &self.losses
    }

    /// Tries for the last time to note in the log what was lost.
    pub fn finish(&mut self) {
        if self.unmarked > 0 {
            self.append(&[], 0);
        }
    }

    fn try_append(&mut self, batch: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.reopen()?;
        }
        if self.size > 0 && self.size >= self.limits.file() {
            self.rotate()?;
        }
        let mark = self.mark();
        let Some(file) = &mut self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let written = file.write_all(&mark).and_then(|()| file.write_all(batch));
        if let Err(error) = written {
            // No line may stay torn. If even this fails, the file is opened again.
            if file.set_len(self.size).is_err() {
                self.file = None;
            }
            return Err(error);
        }
        self.unmarked = 0;
        self.size += u64::try_from(mark.len() + batch.len()).unwrap_or_default();
        Ok(())
    }

    fn mark(&self) -> Vec<u8> {
        let mut line = Vec::new();
        if self.unmarked > 0 {
            let text = format!(
                "knoc: {} log lines could not be written here\n",
                self.unmarked
            );
            let stamp = cri::stamp(Timestamp::now());
            Cutter::new(Stream::Stderr).push(text.as_bytes(), &stamp, &mut line);
        }
        line
    }

    fn reopen(&mut self) -> io::Result<()> {
        if let Some(folder) = self.live.parent() {
            fs::create_dir_all(folder)?;
        }
        // Append mode also after set_len: the next write goes to the new end.
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.live)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let keep = usize::try_from(self.limits.max_files.max(2) - 1).unwrap_or(usize::MAX);
        let sizes: Vec<u64> = (1..)
            .map_while(|n| fs::metadata(rotated(&self.live, n)).ok())
            .map(|metadata| metadata.len())
            .collect();
        // The live file becomes a rotated one, and a new live file grows beside it.
        let room = self.limits.max_total.saturating_sub(self.limits.file());
        let mut last = u32::try_from(sizes.len()).unwrap_or(u32::MAX);
        for _ in kept(&sizes, self.size, keep, room)..sizes.len() {
            fs::remove_file(rotated(&self.live, last))?;
            self.losses.files += 1;
            last -= 1;
        }
        for n in (1..=last).rev() {
            fs::rename(rotated(&self.live, n), rotated(&self.live, n + 1))?;
        }
        fs::rename(&self.live, rotated(&self.live, 1))?;
        self.file = None;
        self.reopen()
    }
}

/// PURE: how many of the rotated files stay if a file of the size `next` is added. `sizes` are
/// given newest first. Together with the added one, at most `most` files with at most `room` bytes
/// may remain.
fn kept(sizes: &[u64], next: u64, most: usize, room: u64) -> usize {
    let mut total = next;
    let fits = |size: &&u64| {
        total = total.saturating_add(**size);
        total <= room
    };
    let fitting = sizes.iter().take_while(fits).count();
    fitting.min(most.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::series, *};

    fn line(n: u32) -> Vec<u8> {
        format!("2026-11-22T18:00:01.000000000Z stdout F {n:04}\n").into_bytes()
    }

    #[test]
    fn rotation_keeps_the_newest_files() {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("c").join("0.log");
        let length = u64::try_from(line(0).len()).unwrap();
        let limits = Limits {
            max_bytes: 2 * length,
            max_files: 3,
            max_total: 1 << 20,
        };
        let mut writer = Writer::open(&live, limits);
        (0..9).for_each(|n| writer.append(&line(n), 1));
        assert_eq!(
            writer.losses(),
            &Losses {
                files: 2,
                ..Losses::default()
            }
        );
        let all: Vec<u8> = series(&live)
            .iter()
            .flat_map(|path| fs::read(path).unwrap())
            .collect();
        let expected: Vec<u8> = (4..9).flat_map(line).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn lost_lines_are_counted_and_marked() {
        let folder = tempfile::tempdir().unwrap();
        let blocker = folder.path().join("c");
        File::create(&blocker).unwrap();
        let live = blocker.join("0.log");
        let mut writer = Writer::open(
            &live,
            Limits {
                max_bytes: 1 << 20,
                max_files: 3,
                max_total: 10 << 20,
            },
        );
        writer.append(&line(0), 1);
        writer.lose(2);
        assert_eq!(writer.losses().lines, 3);
        assert!(writer.losses().error.is_some());
        fs::remove_file(&blocker).unwrap();
        writer.append(&line(1), 1);
        let text = fs::read_to_string(&live).unwrap();
        assert!(
            text.contains(" stderr F knoc: 3 log lines could not be written here\n"),
            "{text}"
        );
        assert!(text.ends_with(" F 0001\n"));
        assert_eq!(writer.losses().lines, 3);
    }

    /// A series never exceeds its limit by more than one batch for the live file and one for a
    /// rotated file.
    #[test]
    fn a_series_stays_within_its_share_however_large_its_files_may_be() {
        let folder = tempfile::tempdir().unwrap();
        let live = folder.path().join("c").join("0.log");
        let limits = Limits {
            max_bytes: 100 << 20,
            max_files: 20,
            max_total: 4000,
        };
        let mut writer = Writer::open(&live, limits);
        let batch = line(7).repeat(5);
        let length = u64::try_from(batch.len()).unwrap();
        let mut most = 0;
        for _ in 0..200 {
            writer.append(&batch, 5);
            let files = series(&live);
            let total = files.iter().map(|path| fs::metadata(path).unwrap().len());
            most = most.max(total.sum::<u64>());
        }
        assert!((2000..=4000 + 2 * length).contains(&most), "{most}");
        assert!(writer.losses().files > 0);
        assert_eq!(writer.losses().lines, 0);
        // The same holds for many small files.
        let limits = Limits {
            max_bytes: 500,
            ..limits
        };
        let mut writer = Writer::open(&live, limits);
        for _ in 0..200 {
            writer.append(&batch, 5);
        }
        let sizes = series(&live)
            .into_iter()
            .map(|path| fs::metadata(path).unwrap().len());
        assert!(sizes.sum::<u64>() <= 4000 + 2 * length);
    }

    #[test]
    fn the_logs_of_the_current_and_the_previous_attempt_stay() {
        let folder = tempfile::tempdir().unwrap();
        let mut made = Vec::new();
        for attempt in [0, 1, 2, 8, 9, 10, 11] {
            made.push(format!("{attempt}.log"));
            made.push(format!("{attempt}.log.1"));
            made.push(format!("{attempt}.log.12"));
        }
        // None of these names is a log of ours.
        made.extend(["x.log", "1.log.old", "1.txt", "-1.log"].map(str::to_owned));
        for name in &made {
            File::create(folder.path().join(name)).unwrap();
        }
        forget_older(&folder.path().join("10.log")).unwrap();
        let gone = |name: &String| {
            ["0.log", "1.log", "2.log", "8.log"].iter().any(|old| {
                name == old || *name == format!("{old}.1") || *name == format!("{old}.12")
            })
        };
        for name in &made {
            let there = folder.path().join(name).exists();
            assert_eq!(there, !gone(name), "{name}");
        }
        forget_older(&folder.path().join("none/10.log")).unwrap();
    }

    proptest! {
        #[test]
        fn kept_files_fit(
            sizes in prop::collection::vec(0_u64..1000, 0..30),
            next in 0_u64..1000,
            most in 1_usize..30,
            room in 0_u64..20_000,
        ) {
            let kept = kept(&sizes, next, most, room);
            prop_assert!(kept < most && kept <= sizes.len());
            let total = next + sizes[..kept].iter().sum::<u64>();
            prop_assert!(kept == 0 || total <= room);
            // The next older file would not fit.
            let more = sizes.get(kept).is_none_or(|size| total + size > room);
            prop_assert!(more || kept + 1 == most);
        }
    }
}
