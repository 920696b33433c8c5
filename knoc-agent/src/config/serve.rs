//! PURE: the table `[serve]` of the site file.

use std::time::Duration;

use serde::Deserialize;

use super::text;

/// An agent that is started on demand.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Serve {
    /// How long it goes on without any link.
    #[serde(deserialize_with = "text::duration")]
    pub linger: Duration,
}

impl Default for Serve {
    fn default() -> Self {
        Self {
            linger: Duration::from_mins(10),
        }
    }
}
