//! PURE: the Node's condition about the names in the API server's certificate, by which pods find out whether they have reached it.

use super::condition::Condition;

/// The type of the condition, a problem as `MemoryPressure` is one.
pub(super) const KIND: &str = "ApiServerCertificateMismatch";

/// Whether the certificate names what pods are told to use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ApiNames {
    /// The kubelet has not seen it, or pods may not reach the API server.
    #[default]
    Unknown,
    /// It names everything.
    Named,
    /// It does not: what is missing, whom it concerns and what to do.
    Lacking(String),
}

impl ApiNames {
    /// The condition. `had`: whether the Node has one of before, which is then taken back.
    pub(super) fn condition(&self, had: bool) -> Option<Condition> {
        match self {
            Self::Unknown => had.then(|| {
                let text = "the kubelet has not looked at the API server's certificate";
                (KIND, "Unknown", "NotLookedAt", text.to_owned())
            }),
            Self::Named => {
                let text = "the API server's certificate names what pods are told to use";
                Some((KIND, "False", "AddressesNamed", text.to_owned()))
            }
            Self::Lacking(message) => Some((KIND, "True", "AddressNotNamed", message.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_is_true_only_while_a_name_is_missing() {
        let of = |found: &ApiNames, had| {
            let (kind, status, _, message) = found.condition(had)?;
            assert_eq!(kind, KIND);
            Some((status, message))
        };
        assert_eq!(of(&ApiNames::Unknown, false), None, "most test clusters");
        assert_eq!(of(&ApiNames::Unknown, true).unwrap().0, "Unknown");
        assert_eq!(of(&ApiNames::Named, false).unwrap().0, "False");
        let lacking = ApiNames::Lacking("it lacks 10.96.0.1".to_owned());
        let expected = ("True", "it lacks 10.96.0.1".to_owned());
        assert_eq!(of(&lacking, true), Some(expected));
    }
}
