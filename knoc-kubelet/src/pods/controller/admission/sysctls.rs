//! PURE: judges the kernel parameters that a pod asks for as a kubelet with the default allow-list does: unsafe ones are
//! forbidden. Safe ones are rejected by their verdict, because an ordinary user cannot set them.

use k8s_openapi::api::core::v1::Pod;

use crate::pods::status::Rejection;

/// `safeSysctls` of the kubelet.
const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// Rejects the first unsafe parameter, with Kubernetes' own reason and message, which tools look for.
pub(super) fn admit(pod: &Pod) -> Result<(), Rejection> {
    let spec = pod.spec.as_ref();
    let context = spec.and_then(|spec| spec.security_context.as_ref());
    let sysctls = context.and_then(|context| context.sysctls.as_deref());
    for sysctl in sysctls.unwrap_or_default() {
        let name = normalized(&sysctl.name);
        if !SAFE.contains(&name.as_str()) {
            let message = format!("forbidden sysctl: \"{name}\" not allowlisted");
            return Err(Rejection::new("SysctlForbidden", &message));
        }
    }
    Ok(())
}

/// The name as `NormalizeName` of the kubelet writes it. The first dot or slash is the separator. If it is a slash, dots and
/// slashes are exchanged, so that the separator is always a dot.
fn normalized(name: &str) -> String {
    if name
        .find(['.', '/'])
        .is_none_or(|at| name[at..].starts_with('.'))
    {
        return name.to_owned();
    }
    let swap = |c| match c {
        '/' => '.',
        '.' => '/',
        other => other,
    };
    name.chars().map(swap).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(names: &[&str]) -> Result<(), Rejection> {
        let sysctls: Vec<_> = names
            .iter()
            .map(|name| json!({"name": name, "value": "1"}))
            .collect();
        let pod = json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [], "securityContext": {"sysctls": sysctls}},
        });
        admit(&serde_json::from_value(pod).expect("a pod"))
    }

    #[test]
    fn a_kernel_parameter_that_is_not_safe_is_forbidden() {
        let rejection = judged(&["net.ipv4.tcp_syncookies", "fs.mount-max", "kernel.msgmax"]);
        let rejection = rejection.unwrap_err();
        assert_eq!(rejection.reason, "SysctlForbidden");
        assert_eq!(
            rejection.message,
            "Pod was rejected: forbidden sysctl: \"fs.mount-max\" not allowlisted"
        );
        let rejection = judged(&["kernel/shm_rmid_forced", "net/ipv4/conf/eno2.100/rp_filter"]);
        assert!(
            rejection
                .unwrap_err()
                .message
                .contains("\"net.ipv4.conf.eno2/100.rp_filter\"")
        );
    }

    #[test]
    fn safe_ones_are_left_to_the_verdict_table() {
        assert!(judged(&[]).is_ok());
        assert!(judged(&SAFE).is_ok());
        assert!(judged(&["kernel/shm_rmid_forced"]).is_ok());
        assert!(admit(&Pod::default()).is_ok());
    }
}
