//! The clients: how each is called, and which verbs its library does not support.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use tokio::time::timeout;

use super::{kubectl, target::Target};
use crate::Run;

/// The time limit of one call, so that a verb that hangs does not block the suite.
const CALL: Duration = Duration::from_secs(45);

/// A verb that clients are tested with; a column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Output and errors apart, exit code.
    Exec,
    /// Bytes in both directions.
    Input,
    /// A command that reads to the end of its input.
    EndOfInput,
    /// A terminal with its size, exit code.
    Terminal,
    /// Input to and output of the container's own program.
    Attach,
    /// A request and its answer.
    PortForward,
    /// An answer that comes only after the end of the request.
    HalfClose,
    /// A log as it grows, to its end.
    Follow,
    /// A file there and back.
    Copy,
}

impl Verb {
    /// All verbs in the order of the table.
    pub const ALL: [Self; 9] = [
        Self::Exec,
        Self::Input,
        Self::EndOfInput,
        Self::Terminal,
        Self::Attach,
        Self::PortForward,
        Self::HalfClose,
        Self::Follow,
        Self::Copy,
    ];

    /// The heading of its column.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Exec => "exec: streams, code",
            Self::Input => "exec: 1 MiB both ways",
            Self::EndOfInput => "exec: end of input",
            Self::Terminal => "exec: terminal",
            Self::Attach => "attach",
            Self::PortForward => "port-forward",
            Self::HalfClose => "port-forward: half-close",
            Self::Follow => "logs -f",
            Self::Copy => "cp both ways",
        }
    }
}

/// A client, and how it is called.
#[derive(Clone, Debug)]
pub struct Client {
    /// The name of its row.
    pub name: &'static str,
    /// How its streams travel to the API server.
    pub transport: &'static str,
    /// Whether it has kubectl's command line instead of that of tests/interop/README.md.
    kubectl: bool,
    /// `env`, its variables, the program and its first arguments.
    command: Vec<String>,
    lacks: &'static [(Verb, &'static str)],
}

const NO_COPY: (Verb, &str) = (Verb::Copy, "the library has no cp");
const NO_HALF_CLOSE: (Verb, &str) = (
    Verb::HalfClose,
    "the library forwards over WebSocket channels (v4), which have no half-close",
);

/// All clients, the rows of the table in their order.
fn all(bed: &Path) -> Vec<Client> {
    let installed = |name: &str| bed.join("interop").join(name).display().to_string();
    let source = |name: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("interop");
        folder.join(name).display().to_string()
    };
    let kubectl = |name, minor, transport| Client {
        name,
        transport,
        kubectl: true,
        command: vec!["env".into(), installed(&format!("kubectl-{minor}"))],
        lacks: &[],
    };
    let program = |name, transport, command: Vec<String>, lacks| Client {
        name,
        transport,
        kubectl: false,
        command: [vec!["env".into()], command].concat(),
        lacks,
    };
    let go = |transport| {
        vec![
            format!("KNOC_TRANSPORT={transport}"),
            installed("go-client"),
        ]
    };
    vec![
        kubectl("kubectl 1.30", "1.30", "WebSocket; ports by SPDY"),
        kubectl("kubectl 1.34", "1.34", "WebSocket, SPDY in WebSocket"),
        kubectl("kubectl 1.36", "1.36", "WebSocket, SPDY in WebSocket"),
        kubectl("kubectl 1.37", "1.37", "WebSocket, SPDY in WebSocket"),
        program("Go client-go, SPDY", "SPDY", go("spdy"), &[NO_COPY]),
        program(
            "Go client-go, WebSocket",
            "WebSocket, SPDY in WebSocket",
            go("websocket"),
            &[NO_COPY],
        ),
        program(
            "Python kubernetes",
            "WebSocket",
            vec![installed("python/bin/python"), source("client.py")],
            &[NO_HALF_CLOSE, NO_COPY],
        ),
        program(
            "JavaScript @kubernetes/client-node",
            "WebSocket",
            vec![
                format!("KNOC_NODE_MODULES={}", installed("javascript")),
                installed("node/bin/node"),
                source("client.mjs"),
            ],
            &[NO_HALF_CLOSE],
        ),
        program(
            "Rust kube",
            "WebSocket",
            vec![built("knoc-kube-client")],
            &[NO_HALF_CLOSE, NO_COPY],
        ),
    ]
}

