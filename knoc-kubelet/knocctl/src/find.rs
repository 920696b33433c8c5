//! Finds the pod that the user named by a uid, a name, or `NAMESPACE/NAME`.

use knoc_proto::pb::PodObserved;

use super::{CtlError, session::Session};

/// Asks the agent for its pods and returns the one that `wanted` names.
pub(super) async fn one(
    session: &mut Session,
    namespace: Option<&str>,
    wanted: &str,
) -> Result<PodObserved, CtlError> {
    choose(session.pods().await?, namespace, wanted)
}

/// PURE: the only pod that `wanted` names. A uid takes precedence over a name.
fn choose(
    pods: Vec<PodObserved>,
    namespace: Option<&str>,
    wanted: &str,
) -> Result<PodObserved, CtlError> {
    let (space, name) = match wanted.split_once('/') {
        Some((space, name)) => (Some(space), name),
        None => (namespace, wanted),
    };
    let by_uid = |pod: &PodObserved| pod.uid == wanted;
    let by_name =
        |pod: &PodObserved| pod.name == name && space.is_none_or(|space| pod.namespace == space);
    let uid_known = pods.iter().any(by_uid);
    let mut found: Vec<_> = pods
        .into_iter()
        .filter(|pod| if uid_known { by_uid(pod) } else { by_name(pod) })
        .collect();
    match (found.pop(), found.as_slice()) {
        (None, _) => Err(CtlError::NoPod {
            wanted: wanted.to_owned(),
        }),
        (Some(pod), []) => Ok(pod),
        (Some(last), others) => {
            let mut candidates: Vec<String> = others.iter().chain([&last]).map(label).collect();
            candidates.sort();
            Err(CtlError::Ambiguous {
                wanted: wanted.to_owned(),
                candidates,
            })
        }
    }
}

fn label(pod: &PodObserved) -> String {
    format!("{}/{} ({})", pod.namespace, pod.name, pod.uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods() -> Vec<PodObserved> {
        [
            ("u1", "a", "web"),
            ("u2", "b", "web"),
            ("u3", "a", "job"),
            ("job", "c", "x"),
        ]
        .map(|(uid, namespace, name)| PodObserved {
            uid: uid.into(),
            namespace: namespace.into(),
            name: name.into(),
            ..PodObserved::default()
        })
        .into()
    }

    fn uid(namespace: Option<&str>, wanted: &str) -> Result<String, String> {
        choose(pods(), namespace, wanted)
            .map(|pod| pod.uid)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn uids_names_and_namespaced_names_are_found() {
        assert_eq!(uid(None, "u2").unwrap(), "u2");
        assert_eq!(uid(None, "b/web").unwrap(), "u2");
        assert_eq!(uid(Some("a"), "web").unwrap(), "u1");
        assert_eq!(uid(None, "x").unwrap(), "job");
    }

    #[test]
    fn a_uid_goes_before_a_name() {
        assert_eq!(uid(None, "job").unwrap(), "job");
        assert_eq!(uid(None, "a/job").unwrap(), "u3");
    }

    #[test]
    fn ambiguous_names_list_the_candidates() {
        let error = uid(None, "web").unwrap_err();
        assert_eq!(error, "web is ambiguous: a/web (u1), b/web (u2)");
        assert_eq!(uid(None, "nix").unwrap_err(), "the agent knows no pod nix");
        assert_eq!(
            uid(Some("z"), "web").unwrap_err(),
            "the agent knows no pod web"
        );
    }
}
