//! What streams need to know about the containers. The supervisor publishes it; exec, attach and logs read it.

use std::{collections::BTreeMap, sync::Arc};

use knoc_contract::logs::read::Follow;

use super::container::Program;

/// The log of one attempt in this job.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    pub(crate) attempt: u32,
    pub(crate) follow: Follow,
}

/// What is known about one container.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Its program, while it runs.
    pub(crate) program: Option<Arc<Program>>,
    /// The log of the newest attempt.
    pub(crate) log: Option<Log>,
    /// The number of the attempt before the newest.
    pub(crate) previous: Option<u32>,
}

/// All containers by name.
#[derive(Debug, Default)]
pub(crate) struct Directory(BTreeMap<String, Entry>);

impl Directory {
    pub(crate) fn new(entries: impl IntoIterator<Item = (String, Entry)>) -> Self {
        Self(entries.into_iter().collect())
    }

    /// The programs that are running.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Arc<Program>> {
        self.0.values().filter_map(|entry| entry.program.as_ref())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.0.get(name)
    }
}
