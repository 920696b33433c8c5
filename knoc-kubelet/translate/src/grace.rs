//! PURE: how long a pod's containers may go on after they are told to end.

/// Kubernetes' default.
const DEFAULT: i64 = 30;

/// The time between SIGTERM and SIGKILL, in whole seconds as Kubernetes counts it. The seconds of the API become this type
/// once; the agent's protocol gets them back by [`Grace::in_seconds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grace(i64);

impl Grace {
    /// SIGKILL at once.
    pub const NONE: Self = Self(0);

    /// The grace that a field of Kubernetes gives: `terminationGracePeriodSeconds`, `deletionGracePeriodSeconds`.
    #[must_use]
    pub fn of_field(seconds: Option<i64>) -> Self {
        Self(seconds.unwrap_or(DEFAULT))
    }

    /// As a number of seconds.
    #[must_use]
    pub fn in_seconds(self) -> i64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_not_set_is_half_a_minute() {
        assert_eq!(Grace::of_field(None).in_seconds(), 30);
        assert_eq!(Grace::of_field(Some(0)), Grace::NONE);
        assert!(Grace::of_field(Some(5)) < Grace::of_field(None));
    }
}
