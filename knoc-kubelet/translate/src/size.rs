//! PURE: how much the contents of a pod's files and variables take.

/// The most, in bytes. A message to the agent has at most 24 MiB, and the rest of the pod needs room in it, too.
const MOST: usize = 20 << 20;

/// What each of them takes besides its name and its contents.
pub(crate) const EACH: usize = 16;

/// The message for a pod that has more.
pub const TOO_MUCH: &str = "the files and variables of the pod, which come from ConfigMaps, Secrets, Services and its own fields, \
    have more than 20 MiB together, and no more can be sent to the job: use less of them, another kind of volume, or `enableServiceLinks: false`";

/// What was added so far. A pod may ask for the same key of a megabyte thousands of times, so nothing is copied any more once there
/// is too much.
#[derive(Debug, Default)]
pub(crate) struct Size(usize);

impl Size {
    /// Adds a file or a variable. False: it is too much, and is not to be copied.
    pub(crate) fn add(&mut self, name: &str, contents: &[u8]) -> bool {
        let bytes = name.len().saturating_add(contents.len());
        self.0 = self.0.saturating_add(bytes).saturating_add(EACH);
        !self.is_too_much()
    }

    pub(crate) fn is_too_much(&self) -> bool {
        self.0 > MOST
    }
}
