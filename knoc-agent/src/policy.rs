//! `[policy]` of the site file as it is now, and which certificates count.
//!
//! The table is re-read while the agent runs: [`watch`] looks at the file, and at the CA, every [`POLL`] and publishes
//! the whole table at once. Whoever decides by it asks [`Live::now`] for each decision. A file with a mistake changes
//! nothing; [`Live::problem`] says so.

pub mod denied;
pub mod nodes;
pub mod rules;
pub mod watch;

use std::{sync::Arc, time::Duration};

use tokio::sync::watch::{Receiver, Sender, channel};

use crate::config::Policy;
pub use rules::{Refused, Renewals, Rules};

/// Between two looks at the site file and the CA. Both are opened and read: on a network file system that shows a change
/// at once, while attributes may be a minute old, and there is no inotify.
pub const POLL: Duration = Duration::from_secs(10);

/// The table as it is now. Clones see the same.
#[derive(Debug, Clone)]
pub struct Live {
    policy: Receiver<Arc<Policy>>,
    problem: Receiver<Option<String>>,
}

/// The other end.
#[derive(Debug)]
pub struct Publisher {
    policy: Sender<Arc<Policy>>,
    problem: Sender<Option<String>>,
}

impl Live {
    /// A table, and what replaces it.
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

    /// A table that is never replaced.
    #[must_use]
    pub fn fixed(policy: Policy) -> Self {
        Self::new(policy).1
    }

    /// The whole table.
    #[must_use]
    pub fn now(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }

    /// Why the site file as it is now is not in effect.
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
