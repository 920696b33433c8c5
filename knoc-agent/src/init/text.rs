//! PURE: the texts that `init` writes.

use std::path::Path;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use knoc_proto::pki::CertifiedKey;

use super::{Found, Options};
use crate::config::{RuntimeKind, SchedulerKind};

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// `host:port`, with brackets around an IPv6 address.
fn address((host, port): &(String, u16)) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// The site file.
pub(super) fn site_file(
    options: &Options,
    folder: &Path,
    addresses: &[(String, u16)],
    found: &Found,
) -> String {
    let slurm = if found.has("sbatch") {
        SchedulerKind::Slurm
    } else {
        SchedulerKind::Local
    };
    let scheduler = options.scheduler.unwrap_or(slurm);
    let any = found.has("apptainer") || found.has("singularity");
    let runtime = if any {
        RuntimeKind::Auto
    } else {
        RuntimeKind::Process
    };
    let runtime = options.runtime.unwrap_or(runtime);
    let port = addresses.first().map_or(super::PORT, |(_, port)| *port);
    let tls = |name: &str| quoted(&folder.join("tls").join(name).to_string_lossy());
    let mut env = format!("PATH = {}\n", quoted(&found.environment.path));
    let conf = found
        .environment
        .slurm_conf
        .iter()
        .map(|conf| ("SLURM_CONF", conf));
    let extra = found
        .environment
        .extra
        .iter()
        .map(|(name, value)| (name.as_str(), value));
    let line = |name: &str, value: &str| format!("{name} = {}\n", quoted(value));
    env.extend(conf.chain(extra).map(|(name, value)| line(name, value)));
    let tools = found
        .tools
        .iter()
        .map(|(name, path)| line(name, &path.to_string_lossy()));
    let tools: String = tools.collect();
    TEMPLATE
        .replace("@SITE@", &quoted(&options.site))
        .replace("@SCHEDULER@", scheduler.as_str())
        .replace("@RUNTIME@", runtime.as_str())
        .replace("@PORT@", &port.to_string())
        .replace("@CA@", &tls("ca.crt"))
        .replace("@CERT@", &tls("agent.crt"))
        .replace("@KEY@", &tls("agent.key"))
        .replace("@TOOLS@", &tools)
        .replace("@ENV@", &env)
}

/// The Secret that the kubelet mounts.
pub(super) fn bundle(
    site: &str,
    first: &(String, u16),
    ca_pem: &str,
    pair: &CertifiedKey,
) -> String {
    let data = |text: &str| BASE64_STANDARD.encode(text);
    format!(
        "# The kubelet's side of the link to the agent of {site}. Holds a private key: keep it as a secret.\n\
         # kubectl apply -n knoc-system -f kubelet-bundle.yaml\n\
         apiVersion: v1\nkind: Secret\nmetadata:\n  name: knoc-agent\n  labels:\n    \
         app.kubernetes.io/part-of: knoc\n  annotations:\n    knoc.io/site: {site:?}\n    \
         knoc.io/address: {address:?}\ntype: Opaque\ndata:\n  ca.crt: {ca}\n  tls.crt: {cert}\n  \
         tls.key: {key}\n",
        address = address(first),
        ca = data(ca_pem),
        cert = data(&pair.cert_pem),
        key = data(&pair.key_pem),
    )
}

/// knocctl's context. Without `current-context`, so that beside the agent its socket goes first.
pub(super) fn knocctl(site: &str, folder: &Path, first: &(String, u16)) -> String {
    let tls = |name: &str| quoted(&folder.join("tls").join(name).to_string_lossy());
    format!(
        "# knocctl's way to the agent from another machine: copy this file and those it names. On the login node\n\
         # knocctl goes through the agent's unix socket and needs none of them; --context {site} goes this way\n\
         # there too. `current-context = {name}` before the first line in brackets makes it the way everywhere.\n\n\
         [contexts.{name}]\naddress = {address}\nca = {ca}\ncert = {cert}\nkey = {key}\nsite = {name}\n",
        name = quoted(site),
        address = quoted(&address(first)),
        ca = tls("ca.crt"),
        cert = tls("knocctl.crt"),
        key = tls("knocctl.key"),
    )
}

