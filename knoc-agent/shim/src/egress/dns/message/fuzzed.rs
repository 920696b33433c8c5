//! What must hold for any bytes as a question of a container and the answer of a server.

use std::time::Duration;

use super::{HEADER, KEPT, Kept, NAME, Question, failure, id, is_answer};

/// Reads any bytes as a question and an answer; the first byte says how long the question is.
///
/// # Panics
/// If a message that is made here is not one, or an answer changes otherwise than by its age.
pub(crate) fn dns_messages(data: &[u8]) {
    let Some((length, rest)) = data.split_first() else {
        return;
    };
    let (question, answer) = rest.split_at(usize::from(*length).min(rest.len()));
    for message in [question, answer, data] {
        look_at(message);
    }
    let asked = Question::parse(question);
    if let Some(asked) = asked {
        let answered = asked.is_answered_by(answer);
        assert!(!answered || is_answer(answer));
    }
    if let Some(kept) = Kept::parse(answer)
        && let Some(old) = kept.answer(question, Duration::from_hours(1))
    {
        assert_eq!(old.len(), answer.len());
        assert_eq!(id(&old), id(question));
    }
}

fn look_at(message: &[u8]) {
    if let Some(question) = Question::parse(message) {
        assert!(question.name.len() <= NAME && question.name.last() == Some(&0));
        assert!(!question.name.iter().any(u8::is_ascii_uppercase));
        assert_eq!(question.key.len() + 2, message.len());
    }
    if let Some(answer) = failure(message) {
        assert!(is_answer(&answer) && answer.len() <= message.len());
        assert_eq!(id(&answer), id(message));
    } else {
        assert!(message.len() < HEADER);
    }
    if let Some(kept) = Kept::parse(message) {
        let most = Duration::from_secs(KEPT.into());
        assert!(!kept.lifetime.is_zero() && kept.lifetime <= most);
        assert_eq!(
            kept.answer(message, Duration::ZERO).as_deref(),
            Some(message)
        );
    }
}
