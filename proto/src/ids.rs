//! PURE: names that are passed between the processes, each checked once where it enters a process.
//!
//! Each of them becomes part of a file name or an element of argv somewhere, so none may be empty, contain a slash, or
//! begin with a dot or a dash.
use std::fmt;

/// Why a string is not a name of this kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// The string is empty.
    #[error("the {kind} is empty")]
    Empty {
        /// The kind of name, such as "pod uid".
        kind: &'static str,
    },
    /// The string is longer than the limit.
    #[error("the {kind} {value:?} has {length} bytes, more than {limit}")]
    TooLong {
        /// The kind of name, such as "pod uid".
        kind: &'static str,
        /// The first bytes of the string.
        value: String,
        /// The length of the string in bytes.
        length: usize,
        /// The largest allowed length in bytes.
        limit: usize,
    },
    /// The string contains a character that is not allowed at its position.
    #[error("the {kind} {value:?} must not contain {found:?} at position {position}")]
    Character {
        /// The kind of name, such as "pod uid".
        kind: &'static str,
        /// The whole string.
        value: String,
        /// The character that is not allowed.
        found: char,
        /// The position of the character in bytes, from 0.
        position: usize,
    },
}

/// The rules for one kind of name.
struct Rules {
    kind: &'static str,
    limit: usize,
    /// Whether a character is allowed at the first, a middle and the last position.
    allows: fn(char, bool) -> bool,
}

impl Rules {
    fn check(&self, value: &str) -> Result<(), InvalidId> {
        let kind = self.kind;
        if value.is_empty() {
            return Err(InvalidId::Empty { kind });
        }
        if value.len() > self.limit {
            let (length, limit) = (value.len(), self.limit);
            let value = value.chars().take(80).collect();
            return Err(InvalidId::TooLong {
                kind,
                value,
                length,
                limit,
            });
        }
        let last = value
            .char_indices()
            .last()
            .map_or(0, |(position, _)| position);
        for (position, found) in value.char_indices() {
            if !(self.allows)(found, position == 0 || position == last) {
                let value = value.to_owned();
                return Err(InvalidId::Character {
                    kind,
                    value,
                    found,
                    position,
                });
            }
        }
        Ok(())
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $rules:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            const RULES: Rules = $rules;

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<&str> for $name {
            type Error = InvalidId;

            fn try_from(value: &str) -> Result<Self, InvalidId> {
                Self::RULES.check(value)?;
                Ok(Self(value.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(value: String) -> Result<Self, InvalidId> {
                Self::RULES.check(&value)?;
                Ok(Self(value))
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;

            fn from_str(value: &str) -> Result<Self, InvalidId> {
                Self::try_from(value)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// `metadata.uid` of a pod, the key by which all components know it: a lower-case UUID, or `[A-Za-z0-9._-]{1,64}`
    /// for pods without Kubernetes.
    PodUid,
    Rules {
        kind: "pod uid",
        limit: 64,
        allows: |c, edge| c.is_ascii_alphanumeric() || (!edge && matches!(c, '.' | '_' | '-')),
    }
);

name_type!(
    /// The name of a container: a DNS label, as in Kubernetes.
    ContainerName,
    Rules {
        kind: "container name",
        limit: 63,
        allows: |c, edge| c.is_ascii_lowercase() || c.is_ascii_digit() || (!edge && c == '-'),
    }
);

name_type!(
    /// The id of a job: `4711`, `4711_2` or `4711+1` from Slurm, and the local scheduler's own form otherwise.
    JobId,
    Rules {
        kind: "job id",
        limit: 64,
        allows: |c, edge| {
            c.is_ascii_alphanumeric() || (!edge && matches!(c, '.' | '_' | '-' | '+'))
        },
    }
);

name_type!(
    /// The name of a site: a DNS label that is short enough for the node's name `knoc-<site>` to be a DNS label too.
    SiteName,
    Rules {
        kind: "site name",
        limit: 58,
        allows: |c, edge| c.is_ascii_lowercase() || c.is_ascii_digit() || (!edge && c == '-'),
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_of_kubernetes_and_of_users_are_accepted() {
        for good in [
            "0e9f5ac4-87ad-4ee6-9b5c-3a9be2f9fd73",
            "demo",
            "a",
            "job_1.x-2",
        ] {
            assert_eq!(PodUid::try_from(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "ä",
            "x\n",
            &"a".repeat(65),
        ] {
            PodUid::try_from(bad).unwrap_err();
        }
    }

    #[test]
    fn container_names_are_dns_labels() {
        ContainerName::try_from("web-1").unwrap();
        for bad in ["Web", "a.b", "a_b", "-a", "a-", "", &"a".repeat(64)] {
            ContainerName::try_from(bad).unwrap_err();
        }
    }

    #[test]
    fn the_node_name_of_a_site_is_a_dns_label() {
        for good in ["a", "my-site", "7", &"a".repeat(58)] {
            SiteName::try_from(good).unwrap();
            ContainerName::try_from(format!("knoc-{good}")).unwrap();
        }
        for bad in ["", "My", "a.b", "a_b", "-a", "a-", &"a".repeat(59)] {
            SiteName::try_from(bad).unwrap_err();
        }
    }

    /// `knoc-agent init` and the Helm chart accept the same names.
    #[test]
    fn the_chart_has_the_same_rule_for_sites() {
        let schema = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../deploy/chart/knoc/values.schema.json"
        );
        let schema: serde_json::Value =
            serde_json::from_slice(&std::fs::read(schema).unwrap()).unwrap();
        let site = &schema["properties"]["agent"]["properties"]["site"];
        assert_eq!(site["maxLength"], SiteName::RULES.limit);
        assert_eq!(site["pattern"], "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$");
    }

    #[test]
    fn the_error_names_the_character_and_its_position() {
        let error = JobId::try_from("47;11").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the job id \"47;11\" must not contain ';' at position 2"
        );
    }

    #[test]
    fn deserialization_applies_the_rules() {
        assert_eq!(
            serde_json::from_str::<JobId>("\"47_1\"").unwrap().as_str(),
            "47_1"
        );
        serde_json::from_str::<JobId>("\"../x\"").unwrap_err();
    }
}
