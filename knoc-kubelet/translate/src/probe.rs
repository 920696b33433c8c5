//! PURE: the probes and hooks of a container, and the signal that ends it.

use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::util::intstr::IntOrString};
use knoc_proto::pb;

use super::carried::{
    Container, ContainerPort, ExecAction, GrpcAction, HttpGetAction, HttpHeader, Lifecycle,
    LifecycleHandler, Probe, SleepAction, TcpSocketAction,
};

/// All of one container.
#[derive(Default)]
pub(crate) struct Probes {
    pub(crate) startup: Option<pb::Probe>,
    pub(crate) liveness: Option<pb::Probe>,
    pub(crate) readiness: Option<pb::Probe>,
    pub(crate) post_start: Option<pb::Hook>,
    pub(crate) pre_stop: Option<pb::Hook>,
    pub(crate) stop_signal: String,
}

/// The field of a container that is a probe or hook. Problems name it, and ports are looked up in its container.
#[derive(Clone, Copy)]
struct Field<'a> {
    container: Container<'a>,
    name: &'a str,
}

/// Translates them; adds what is wrong to `problems`.
pub(crate) fn shape(container: Container<'_>, problems: &mut Vec<String>) -> Probes {
    let at = |name| Field { container, name };
    let mut probe = |field, probe: &Option<core::Probe>| {
        let probe = Probe::from(probe.as_ref()?);
        Some(at(field).probe(probe, problems))
    };
    let startup = probe("startupProbe", container.startup_probe);
    let liveness = probe("livenessProbe", container.liveness_probe);
    let readiness = probe("readinessProbe", container.readiness_probe);
    let lifecycle = container.lifecycle.as_ref().map(Lifecycle::from);
    let mut hook = |field, hook: Option<&Option<core::LifecycleHandler>>| {
        let hook = LifecycleHandler::from(hook?.as_ref()?);
        Some(at(field).hook(hook, problems))
    };
    Probes {
        startup,
        liveness,
        readiness,
        post_start: hook("lifecycle.postStart", lifecycle.map(|all| all.post_start)),
        pre_stop: hook("lifecycle.preStop", lifecycle.map(|all| all.pre_stop)),
        stop_signal: lifecycle
            .and_then(|all| all.stop_signal.clone())
            .unwrap_or_default(),
    }
}

impl Field<'_> {
    fn probe(self, probe: Probe<'_>, problems: &mut Vec<String>) -> pb::Probe {
        use pb::probe::Action;
        let mut actions = Vec::new();
        if let Some(exec) = probe.exec {
            actions.push(Action::Exec(of_exec(exec.into())));
        }
        if let Some(get) = probe.http_get {
            actions.extend(self.http(get.into(), problems).map(Action::HttpGet));
        }
        if let Some(tcp) = probe.tcp_socket {
            let port = self.port("tcpSocket", TcpSocketAction::from(tcp).port, problems);
            actions.extend(port.map(|port| Action::TcpSocket(pb::TcpSocketAction { port })));
        }
        if let Some(grpc) = probe.grpc {
            let GrpcAction {
                mode,
                port,
                service,
            } = grpc.into();
            let port = self.port("grpc", &IntOrString::Int(*port), problems);
            actions.extend(port.map(|port| {
                Action::Grpc(pb::GrpcAction {
                    port,
                    service: service.clone().unwrap_or_default(),
                    tls: mode.as_deref() == Some("TLS"),
                })
            }));
        }
        pb::Probe {
            action: self.only(actions, problems),
            initial_delay_seconds: probe.initial_delay_seconds.unwrap_or(0),
            period_seconds: probe.period_seconds.unwrap_or(0),
            timeout_seconds: probe.timeout_seconds.unwrap_or(0),
            success_threshold: probe.success_threshold.unwrap_or(0),
            failure_threshold: probe.failure_threshold.unwrap_or(0),
            termination_grace_period_seconds: *probe.termination_grace_period_seconds,
        }
    }

    fn hook(self, hook: LifecycleHandler<'_>, problems: &mut Vec<String>) -> pb::Hook {
        use pb::hook::Action;
        let mut actions = Vec::new();
        if let Some(exec) = hook.exec {
            actions.push(Action::Exec(of_exec(exec.into())));
        }
        if let Some(get) = hook.http_get {
            actions.extend(self.http(get.into(), problems).map(Action::HttpGet));
        }
        if let Some(sleep) = hook.sleep {
            actions.push(Action::SleepSeconds(*SleepAction::from(sleep).seconds));
        }
        pb::Hook {
            action: self.only(actions, problems),
        }
    }

    /// Several actions are a mistake. That none is left may be one of an action itself, which is recorded already.
    fn only<A>(self, mut actions: Vec<A>, problems: &mut Vec<String>) -> Option<A> {
        if actions.len() > 1 {
            self.wrong(": has more than one action; leave one", problems);
        }
        actions.pop()
    }

    fn http(self, get: HttpGetAction<'_>, problems: &mut Vec<String>) -> Option<pb::HttpGetAction> {
        let headers = get.http_headers.iter().flatten().map(HttpHeader::from);
        Some(pb::HttpGetAction {
            port: self.port("httpGet", get.port, problems)?,
            path: get.path.clone().unwrap_or_default(),
            https: get.scheme.as_deref() == Some("HTTPS"),
            headers: headers
                .map(|header| pb::HttpHeader {
                    name: header.name.clone(),
                    value: header.value.clone(),
                })
                .collect(),
        })
    }

    /// A number, or the name of a port of the same container.
    fn port(self, action: &str, port: &IntOrString, problems: &mut Vec<String>) -> Option<u32> {
        let number = match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::String(name) => {
                let ports = self.container.ports.iter().flatten();
                let mut ports = ports.map(ContainerPort::from);
                let named = ports.find(|port| port.name.as_ref() == Some(name));
                named
                    .map(|port| *port.container_port)
                    .or_else(|| name.parse().ok())
            }
        };
        let valid = number
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| (1..=65535).contains(number));
        if valid.is_none() {
            let port = match port {
                IntOrString::Int(number) => number.to_string(),
                IntOrString::String(name) => knoc_proto::text::quote(name, 80),
            };
            let what = format!(
                ".{action}.port is {port}; give a number from 1 to 65535, or the name of one of the container's ports"
            );
            self.wrong(&what, problems);
        }
        valid
    }

    fn wrong(self, what: &str, problems: &mut Vec<String>) {
        problems.push(format!("{}{what}", self.name));
    }
}

