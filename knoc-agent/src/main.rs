//! `knoc-agent`: command line, tracing, runtime, signals and exit code. Everything else is in the
//! library.

use std::{
    ffi::{OsStr, OsString},
    io::Write as _,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use knoc_agent::{
    app::{App, socket_places},
    config::{Config, Home},
    connect, init, manage, on_demand, run_mode, shim_connect,
};
use knoc_link::carrier::exec::marker::Speaks;
use knoc_memory as _;
use knoc_proto::{
    error::chain,
    log::{self, Form},
    private::keep_memory_private,
    text::escape_lines,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

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
    Serve(Serve),
    /// Connects standard input and output to the running agent, for a link over SSH.
    Connect(Connect),
    /// Lists the ways in which this site lets the agent be kept running, or sets one of them up
    RunMode(run_mode::cli::Options),
    /// Answers `knocctl agent` over SSH: a request as JSON on standard input
    #[command(hide = true)]
    Manage,
    /// Runs the containers of one pod inside its job.
    Shim {
        /// The job directory.
        jobdir: PathBuf,
    },
    /// Prints the version.
    Version,
    /// Runs one rank of an MPI program; srun starts it on the node of the rank.
    #[command(hide = true)]
    Rank {
        /// The job directory.
        jobdir: PathBuf,
        /// The attempt of the container.
        attempt: u32,
        /// Where the shim listens.
        #[arg(required = true)]
        addresses: Vec<String>,
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

#[derive(Debug, clap::Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the command line"
)]
struct Serve {
    #[command(flatten)]
    config: ConfigFile,
    /// Starts an agent only if none runs, in the background, and connects standard input and output to it
    #[arg(long)]
    stdio: bool,
    /// With --stdio: connects to the socket without TLS, for knocctl without a certificate
    #[arg(long, requires = "stdio")]
    plain: bool,
    /// Ends once there was no link for `serve.linger` of the site file.
    #[arg(long, hide = true, conflicts_with = "stdio")]
    on_demand: bool,
    /// Starts an agent in the background and returns; does nothing if one runs, on this host or another one
    #[arg(long, conflicts_with_all = ["stdio", "on_demand"])]
    detach: bool,
}

#[derive(Debug, clap::Args)]
struct Connect {
    /// Connects to the shim of the pod with this job directory instead, which must run on this host; the agent runs this
    /// as a step of the pod's job if compute nodes cannot reach the agent
    #[arg(conflicts_with = "plain")]
    jobdir: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    /// Connects to the socket without TLS, for knocctl without a certificate; kubelets are refused there
    #[arg(long)]
    plain: bool,
}

fn speaks(plain: bool) -> Speaks {
    if plain { Speaks::Plain } else { Speaks::Tls }
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
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some(code) = knoc_shim::launch::helper(&arguments) {
        return code;
    }
    let result = match Cli::parse().command {
        Command::Shim { jobdir } => return knoc_shim::main(&jobdir),
        Command::Rank {
            jobdir,
            attempt,
            addresses,
        } => return knoc_shim::rank::main(&jobdir, attempt, &addresses),
        Command::Version => say(&format!("knoc-agent {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Init(options) => {
            let found = init::Found::look(init::Environment::own());
            home().and_then(|home| initialise(&options, &home, &found))
        }
        Command::RunMode(options) => home().and_then(|home| {
            let told = wait_for(run_mode::cli::run(&options, &home))??;
            say(&told)
        }),
        Command::Manage => home().and_then(|home| wait_for(manage::run(&home))?),
        Command::Serve(options) if options.detach => {
            options.config.load().and_then(|config| detach(&config))
        }
        Command::Serve(options) if options.stdio => options
            .config
            .load()
            .and_then(|config| relay(&config, speaks(options.plain), true)),
        Command::Serve(options) => options
            .config
            .load()
            .and_then(|config| serve(config, options.on_demand)),
        Command::Connect(Connect {
            jobdir: Some(jobdir),
            ..
        }) => relay_to_shim(&jobdir),
        Command::Connect(options) => options
            .config
            .load()
            .and_then(|config| relay(&config, speaks(options.plain), false)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Says why the command has failed.
fn failed(error: &anyhow::Error) -> ExitCode {
    let line = format!("knoc-agent: {}\n", escape_lines(&chain(error.as_ref())));
    // If standard error is closed, the exit code still tells.
    drop(std::io::stderr().write_all(line.as_bytes()));
    ExitCode::FAILURE
}

fn home() -> anyhow::Result<Home> {
    let home = std::env::var_os("HOME").context("HOME is not set")?;
    Ok(Home { home: home.into() })
}

/// Runs something that asks the site's programs, on this thread.
fn wait_for<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(work))
}

fn initialise(options: &init::Options, home: &Home, found: &init::Found) -> anyhow::Result<()> {
    say(&init::run(options, &home.home, found)?)?;
    let folder = options.dir.clone();
    let folder = folder.unwrap_or_else(|| home.home.join(".config/knoc"));
    let site_file = folder.join("agent.toml");
    let partition = options.partition.as_deref();
    let after = run_mode::cli::after_init(&site_file, options.run_mode, partition, home);
    say(&wait_for(after)??)
}

fn on_demand_start(config: &Config, lingers: bool) -> anyhow::Result<on_demand::Start> {
    let source = config.source.as_ref().context("no site file")?;
    Ok(on_demand::Start {
        site_file: source.path.clone(),
        environment: std::env::vars_os().collect(),
        lingers,
    })
}

/// Starts an agent in the background if none runs.
fn detach(config: &Config) -> anyhow::Result<()> {
    let start = on_demand_start(config, false)?;
    let places = socket_places(config);
    Ok(wait_for(on_demand::ensure(config, &places, &start))??)
}

fn say(text: &str) -> anyhow::Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("write to standard output")
}

/// What is logged, by the value of `KNOC_LOG`.
fn filter(wanted: Option<&OsStr>) -> anyhow::Result<Targets> {
    let text = wanted.map_or(Some("info"), OsStr::to_str);
    let text = text.context("KNOC_LOG is not UTF-8")?;
    text.parse::<Targets>().with_context(|| {
        format!("KNOC_LOG is {text:?}, and not like `debug` or `info,knoc_agent::pod=debug`")
    })
}

fn serve(config: Config, on_demand: bool) -> anyhow::Result<()> {
    let filter = filter(std::env::var_os("KNOC_LOG").as_deref())?;
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        // No colours: escape sequences in a line are escaped, whoever wrote them.
        .with_ansi(false)
        .with_writer(|| log::stderr(Form::Text))
        .finish()
        .with(filter)
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
        let linger = config.serve.linger;
        let mut app = App::build(config).await?;
        if on_demand {
            app = app.lingering(linger);
        }
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

/// Relays to the running agent; `start`: starts one if none runs.
fn relay(config: &Config, speaks: Speaks, start: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let places = socket_places(config);
    let reached = runtime.block_on(async {
        if !start {
            return anyhow::Ok(connect::reach(config, &places, speaks).await?);
        }
        let start = on_demand_start(config, true)?;
        Ok(on_demand::reach(config, &places, speaks, &start).await?)
    })?;
    runtime.shutdown_background();
    Ok(reached.relay()?)
}

/// Relays to the shim of a job directory.
fn relay_to_shim(jobdir: &std::path::Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let relayed = runtime.block_on(shim_connect::to_shim(jobdir));
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