/// A program of this package, which cargo puts next to the folder of the running test.
fn built(name: &str) -> String {
    let test = std::env::current_exe().unwrap_or_default();
    let folder = test.parent().and_then(Path::parent);
    folder
        .unwrap_or_else(|| Path::new("."))
        .join(name)
        .display()
        .to_string()
}

impl Client {
    /// The client of that name.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        let bed = std::env::var_os("KNOC_BED");
        let bed = bed.context("KNOC_BED is not set: make up && eval \"$(make -s env)\"")?;
        let found = all(Path::new(&bed))
            .into_iter()
            .find(|one| one.name == name);
        let client = found.with_context(|| format!("no client is called {name:?}"))?;
        let files = client.command.iter().filter(|word| word.starts_with('/'));
        let missing: Vec<_> = files.filter(|file| !Path::new(file).exists()).collect();
        ensure!(
            missing.is_empty(),
            "missing: {missing:?}; install the clients: tests/testbed/interop.sh"
        );
        Ok(client)
    }

    /// A client without a program, for unit tests.
    #[cfg(test)]
    pub(super) fn sample(name: &'static str) -> Self {
        Self {
            name,
            transport: "any",
            kubectl: false,
            command: Vec::new(),
            lacks: &[],
        }
    }

    /// The reason why the client does not support the verb, if it does not.
    #[must_use]
    pub fn lacks(&self, verb: Verb) -> Option<&'static str> {
        let found = self.lacks.iter().find(|(lacking, _)| *lacking == verb);
        found.map(|(_, reason)| *reason)
    }

    /// The command line of a call, beginning with the program; `verb` and `rest` are those of the contract.
    #[must_use]
    pub fn command_line(&self, verb: &str, target: Target<'_>, rest: &[&str]) -> Vec<String> {
        let call = if self.kubectl {
            kubectl::arguments(verb, target, rest)
        } else {
            let Target {
                namespace,
                pod,
                container,
            } = target;
            let fixed = [verb, namespace, pod, container];
            fixed.iter().chain(rest).map(|&word| word.into()).collect()
        };
        [self.command.clone(), call].concat()
    }

    /// The call as a process.
    #[must_use]
    pub fn call(&self, verb: &str, target: Target<'_>, rest: &[&str]) -> Run {
        let command = self.command_line(verb, target, rest);
        Run::new(&command[0]).args(&command[1..]).deadline(CALL)
    }

    /// Sends bytes to a port of the pod, and their end if the client supports it; returns what came back until the other side
    /// closed.
    pub async fn forward(
        &self,
        target: Target<'_>,
        port: u16,
        bytes: Vec<u8>,
    ) -> anyhow::Result<Vec<u8>> {
        if self.kubectl {
            let command = self.command_line("port-forward", target, &[&format!(":{port}")]);
            let forwarded = kubectl::forward(&command, &bytes);
            return timeout(CALL, forwarded)
                .await
                .context("no end of kubectl port-forward")?;
        }
        let port = port.to_string();
        let there = Target {
            container: &port,
            ..target
        };
        let run = self.call("port-forward", there, &[]).stdin(bytes);
        Ok(run.ok().await?.stdout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_the_contract_or_kubectls_words() {
        let target = Target {
            namespace: "n",
            pod: "p",
            container: "c",
        };
        let bed = Path::new("/bed");
        let clients = all(bed);
        let command = |client: &Client, verb, rest: &[&str]| {
            client.command_line(verb, target, rest).join(" ")
        };
        assert_eq!(
            command(&clients[0], "exec-stdin", &["cat"]),
            "env /bed/interop/kubectl-1.30 --namespace n exec -i p -c c -- cat"
        );
        assert_eq!(
            command(&clients[0], "cp-from", &["/tmp/cp", "/here", "data"]),
            "env /bed/interop/kubectl-1.30 --namespace n cp --retries=0 -c c p:/tmp/cp/data /here/data"
        );
        assert_eq!(
            command(&clients[4], "exec", &["true"]),
            "env KNOC_TRANSPORT=spdy /bed/interop/go-client exec n p c true"
        );
    }

    #[test]
    fn names_are_distinct_and_reasons_are_given_once() {
        let clients = all(Path::new("/bed"));
        for (at, client) in clients.iter().enumerate() {
            assert!(clients[..at].iter().all(|other| other.name != client.name));
            for verb in Verb::ALL {
                let reasons = client.lacks.iter().filter(|(lacking, _)| *lacking == verb);
                assert!(reasons.count() <= 1, "{}: {verb:?}", client.name);
            }
        }
    }
}
