//! `knocctl agent`: installs, upgrades and removes the agent on a login node, by OpenSSH with the user's own configuration.
//! The host's key must be known already; nothing is asked.
//!
//! ```text
//! install, upgrade   1. ssh: cat > ~/.local/lib/knoc/upload.TOKEN      the program, by standard input
//!                    2. ssh: ~/.local/lib/knoc/upload.TOKEN manage     a request as JSON, by standard input
//! status, uninstall     ssh: ~/.local/bin/knoc-agent manage            the same
//! ```
//!
//! The login shell only sees fixed words that every shell reads alike ([`Script`]); what the user gives goes by standard
//! input. The steps are the far side's (`knoc-agent manage`), and are shown like those of doctor.

mod next;
mod program;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Subcommand;
use knoc_link::{
    LinkError,
    carrier::ssh::{Script, Ssh},
};
use knoc_proto::{
    manage::{Answer, Install, MAX_ANSWER, Request, RunMode, Step},
    pb,
};
use serde_json::{Value, json};

use super::{
    CtlError, Global,
    command::RunError,
    doctor,
    output::{self, Format, print},
};

pub(super) use program::Program;

/// How long the far side may take: it waits for systemd, Slurm and the start of the agent.
const ANSWER_LIMIT: Duration = Duration::from_mins(5);
/// How long the program may take to get there.
const UPLOAD_LIMIT: Duration = Duration::from_mins(30);

/// Why an agent cannot be managed over SSH.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManageError {
    #[error("{doing}")]
    Ssh {
        doing: &'static str,
        #[source]
        source: LinkError,
    },
    #[error("read the program {}", path.display())]
    Program {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("run the program {}", path.display())]
    Run {
        path: PathBuf,
        #[source]
        source: RunError,
    },
    #[error("{} is no program for Linux (it does not begin as an ELF file)", path.display())]
    NotElf { path: PathBuf },
    #[error("the login node has not answered the request; its output was {said:?}")]
    NoAnswer { said: String },
    #[error("the program {} has not answered the request; its stderr was {said:?}", path.display())]
    NoAnswerHere { path: PathBuf, said: String },
    #[error("write the bundle {}", path.display())]
    Bundle {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is there with other contents, and may be another site's", path.display())]
    OtherBundle { path: PathBuf },
    /// The scripts are fixed, so this does not happen.
    #[error("a script has characters that login shells read differently")]
    Script,
}

impl ManageError {
    /// What to do next.
    pub(crate) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Ssh { source, .. } => return hint_of_ssh(source),
            Self::Program { .. }
            | Self::NotElf { .. }
            | Self::Run { .. }
            | Self::NoAnswerHere { .. } => {
                "the agent's program lies beside knocctl in the package; name another one by --binary FILE"
            }
            Self::NoAnswer { .. } => {
                "the account's login shell must run commands without a terminal, and its key must not have a forced command"
            }
            Self::OtherBundle { .. } | Self::Bundle { .. } => {
                "move the file away, or name another one by --bundle FILE"
            }
            Self::Script => return None,
        };
        Some(hint.to_owned())
    }
}

/// PURE: what to do about a failed login, beyond what its error says itself.
fn hint_of_ssh(error: &LinkError) -> Option<String> {
    let said = knoc_proto::error::chain(error);
    let has = |text: &str| said.contains(text);
    let hint = if has("Exec format error") || has("cannot execute binary") {
        "the login node has another kind of processor: give its program by --binary FILE"
    } else if has("No space left") || has("quota exceeded") || has("Quota exceeded") {
        "make room in the home directory of the login node, and run the command again"
    } else if has("Read-only file system") || has("upload.") && has("Permission denied") {
        "the home directory of the login node must be writable and must allow programs (no noexec)"
    } else if has("bin/knoc-agent") && has("not found") || has("No such file") {
        "no agent is installed there: run `knocctl agent install`"
    } else if has("Permission denied (") {
        "no password is asked for: use a key or an agent, or keep a connection open with ControlMaster in ~/.ssh/config"
    } else {
        return None;
    };
    Some(hint.to_owned())
}

#[derive(Debug, clap::Args)]
pub(super) struct Agent {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Installs the agent, configures and starts it, and prints what follows in the cluster
    ///
    /// Can be run again: what is there already is kept.
    Install(Box<InstallOptions>),
    /// Shows which version is installed, whether it runs, how and since when, and its jobs
    Status(Login),
    /// Installs a new version beside the old one and restarts the agent; jobs do not notice
    Upgrade(Upgrade),
    /// Stops the agent and removes its programs; configuration, state and jobs are left
    Uninstall(Uninstall),
}

#[derive(Debug, Clone, clap::Args)]
struct Login {
    /// The login node; ssh uses your own configuration (~/.ssh/config), and the host's key must be known
    #[arg(long, value_name = "[USER@]HOST[:PORT]", value_parser = login)]
    ssh: Ssh,
}

/// A login that names its host.
pub(super) fn login(text: &str) -> Result<Ssh, String> {
    let ssh: Ssh = text
        .parse()
        .map_err(|error: knoc_link::InvalidCarrier| error.to_string())?;
    match ssh.host {
        Some(_) => Ok(ssh),
        None => Err("the host is missing".to_owned()),
    }
}

fn run_mode(text: &str) -> Result<RunMode, String> {
    text.parse()
}

