//! A site without root, Slurm and Kubernetes: the real agent with its `local` scheduler and the
//! `process` runtime in a temporary folder, with its own CA and ports; optionally the real kubelet
//! against the fake API server. Tests start, kill and restart the processes as they need.

mod daemon;
mod kubelet;
mod pods;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
pub use daemon::{Daemon, nothing_names, processes_naming};
use knoc_link::pki::{Ca, Validity};
use knoc_link::{Carrier, Credentials, ExpectPeer, Identity};
use knoc_proto::pb;
use knoc_proto::pb::agent_client::AgentClient;
pub use kubelet::{Kubelet, NODE};
pub use pods::{Pod, brief, container, containers_run};
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{Run, ports::free_port, wait_for};

/// How long a daemon may take until it answers, on a machine that starts many of them at once.
const START: Duration = Duration::from_mins(2);

/// Largest message of a client: a pod with the largest environment that Kubernetes keeps.
const MESSAGE_LIMIT: usize = 8 << 20;

/// The cluster id of the tests' kubelets.
pub const CLUSTER: &str = "11111111-2222-4333-8444-555555555555";

/// The options of a site.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Shell commands at the beginning of every batch script.
    pub prelude: String,
    /// A command that runs the agent, such as knoc-oldkernel.
    pub wrapper: Option<PathBuf>,
    /// Additional lines for the site file's `[limits]`.
    pub limits: String,
    /// Additional tables for the site file.
    pub tables: String,
    /// Leaves `listen.socket` out of the site file.
    pub default_socket: bool,
    /// The agent listens on no port for kubelets.
    pub ssh_only: bool,
    /// The address that shims dial instead of the agent's, such as that of a [`crate::relay::Relay`].
    pub shims_dial: Option<SocketAddr>,
}

impl Options {
    /// Shims never reach the agent: they dial a port where nobody listens.
    #[must_use]
    pub fn cut_off() -> Self {
        Self {
            shims_dial: Some((Ipv4Addr::LOCALHOST, 1).into()),
            ..Self::default()
        }
    }

    /// Shims never reach the agent, and no job step may carry their link.
    #[must_use]
    pub fn without_link() -> Self {
        Self {
            limits: "srun_links = 0".to_owned(),
            ..Self::cut_off()
        }
    }
}

/// A site. Dropping it ends the processes that it started.
#[derive(Debug)]
pub struct Site {
    dir: TempDir,
    options: Options,
    address: SocketAddr,
    shim: SocketAddr,
    credentials: Credentials,
    ca: Ca,
}

