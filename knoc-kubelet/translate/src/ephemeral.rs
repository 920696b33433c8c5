//! PURE: ephemeral containers, which are translated as the other containers are.

use k8s_openapi::api::core::v1 as core;

use super::carried::{EphemeralContainer, PodSpec};

/// One ephemeral container.
pub(super) struct Ephemeral {
    /// As a container, with which it has all but its target in common.
    pub(super) container: core::Container,
    /// The container whose processes it sees; empty: none.
    pub(super) target: String,
}

/// The ephemeral containers of the pod.
pub(super) fn containers(spec: PodSpec<'_>) -> Vec<Ephemeral> {
    let all = spec.ephemeral_containers.iter().flatten();
    all.map(|one| of(EphemeralContainer::from(one))).collect()
}

fn of(one: EphemeralContainer<'_>) -> Ephemeral {
    Ephemeral {
        target: one.target_container_name.clone().unwrap_or_default(),
        container: core::Container {
            args: one.args.clone(),
            command: one.command.clone(),
            env: one.env.clone(),
            env_from: one.env_from.clone(),
            image: one.image.clone(),
            image_pull_policy: one.image_pull_policy.clone(),
            name: one.name.clone(),
            security_context: one.security_context.clone(),
            stdin: *one.stdin,
            stdin_once: *one.stdin_once,
            termination_message_path: one.termination_message_path.clone(),
            termination_message_policy: one.termination_message_policy.clone(),
            tty: *one.tty,
            volume_mounts: one.volume_mounts.clone(),
            working_dir: one.working_dir.clone(),
            ..core::Container::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{Resolved, needs, shape, values, verdict};

    fn debugged() -> serde_json::Value {
        json!({
            "metadata": {"name": "p", "uid": "u", "generation": 2},
            "spec": {
                "initContainers": [{"name": "proxy", "image": "i", "restartPolicy": "Always"}],
                "containers": [{
                    "name": "main", "image": "i", "restartPolicy": "Never",
                    "restartPolicyRules": [
                        {"action": "Restart", "exitCodes": {"operator": "In", "values": [3, 4]}},
                        {"action": "RestartAllContainers", "exitCodes": {"operator": "NotIn", "values": [1]}},
                    ],
                }],
                "ephemeralContainers": [{
                    "name": "debug", "image": "busybox:1", "targetContainerName": "main", "tty": true, "stdin": true,
                    "env": [{"name": "A", "value": "b"}, {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                    "securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}},
                    "resources": {},
                }],
            },
        })
    }

    #[test]
    fn an_ephemeral_container_is_carried_apart_from_the_others() {
        let pod = serde_json::from_value(debugged()).unwrap();
        let shape = shape(&pod).unwrap();
        let debug = &shape.ephemeral_containers[0];
        assert_eq!(
            (debug.name.as_str(), debug.target.as_str()),
            ("debug", "main")
        );
        assert!(debug.tty && debug.stdin);
        assert!(shape.init_containers[0].is_sidecar());
        let rules = &shape.containers[0].restart_rules;
        assert_eq!(
            (rules[0].not_in, &rules[0].exit_codes[..]),
            (false, &[3, 4][..])
        );
        assert_eq!(
            (rules[1].not_in, &rules[1].exit_codes[..]),
            (true, &[1][..])
        );
        assert!(!rules[0].restart_all && rules[1].restart_all);

        assert_eq!(needs(&pod).secrets, ["s"]);
        let values = values(&pod, &Resolved::default()).unwrap();
        assert_eq!(values.values.env.len(), 2);
        let env = &values.values.ephemeral_env[0];
        assert_eq!((env.container.as_str(), env.vars.len()), ("debug", 1));
        // It holds up nothing but its container.
        let [lacking] = values.lacking.as_slice() else {
            panic!("{:?}", values.lacking);
        };
        assert_eq!(lacking.container, "debug");
        assert_eq!(lacking.messages.len(), 1, "{lacking:?}");
    }

    #[test]
    fn what_an_ephemeral_container_cannot_have_is_rejected_by_its_path() {
        let mut pod = debugged();
        let findings = verdict::judge(&pod);
        assert_eq!(findings.rejected, Vec::<String>::new());
        assert!(
            findings.mapped[0]
                .starts_with("spec.ephemeralContainers[debug].securityContext.capabilities.add: ")
        );
        let debug = &mut pod["spec"]["ephemeralContainers"][0];
        debug["securityContext"]["capabilities"]["add"] = json!(["SYS_PTRACE", "NET_ADMIN"]);
        debug["lifecycle"] = json!({"preStop": {"sleep": {"seconds": 1}}});
        let rejected = verdict::judge(&pod).rejected;
        let paths: Vec<_> = rejected
            .iter()
            .filter_map(|why| why.split_once(": ").map(|(path, _)| path))
            .collect();
        assert_eq!(
            paths,
            [
                "spec.ephemeralContainers[debug].lifecycle",
                "spec.ephemeralContainers[debug].securityContext.capabilities.add"
            ]
        );
    }
}
