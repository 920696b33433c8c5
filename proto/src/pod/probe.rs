//! PURE: the bounds and defaults of probes and hooks.

use std::time::Duration;

use super::has_control;
use crate::pb;

/// Kubernetes' defaults.
const PERIOD: u64 = 10;
const TIMEOUT: u64 = 1;
const SUCCESSES: u32 = 1;
const FAILURES: u32 = 3;

/// The longest path, header or service name of a probe, and the most headers: a request stays small.
const MAX_TEXT: usize = 16 << 10;
const MAX_HEADERS: usize = 100;

impl pb::Probe {
    /// How long after the start of the program the first try is made.
    #[must_use]
    pub fn initial_delay(&self) -> Duration {
        Duration::from_secs(self.initial_delay_seconds.try_into().unwrap_or(0))
    }

    /// From one try to the next.
    #[must_use]
    pub fn period(&self) -> Duration {
        Duration::from_secs(positive(self.period_seconds).map_or(PERIOD, u64::from))
    }

    /// How long a try may take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(positive(self.timeout_seconds).map_or(TIMEOUT, u64::from))
    }

    /// How many successes in a row count as one.
    #[must_use]
    pub fn successes(&self) -> u32 {
        positive(self.success_threshold).unwrap_or(SUCCESSES)
    }

    /// How many failures in a row count as one.
    #[must_use]
    pub fn failures(&self) -> u32 {
        positive(self.failure_threshold).unwrap_or(FAILURES)
    }

    /// The grace period of a container that this probe stops, if it has one of its own.
    #[must_use]
    pub fn grace(&self) -> Option<Duration> {
        let seconds = self.termination_grace_period_seconds?;
        Some(Duration::from_secs(seconds.try_into().unwrap_or(0)))
    }
}

fn positive(number: i32) -> Option<u32> {
    u32::try_from(number).ok().filter(|number| *number > 0)
}

/// Records what is wrong with the probes and hooks of a container.
pub(super) fn check(container: &pb::Container, problems: &mut Vec<String>) {
    for (field, probe) in [
        ("startupProbe", &container.startup_probe),
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
    ] {
        if let Some(probe) = probe {
            let mut found = Vec::new();
            check_probe(field, probe, &mut found);
            name_all(container, field, found, problems);
        }
    }
    for (field, hook) in [
        ("lifecycle.postStart", &container.post_start),
        ("lifecycle.preStop", &container.pre_stop),
    ] {
        if let Some(hook) = hook {
            let mut found = Vec::new();
            check_hook(hook, &mut found);
            name_all(container, field, found, problems);
        }
    }
}

fn name_all(
    container: &pb::Container,
    field: &str,
    found: Vec<String>,
    problems: &mut Vec<String>,
) {
    let name = &container.name;
    let named = found
        .into_iter()
        .map(|problem| format!("container {name:?}: {field}{problem}"));
    problems.extend(named);
}