#[derive(Debug, clap::Args)]
struct Binary {
    /// The agent's program for the login node [default: knoc-agent beside knocctl]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct InstallOptions {
    #[command(flatten)]
    login: Login,
    #[command(flatten)]
    binary: Binary,
    /// The name of the site, a DNS label of at most 58 characters; the node is called knoc-SITE
    #[arg(long)]
    site: String,
    /// An address at which kubelets reach the login node over TCP; can be repeated [default: none, they come over SSH and no
    /// port is opened]
    #[arg(long, value_name = "HOST[:PORT]")]
    address: Vec<String>,
    /// A namespace of the cluster whose pods can run there as this account (--namespace of knoc-agent init); can be repeated
    /// [default: every namespace]
    #[arg(long = "allow-namespace", value_name = "NAMESPACE")]
    namespaces: Vec<String>,
    /// The scheduler: slurm or local [default: slurm if sbatch is in PATH there, else local]
    #[arg(long, value_name = "NAME")]
    scheduler: Option<String>,
    /// The container runtime: auto, apptainer, singularity or process [default: auto, or process if none is in PATH there]
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// How to keep the agent running: systemd, cron, scrontab, job or on-demand [default: systemd, else cron, else on-demand]
    #[arg(long, value_name = "MODE", value_parser = run_mode)]
    run_mode: Option<RunMode>,
    /// With --run-mode scrontab or job: the partition in which the agent runs
    #[arg(long, value_name = "NAME", requires = "run_mode")]
    partition: Option<String>,
    /// Where to write the kubelet's Secret manifest, with mode 0600 [default: kubelet-bundle-SITE.yaml]
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct Upgrade {
    #[command(flatten)]
    login: Login,
    #[command(flatten)]
    binary: Binary,
}

#[derive(Debug, clap::Args)]
struct Uninstall {
    #[command(flatten)]
    login: Login,
    /// Also if pods may have jobs, which then go on until they end
    #[arg(long)]
    force: bool,
}

impl Agent {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let format = global.output;
        match self.command {
            Command::Install(options) => options.run(format).await,
            Command::Status(login) => {
                let answer = installed(&login.ssh, &Request::Status).await?;
                show(format, &answer)
            }
            Command::Upgrade(options) => {
                let program = Program::open(options.binary.binary)?;
                let length = program.length();
                let answer = program
                    .run(&options.login.ssh, &Request::Upgrade { length })
                    .await?;
                show(format, &answer)
            }
            Command::Uninstall(options) => {
                let force = options.force;
                let answer = installed(&options.login.ssh, &Request::Uninstall { force }).await?;
                show(format, &answer)
            }
        }
    }
}

impl InstallOptions {
    async fn run(self, format: Format) -> Result<ExitCode, CtlError> {
        let program = Program::open(self.binary.binary)?;
        let file = self.bundle;
        let file =
            file.unwrap_or_else(|| PathBuf::from(format!("kubelet-bundle-{}.yaml", self.site)));
        let request = Request::Install(Box::new(Install {
            length: program.length(),
            site: self.site.clone(),
            addresses: self.address.clone(),
            namespaces: self.namespaces,
            scheduler: self.scheduler,
            runtime: self.runtime,
            run_mode: self.run_mode,
            partition: self.partition,
        }));
        let ssh = &self.login.ssh;
        let mut answer = program.run(ssh, &request).await?;
        if let Some(installed) = &answer.installed {
            let done = next::write_bundle(&file, &installed.bundle)?;
            answer.steps.push(Step {
                what: "bundle".to_owned(),
                ok: true,
                detail: done,
                cure: String::new(),
            });
        }
        let code = show(format, &answer)?;
        if let Some(installed) = &answer.installed
            && matches!(format, Format::Table | Format::Wide)
        {
            print(&next::commands(
                &self.site,
                ssh,
                self.address.first().map(String::as_str),
                &file,
                installed,
            ))?;
        }
        Ok(code)
    }
}

/// Asks the agent's program that is installed there.
async fn installed(ssh: &Ssh, request: &Request) -> Result<Answer, CtlError> {
    ask(ssh, "exec \"$HOME/.local/bin/knoc-agent\" manage", request).await
}

/// Sends a request to `knoc-agent manage` at the end of the script.
async fn ask(ssh: &Ssh, script: &str, request: &Request) -> Result<Answer, CtlError> {
    let script = Script::new(script).ok_or(ManageError::Script)?;
    let json = serde_json::to_vec(request).unwrap_or_default();
    let output = ssh.run(&script, json.as_slice(), MAX_ANSWER, ANSWER_LIMIT);
    let output = output.await.map_err(|source| ManageError::Ssh {
        doing: "manage the agent over SSH",
        source,
    })?;
    let answer = Answer::find(&output);
    Ok(answer.ok_or_else(|| ManageError::NoAnswer {
        said: last_of(&output),
    })?)
}

/// PURE: the end of an output, for an error.
pub(super) fn last_of(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let text = text.trim();
    let begin = text.len().saturating_sub(200);
    let begin = (begin..text.len()).find(|at| text.is_char_boundary(*at));
    text.get(begin.unwrap_or(0)..)
        .unwrap_or_default()
        .to_owned()
}

pub(super) fn finding(step: &Step) -> pb::Finding {
    pb::Finding {
        check: step.what.clone(),
        ok: step.ok,
        detail: step.detail.clone(),
        cure: step.cure.clone(),
    }
}

/// Shows the steps as doctor shows its findings.
fn show(format: Format, answer: &Answer) -> Result<ExitCode, CtlError> {
    let findings: Vec<pb::Finding> = answer.steps.iter().map(finding).collect();
    let value = || {
        let steps: Vec<Value> = findings.iter().map(doctor::finding_json).collect();
        json!({"version": answer.version, "steps": steps})
    };
    output::show(format, value, |_| {
        findings.iter().map(doctor::line).collect()
    })?;
    let whole = findings.iter().all(|finding| finding.ok);
    Ok(if whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests;
