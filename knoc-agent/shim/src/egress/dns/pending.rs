//! PURE: the questions that were passed on and have no answer yet.
//!
//! Each has an id of its own that nobody can guess, so that questions of all containers can share a flow, and no message
//! answers one but that of the server that was asked.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::message::{self, Question};

/// The most questions without an answer. Containers ask again if one is lost.
const MOST: usize = 512;

/// How long an answer is waited for: containers ask again after five seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// How often another id is tried if one is in use.
const TRIES: usize = 16;

/// A question of a container.
#[derive(Debug)]
pub(super) struct Asked<Client> {
    /// Who is answered.
    pub(super) client: Client,
    /// As the container has sent it.
    pub(super) message: Vec<u8>,
    /// `None` for a message that is not read, such as an update.
    pub(super) question: Option<Question>,
    /// The flow that it was sent to.
    pub(super) flow: u64,
    pub(super) at: Instant,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Pending<Client>(HashMap<u16, Asked<Client>>);

impl<Client> Default for Pending<Client> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<Client> Pending<Client> {
    /// Adds a question. Returns the id with which it is passed on; `None` if there are too many.
    pub(super) fn add(
        &mut self,
        asked: Asked<Client>,
        mut random: impl FnMut() -> u16,
    ) -> Option<u16> {
        if self.0.len() >= MOST {
            let now = asked.at;
            self.0.retain(|_, one| now < one.at + PATIENCE);
        }
        if self.0.len() >= MOST {
            return None;
        }
        let mut ids = std::iter::repeat_with(&mut random).take(TRIES);
        let id = ids.find(|id| !self.0.contains_key(id))?;
        self.0.insert(id, asked);
        Some(id)
    }

    /// The question that this message of the flow answers.
    pub(super) fn answered(&mut self, flow: u64, message: &[u8]) -> Option<Asked<Client>> {
        let id = message::id(message)?;
        let asked = self.0.get(&id).filter(|asked| asked.flow == flow)?;
        let answers = match &asked.question {
            Some(question) => question.is_answered_by(message),
            None => message::is_answer(message),
        };
        answers.then(|| self.0.remove(&id)).flatten()
    }

    /// Whether a question of this flow has had no answer since then.
    pub(super) fn waits_since(&self, flow: u64, then: Instant) -> bool {
        let mut of_flow = self.0.values().filter(|asked| asked.flow == flow);
        of_flow.any(|asked| asked.at <= then)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes all questions of a flow that has failed.
    pub(super) fn of(&mut self, flow: u64) -> impl Iterator<Item = Asked<Client>> {
        self.0
            .extract_if(move |_, asked| asked.flow == flow)
            .map(|(_, asked)| asked)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::message::samples::*, *};

    fn asked(name: &str, flow: u64, at: Instant) -> Asked<u32> {
        let message = question(1, name);
        Asked {
            client: 7,
            question: Question::parse(&message),
            message,
            flow,
            at,
        }
    }

    /// The answer to the question for this name, with this id.
    fn answer(id: u16, name: &str) -> Vec<u8> {
        found(&question(id, name), 5, [10, 96, 0, 1])
    }

    #[test]
    fn only_an_answer_to_the_question_in_its_flow_with_its_id_counts() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        assert_eq!(pending.add(asked("a", 1, now), || 500), Some(500));
        for (flow, message) in [
            (1, answer(501, "a")),
            (1, answer(500, "b")),
            (2, answer(500, "a")),
            (1, question(500, "a")),
            (1, vec![1]),
        ] {
            assert!(pending.answered(flow, &message).is_none(), "{message:?}");
        }
        let found = pending.answered(1, &answer(500, "a")).unwrap();
        assert_eq!((found.client, message::id(&found.message)), (7, Some(1)));
        assert!(pending.answered(1, &answer(500, "a")).is_none());
    }

    #[test]
    fn a_message_that_is_not_read_is_answered_by_its_id() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let mut update = asked("a", 1, now);
        update.question = None;
        pending.add(update, || 9).unwrap();
        assert!(pending.answered(1, &question(9, "a")).is_none());
        assert!(pending.answered(1, &answer(9, "b")).is_some());
    }

    #[test]
    fn an_id_is_given_once_and_the_number_is_bounded() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let mut ids = [5, 5, 6].into_iter();
        let mut random = || ids.next().unwrap();
        assert_eq!(pending.add(asked("a", 1, now), &mut random), Some(5));
        assert_eq!(pending.add(asked("a", 1, now), &mut random), Some(6));
        assert_eq!(pending.add(asked("a", 1, now), || 5), None);
        for id in 100.. {
            if pending.add(asked("a", 1, now), || id).is_none() {
                break;
            }
        }
        assert_eq!(pending.len(), MOST);
        let later = now + PATIENCE;
        assert_eq!(pending.add(asked("a", 1, later), || 5), Some(5));
        assert_eq!(pending.len(), 1, "those that are too old are gone");
    }

    #[test]
    fn a_flow_is_known_by_what_it_owes() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let later = now + Duration::from_secs(1);
        pending.add(asked("a", 1, now), || 1).unwrap();
        pending.add(asked("b", 2, later), || 2).unwrap();
        assert!(pending.waits_since(1, now) && !pending.waits_since(2, now));
        assert!(pending.waits_since(2, later));
        let failed: Vec<_> = pending.of(1).map(|asked| asked.flow).collect();
        assert_eq!((failed, pending.len()), (vec![1], 1));
    }
}