impl Site {
    /// Creates the folder, certificates and site file; starts nothing.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("knoc-site-").tempdir()?;
        std::fs::create_dir(dir.path().join("scratch"))?;
        let ca = Ca::generate("knoc-tests")?;
        let [kubelet, shim] = [free_port()?, free_port()?];
        for (name, identity) in identities() {
            let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
            let pair = ca.issue(&identity, &names)?;
            write(&dir.path().join(format!("{name}.crt")), &pair.cert_pem)?;
            write(&dir.path().join(format!("{name}.key")), &pair.key_pem)?;
        }
        write(&dir.path().join("ca.crt"), ca.cert_pem())?;
        let credentials = credentials(dir.path(), "ctl")?;
        let site = Self {
            dir,
            options,
            address: loopback(kubelet),
            shim: loopback(shim),
            credentials,
            ca,
        };
        write(&site.path("agent.toml"), &site.config())?;
        Ok(site)
    }

    /// Creates a site and starts its agent; returns a client of the agent too. Dropping the daemon kills the agent.
    pub async fn start(options: Options) -> anyhow::Result<(Self, Daemon, AgentClient<Channel>)> {
        let site = Self::new(options)?;
        let agent = site.agent(&[]).await?;
        let client = site.client()?;
        Ok((site, agent, client))
    }

    /// A path in the site's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file into the site's folder.
    pub fn put(&self, name: &str, text: &str) -> anyhow::Result<()> {
        write(&self.path(name), text)
    }

    /// `knocctl` with the site's certificate, over TLS.
    pub fn knocctl<S: AsRef<std::ffi::OsStr>>(
        &self,
        args: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Run> {
        let config = self.path("knocctl.toml");
        if !config.exists() {
            let (dir, address) = (self.dir.path().display(), self.address);
            let text = format!(
                "[contexts.site]\naddress = \"{address}\"\nca = \"{dir}/ca.crt\"\n\
                 cert = \"{dir}/ctl.crt\"\nkey = \"{dir}/ctl.key\"\n"
            );
            write(&config, &text)?;
        }
        let run = Run::new(binary("knocctl")?).env("KNOCCTL_CONFIG", config);
        Ok(run.env("HOME", self.dir.path()).args(args))
    }

    /// Issues credentials for another identity and validity from the site's CA.
    pub fn issue(&self, identity: &Identity, validity: Validity) -> anyhow::Result<Credentials> {
        let pair = self.ca.issue_for(identity, &[], validity)?;
        let (ca, cert, key) = (self.ca.cert_pem(), &pair.cert_pem, &pair.key_pem);
        Ok(Credentials::from_pem(ca, cert, key)?)
    }

    /// Writes `NAME.crt` and `NAME.key` for that identity and validity, replacing existing files.
    pub fn issue_files(
        &self,
        name: &str,
        identity: &Identity,
        validity: Validity,
    ) -> anyhow::Result<()> {
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let pair = self.ca.issue_for(identity, &names, validity)?;
        self.put(&format!("{name}.crt"), &pair.cert_pem)?;
        self.put(&format!("{name}.key"), &pair.key_pem)
    }

    /// Writes the CA's key next to the CA, as `init` does, so that the agent can renew certificates.
    pub fn put_ca_key(&self) -> anyhow::Result<()> {
        self.put("ca.key", &self.ca.key_pem())
    }

    /// Rewrites the site file with these tables at its end, as an editor would.
    pub fn put_tables(&self, tables: &str) -> anyhow::Result<()> {
        let text = self.config().replace(&self.options.tables, "");
        self.put("agent.toml.new", &format!("{text}\n{tables}\n"))?;
        let (from, to) = (self.path("agent.toml.new"), self.path("agent.toml"));
        std::fs::rename(from, to)?;
        Ok(())
    }

    /// A client with a new certificate of the kubelet of that name.
    pub fn kubelet_client(&self, name: &str) -> anyhow::Result<AgentClient<Channel>> {
        let identity = Identity::Kubelet {
            name: name.to_owned(),
        };
        let now = jiff::Timestamp::now();
        let dates = Validity::starting(now, Duration::from_hours(1));
        self.client_with(self.issue(&identity, dates)?)
    }

    /// A client at the agent's unix socket.
    pub fn socket_client(&self) -> anyhow::Result<AgentClient<Channel>> {
        let carrier = Carrier::Unix(self.path("socket/agent.sock"));
        let channel = knoc_link::dial(carrier, None, ExpectPeer::AnyAgent)?;
        Ok(AgentClient::new(channel))
    }

    /// A client of the agent with other credentials.
    pub fn client_with(&self, credentials: Credentials) -> anyhow::Result<AgentClient<Channel>> {
        let carrier = Carrier::Tcp(self.address.to_string());
        let channel = knoc_link::dial(carrier, Some(credentials), ExpectPeer::AnyAgent)?;
        Ok(AgentClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT))
    }

    /// The address at which kubelets dial the agent.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts the agent and waits until it answers. `env` is added to HOME and PATH.
    pub async fn agent(&self, env: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        self.answering(self.agent_process(env)?).await
    }

    /// Starts the agent through a program that executes its arguments, and waits until it answers.
    pub async fn wrapped_agent(&self, wrapper: &Path) -> anyhow::Result<Daemon> {
        self.answering(self.start_agent(Some(wrapper), &[])?).await
    }

    async fn answering(&self, mut agent: Daemon) -> anyhow::Result<Daemon> {
        let mut client = self.client()?;
        wait_for("the agent answers", START, async || {
            agent.still_runs()?;
            let request = pb::GetInfoRequest::default();
            client
                .get_info(request)
                .await
                .map(|_| ())
                .map_err(|status| status.to_string())
        })
        .await
        .map_err(|error| error.context(self.log()))?;
        Ok(agent)
    }

    /// Starts the agent without waiting.
    pub fn agent_process(&self, env: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        self.start_agent(self.options.wrapper.as_deref(), env)
    }

    fn start_agent(&self, wrapper: Option<&Path>, env: &[(&str, &str)]) -> anyhow::Result<Daemon> {
        let binary = binary("knoc-agent")?;
        let mut argv = vec![
            binary,
            "serve".into(),
            "--config".into(),
            self.path("agent.toml"),
        ];
        if let Some(wrapper) = wrapper {
            argv.insert(0, wrapper.to_owned());
        }
        Daemon::start(&argv, env, self.dir.path(), &self.path("agent.log"))
    }

    /// A client of the agent with the identity of a `knocctl`. It connects when it is used, and reconnects.
    pub fn client(&self) -> anyhow::Result<AgentClient<Channel>> {
        self.client_with(self.credentials.clone())
    }

    /// The job directory of a pod.
    #[must_use]
    pub fn jobdir(&self, uid: &str) -> PathBuf {
        self.path("state/pods").join(uid)
    }

    /// How many jobs claimed the pod.
    pub fn claims(&self, uid: &str) -> anyhow::Result<usize> {
        let mut claims = 0;
        for entry in std::fs::read_dir(self.jobdir(uid))? {
            claims += usize::from(entry?.file_name().to_string_lossy().starts_with("claim."));
        }
        Ok(claims)
    }

    /// How often the pod's program ran; each run appends a line to `runs/UID`.
    pub fn runs(&self, uid: &str) -> anyhow::Result<usize> {
        match std::fs::read_to_string(self.path("runs").join(uid)) {
            Ok(text) => Ok(text.lines().count()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// The end of the agent's log, for error messages.
    #[must_use]
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(15).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// The address at which the agent listens for shims.
    #[must_use]
    pub fn shim_address(&self) -> SocketAddr {
        self.shim
    }

    fn config(&self) -> String {
        let (dir, shim) = (self.dir.path().display(), self.shim);
        let kubelet = if self.options.ssh_only {
            "none".to_owned()
        } else {
            self.address.to_string()
        };
        let dialled = self.options.shims_dial.unwrap_or(shim);
        let socket = if self.options.default_socket {
            String::new()
        } else {
            format!("socket = \"{dir}/socket/agent.sock\"")
        };
        let Options {
            prelude,
            limits,
            tables,
            ..
        } = &self.options;
        format!(
            r#"
site = "test"
state_dir = "{dir}/state"
scheduler = "local"
runtime = "process"
prelude = '''
{prelude}'''

[listen]
kubelet = "{kubelet}"
shim = "{shim}"
shim_addresses = ["{dialled}"]
{socket}

[tls]
ca = "{dir}/ca.crt"
cert = "{dir}/agent.crt"
key = "{dir}/agent.key"

[env]
PATH = "/usr/local/bin:/usr/bin:/bin"

[limits]
sbatch_rate = 1000.0
sbatch_burst = 1000
poll_min = "200ms"
poll_max = "1s"
report_grace = "3s"
lost_after = "5s"
{limits}

[backoff]
initial = "200ms"
max = "2s"

[job]
scratch = "{dir}/scratch"

{tables}
"#,
        )
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Jobs outlive their agent by design, so the jobs of a test are killed here.
        daemon::kill_naming(self.dir.path());
    }
}

/// The path of one of the project's binaries: only in `$KNOC_BIN` if that is set (`make test` sets it to the release build with crash
/// points), else in the folder where this test was built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    if let Some(folder) = std::env::var_os("KNOC_BIN").map(PathBuf::from) {
        let path = folder.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{} is not built: make build-tested",
            path.display()
        );
        return Ok(path);
    }
    let own = std::env::current_exe()?;
    let built = own
        .ancestors()
        .find(|folder| folder.join(".fingerprint").is_dir());
    let found = built
        .map(|folder| folder.join(name))
        .filter(|path| path.is_file());
    found.with_context(|| format!("{name} is not built: `make build-tested`, or set KNOC_BIN"))
}

/// Writes a file that only we may read.
pub(crate) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    let mut file = file.with_context(|| path.display().to_string())?;
    file.write_all(text.as_bytes())
        .with_context(|| path.display().to_string())
}

/// PEM files of one identity of the site.
pub(crate) fn credentials(dir: &Path, name: &str) -> anyhow::Result<Credentials> {
    let file = |name: String| dir.join(name);
    let pair = (file(format!("{name}.crt")), file(format!("{name}.key")));
    Ok(Credentials::from_files(
        file("ca.crt".to_owned()),
        &pair.0,
        &pair.1,
    )?)
}

fn identities() -> [(&'static str, Identity); 3] {
    [
        (
            "agent",
            Identity::Agent {
                site: "test".to_owned(),
            },
        ),
        (
            "kubelet",
            Identity::Kubelet {
                name: NODE.to_owned(),
            },
        ),
        (
            "ctl",
            Identity::Ctl {
                name: "test".to_owned(),
            },
        ),
    ]
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// An address of loopback on which nobody listens.
pub fn spare_address() -> anyhow::Result<SocketAddr> {
    Ok(loopback(free_port()?))
}
