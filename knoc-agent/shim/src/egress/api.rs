//! PURE: what a container in the node's network is told about the API server, the only Service that it reaches.
//!
//! The shim listens for it on a port of the loopback interface. The variables that name the Service lead there, by a name
//! for which the API server has a certificate, and which the container's `/etc/hosts` has.

use std::net::{Ipv4Addr, SocketAddrV4};

use knoc_proto::pb::{EnvVar, env_var::Value};

/// The name of the API server in every cluster.
const NAME: &str = "kubernetes.default.svc";

/// The variables that Kubernetes sets about its Service begin with it.
const PREFIX: &str = "KUBERNETES_";

/// The API server's Service, and the port that leads to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ApiServer {
    pub(crate) service: SocketAddrV4,
    pub(crate) port: u16,
    /// Whether the containers have an `/etc/hosts` of their own.
    pub(crate) named: bool,
}

impl ApiServer {
    fn host(self) -> String {
        if self.named {
            NAME.to_owned()
        } else {
            Ipv4Addr::LOCALHOST.to_string()
        }
    }

    /// The line of `/etc/hosts`, which is the same for every port.
    pub(crate) fn hosts_line() -> String {
        format!("{}\t{NAME}", Ipv4Addr::LOCALHOST)
    }

    /// The container's variables, of which those that name the Service lead to the port. What the pod sets itself to
    /// something else stays.
    pub(crate) fn redirect(self, vars: &[EnvVar]) -> Vec<EnvVar> {
        let mut vars = vars.to_vec();
        for var in &mut vars {
            let Some(Value::Literal(value)) = &var.value else {
                continue;
            };
            if let Some(other) = self.instead_of(&var.name, value) {
                var.value = Some(Value::Literal(other.into_bytes().into()));
            }
        }
        vars
    }

    fn instead_of(self, name: &str, value: &[u8]) -> Option<String> {
        let (ip, port) = (
            self.service.ip().to_string(),
            self.service.port().to_string(),
        );
        let name = name.strip_prefix(PREFIX)?;
        let is_host = name == "SERVICE_HOST" || name.ends_with("_TCP_ADDR");
        let is_port = name.starts_with("SERVICE_PORT") || name.ends_with("_TCP_PORT");
        if is_host && value == ip.as_bytes() {
            Some(self.host())
        } else if is_port && value == port.as_bytes() {
            Some(self.port.to_string())
        } else if value == format!("tcp://{ip}:{port}").as_bytes() {
            Some(format!("tcp://{}:{}", self.host(), self.port))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_the_service_leads_to_the_port_and_nothing_else_changes() {
        let api = ApiServer {
            service: "10.96.0.1:443".parse().unwrap(),
            port: 40_001,
            named: true,
        };
        let of = |api: ApiServer, name: &str, value: &str| {
            let var = EnvVar {
                name: name.to_owned(),
                value: Some(Value::Literal(value.as_bytes().to_vec().into())),
            };
            let Some(Value::Literal(value)) = api.redirect(&[var]).remove(0).value else {
                panic!("{name} is no literal");
            };
            String::from_utf8(value.to_vec()).unwrap()
        };
        for (name, value, expected) in [
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1", NAME),
            ("KUBERNETES_SERVICE_PORT", "443", "40001"),
            ("KUBERNETES_SERVICE_PORT_HTTPS", "443", "40001"),
            (
                "KUBERNETES_PORT",
                "tcp://10.96.0.1:443",
                "tcp://kubernetes.default.svc:40001",
            ),
            (
                "KUBERNETES_PORT_443_TCP",
                "tcp://10.96.0.1:443",
                "tcp://kubernetes.default.svc:40001",
            ),
            ("KUBERNETES_PORT_443_TCP_ADDR", "10.96.0.1", NAME),
            ("KUBERNETES_PORT_443_TCP_PORT", "443", "40001"),
            ("KUBERNETES_PORT_443_TCP_PROTO", "tcp", "tcp"),
            ("KUBERNETES_SERVICE_HOST", "api.example", "api.example"),
            ("OTHER_SERVICE_HOST", "10.96.0.1", "10.96.0.1"),
            ("OTHER", "443", "443"),
        ] {
            assert_eq!(of(api, name, value), expected, "{name}");
        }
        let unnamed = ApiServer {
            named: false,
            ..api
        };
        assert_eq!(
            of(unnamed, "KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            "127.0.0.1"
        );
        assert_eq!(ApiServer::hosts_line(), "127.0.0.1\tkubernetes.default.svc");
    }
}
