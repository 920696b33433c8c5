//! `knoc-agent`: command line, tracing, runtime, signals and exit code. Everything else is in the
//! library.

use std::{ffi::OsStr, io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use knoc_agent::{
    app::{App, socket_places},
    config::{Config, Home},
    connect, init,
};
use knoc_memory as _;
use knoc_proto::{
    error::chain,
    log::{self, Form},
    private::keep_memory_private,
    text::escape_lines,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Threads for file work that waits for a slow file system; a login node allows a user few threads.
const BLOCKING_THREADS: usize = 64;

/// Runs pods of a Kubernetes cluster as jobs of an HPC cluster, as an ordinary user.
#[derive(Debug, Parser)]
#[command(name = "knoc-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Creates certificates, the kubelet's bundle and a commented site file; never overwrites a file.
    Init(init::Options),
    /// Runs the agent on the login node.
    Serve(ConfigFile),
    /// Connects standard input and output to the unix socket of the running agent.
    Connect(ConfigFile),
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
    /// Mounts the volumes of a container and then executes the container runtime.
    #[command(hide = true)]
    Contain,
    /// Starts a process in the namespaces of a running container.
    #[command(hide = true)]
    Enter {
        /// The arguments that the shim passes.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The site file [default: ~/.config/knoc/agent.toml]
    #[arg(long, env = "KNOC_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    fn load(self) -> anyhow::Result<Config> {
        let home = home()?;
        let path = self
            .config
            .unwrap_or_else(|| home.home.join(".config/knoc/agent.toml"));
        Ok(Config::load(&path, &home)?)
    }
}

fn main() -> ExitCode {
    // Done before anything is read, and in the helpers before they enter a container.
    if let Err(error) = keep_memory_private() {
        drop(writeln!(
            std::io::stderr(),
            "knoc-agent: keep the memory of this process private: {error}"
        ));
        return ExitCode::FAILURE;
    }
    let result = match Cli::parse().command {
        Command::Shim { jobdir } => return knoc_shim::main(&jobdir),
        Command::Launch { socket } => return knoc_shim::launch::main(&socket),
        Command::Contain => return knoc_shim::launch::contain::main(),
        Command::Enter { arguments } => return knoc_shim::launch::enter::main(&arguments),
        Command::Version => say(&format!("knoc-agent {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Init(options) => {
            let found = init::Found::look(init::Environment::own());
            home().and_then(|home| say(&init::run(&options, &home.home, &found)?))
        }
        Command::Serve(config) => config.load().and_then(serve),
        Command::Connect(config) => config.load().and_then(|config| relay(&config)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("knoc-agent: {}\n", escape_lines(&chain(error.as_ref())));
            // If standard error is closed, the exit code still tells.
            drop(std::io::stderr().write_all(line.as_bytes()));
            ExitCode::FAILURE
        }
    }
}

fn home() -> anyhow::Result<Home> {
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    Ok(Home { home: home.into() })
}

fn say(text: &str) -> anyhow::Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("write to standard output")
}

/// What is logged, by the value of `KNOC_LOG`.
fn filter(wanted: Option<&OsStr>) -> anyhow::Result<EnvFilter> {
    let text = wanted.map_or(Some("info"), OsStr::to_str);
    let text = text.context("KNOC_LOG is not UTF-8")?;
    EnvFilter::try_new(text).with_context(|| {
        format!("KNOC_LOG is {text:?}, and not like `debug` or `info,knoc_agent::pod=debug`")
    })
}

fn serve(config: Config) -> anyhow::Result<()> {
    let filter = filter(std::env::var_os("KNOC_LOG").as_deref())?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        // No colours: escape sequences in a line are escaped, whoever wrote them.
        .with_ansi(false)
        .with_writer(|| log::stderr(Form::Text))
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.limits.threads)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let app = App::build(config).await?;
        let token = shutdown.clone();
        let signals = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = app.run(shutdown) => {}
            () = signals => {}
        }
        Ok(())
    })
}

fn relay(config: &Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let relayed = runtime.block_on(connect::run(&socket_places(config)));
    // A read from standard input cannot be cancelled; waiting for it would delay the exit.
    runtime.shutdown_background();
    Ok(relayed?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_filter_that_cannot_be_meant_is_named() {
        for right in [None, Some("debug"), Some("info,knoc_agent::pod=debug")] {
            assert!(filter(right.map(OsStr::new)).is_ok(), "{right:?}");
        }
        let error = filter(Some(OsStr::new("knoc_agent=loud"))).unwrap_err();
        assert!(error.to_string().contains("KNOC_LOG"), "{error}");
    }
}
