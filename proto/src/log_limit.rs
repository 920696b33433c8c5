//! PURE: how many log lines one cause may write, and how many were left out.
//!
//! Whoever can make us write a line without an identity could fill a disk and hide other lines. Each source gets a few
//! lines in a window of time, all sources together some more; what exceeds them is counted, and the count is a line of
//! its own when the window has passed.

use std::{collections::HashMap, hash::Hash, time::Duration};

use tokio::time::Instant;

/// The time over which lines are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// Lines of one source in a window: enough to see what is wrong with it.
const OF_ONE: u32 = 5;
/// Lines of all sources in a window; bounds the memory of the limit too.
const OF_ALL: u32 = 50;

/// What to do about one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Write its line.
    pub write: bool,
    /// So many were left out in the window that has passed: a line of its own, before that of the event.
    pub left_out: Option<u64>,
}

/// Counts the lines of the present window.
#[derive(Debug)]
pub struct LogLimit<K> {
    began: Option<Instant>,
    written: u32,
    sources: HashMap<K, u32>,
    left_out: u64,
}

impl<K> Default for LogLimit<K> {
    fn default() -> Self {
        Self {
            began: None,
            written: 0,
            sources: HashMap::new(),
            left_out: 0,
        }
    }
}

impl<K: Eq + Hash> LogLimit<K> {
    /// An event of this source happens now.
    pub fn event(&mut self, now: Instant, source: K) -> Verdict {
        let left_out = self.flush(now);
        if self.began.is_none() {
            self.began = Some(now);
        }
        let of_this = self.sources.get(&source).copied().unwrap_or(0);
        let write = of_this < OF_ONE && self.written < OF_ALL;
        if write {
            self.written += 1;
            self.sources.insert(source, of_this + 1);
        } else {
            self.left_out += 1;
        }
        Verdict { write, left_out }
    }

    /// When [`Self::flush`] will have something to say; `None` if nothing was left out.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let began = self.began.filter(|_| self.left_out > 0)?;
        Some(began + WINDOW)
    }

    /// Ends the window if its time has passed, and tells how many lines were left out in it.
    pub fn flush(&mut self, now: Instant) -> Option<u64> {
        if self.began.is_none_or(|began| now < began + WINDOW) {
            return None;
        }
        let ended = std::mem::take(self);
        (ended.left_out > 0).then_some(ended.left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_writes_a_few_lines_and_its_count_and_hides_no_other_source() {
        let began = Instant::now();
        let mut limit = LogLimit::default();
        let lines = (0..5000).filter(|_| limit.event(began, 2).write).count();
        assert_eq!(lines, 5);
        assert_eq!(
            limit.event(began, 1),
            Verdict {
                write: true,
                left_out: None
            }
        );
        assert_eq!(limit.due(), Some(began + WINDOW));
        let later = began + WINDOW;
        let first = limit.event(later, 2);
        assert_eq!(
            first,
            Verdict {
                write: true,
                left_out: Some(4995)
            }
        );
        assert_eq!(limit.due(), None);
        assert_eq!(limit.flush(later + WINDOW), None, "nothing was left out");
    }

    #[test]
    fn many_sources_are_bounded_together() {
        let began = Instant::now();
        let mut limit = LogLimit::default();
        let lines = (0..5000).filter(|number| limit.event(began, *number).write);
        assert_eq!(lines.count(), 50);
        assert!(limit.sources.len() <= 50);
        assert_eq!(limit.flush(began + WINDOW), Some(4950));
    }
}
