//! PURE: the contents of the files that `init` writes.

use std::path::Path;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use knoc_link::pki::CertifiedKey;

use super::{Found, Options};
use crate::config::{RuntimeKind, SchedulerKind};

/// Quotes `text` as a TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Formats `host:port`, with brackets around an IPv6 address.
fn address((host, port): &(String, u16)) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// The contents of the site file.
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
    let listen = if options.no_port {
        "none".to_owned()
    } else {
        format!("0.0.0.0:{port}")
    };
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
        .replace("@LISTEN@", &listen)
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
        "# The kubelet's certificate for the link to the agent of {site}. Contains a private key: keep it secret.\n\
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

/// knocctl's context. It does not set `current-context`, so that on the login node the agent's
/// socket is preferred.
pub(super) fn knocctl(site: &str, folder: &Path, first: &(String, u16)) -> String {
    let tls = |name: &str| quoted(&folder.join("tls").join(name).to_string_lossy());
    format!(
        "# knocctl's configuration for another machine: copy this file and the files that it names there. On the login\n\
         # node knocctl uses the agent's unix socket and needs none of them, unless you pass --context {site}. To use\n\
         # this context everywhere, add `current-context = {name}` before the first line in brackets.\n\n\
         [contexts.{name}]\naddress = {address}\nca = {ca}\ncert = {cert}\nkey = {key}\nsite = {name}\n",
        name = quoted(site),
        address = quoted(&address(first)),
        ca = tls("ca.crt"),
        cert = tls("knocctl.crt"),
        key = tls("knocctl.key"),
    )
}

const TEMPLATE: &str = r#"# The site file of knoc-agent. `knoc-agent serve` reads it when it starts, and reads [policy] again whenever this file changes.
# Mistakes are reported with their line numbers.
# Settings without a leading `#` are set. A commented setting that ends with `# default` shows the default value; one that ends
# with `# example` shows a possible value that is not the default.

site = @SITE@

# The agent's state, on a file system that the login node and the compute nodes share; mode 0700.
# state_dir = "~/.local/state/knoc"  # default

# The scheduler that runs the jobs: slurm, or local (processes on this host).
scheduler = "@SCHEDULER@"
# The container runtime: auto (Apptainer, else Singularity), apptainer, singularity, or process (no containers).
runtime = "@RUNTIME@"

# Shell commands at the beginning of every batch script, for example: module load apptainer
prelude = ""

# Folders whose image files and sandboxes pods can use.
image_roots = []
# An image file, its folder in image_roots and all folders above must belong to root or to you, and nobody else may be able to
# write to them. `true` lifts this requirement: everybody who can write there then chooses what runs as you.
# trust_shared_roots = false  # default

[listen]
# The address for kubelets and knocctl (mutual TLS). "none" opens no port, for links over SSH and for [[dial_out]].
kubelet = "@LISTEN@"
# The address for shims of running jobs (TLS with pinned keys).
# shim = "0.0.0.0:10351"  # default
# The addresses that shims connect to. If empty, all addresses of this host.
# shim_addresses = ["login1:10351"]  # example
# The unix socket, in a folder that belongs to you and has mode 0700. If unset, $XDG_RUNTIME_DIR/knoc/agent.sock if
# XDG_RUNTIME_DIR exists and belongs to you, else STATE_DIR/socket/agent.sock.
# socket = "/run/user/1000/knoc/agent.sock"  # example

[tls]
ca = @CA@
cert = @CERT@
key = @KEY@
# The CA's key, with which certificates are renewed before they expire; the file may be missing. If unset, the path of the CA with
# the extension .key.
# ca_key = "~/.config/knoc/ca.key"  # example

# Kubelets that cannot connect to this agent: the agent connects to them. Each entry is one kubelet with `agent.address: accept`, or the
# Ingress or load balancer in front of it, which must pass TLS through. server_name is the host name in the TLS handshake, if it
# is not the host of the address; kubelet is the name in the kubelet's certificate. proxy is the HTTP proxy on the way, or "none"; if
# unset, HTTPS_PROXY and NO_PROXY of [env] or of the agent's own environment decide. proxy_credentials is a file of mode 0600
# with `user:password`.
# [[dial_out]]
# address = "knoc.example.org:443"  # example
# server_name = "knoc.example.org"  # example
# kubelet = "knoc-site"  # example
# proxy = "http://proxy.example.org:3128"  # example
# proxy_credentials = "~/.config/knoc/proxy"  # example

# Tools that `init` found. A tool that is not listed is looked up in env.PATH.
[tools]
@TOOLS@
# The complete environment of every tool.
[env]
@ENV@
# Where images are fetched from; the first match applies. Hosts that are listed here may also have a loopback or link-local
# address, which is rejected otherwise. insecure = true uses plain HTTP,
# also for the token realm and redirects at this host, but at no other.
# [[registry]]
# prefix = "docker.io"  # example
# mirror = "registry.example.org:5000"  # example
# insecure = false  # default
# Whether the mirror gets the credentials that pods have for images under the prefix (imagePullSecrets).
# credentials = false  # default

