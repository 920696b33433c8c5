//! PURE: the texts that `init` writes.

use std::path::Path;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use knoc_link::pki::CertifiedKey;

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
    let namespaces: Vec<_> = options.namespaces.iter().map(|name| quoted(name)).collect();
    TEMPLATE
        .replace("@SITE@", &quoted(&options.site))
        .replace("@SCHEDULER@", scheduler.as_str())
        .replace("@RUNTIME@", runtime.as_str())
        .replace("@PORT@", &port.to_string())
        .replace("@CA@", &tls("ca.crt"))
        .replace("@CERT@", &tls("agent.crt"))
        .replace("@KEY@", &tls("agent.key"))
        .replace("@NAMESPACES@", &namespaces.join(", "))
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

const TEMPLATE: &str = r#"# The site file of knoc-agent. `knoc-agent serve` reads it at its start, and [policy] again whenever this file changes;
# mistakes are named with their lines.
# A setting without `#` in front is in force. Behind a `#`, one that ends with `# default` is what holds anyway, and one that
# ends with `# example` is not: it shows what could stand there.

site = @SITE@

# On a file system that login and compute nodes share; mode 0700.
# state_dir = "~/.local/state/knoc"  # default

# Who owns the jobs: slurm, or local (processes of this host).
scheduler = "@SCHEDULER@"
# What starts containers: auto (Apptainer, else Singularity), apptainer, singularity, or process (none).
runtime = "@RUNTIME@"

# Shell text at the head of every batch script, such as: module load apptainer
prelude = ""

# Folders under which pods may name image files and sandboxes.
image_roots = []
# An image that a pod names, its root and all folders above must belong to root or to you and be writable by nobody else.
# `true` lifts that: then everybody who can write there chooses what runs as you.
# trust_shared_roots = false  # default
# Folders under which pods may mount host paths: none yet, since every hostPath is refused.
# host_paths = []  # default

[listen]
# Kubelets and knocctl, mutual TLS.
kubelet = "0.0.0.0:@PORT@"
# Shims of running jobs, pinned keys.
# shim = "0.0.0.0:10351"  # default
# What shims dial; empty: all addresses of this host.
# shim_addresses = ["login1:10351"]  # example
# The unix socket, in a folder of your own with mode 0700; unset: $XDG_RUNTIME_DIR/knoc/agent.sock if that folder is
# there and yours, else STATE_DIR/socket/agent.sock.
# socket = "/run/user/1000/knoc/agent.sock"  # example

[tls]
ca = @CA@
cert = @CERT@
key = @KEY@
# The CA's key renews certificates before they end. It need not be there. Unset: the CA's path with the ending .key.
# ca_key = "~/.config/knoc/ca.key"  # example

# Found by `init`; a tool that is not named is looked up in env.PATH.
[tools]
@TOOLS@
# The environment of every tool, and the whole of it.
[env]
@ENV@
# Where images come from, first match wins. A host that stands here may also have a loopback or link-local address,
# which is refused otherwise; insecure = true is plain HTTP.
# [[registry]]
# prefix = "docker.io"  # example
# mirror = "registry.example.org:5000"  # example
# insecure = false  # default

# What the cluster cannot widen.
[policy]
# UID of the namespace kube-system of the only cluster served; unset: pinned at first use.
# cluster_id = "7d1f3c52-0f0b-4c59-8a0e-3f4b1a9d2c11"  # example
# Identities served; a `*` at the end matches any rest. Empty: all that the CA vouches for.
clients = []
# Certificates that are not served, with all that were renewed from them: "sha256/…" of a public key, "serial/…", or an identity.
denied = []
# Who runs programs as you: whoever may create a pod in one of these namespaces of the cluster, such as ["team-a"]. Empty: in
# ANY namespace. Decide before you hand over the kubelet's bundle.
namespaces = [@NAMESPACES@]
# Partitions, accounts and QOS that pods may name. Empty: all.
partitions = []
accounts = []
qos = []
# Beginnings of the names of images that pods may name, such as "docker.io/library" or "quay.io". Empty: all.
registries = []
# Further sbatch flags that pods may give by knoc.io/flags.
# flags = ["--mail-type", "--mail-user", "--mem-per-cpu", "--cores-per-socket", "--hint"]  # default

# A kubelet leads the node of its own name. Nodes of other names, and whose kubelet leads them:
[policy.nodes]
# "knoc-gpu" = "kubelet/knoc-site"  # example

# Extended resources of pods and what they are in --gres. The node offers those that stand here.
[gres]
"nvidia.com/gpu" = "gpu"
# "amd.com/gpu" = "gpu"  # example

# What a job gets that says nothing.
[job]
# Unset: what Slurm gives to a job that names none.
# partition = "batch"  # example
# account = "physics"  # example
# qos = "normal"  # example
# Unset: the partition's DefaultTime, else its MaxTime.
# time_minutes = 60  # example
# A folder of the compute node for what containers write.
# scratch = "/tmp"  # default

[limits]
# Submissions: a second in the long run, at once after a pause, at the same time.
# sbatch_rate = 50.0  # default
# sbatch_burst = 100  # default
# sbatch_concurrency = 4  # default
# Images: conversions at the same time; bytes of an image by its manifest, of one that is unpacked, and of all that are
# kept (those that were not used for longest go first); how long a layer may bring less than 64 KiB, or less than 1 MiB
# while other images wait.
# image_concurrency = 2  # default
# image_size = "64GiB"  # default
# image_unpacked = "128GiB"  # default
# image_cache = "256GiB"  # default
# image_stall = "1m"  # default
# Rounds of squeue: the shortest and the longest time between two.
# poll_min = "1s"  # default
# poll_max = "30s"  # default
# How long the report of an ended job may take to show on the shared file system.
# report_grace = "90s"  # default
# How long a job may wait for a reason that never ends before its pod fails.
# never_ends_after = "10m"  # default
# How long a job that the scheduler does not know may stay undecided.
# lost_after = "5m"  # default
# Past a pod's grace period, before its job is cancelled.
# stop_slack = "15s"  # default
# Pods at the same time; unset: what the limit of open files carries.
# pods = 1000  # example
# Threads on which bytes move. One carries several hundred MB/s; more are of use where many large streams run at once.
# threads = 1  # default

[logs]
# max_bytes = 104857600  # default
# max_files = 20  # default
# All logs of one pod; each attempt that is kept of each container (the current and the previous one) has an equal share.
# max_pod_bytes = 4294967296  # default

[backoff]
# initial = "10s"  # default
# max = "5m"  # default

[values]
# Where Secrets and tokens wait for the job: file (0600 in a 0700 folder), or none (in the agent's memory).
# at_rest = "file"  # default
# What happens on a node whose /dev/shm is missing, not writable or no tmpfs: error (the pod fails), or disk (Secrets,
# tokens and volumes of the medium Memory lie on the node's disk, with a warning at the pod).
# memory_fallback = "error"  # default
# How long a job holds its nodes and waits for values that are not there or have expired, before its pod fails.
# wait = "10m"  # default
"#;