fn of_exec(exec: ExecAction<'_>) -> pb::ExecAction {
    pb::ExecAction {
        command: exec.command.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use pb::{hook, probe::Action};

    use super::*;

    fn shaped(container: Value) -> (Probes, Vec<String>) {
        let container: core::Container = serde_json::from_value(container).unwrap();
        let mut problems = Vec::new();
        let probes = shape((&container).into(), &mut problems);
        (probes, problems)
    }

    #[expect(
        clippy::too_many_lines,
        reason = "one example that has every kind of probe and hook"
    )]
    #[test]
    fn probes_and_hooks_are_carried_with_their_ports_by_number() {
        let (probes, problems) = shaped(json!({
            "name": "web",
            "ports": [{"name": "metrics", "containerPort": 9090}, {"name": "http", "containerPort": 8080}],
            "startupProbe": {"exec": {"command": ["cat", "/ready"]}, "failureThreshold": 30, "terminationGracePeriodSeconds": 3},
            "livenessProbe": {"httpGet": {"port": "http", "path": "/live", "scheme": "HTTPS",
                "httpHeaders": [{"name": "X-A", "value": "1"}]}, "initialDelaySeconds": 5, "periodSeconds": 7, "timeoutSeconds": 2},
            "readinessProbe": {"grpc": {"port": 50051, "service": "s", "mode": "TLS"}, "successThreshold": 2},
            "lifecycle": {
                "postStart": {"httpGet": {"port": "9090", "path": "warm"}},
                "preStop": {"sleep": {"seconds": 4}},
            },
        }));
        assert_eq!(problems, Vec::<String>::new());
        let startup = probes.startup.unwrap();
        let command = vec!["cat".to_owned(), "/ready".to_owned()];
        assert_eq!(
            startup.action,
            Some(Action::Exec(pb::ExecAction { command }))
        );
        assert_eq!(
            (
                startup.failure_threshold,
                startup.termination_grace_period_seconds
            ),
            (30, Some(3))
        );
        let liveness = probes.liveness.unwrap();
        let get = pb::HttpGetAction {
            port: 8080,
            path: "/live".to_owned(),
            https: true,
            headers: vec![pb::HttpHeader {
                name: "X-A".to_owned(),
                value: "1".to_owned(),
            }],
        };
        assert_eq!(liveness.action, Some(Action::HttpGet(get)));
        let times = (
            liveness.initial_delay_seconds,
            liveness.period_seconds,
            liveness.timeout_seconds,
        );
        assert_eq!(times, (5, 7, 2));
        let readiness = probes.readiness.unwrap();
        let grpc = pb::GrpcAction {
            port: 50051,
            service: "s".to_owned(),
            tls: true,
        };
        assert_eq!(
            (readiness.action, readiness.success_threshold),
            (Some(Action::Grpc(grpc)), 2)
        );
        let warm = pb::HttpGetAction {
            port: 9090,
            path: "warm".to_owned(),
            ..pb::HttpGetAction::default()
        };
        let post_start = probes.post_start.unwrap().action;
        assert_eq!(post_start, Some(hook::Action::HttpGet(warm)));
        let pre_stop = probes.pre_stop.unwrap().action;
        assert_eq!(pre_stop, Some(hook::Action::SleepSeconds(4)));
    }

    #[test]
    fn a_port_that_is_none_and_a_second_action_are_named() {
        let (_, problems) = shaped(json!({
            "name": "web",
            "livenessProbe": {"httpGet": {"port": "http"}},
            "readinessProbe": {"tcpSocket": {"port": 0}},
            "startupProbe": {"grpc": {"port": 70000}},
            "lifecycle": {"preStop": {"sleep": {"seconds": 4}, "exec": {"command": ["true"]}}},
        }));
        let fields = [
            "startupProbe.grpc.port is 70000",
            "livenessProbe.httpGet.port is \"http\"",
            "readinessProbe.tcpSocket.port is 0",
            "lifecycle.preStop: has more than one action",
        ];
        assert_eq!(problems.len(), fields.len(), "{problems:#?}");
        for (problem, field) in problems.iter().zip(fields) {
            assert!(problem.starts_with(field), "{problem}");
        }
    }
}
