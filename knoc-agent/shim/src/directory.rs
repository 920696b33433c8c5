//! What streams need to know of the containers: published by the supervisor, read by exec and logs.

use std::{collections::BTreeMap, sync::Arc};

use knoc_contract::logs::read::Follow;

use super::container::Program;

/// A log series of this job.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    pub(crate) attempt: u32,
    pub(crate) follow: Follow,
}

/// One container.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// While it runs.
    pub(crate) program: Option<Arc<Program>>,
    /// The newest attempt's.
    pub(crate) log: Option<Log>,
    /// The attempt before.
    pub(crate) previous: Option<u32>,
}

/// All containers by name.
#[derive(Debug, Default)]
pub(crate) struct Directory(BTreeMap<String, Entry>);

impl Directory {
    pub(crate) fn new(entries: impl IntoIterator<Item = (String, Entry)>) -> Self {
        Self(entries.into_iter().collect())
    }

    /// The programs that run.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Arc<Program>> {
        self.0.values().filter_map(|entry| entry.program.as_ref())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Entry> {
        self.0.get(name)
    }
}
