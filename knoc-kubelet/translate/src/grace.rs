//! PURE: the grace period of a pod: how long its containers may keep running after they were told to stop.

/// Kubernetes' default of `terminationGracePeriodSeconds`.
const DEFAULT: i64 = 30;

/// The time between SIGTERM and SIGKILL, in whole seconds as in the Kubernetes API. The seconds of the API are
/// converted to this type once; [`Grace::in_seconds`] converts it back for the agent's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grace(i64);

impl Grace {
    /// No grace: SIGKILL at once.
    pub const NONE: Self = Self(0);

    /// The grace period of a field of Kubernetes (`terminationGracePeriodSeconds`, `deletionGracePeriodSeconds`). A
    /// field that is not set means 30 s, and a negative one 1 s: the API server stores it, and deletes the pod with a second.
    #[must_use]
    pub fn of_field(seconds: Option<i64>) -> Self {
        Self(match seconds {
            None => DEFAULT,
            Some(..0) => 1,
            Some(seconds) => seconds,
        })
    }

    /// The grace period in seconds, never negative.
    #[must_use]
    pub fn in_seconds(self) -> i64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_is_not_set_is_half_a_minute_and_a_negative_one_a_second() {
        assert_eq!(Grace::of_field(None).in_seconds(), 30);
        assert_eq!(Grace::of_field(Some(0)), Grace::NONE);
        assert_eq!(Grace::of_field(Some(-5)).in_seconds(), 1);
        assert!(Grace::of_field(Some(5)) < Grace::of_field(None));
    }
}
