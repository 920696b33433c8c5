//! PURE: limits how many log lines one source may cause, and counts those that were left out.
//!
//! A client that can cause log lines without authenticating could fill a disk and hide other lines. Therefore each
//! source gets a few lines in a window of time, and all sources together some more. Further lines are counted, and the
//! count is logged in a line of its own when the window is over.

use std::{collections::HashMap, hash::Hash, time::Duration};

use tokio::time::Instant;

/// The length of the window in which lines are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// The most lines of one source in a window: enough to diagnose it.
const OF_ONE: u32 = 5;
/// The most lines of all sources in a window, which also bounds the memory of the limit.
const OF_ALL: u32 = 50;

/// What to do with one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether to write the event's line.
    pub write: bool,
    /// How many lines were left out in the window that has just ended. If set, write it in a line of its own before the
    /// event's line.
    pub left_out: Option<u64>,
}

/// Counts the lines of the current window by their source, `K`.
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
    /// Counts an event of this source at the time `now`.
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

    /// When [`Self::flush`] will return a count; `None` if no line was left out.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let began = self.began.filter(|_| self.left_out > 0)?;
        Some(began + WINDOW)
    }

    /// Ends the window if its time is over, and returns how many lines were left out in it, if any.
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
