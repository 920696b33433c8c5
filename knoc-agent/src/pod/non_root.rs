//! PURE: checks `runAsNonRoot` as `verifyRunAsNonRoot` of the kubelet does: against `runAsUser`, else against the image's
//! user.

use knoc_proto::pb;

/// Returns why the container must not be started, if it would run as root. `own_file` is true for a SIF file or a sandbox:
/// if it names no user, it runs as whoever starts it, which is the HPC user.
pub(super) fn check(
    pod: &pb::PodSpec,
    container: &pb::Container,
    image_user: &str,
    own_file: bool,
) -> Result<(), String> {
    if !container.run_as_non_root {
        return Ok(());
    }
    let of = format!(
        "(pod: \"{}_{}({})\", container: {})",
        pod.name, pod.namespace, pod.uid, container.name
    );
    if let Some(uid) = container.run_as_user {
        return if uid == 0 {
            Err(format!("container's runAsUser breaks non-root policy {of}"))
        } else {
            Ok(())
        };
    }
    // `USER[:GROUP]`
    let user = image_user.split(':').next().unwrap_or_default();
    match user.parse::<u32>() {
        Ok(0) => Err(format!(
            "container has runAsNonRoot and image will run as root {of}"
        )),
        Ok(_) => Ok(()),
        Err(_) if user.is_empty() && own_file => Ok(()),
        Err(_) if user.is_empty() => Err(format!(
            "container has runAsNonRoot and image will run as root {of}"
        )),
        Err(_) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root {of}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(run_as_user: Option<i64>, image_user: &str, own_file: bool) -> Result<(), String> {
        let pod = pb::PodSpec {
            name: "p".to_owned(),
            namespace: "n".to_owned(),
            uid: "u".to_owned(),
            ..pb::PodSpec::default()
        };
        let container = pb::Container {
            name: "c".to_owned(),
            run_as_user,
            run_as_non_root: true,
            ..pb::Container::default()
        };
        check(&pod, &container, image_user, own_file)
    }

    #[test]
    fn the_pods_user_comes_before_the_images() {
        assert_eq!(said(Some(1000), "0", false), Ok(()));
        assert_eq!(
            said(Some(0), "1000", false),
            Err(
                "container's runAsUser breaks non-root policy (pod: \"p_n(u)\", container: c)"
                    .to_owned()
            )
        );
    }

    #[test]
    fn the_images_user_must_be_a_number_other_than_0() {
        for user in ["1", "1000:0", "65535:65535"] {
            assert_eq!(said(None, user, false), Ok(()), "{user}");
        }
        for (user, words) in [
            ("", "image will run as root"),
            ("0", "image will run as root"),
            ("0:1000", "image will run as root"),
            ("root", "non-numeric user (root), cannot verify"),
            ("nginx:nginx", "non-numeric user (nginx), cannot verify"),
        ] {
            let why = said(None, user, false).unwrap_err();
            assert!(why.contains(words), "{user}: {why}");
        }
    }

    #[test]
    fn a_file_that_names_no_user_runs_as_the_hpc_user() {
        assert_eq!(said(None, "", true), Ok(()));
        assert!(said(None, "0", true).is_err());
        assert!(said(Some(0), "", true).is_err());
    }

    #[test]
    fn nothing_is_checked_that_the_pod_does_not_ask_for() {
        let container = pb::Container {
            run_as_user: Some(0),
            ..pb::Container::default()
        };
        assert_eq!(
            check(&pb::PodSpec::default(), &container, "0", false),
            Ok(())
        );
    }
}
