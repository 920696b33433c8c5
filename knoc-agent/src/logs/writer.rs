//! The writer of one log series: appends batches, rotates, and survives a file system that refuses.
//!
//! Blocking file work: the shim calls it on a blocking thread. A batch that cannot be written whole is taken
//! back, so no torn line stays; its lines are counted, and once writing works again a line in the log says how many
//! are missing. Never stops the program whose output it is.

use std::{
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

/// How large one file and how long the series may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A file is rotated once it is larger.
    pub max_bytes: u64,
    /// Files of a series, the live one included.
    pub max_files: u32,
}

/// What was lost so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// Lines that could not be written.
    pub lines: u64,
    /// Rotated files that were dropped for the limit.
    pub files: u64,
    /// The system's last words.
    pub error: Option<String>,
}

/// See the module.
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
    /// Opens the live file; a failure is kept for the first batch.
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

    /// Counts lines that never came to be written.
    pub fn lose(&mut self, lines: u64) {
        self.unmarked += lines;
        self.losses.lines += lines;
    }

    /// What was lost so far.
    #[must_use]
    pub fn losses(&self) -> &Losses {
        &self.losses
    }

    /// The last attempt to mark what was lost.
    pub fn finish(&mut self) {
        if self.unmarked > 0 {
            self.append(&[], 0);
        }
    }

    fn try_append(&mut self, batch: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.reopen()?;
        }
        if self.size > 0 && self.size >= self.limits.max_bytes {
            self.rotate()?;
        }
        let mark = self.mark();
        let Some(file) = &mut self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let written = file.write_all(&mark).and_then(|()| file.write_all(batch));
        if let Err(error) = written {
            // No torn line may stay; where even that fails the file is opened anew.
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
        let keep = self.limits.max_files.max(2) - 1;
        let existing = (1..=keep)
            .take_while(|n| rotated(&self.live, *n).exists())
            .count();
        let mut last = u32::try_from(existing).unwrap_or(keep);
        if last == keep {
            fs::remove_file(rotated(&self.live, keep))?;
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

#[cfg(test)]
mod tests {
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
}