fn check_probe(field: &str, probe: &pb::Probe, found: &mut Vec<String>) {
    use pb::probe::Action;
    match &probe.action {
        None => found.push(" has no action that this version supports".to_owned()),
        Some(Action::Exec(exec)) => check_exec(exec, found),
        Some(Action::HttpGet(get)) => check_http(get, found),
        Some(Action::TcpSocket(tcp)) => check_port("tcpSocket", tcp.port, found),
        Some(Action::Grpc(grpc)) => {
            check_port("grpc", grpc.port, found);
            if grpc.service.len() > MAX_TEXT {
                found.push(format!(
                    ".grpc.service has more than {MAX_TEXT} bytes; shorten it"
                ));
            }
        }
    }
    for (name, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("periodSeconds", probe.period_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        if value < 0 {
            found.push(format!(".{name} is negative ({value}); give a larger one"));
        }
    }
    let once = field != "readinessProbe";
    if once && probe.success_threshold > 1 {
        let value = probe.success_threshold;
        found.push(format!(
            ".successThreshold is {value}; it must be 1 unless the probe is one of readiness"
        ));
    }
    match probe.termination_grace_period_seconds {
        Some(_) if !once => found.push(
            ".terminationGracePeriodSeconds has no effect, because a probe of readiness stops nothing; leave it out"
                .to_owned(),
        ),
        Some(..0) => found.push(".terminationGracePeriodSeconds is negative; give 1 or more".to_owned()),
        Some(_) | None => {}
    }
}

fn check_hook(hook: &pb::Hook, found: &mut Vec<String>) {
    use pb::hook::Action;
    match &hook.action {
        None => found.push(" has no action that this version supports".to_owned()),
        Some(Action::Exec(exec)) => check_exec(exec, found),
        Some(Action::HttpGet(get)) => check_http(get, found),
        Some(Action::SleepSeconds(..0)) => {
            found.push(".sleep.seconds is negative; give 0 or more".to_owned());
        }
        Some(Action::SleepSeconds(_)) => {}
    }
}

fn check_exec(exec: &pb::ExecAction, found: &mut Vec<String>) {
    if exec.command.first().is_none_or(String::is_empty) {
        found.push(".exec.command is empty; name a program of the image".to_owned());
    }
    if exec.command.iter().any(|argument| argument.contains('\0')) {
        found.push(".exec.command contains a NUL byte".to_owned());
    }
}

fn check_http(get: &pb::HttpGetAction, found: &mut Vec<String>) {
    check_port("httpGet", get.port, found);
    if get.path.len() > MAX_TEXT {
        found.push(format!(
            ".httpGet.path has more than {MAX_TEXT} bytes; shorten it"
        ));
    }
    if get.headers.len() > MAX_HEADERS {
        let count = get.headers.len();
        found.push(format!(
            ".httpGet.httpHeaders has {count} headers; {MAX_HEADERS} are possible"
        ));
    }
    for header in &get.headers {
        // An error never shows a header's value, which may be secret.
        let name = crate::text::quote(&header.name, super::SHOWN);
        if !is_token(&header.name) {
            found.push(format!(
                ".httpGet.httpHeaders: {name} is not a name of a header"
            ));
        }
        if has_control(&header.value) || header.value.len() > MAX_TEXT {
            found.push(format!(
                ".httpGet.httpHeaders: the value of {name} contains control characters, or is longer than {MAX_TEXT} bytes"
            ));
        }
    }
}

/// Whether a header may have this name (RFC 9110, 5.1).
fn is_token(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.len() <= MAX_TEXT && name.bytes().all(allowed)
}

fn check_port(action: &str, port: u32, found: &mut Vec<String>) {
    if !(1..=65535).contains(&port) {
        found.push(format!(
            ".{action}.port is {port}; give a number from 1 to 65535"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(container: &pb::Container) -> Vec<String> {
        let mut problems = Vec::new();
        check(container, &mut problems);
        problems
    }

    fn tcp(port: u32) -> pb::Probe {
        pb::Probe {
            action: Some(pb::probe::Action::TcpSocket(pb::TcpSocketAction { port })),
            ..pb::Probe::default()
        }
    }

    #[test]
    fn what_a_probe_leaves_out_has_kubernetes_defaults() {
        let probe = tcp(80);
        let seconds = Duration::from_secs;
        assert_eq!(probe.initial_delay(), Duration::ZERO);
        assert_eq!((probe.period(), probe.timeout()), (seconds(10), seconds(1)));
        assert_eq!((probe.successes(), probe.failures()), (1, 3));
        assert_eq!(probe.grace(), None);
    }

    #[test]
    fn every_mistake_in_a_probe_or_hook_is_named_with_its_field() {
        let http = pb::HttpGetAction {
            port: 80,
            headers: vec![
                pb::HttpHeader {
                    name: "a b".to_owned(),
                    value: "secret".to_owned(),
                },
                pb::HttpHeader {
                    name: "X-Token".to_owned(),
                    value: "secret\r\nHost: x".to_owned(),
                },
            ],
            ..pb::HttpGetAction::default()
        };
        let container = pb::Container {
            name: "web".to_owned(),
            startup_probe: Some(pb::Probe {
                period_seconds: -1,
                success_threshold: 2,
                ..tcp(65536)
            }),
            liveness_probe: Some(pb::Probe::default()),
            readiness_probe: Some(pb::Probe {
                termination_grace_period_seconds: Some(5),
                ..tcp(80)
            }),
            post_start: Some(pb::Hook {
                action: Some(pb::hook::Action::HttpGet(http)),
            }),
            pre_stop: Some(pb::Hook {
                action: Some(pb::hook::Action::Exec(pb::ExecAction::default())),
            }),
            ..pb::Container::default()
        };
        let problems = problems(&container);
        let expected = [
            "startupProbe.tcpSocket.port is 65536",
            "startupProbe.periodSeconds is negative",
            "startupProbe.successThreshold is 2",
            "livenessProbe has no action",
            "readinessProbe.terminationGracePeriodSeconds has no effect",
            "lifecycle.postStart.httpGet.httpHeaders: \"a b\"",
            "lifecycle.postStart.httpGet.httpHeaders: the value of \"X-Token\"",
            "lifecycle.preStop.exec.command is empty",
        ];
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
        for (problem, expected) in problems.iter().zip(expected) {
            let start = format!("container \"web\": {expected}");
            assert!(problem.starts_with(&start), "{problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }

    #[test]
    fn a_container_with_probes_and_hooks_of_all_kinds_is_fine() {
        let exec = pb::ExecAction {
            command: vec!["true".to_owned()],
        };
        let container = pb::Container {
            startup_probe: Some(pb::Probe {
                action: Some(pb::probe::Action::Exec(exec.clone())),
                termination_grace_period_seconds: Some(1),
                ..pb::Probe::default()
            }),
            liveness_probe: Some(tcp(1)),
            readiness_probe: Some(pb::Probe {
                success_threshold: 3,
                ..tcp(65535)
            }),
            post_start: Some(pb::Hook {
                action: Some(pb::hook::Action::SleepSeconds(0)),
            }),
            pre_stop: Some(pb::Hook {
                action: Some(pb::hook::Action::Exec(exec)),
            }),
            ..pb::Container::default()
        };
        assert_eq!(problems(&container), Vec::<String>::new());
    }
}
