//! `knoc-agent`: command line, tracing, runtime, signals, exit code. All else is in the library.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Runs pods of a Kubernetes cluster as jobs of an HPC cluster, as an ordinary user.
#[derive(Debug, Parser)]
#[command(name = "knoc-agent", version, disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes certificates, the kubelet's bundle and a commented site file. Overwrites nothing.
    Init,
    /// Serves the agent on the login node.
    Serve {
        /// The site file.
        #[arg(long, env = "KNOC_AGENT_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Relays standard input and output to the running agent's unix socket.
    Connect,
    /// Runs the containers of one pod inside its job.
    Shim {
        /// The job directory.
        jobdir: PathBuf,
    },
    /// Prints the version.
    Version,
    /// Starts a container's program (inside the container).
    #[command(hide = true)]
    Launch {
        /// The launch socket.
        socket: PathBuf,
    },
    /// Starts a process in the namespaces of a running container.
    #[command(hide = true)]
    Enter {
        /// As the shim gives them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Version => {
            let stdout = &mut std::io::stdout();
            let line = format!("knoc-agent {}\n", env!("CARGO_PKG_VERSION"));
            match std::io::Write::write_all(stdout, line.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Command::Shim { jobdir } => knoc_agent::shim::main(&jobdir),
        Command::Launch { socket } => knoc_agent::launch::main(&socket),
        Command::Enter { arguments } => knoc_agent::launch::enter::main(&arguments),
        Command::Init | Command::Serve { .. } | Command::Connect => ExitCode::FAILURE,
    }
}
