//! `knoc-kubelet`: a virtual Kubernetes node whose pods run on a Slurm cluster.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use knoc_kubelet::{
    app::App,
    config::{Config, LogConfig},
};
use knoc_memory as _;
use knoc_proto::{
    log::{self, Form},
    private::keep_memory_private,
    text::escape_lines,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// A virtual Kubernetes node whose pods run on a Slurm cluster, as jobs of knoc-agent's user.
///
/// Every setting can be given in the file or in the environment (KNOC_*); the environment takes precedence.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file (YAML).
    #[arg(long, env = "KNOC_CONFIG")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let private = keep_memory_private().context("keep the memory of this process private");
    match private.and_then(|()| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Logging may not be set up yet.
            let text = format!("knoc-kubelet: {}\n", escape_lines(&format!("{error:#}")));
            drop(std::io::Write::write_all(
                &mut std::io::stderr(),
                text.as_bytes(),
            ));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let text = |path: &PathBuf| {
        std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
    };
    let text = arguments.config.as_ref().map(text).transpose()?;
    let file = arguments.config.as_deref().zip(text.as_deref());
    let config = Config::load(file, std::env::vars())?;
    log_to(&config.log)?;
    raise_open_files();
    // kube uses the process's default provider; the link names ring itself.
    drop(rustls::crypto::ring::default_provider().install_default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // One thread carries several hundred MB/s of streams; two would pass the same bytes back and forth.
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(serve(config))
}

/// The API's own limits allow thousands of connections with two descriptors each; the usual soft limit is 1024.
fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, ?current, ?maximum, "could not raise the limit of open files");
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let token = shutdown.clone();
    let run = async {
        let app = App::build(config).await?;
        app.run(token).await?;
        Ok(())
    };
    let mut run = std::pin::pin!(run);
    tokio::select! {
        biased;
        ended = &mut run => return ended,
        _ = terminate.recv() => tracing::info!("SIGTERM received, stopping; jobs continue"),
        _ = interrupt.recv() => tracing::info!("SIGINT received, stopping; jobs continue"),
    }
    shutdown.cancel();
    run.await
}

fn log_to(config: &LogConfig) -> anyhow::Result<()> {
    let filter: Targets = config
        .level
        .parse()
        .with_context(|| format!("log.level `{}` is not a valid filter", config.level))?;
    // No colours: everything in a line that looks like an escape sequence is escaped, whoever wrote it.
    let builder = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_ansi(false);
    if config.json {
        builder
            .json()
            .with_writer(|| log::stderr(Form::Json))
            .finish()
            .with(filter)
            .init();
    } else {
        builder
            .with_writer(|| log::stderr(Form::Text))
            .finish()
            .with(filter)
            .init();
    }
    Ok(())
}
