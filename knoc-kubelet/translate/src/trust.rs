//! PURE: what a `clusterTrustBundle` of a projected volume selects.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use super::carried::TrustBundleProjection;

/// What selects `ClusterTrustBundles`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrustBundleKey {
    /// The one with this name.
    Named(String),
    /// All of a signer whose labels match.
    Signed {
        /// The signer's name.
        signer: String,
        /// The selector as the API server reads it. None selects nothing, an empty one everything.
        labels: Option<String>,
    },
}

impl TrustBundleKey {
    /// What the projection selects. The API server accepts no projection that names neither an object nor a signer.
    pub(crate) fn of(projection: TrustBundleProjection<'_>) -> Self {
        match projection.name {
            Some(name) if !name.is_empty() => Self::Named(name.clone()),
            Some(_) | None => Self::Signed {
                signer: projection.signer_name.clone().unwrap_or_default(),
                labels: projection.label_selector.as_ref().map(selector),
            },
        }
    }
}

impl std::fmt::Display for TrustBundleKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named(name) => write!(f, "clustertrustbundle \"{name}\""),
            Self::Signed { signer, labels } => {
                write!(f, "clustertrustbundles of signer \"{signer}\"")?;
                match labels.as_deref() {
                    Some("") => Ok(()),
                    Some(labels) => write!(f, " with labels \"{labels}\""),
                    None => f.write_str(" (no labelSelector, which selects nothing)"),
                }
            }
        }
    }
}

/// The selector in the form of a query.
fn selector(labels: &LabelSelector) -> String {
    let equal = labels.match_labels.iter().flatten();
    let equal = equal.map(|(key, value)| format!("{key}={value}"));
    let expressions = labels.match_expressions.iter().flatten().map(requirement);
    equal.chain(expressions).collect::<Vec<_>>().join(",")
}

fn requirement(requirement: &LabelSelectorRequirement) -> String {
    let key = &requirement.key;
    let values = requirement.values.as_deref().unwrap_or_default().join(",");
    match requirement.operator.as_str() {
        "In" => format!("{key} in ({values})"),
        "NotIn" => format!("{key} notin ({values})"),
        "DoesNotExist" => format!("!{key}"),
        _ => key.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_selector_is_written_as_a_query() {
        let labels = json!({
            "matchLabels": {"a": "1", "b": "2"},
            "matchExpressions": [
                {"key": "c", "operator": "In", "values": ["x", "y"]},
                {"key": "d", "operator": "NotIn", "values": ["z"]},
                {"key": "e", "operator": "Exists"},
                {"key": "f", "operator": "DoesNotExist"},
            ],
        });
        let labels: LabelSelector = serde_json::from_value(labels).unwrap();
        assert_eq!(selector(&labels), "a=1,b=2,c in (x,y),d notin (z),e,!f");
        assert_eq!(selector(&LabelSelector::default()), "");
    }
}