# Limits that the Kubernetes cluster cannot extend.
[policy]
# The only cluster that is served, as the UID of its namespace kube-system. If unset, the first cluster that connects.
# cluster_id = "7d1f3c52-0f0b-4c59-8a0e-3f4b1a9d2c11"  # example
# Identities that are served; a trailing `*` matches anything. If empty, all clients with a certificate of the CA.
clients = []
# Certificates that are denied, together with all certificates renewed from them: "sha256/…" of a public key, "serial/…", or an
# identity.
denied = []
# Namespaces of the cluster whose pods are accepted, such as ["team-a"]. Everybody who can create a pod in one of them can run
# programs as you. If empty, pods of ANY namespace are accepted. Decide before you hand over the kubelet's bundle.
namespaces = [@NAMESPACES@]
# Partitions, accounts and QOS that pods can request. If empty, all.
partitions = []
accounts = []
qos = []
# Prefixes of the image names that pods can use, such as "docker.io/library" or "quay.io". If empty, all.
registries = []
# What happens to a pod with a `privileged` container, because nobody on a compute node can give it privileges: "reject", or
# "unprivileged" to run the container without them, as pods expect that ask for more than they need.
# privileged = "reject"  # default
# Ports of compute nodes from which connections are forwarded to a pod that asks for it (hostPort), each a port or a range.
# Everybody who reaches the node can connect to them. If empty, none.
# host_ports = ["20000-20999"]  # example
# Services of the cluster that pods can reach, as NAMESPACE/SERVICE, where `*` stands for any characters. The cluster has a list too, and a
# Service has to be in both. If empty, none.
# egress = ["default/kubernetes", "kube-system/kube-dns"]  # default
# Between which namespaces pods reach each other at addresses of their own, as NAMESPACE:NAMESPACE, where `*` stands for any characters.
# Pods of one namespace always do. It is for both directions.
# pod_traffic = ["team-a:team-b", "*:shared"]  # example
# Paths of the compute nodes that pods can mount as hostPath volumes, with everything below them; the most specific path decides. Links
# in these paths are followed; below them, a link that leads out is not. Your home directory itself, ~/.ssh, keys and KNoC's own folders
# are never mounted, and neither is a folder that contains them. A job keeps the paths that it was submitted with.
# host_paths = [{ path = "/data" }, { path = "/scratch", writable = true }]  # example
# Where the compute nodes have what persistent volumes name: exports of NFS servers, with what is below them, and volumes of CSI drivers.
# In the path of a driver, {handle} stands for the volumeHandle of a volume and {NAME} for its attribute of that name. All of these
# paths must be below host_paths.
# nfs = [{ server = "filer.example.org", export = "/export/data", path = "/data" }]  # example
# csi = [{ driver = "nfs.csi.k8s.io", path = "/scratch/{subdir}" }]  # example
# Additional sbatch flags that pods can pass with the annotation knoc.io/flags.
# flags = ["--mail-type", "--mail-user", "--mem-per-cpu", "--cores-per-socket", "--hint"]  # default

# A kubelet leads the node with its own name. To let it lead a node with another name, assign that node here:
[policy.nodes]
# "knoc-gpu" = "kubelet/knoc-site"  # example

# Extended resources of pods and the --gres resource that each is mapped to. The node offers the resources that are listed here.
[gres]
"nvidia.com/gpu" = "gpu"
# "amd.com/gpu" = "gpu"  # example

# Paths of the compute nodes that every container has, whatever its pod asks for, such as module trees or Slurm's configuration; a volume
# that a pod mounts at the same path replaces it. target is the path in the container, if it is another one. partitions: the
# partitions whose jobs have it; if unset, all. A container does not start if the path is missing.
# [[bind]]
# path = "/opt/modules"  # example
# target = "/opt/modules"  # example
# writable = false  # default
# partitions = ["gpu"]  # example

