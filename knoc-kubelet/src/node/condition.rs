//! A condition of the Node as the task computes it, before it becomes JSON.

/// Type, status, reason and message of a condition.
pub(super) type Condition = (&'static str, &'static str, &'static str, String);
