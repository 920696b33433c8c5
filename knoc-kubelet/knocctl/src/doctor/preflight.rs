//! `knocctl doctor --preflight`: what can be checked before anything is installed, without an agent and without a configuration.
//!
//! ```text
//! login node   over SSH (--ssh), or this machine if it has sbatch: the agent's program looks and answers (`knoc-agent manage`)
//! addresses    names and ports by which the cluster is to reach the agent, from this machine
//! cluster      if kubectl is here: versions, and the rights to install the chart, to grant what it grants and to run pods
//! ```

mod cluster;
mod grants;

use std::{ffi::OsStr, path::PathBuf, time::Duration};

use knoc_link::carrier::ssh::Ssh;
use knoc_proto::{
    error::chain,
    manage::{Answer, Request},
};
use tokio::net::TcpStream;

use super::Report;
use crate::{
    CtlError, Global,
    agent::{self, Program},
    command::{self, RunError},
};

/// How long the login node may take: a job may wait for its start.
const LOOK: Duration = Duration::from_mins(5);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// No answer of the API server is waited for longer.
const TIMEOUT: &str = "--request-timeout=10s";
/// The port of an agent whose address names none.
const PORT: u16 = 10350;

/// The options that go with `--preflight`.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Checks what an installation needs, before anything is installed: on the login node (this one, or that of --ssh) and in the
    /// cluster of kubectl; with --probe, a job also looks at a compute node
    #[arg(long)]
    preflight: bool,
    /// With --preflight: the login node; ssh uses your own configuration. The agent's program is copied there and removed again
    #[arg(long, value_name = "[USER@]HOST[:PORT]", value_parser = agent::login, requires = "preflight")]
    ssh: Option<Ssh>,
    /// With --preflight: an address at which the cluster is to reach the agent over TCP; can be repeated
    #[arg(long, value_name = "HOST[:PORT]", requires = "preflight")]
    address: Vec<String>,
    /// With --preflight: the agent's program [default: knoc-agent beside knocctl]
    #[arg(long, value_name = "FILE", requires = "preflight")]
    binary: Option<PathBuf>,
}

impl Options {
    pub(super) fn asked(&self) -> bool {
        self.preflight
    }

    /// Checks everything that can be reached from here. Each check stands alone.
    pub(super) async fn run(
        self,
        probe: bool,
        global: &Global,
        report: &mut Report,
    ) -> Result<(), CtlError> {
        let here = in_path("sbatch");
        let request = Request::Preflight { probe };
        let looked = self.ssh.is_some() || here;
        if let Some(ssh) = &self.ssh {
            let answer = match Program::open(self.binary) {
                Ok(program) => program.run(ssh, &request).await,
                Err(error) => Err(error.into()),
            };
            login_node(report, answer)?;
        } else if here {
            let answer = local(self.binary, &request).await;
            login_node(report, answer)?;
        }
        for address in &self.address {
            reach(report, address).await?;
        }
        let cluster = cluster::check(report, global.namespace.as_deref()).await?;
        if looked || cluster {
            return Ok(());
        }
        report.bad(
            "preflight",
            "this machine has neither Slurm's commands nor kubectl",
            "run this on the login node, or with --ssh USER@LOGIN-NODE, or where kubectl reaches the cluster",
        )
    }
}

/// Is there a program of this name in `PATH`?
fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// Asks the agent's program on this machine.
async fn local(binary: Option<PathBuf>, request: &Request) -> Result<Answer, CtlError> {
    let program = Program::path(binary)?;
    let json = serde_json::to_vec(request).unwrap_or_default();
    let ran = command::run(program.as_os_str(), &["manage"], &json, LOOK).await;
    let said = match ran {
        Ok(said) => said,
        Err(source) => {
            let path = program;
            return Err(agent::ManageError::Run { path, source }.into());
        }
    };
    let answer = Answer::find(&said.stdout);
    Ok(answer.ok_or_else(|| agent::ManageError::NoAnswerHere {
        path: program,
        said: agent::last_of(&said.stderr),
    })?)
}

fn login_node(report: &mut Report, answer: Result<Answer, CtlError>) -> Result<(), CtlError> {
    match answer {
        Ok(answer) => answer
            .steps
            .iter()
            .try_for_each(|step| report.add(agent::finding(step))),
        Err(error) => {
            let cure = error.hint().unwrap_or_else(|| {
                "log in to the login node by hand, and run `knocctl doctor --preflight` there"
                    .to_owned()
            });
            report.bad("login node", &chain(&error), &cure)
        }
    }
}

/// PURE: the address with its port.
fn with_port(address: &str) -> String {
    let port = address.rsplit_once(':').map(|(_, port)| port);
    match port.map(str::parse::<u16>) {
        Some(Ok(_)) => address.to_owned(),
        Some(Err(_)) | None => format!("{address}:{PORT}"),
    }
}

/// Dials an address: before the agent runs, a refused connection shows that the way is open.
async fn reach(report: &mut Report, address: &str) -> Result<(), CtlError> {
    let address = with_port(address);
    let check = format!("address {address}");
    let closed = "the way is closed from this machine; what counts is the cluster's nodes. If the site opens no port, the kubelet can come \
                  over SSH, or the agent can dial the cluster: docs/guide/links.md";
    match tokio::time::timeout(CONNECT, TcpStream::connect(&address)).await {
        Ok(Ok(_)) => report.good(&check, "something answers there, from this machine"),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => report.good(
            &check,
            "is reached from this machine; nothing listens there yet",
        ),
        Ok(Err(error)) => report.bad(&check, &error.to_string(), closed),
        Err(_) => report.bad(
            &check,
            &format!(
                "no answer within {} s: a firewall drops the packets",
                CONNECT.as_secs()
            ),
            closed,
        ),
    }
}

/// Runs a program of the user's machine; `None` if there is none.
async fn program(name: &str, args: &[&str]) -> Option<Result<command::Said, RunError>> {
    match command::run(OsStr::new(name), args, b"", Duration::from_secs(20)).await {
        Err(RunError::NotFound) => None,
        ran => Some(ran),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_port_gets_that_of_the_agent() {
        assert_eq!(with_port("login.example.org"), "login.example.org:10350");
        assert_eq!(with_port("login:443"), "login:443");
        assert_eq!(with_port("[2001:db8::1]"), "[2001:db8::1]:10350");
        assert_eq!(with_port("[2001:db8::1]:7"), "[2001:db8::1]:7");
    }
}