# Defaults for jobs whose pod does not request anything else.
[job]
# If unset, Slurm's own default applies.
# partition = "batch"  # example
# account = "physics"  # example
# qos = "normal"  # example
# If unset, the partition's DefaultTime, else its MaxTime.
# time_minutes = 60  # example
# A folder on the compute node for files that containers write.
# scratch = "/tmp"  # default
# The network of pods that ask for none: "private" is one of their own, in which they may listen on any port, and needs user
# namespaces and, to reach other networks, pasta (package passt) on the compute nodes; "host" is the compute node's; "auto" is
# private on nodes that can do it, else host. Pods with several tasks are in the node's network.
# network = "auto"  # default
# A network of a pod's own reaches the node's IPv4 networks only; with true its IPv6 networks too, and then the pod has the node's
# IPv6 addresses.
# network_ipv6 = false  # default
# Pods in a network of their own ask the cluster's DNS for all names; names with one of these endings are asked at the compute
# node's resolvers (its /etc/resolv.conf) instead.
# node_dns_suffixes = ["hpc.example.org"]  # example
# As whom programs see themselves, where compute nodes have user namespaces: "requested", as the user and the group that the pod asks
# for (runAsUser, runAsGroup), or the image unless it is root; "own", as you. To the node and its file systems they are you in either
# case. Programs that compare their own number with yours, such as srun in a container, need "own".
# user_ids = "requested"  # default

# Images of a container library, and how images from registries are kept.
[images]
# The container library for images named library://ENTITY/COLLECTION/CONTAINER:TAG, as `apptainer pull --library` has it; such images
# are SIF files, and are used as they are. If unset, pods with such an image are rejected.
# library = "https://library.example.org"  # example
# A file of mode 0600 with your token for it. Every pod can then use what the library gives for that token.
# library_token = "~/.config/knoc/library-token"  # example
# How their files are compressed when they are converted to SIF files: gzip, which every runtime writes and reads; zstd, which is
# written ten times as fast and from which programs start faster; lz4, from which they start fastest, in larger files; auto is zstd if
# the runtime can write it (Apptainer from 1.4 on) and no compute node has been unable to read it, else gzip. Images that are in the
# cache stay as they are.
# compression = "auto"  # default
# Where they are converted: on the login node (login), or in a Slurm job for each image (job), with the account and the QOS of pods
# that name none. The partition of these jobs, if not that of such pods; their CPUs, memory and time limit.
# convert = "login"  # default
# convert_partition = "short"  # example
# convert_cpus = 2  # default
# convert_memory = "4GiB"  # default
# convert_time = "1h"  # default

[limits]
# Submissions: the sustained rate per second, the burst after an idle period, and the number of concurrent sbatch calls.
# sbatch_rate = 50.0  # default
# sbatch_burst = 100  # default
# sbatch_concurrency = 4  # default
# Images: the number of concurrent conversions; the largest size of an image according to its manifest, of an unpacked image, and
# of the cache with all that pulls have on disk (the least recently used images are removed first); and how long a layer may
# deliver less than 64 KiB, or less than 1 MiB while other images wait.
# image_concurrency = 2  # default
# image_size = "64GiB"  # default
# image_unpacked = "128GiB"  # default
# image_cache = "256GiB"  # default
# image_stall = "1m"  # default
# The shortest and the longest time between two rounds of squeue.
# poll_min = "1s"  # default
# poll_max = "30s"  # default
# How long the report of an ended job may take to appear on the shared file system.
# report_grace = "90s"  # default
# How long a job may be pending for a reason that never goes away before its pod fails.
# never_ends_after = "10m"  # default
# How long the scheduler may not know a job before its pod fails.
# lost_after = "5m"  # default
# How long to wait after a pod's grace period before its job is cancelled.
# stop_slack = "15s"  # default
# If compute nodes cannot reach the agent: how many job steps (srun --overlap, one process on the login node each) may carry links
# to pods at the same time (0: none), and how long a step goes on after its last use.
# srun_links = 16  # default
# srun_idle = "1m"  # default
# The largest number of pods at the same time. If unset, it follows from the limit of open files.
# pods = 1000  # example
# Threads that move the bytes of streams. One thread moves several hundred MB/s; use more if many large streams run at once.
# threads = 1  # default

[logs]
# The size in bytes at which a log goes on in another file, and how many files are kept of each attempt of a container.
# max_bytes = 104857600  # default
# max_files = 20  # default
# The limit for all logs of one pod, shared equally by the current and the previous attempt of each container;
# an eighth is kept for ephemeral containers, a 64th of it for each.
# max_pod_bytes = 4294967296  # default

[backoff]
# The first pause before a container is restarted again, or a failed pull or submission is tried again, and the longest one.
# initial = "10s"  # default
# max = "5m"  # default

[values]
# Where Secrets and tokens are kept until the job starts: file (mode 0600 in a 0700 folder), or none (in the agent's memory).
# at_rest = "file"  # default
# What happens if a node's /dev/shm is missing, not writable or not a tmpfs: error (the pod fails), or disk (Secrets, tokens and
# volumes with the medium Memory are stored on the node's disk, and the pod gets a warning).
# memory_fallback = "error"  # default
# How long a job waits, holding its nodes, for values that are missing or have expired before its pod fails.
# wait = "10m"  # default

[serve]
# How long an agent that was started on demand (`knoc-agent serve --stdio`) goes on without any link.
# linger = "10m"  # default
"#;
