//! `knocctl` uses the agent's API as the kubelet does, and shows the answers. It needs no Kubernetes.
//!
//! Each command has one file. It takes its parsed arguments, opens a [`session::Session`] and writes through [`output`].
//! The runtime has one thread, and nothing is kept on disk. These parts are pure: [`config`] (parsing), [`manifest`],
//! [`view`], [`output`] (tables) and `find` (choosing a pod).
//!
//! Control characters in texts of pods and agents are escaped before they are printed. The bytes of `logs` and `exec`
//! pass unchanged.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use knoc_memory as _;
use knoc_proto::private::keep_memory_private;

mod agent;
mod attach;
mod command;
mod completions;
mod config;
mod converse;
mod cp;
mod delete;
mod describe;
mod doctor;
mod error;
mod exec;
mod find;
mod info;
mod logs;
mod manifest;
mod output;
mod pods;
mod port_forward;
mod run;
mod script;
mod session;
mod terminal;
mod top;
mod view;

use error::CtlError;

/// Inspects and manages a KNoC agent and its pods without Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "knocctl", version, after_help = HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const HELP: &str = "\
On the host of the agent, knocctl connects to the agent's socket unless a file or a context is given (--config, --context, \
`current-context`). The socket is listen.socket of the site file, else $XDG_RUNTIME_DIR/knoc/agent.sock, else \
STATE_DIR/socket/agent.sock. Its folder must belong to you and have mode 0700.
POD is a name, NAMESPACE/NAME or a uid.
Exit codes: 0 success, 1 failure (of doctor: a check failed), 2 wrong usage; exec, attach and `run --wait` return the program's own \
exit code.";

/// Options of every command.
#[derive(Debug, Clone, clap::Args)]
struct Global {
    /// The configuration file [default: ~/.config/knoc/knocctl.toml]
    #[arg(long, global = true, env = "KNOCCTL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// The context to use instead of `current-context`
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// The namespace of pods that are given by name only
    #[arg(short, long, global = true, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The output format: `wide` adds columns, `json` and `yaml` are machine-readable
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: output::Format,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the agent's version, site, scheduler and runtime
    Info,
    /// Lists the pods that the agent knows
    #[command(visible_alias = "get")]
    Pods(pods::Pods),
    /// Shows the details of one pod
    Describe(describe::Describe),
    /// Runs a pod from a Kubernetes manifest
    Run(run::Run),
    /// Prints the log of a container
    Logs(logs::Logs),
    /// Runs a command in a container
    Exec(exec::Exec),
    /// Attaches to a running container: shows its output from now on and can send input
    Attach(attach::Attach),
    /// Forwards local ports to ports of a pod
    PortForward(port_forward::PortForward),
    /// Copies files and folders to and from a container
    Cp(cp::Cp),
    /// Shows the CPU and memory use of running pods
    Top(top::Top),
    /// Prints the batch script of a pod without submitting it
    Script(script::Script),
    /// Deletes pods and their job directories
    Delete(delete::Delete),
    /// Checks the whole chain from configuration to Slurm and images, and says how to fix each problem
    Doctor(doctor::Doctor),
    /// Installs, upgrades and removes the agent on a login node over SSH
    Agent(agent::Agent),
    /// Prints the completion script for a shell
    Completions(completions::Completions),
}

/// The definition of the command line, for completions.
fn command() -> clap::Command {
    Cli::command()
}

fn main() -> ExitCode {
    // The memory holds the client's private key, and manifests may contain secrets.
    if let Err(source) = keep_memory_private() {
        return report(&CtlError::Private { source });
    }
    run_with(std::env::args_os())
}

fn run_with(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // clap returns --help and --version as errors whose exit code is 0.
            let shown = error.print();
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            return ExitCode::from(if shown.is_ok() { code } else { 1 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(source) => return report(&CtlError::Runtime { source }),
    };
    let result = runtime.block_on(dispatch(cli));
    // Do not wait for the thread that reads standard input: it may wait for a key.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

async fn dispatch(cli: Cli) -> Result<ExitCode, CtlError> {
    let global = &cli.global;
    match cli.command {
        Command::Info => info::run(global).await,
        Command::Pods(command) => command.run(global).await,
        Command::Describe(command) => command.run(global).await,
        Command::Run(command) => Box::pin(command.run(global)).await,
        Command::Logs(command) => command.run(global).await,
        Command::Exec(command) => Box::pin(command.run(global)).await,
        Command::Attach(command) => Box::pin(command.run(global)).await,
        Command::PortForward(command) => Box::pin(command.run(global)).await,
        Command::Cp(command) => Box::pin(command.run(global)).await,
        Command::Top(command) => Box::pin(command.run(global)).await,
        Command::Script(command) => Box::pin(command.run(global)).await,
        Command::Delete(command) => command.run(global).await,
        Command::Doctor(command) => Box::pin(command.run(global)).await,
        Command::Agent(command) => Box::pin(command.run(global)).await,
        Command::Completions(command) => command.run(),
    }
}

/// Prints the error, and what to do next if that is known.
fn report(error: &CtlError) -> ExitCode {
    if let CtlError::Print { source } = error
        && source.kind() == std::io::ErrorKind::BrokenPipe
    {
        // The reader of a pipe, such as `head`, has closed it.
        return ExitCode::SUCCESS;
    }
    output::complain(&format!("error: {}", knoc_proto::error::chain(error)));
    if let Some(hint) = error.hint() {
        output::complain(&format!("hint: {hint}"));
    }
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests;
