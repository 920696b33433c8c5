//! Authorization: one `SubjectAccessReview` for each candidate subresource of `nodes`; one that allows is enough.
//!
//! [`attributes`] is pure. Exec, attach, run and port-forward need `create` whatever the method: the Kubernetes kubelet
//! authorizes an exec by WebSocket, which is a GET, with `get nodes/proxy`, a right that many monitoring agents have.

use http::Method;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReviewSpec};

use super::user::User;

/// What the authorizer is asked about one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes {
    /// Empty for a method without a Kubernetes verb.
    pub(super) verb: &'static str,
    /// The subresources, which are tried in this order.
    pub(super) subresources: &'static [&'static str],
}

/// The attributes of a request, as in [kubelet
/// authorization](https://kubernetes.io/docs/reference/access-authn-authz/kubelet-authn-authz/#kubelet-authorization).
pub(super) fn attributes(method: &Method, path: &str) -> Attributes {
    let under = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let subresources: &[&str] = if under("/stats") {
        &["stats"]
    } else if under("/metrics") {
        &["metrics"]
    } else if under("/logs") {
        &["log"]
    } else if under("/checkpoint") {
        &["checkpoint"]
    } else if under("/pods") || under("/runningpods") {
        &["pods", "proxy"]
    } else if under("/healthz") {
        &["healthz", "proxy"]
    } else if under("/configz") {
        &["configz", "proxy"]
    } else if under("/statusz") {
        &["statusz", "proxy"]
    } else {
        &["proxy"]
    };
    let streams = ["/exec", "/attach", "/run", "/portForward"];
    let verb = if streams.into_iter().any(under) {
        "create"
    } else {
        verb(method)
    };
    Attributes { verb, subresources }
}

fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "POST" => "create",
        "GET" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "",
    }
}

/// The review of one subresource.
pub(super) fn review(
    user: &User,
    node: &str,
    verb: &str,
    subresource: &str,
) -> SubjectAccessReviewSpec {
    SubjectAccessReviewSpec {
        user: Some(user.name.clone()),
        uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
        groups: Some(user.groups.clone()),
        extra: Some(user.extra.clone()).filter(|extra| !extra.is_empty()),
        resource_attributes: Some(ResourceAttributes {
            group: Some(String::new()),
            version: Some("v1".to_owned()),
            resource: Some("nodes".to_owned()),
            subresource: Some(subresource.to_owned()),
            name: Some(node.to_owned()),
            verb: Some(verb.to_owned()),
            ..ResourceAttributes::default()
        }),
        non_resource_attributes: None,
    }
}

/// The text of a 403.
pub(super) fn forbidden(user: &User, attributes: Attributes) -> String {
    format!(
        "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}])\n",
        user.name,
        attributes.verb,
        attributes.subresources.join(" ")
    )
}

/// The text of a 500 if the authorizer did not answer.
pub(super) fn undecided(user: &User, attributes: Attributes) -> String {
    format!(
        "Authorization error (user={}, verb={}, resource=nodes, subresource(s)=[{}])",
        user.name,
        attributes.verb,
        attributes.subresources.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_every_path_of_the_contract() {
        let cases: [(Method, &str, &str, &[&str]); 14] = [
            (Method::GET, "/stats/summary", "get", &["stats"]),
            (Method::GET, "/metrics/resource", "get", &["metrics"]),
            (Method::GET, "/logs/", "get", &["log"]),
            (Method::POST, "/checkpoint/a/b/c", "create", &["checkpoint"]),
            (Method::GET, "/pods", "get", &["pods", "proxy"]),
            (Method::GET, "/runningpods/", "get", &["pods", "proxy"]),
            (Method::GET, "/healthz/ping", "get", &["healthz", "proxy"]),
            (Method::GET, "/configz", "get", &["configz", "proxy"]),
            (Method::GET, "/podsx", "get", &["proxy"]),
            (Method::GET, "/containerLogs/a/b/c", "get", &["proxy"]),
            (Method::GET, "/exec/a/b/c", "create", &["proxy"]),
            (Method::GET, "/portForward/a/b", "create", &["proxy"]),
            (Method::DELETE, "/attach/a/b/c", "create", &["proxy"]),
            (Method::HEAD, "/pods", "", &["pods", "proxy"]),
        ];
        for (method, path, verb, subresources) in cases {
            let expected = Attributes { verb, subresources };
            assert_eq!(attributes(&method, path), expected, "{method} {path}");
        }
    }

    #[test]
    fn says_forbidden_as_upstream() {
        let user = User {
            name: "eve".to_owned(),
            ..User::default()
        };
        assert_eq!(
            forbidden(&user, attributes(&Method::GET, "/pods")),
            "Forbidden (user=eve, verb=get, resource=nodes, subresource(s)=[pods proxy])\n"
        );
    }
}
