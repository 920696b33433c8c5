//! The agent's notes on a pod as Events, each once.

use std::hash::{DefaultHasher, Hash, Hasher};

use jiff::{SignedDuration, Timestamp};

use super::worker::Worker;
use crate::pods::{
    events::{Note, about_pod},
    store::PodView,
};

/// Notes older than this at the start of the process were told by an earlier one.
const EARLIER: SignedDuration = SignedDuration::from_secs(120);

impl Worker<'_> {
    pub(super) fn tell_notes(&mut self, view: &PodView) {
        let Some(observed) = &view.observed else {
            return;
        };
        let first = self.memory.note.is_none();
        let told = self.memory.note.unwrap_or(i64::MIN);
        let since = self
            .context
            .started
            .checked_sub(EARLIER)
            .unwrap_or(Timestamp::MIN);
        for note in observed.notes.iter().filter(|note| note.sequence > told) {
            let at = Timestamp::from_nanosecond(i128::from(note.at)).unwrap_or_default();
            self.memory.note = Some(note.sequence);
            if first && at < since {
                continue;
            }
            let mut salt = DefaultHasher::new();
            (note.sequence, note.at).hash(&mut salt);
            self.context.events.tell(Note {
                object: about_pod(&view.pod, &note.container),
                warning: note.warning,
                reason: note.reason.clone(),
                message: note.message.clone(),
                at,
                salt: salt.finish(),
            });
        }
    }
}