const TEMPLATE: &str = r#"# The site file of knoc-agent. `knoc-agent serve` reads it once, at start; mistakes are named with their lines.
# A line that begins with `#` shows the default, or an example.

site = @SITE@

# On a file system that login and compute nodes share; mode 0700.
# state_dir = "~/.local/state/knoc"

# Who owns the jobs: slurm, or local (processes of this host).
scheduler = "@SCHEDULER@"
# What starts containers: auto (Apptainer, else Singularity), apptainer, singularity, or process (none).
runtime = "@RUNTIME@"

# Shell text at the head of every batch script, such as: module load apptainer
prelude = ""

# Folders under which pods may name image files and sandboxes.
image_roots = []
# Folders under which pods may mount host paths: none yet, since every hostPath is refused.
# host_paths = []

[listen]
# Kubelets and knocctl, mutual TLS.
kubelet = "0.0.0.0:@PORT@"
# Shims of running jobs, pinned keys.
# shim = "0.0.0.0:10351"
# What shims dial; empty: all addresses of this host.
# shim_addresses = ["login1:10351"]
# The unix socket; unset: $XDG_RUNTIME_DIR/knoc/agent.sock, else /tmp/knoc-<uid>/agent.sock.
# socket = "~/.local/state/knoc/agent.sock"

[tls]
ca = @CA@
cert = @CERT@
key = @KEY@
# The CA's key renews certificates before they end. It need not be there; the default lies beside the CA.
# ca_key = "~/.config/knoc/tls/ca.key"

# Found by `init`; a tool that is not named is looked up in env.PATH.
[tools]
@TOOLS@
# The environment of every tool, and the whole of it.
[env]
@ENV@
# Where images come from, first match wins.
# [[registry]]
# prefix = "docker.io"
# mirror = "registry.example.org:5000"
# insecure = false

# What the cluster cannot widen.
[policy]
# UID of the namespace kube-system of the only cluster served; unset: pinned at first use.
# cluster_id = ""
# Identities served; a `*` at the end matches any rest. Empty: all that the CA vouches for.
clients = []
# Certificates that are not served, with all that were renewed from them: "sha256/…" of a public key, "serial/…", or an identity.
# The whole of [policy] is read again when this file changes.
denied = []
# Empty: all.
namespaces = []
partitions = []
accounts = []
qos = []
# Further sbatch flags that pods may give by knoc.io/flags.
# flags = ["--mail-type", "--mail-user"]

# A kubelet leads the node of its own name. Nodes of other names, and whose kubelet leads them:
[policy.nodes]
# "knoc-gpu" = "kubelet/knoc-site"

# Extended resources of pods and what they are in --gres. The node offers those that stand here.
[gres]
"nvidia.com/gpu" = "gpu"
# "amd.com/gpu" = "gpu"

# What a job gets that says nothing.
[job]
# partition = "batch"
# account = ""
# qos = ""
# time_minutes = 60
# scratch = "/tmp"

[limits]
# Submissions: a second in the long run, at once after a pause, at the same time.
# sbatch_rate = 50.0
# sbatch_burst = 100
# sbatch_concurrency = 4
# image_concurrency = 2
# Rounds of squeue: the shortest and the longest time between two.
# poll_min = "1s"
# poll_max = "30s"
# How long the report of an ended job may take to show on the shared file system.
# report_grace = "90s"
# How long a job may wait for a reason that never ends before its pod fails.
# never_ends_after = "10m"
# How long a job that the scheduler does not know may stay undecided.
# lost_after = "5m"
# Past a pod's grace period, before its job is cancelled.
# stop_slack = "15s"
# Pods at the same time; unset: what the limit of open files carries.
# pods = 1000
# Threads on which bytes move. One carries several hundred MB/s; more are of use where many large streams run at once.
# threads = 1

[logs]
# max_bytes = 104857600
# max_files = 20

[backoff]
# initial = "10s"
# max = "5m"

[values]
# Where Secrets and tokens wait for the job: file (0600 in a 0700 folder), or none (in the agent's memory).
# at_rest = "file"
# How long a job holds its nodes and waits for values that are not there or have expired, before its pod fails.
# wait = "10m"
"#;
