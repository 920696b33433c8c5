//! A condition of the node before it is rendered.

/// Type, status, reason and message.
pub(super) type Condition = (&'static str, &'static str, &'static str, String);
