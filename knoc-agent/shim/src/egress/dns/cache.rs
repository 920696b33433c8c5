//! PURE: the answers that the shim keeps for the containers of its pod.
//!
//! No other pod has a part in it: what one pod is answered never reaches another one.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::message::{Kept, Question};

/// The most answers, and the most bytes of all of them with their questions.
const ANSWERS: usize = 512;
const BYTES: usize = 256 << 10;

/// The kept answers.
#[derive(Debug, Default)]
pub(super) struct Cache {
    answers: HashMap<Vec<u8>, Entry>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    kept: Kept,
    since: Instant,
}

impl Entry {
    fn ends(&self) -> Instant {
        self.since + self.kept.lifetime
    }
}

impl Cache {
    /// The answer to `message`, which asks this question.
    pub(super) fn answer(
        &self,
        question: &Question,
        message: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let entry = self.answers.get(&question.key)?;
        let age = now.saturating_duration_since(entry.since);
        // In its last second, its lifetime would be shown as zero.
        let is_fresh = age + Duration::from_secs(1) <= entry.kept.lifetime;
        let answer = is_fresh.then(|| entry.kept.answer(message, age));
        answer.flatten()
    }

    /// Keeps an answer, if it may be kept.
    pub(super) fn keep(&mut self, question: &Question, message: &[u8], now: Instant) {
        if !question.is_plain {
            return;
        }
        let Some(kept) = Kept::parse(message) else {
            return;
        };
        let size = size(&question.key, &kept);
        self.remove(&question.key);
        self.make_room(size, now);
        self.bytes += size;
        let entry = Entry { kept, since: now };
        self.answers.insert(question.key.clone(), entry);
    }

    /// Forgets all answers.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(entry) = self.answers.remove(key) {
            self.bytes = self.bytes.saturating_sub(size(key, &entry.kept));
        }
    }

    /// Removes what is over, and then what ends first, until there is room for one more answer of this size.
    fn make_room(&mut self, size: usize, now: Instant) {
        let is_full = |cache: &Self| cache.answers.len() >= ANSWERS || cache.bytes + size > BYTES;
        if !is_full(self) {
            return;
        }
        let mut by_end: Vec<_> = self
            .answers
            .iter()
            .map(|(key, entry)| (entry.ends(), key.clone()))
            .collect();
        by_end.sort_unstable();
        for (ends, key) in by_end {
            if ends > now && !is_full(self) {
                return;
            }
            self.remove(&key);
        }
    }
}

fn size(key: &[u8], kept: &Kept) -> usize {
    key.len() + kept.size()
}

#[cfg(test)]
mod tests {
    use super::{super::message::samples::*, *};

    const ADDRESS: [u8; 4] = [10, 96, 0, 1];

    fn keep(cache: &mut Cache, name: &str, lifetime: u32, now: Instant) {
        let asked = question(1, name);
        let parsed = Question::parse(&asked).unwrap();
        cache.keep(&parsed, &found(&asked, lifetime, ADDRESS), now);
    }

    fn has(cache: &Cache, name: &str, now: Instant) -> bool {
        let asked = question(2, name);
        let parsed = Question::parse(&asked).unwrap();
        cache.answer(&parsed, &asked, now).is_some()
    }

    #[test]
    fn an_answer_is_given_until_its_lifetime_ends() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        keep(&mut cache, "a.b", 10, now);
        let asked = question(7, "A.B");
        let parsed = Question::parse(&asked).unwrap();
        let answer = cache.answer(&parsed, &asked, now + Duration::from_secs(3));
        assert_eq!(answer.unwrap(), found(&asked, 7, ADDRESS));
        assert!(has(&cache, "a.b", now + Duration::from_secs(9)));
        assert!(!has(&cache, "a.b", now + Duration::from_millis(9001)));
        assert!(!has(&cache, "a.c", now));
        cache.clear();
        assert!(!has(&cache, "a.b", now));
    }

    #[test]
    fn a_question_with_options_is_never_answered_from_it() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let mut asked = question(1, "a");
        asked[11] = 1;
        asked.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 5, 0, 10, 0, 1, 7]);
        let parsed = Question::parse(&asked).unwrap();
        let mut answer = found(&question(1, "a"), 10, ADDRESS);
        answer[11] = 0;
        cache.keep(&parsed, &answer, now);
        assert!(cache.answers.is_empty() && cache.bytes == 0);
    }

    #[test]
    fn what_ends_first_makes_room_and_the_bytes_are_counted() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        keep(&mut cache, "first", 5, now);
        for number in 1..ANSWERS {
            keep(&mut cache, &format!("n{number}"), 20, now);
        }
        keep(&mut cache, "n1", 20, now);
        assert!(has(&cache, "first", now), "a newer answer needs no room");
        keep(&mut cache, "last", 20, now);
        assert!(!has(&cache, "first", now) && has(&cache, "last", now));
        assert_eq!(cache.answers.len(), ANSWERS);
        // What is over goes at once, all of it.
        let later = now + Duration::from_mins(1);
        keep(&mut cache, "new", 20, later);
        assert_eq!(cache.answers.len(), 1);
        assert!(cache.bytes > 0 && cache.bytes < 200, "{}", cache.bytes);
        cache.remove(&Question::parse(&question(1, "new")).unwrap().key);
        assert_eq!(cache.bytes, 0);
    }

    #[test]
    fn long_answers_leave_the_memory_bounded() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for number in 0..200 {
            let asked = question(1, &format!("n{number}"));
            let mut answer = found(&asked, 20, ADDRESS);
            // The record has as many bytes as are kept.
            let length = 4000_u16;
            let at = answer.len() - 6;
            answer[at..at + 2].copy_from_slice(&length.to_be_bytes());
            answer.resize(at + 2 + usize::from(length), 7);
            cache.keep(&Question::parse(&asked).unwrap(), &answer, now);
            assert!(cache.bytes <= BYTES, "{}", cache.bytes);
        }
        assert!(cache.answers.len() > 50);
    }
}
