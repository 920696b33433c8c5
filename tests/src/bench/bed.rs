//! The stack that is measured: the world of level 3, a client of the agent, and an image with our
//! stamping program.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use knoc_link::{Addresses, Credentials, ExpectPeer, Route, carrier::ssh::Login};
use knoc_proto::pb;
use knoc_proto::pb::agent_client::AgentClient;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde::Deserialize;
use tonic::transport::Channel;

use crate::{Run, World, image};

/// The folder of the benchmark as the nodes see it.
pub(super) const FOLDER: &str = "/scratch/knoc-bench";

/// The path of this program on the nodes.
pub(super) const RELAY: &str = "/scratch/knoc-bench/knoc-bench";

/// The command with which the floor starts containers; the shim uses the same options.
pub(super) const EXEC: &str = "apptainer --silent exec --containall --no-init --no-home --no-eval";

/// The time limit for building the image and similar preparations.
const BUILD: Duration = Duration::from_mins(2);

pub(super) struct Bed {
    pub(super) world: World,
    pub(super) agent: AgentClient<Channel>,
    pub(super) info: pb::AgentInfo,
    /// The path of the shared file system on this host.
    shared: PathBuf,
}

#[derive(Deserialize)]
struct Knocctl {
    contexts: BTreeMap<String, Context>,
}

#[derive(Deserialize)]
struct Context {
    address: Addresses,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
    #[serde(rename = "ssh-folder")]
    ssh_folder: Option<PathBuf>,
}

impl Bed {
    pub(super) async fn open() -> anyhow::Result<Self> {
        let world = World::new("bench").await?;
        let prefix = std::env::var("HPC_PREFIX").context("HPC_PREFIX is not set: make up")?;
        let mut agent = agent()?;
        let info = agent
            .get_info(pb::GetInfoRequest::default())
            .await?
            .into_inner();
        image::build(&world, FOLDER).await?;
        let bed = Self {
            world,
            agent,
            info,
            shared: Path::new(&prefix).join("shared"),
        };
        bed.install_ourselves()?;
        Ok(bed)
    }

    /// Copies this program to the shared file system, so that the nodes can start relays.
    fn install_ourselves(&self) -> anyhow::Result<()> {
        let (new, place) = (self.here(FOLDER).join("relay.new"), self.here(RELAY));
        std::fs::copy(std::env::current_exe()?, &new)?;
        std::fs::rename(&new, &place).with_context(|| place.display().to_string())
    }

    pub(super) async fn close(self) -> anyhow::Result<()> {
        self.world.finish().await
    }

    /// The path on this host of a file of the shared file system.
    pub(super) fn here(&self, path: &str) -> PathBuf {
        self.shared.join(path.trim_start_matches('/'))
    }

    /// The image that both the pods and the floor run.
    pub(super) fn image_path() -> String {
        image::path(FOLDER)
    }

    /// Runs a shell command on a node as the agent's user.
    pub(super) fn shell(&self, node: &str, text: &str) -> Run {
        self.world.on(node, ["bash", "-c", text]).deadline(BUILD)
    }

    /// The time at which the job of a pod began, in Unix nanoseconds.
    pub(super) fn job_began(&self, uid: &str) -> anyhow::Result<i64> {
        let state = self.here(&self.info.state_dir);
        began(&state.join("pods").join(uid).join("batch.out"))
    }
}

/// The time at which the job with this output file began: creating the file is the first thing that slurmstepd does.
pub(super) fn began(output: &Path) -> anyhow::Result<i64> {
    let made = statx(CWD, output, AtFlags::empty(), StatxFlags::BTIME);
    let made = made
        .with_context(|| output.display().to_string())?
        .stx_btime;
    Ok(made.tv_sec * 1_000_000_000 + i64::from(made.tv_nsec))
}

/// A client of the agent with knocctl's configuration.
fn agent() -> anyhow::Result<AgentClient<Channel>> {
    let path = std::env::var("KNOCCTL_CONFIG").context("KNOCCTL_CONFIG is not set: make up")?;
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let config: Knocctl = toml::from_str(&text).with_context(|| path.clone())?;
    let context = config
        .contexts
        .into_values()
        .next()
        .context("knocctl has no context")?;
    let base = Path::new(&path).parent().unwrap_or_else(|| Path::new("/"));
    let [ca, cert, key] = [context.ca, context.cert, context.key].map(|file| base.join(file));
    let credentials = Credentials::from_files(&ca, &cert, &key)?;
    let login = Login {
        folder: context.ssh_folder,
        ..Login::default()
    };
    let carriers = context.address.carriers()?.into_iter();
    let carriers = carriers.map(|carrier| carrier.with_login(login.clone()));
    let route = Route::new(carriers.collect()).context("knocctl's context has no address")?;
    let channel = knoc_link::dial(route, Some(credentials), ExpectPeer::AnyAgent)?;
    Ok(AgentClient::new(channel).max_decoding_message_size(16 << 20))
}
