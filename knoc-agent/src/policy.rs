//! The current `[policy]` of the site file, and the rules that decide which certificates are
//! accepted.
//!
//! The table is re-read while the agent runs: every [`POLL`], [`watch`] reads the site file and the
//! CA and publishes the whole table at once. Code that decides by the policy calls [`Live::now`]
//! for each decision. If the file has a mistake, the last good table stays in effect and
//! [`Live::problem`] says what is wrong.

pub mod denied;
pub(crate) mod host_paths;
pub mod nodes;
pub mod rules;
pub mod watch;

use std::{sync::Arc, time::Duration};

use tokio::sync::watch::{Receiver, Sender, channel};

use crate::config::Policy;
pub use rules::{PeerDenied, Renewals, Rules};

/// The interval between two reads of the site file and the CA. Both are opened and read: on a
/// network file system this shows a change at once, while attributes may be a minute old and
/// inotify does not work.
pub const POLL: Duration = Duration::from_secs(10);

/// The current table. All clones see the same one.
#[derive(Debug, Clone)]
pub struct Live {
    policy: Receiver<Arc<Policy>>,
    problem: Receiver<Option<String>>,
}

/// Replaces the table that [`Live`] shows.
#[derive(Debug)]
pub struct Publisher {
    policy: Sender<Arc<Policy>>,
    problem: Sender<Option<String>>,
}

impl Live {
    /// Creates a table, and the publisher that replaces it.
    #[must_use]
    pub fn new(policy: Policy) -> (Publisher, Self) {
        let (policy_to, policy) = channel(Arc::new(policy));
        let (problem_to, problem) = channel(None);
        let publisher = Publisher {
            policy: policy_to,
            problem: problem_to,
        };
        (publisher, Self { policy, problem })
    }

    /// Creates a table that is never replaced.
    #[must_use]
    pub fn fixed(policy: Policy) -> Self {
        Self::new(policy).1
    }

    /// The current table.
    #[must_use]
    pub fn now(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    /// Why the current site file is not in effect, if it is not.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        self.problem.borrow().clone()
    }
}

impl PartialEq for Live {
    fn eq(&self, other: &Self) -> bool {
        self.now() == other.now()
    }
}
