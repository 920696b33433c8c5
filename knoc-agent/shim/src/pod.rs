//! What stays the same for the life of the shim: the pod, its folders, its runtime, and facts about the node.

use std::{
    borrow::Cow,
    fs, io,
    net::{IpAddr, ToSocketAddrs as _, UdpSocket},
    path::PathBuf,
    sync::Arc,
};

use knoc_contract::{
    host::node_name,
    jobdir::{JobDir, claim::Claim, schema::Endpoint},
    logs::writer::{KEPT_ATTEMPTS, Limits},
};
use knoc_proto::{
    expand::RuntimeFields,
    ids::PodUid,
    pb,
    pod::{Hostname, MAX_EPHEMERAL, PodSpec},
};
use rustix::process::{Resource, getrlimit, setrlimit};

use super::{
    cgroup::JobCgroup,
    children::Children,
    egress::{Egress, NodeNames},
    environment::Facts,
    gpus,
    mesh::Mesh,
    mounts::Mounting,
    network::{self, Network, Tools, Up, Wish},
    oom::OomCounter,
    processes::Holder,
    ranks::node::Shared,
    resolver::ClusterDns,
    role::Role,
    scratch::{Fallback, Scratch},
    volumes::Volumes,
};
use crate::runtime::{self, Runtime};

/// The settings of the resolver, on the node and in a container.
pub(crate) const RESOLVER: &str = "/etc/resolv.conf";

const LOG_MAX_BYTES: u64 = 100 << 20;

/// What a pod lacks that should have an address of its own.
const NO_ADDRESS: &str =
    "it has no address at which other pods reach it, because compute nodes do not reach the agent";

const LOG_MAX_FILES: u32 = 20;
const LOG_MAX_POD_BYTES: u64 = 4 << 30;
/// The part of the limit of a pod's logs that is kept for all ephemeral containers it can have: an eighth.
const EPHEMERAL_PART: u64 = 8;

/// The pod that the shim runs.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) jobdir: JobDir,
    pub(crate) claim: Claim,
    pub(crate) job: pb::JobFile,
    spec: PodSpec,
    pub(crate) runtime: Box<dyn Runtime>,
    pub(crate) agent: PathBuf,
    pub(crate) facts: Facts,
    pub(crate) oom: OomCounter,
    pub(crate) cgroup: JobCgroup,
    pub(crate) volumes: Volumes,
    pub(crate) scratch: Scratch,
    pub(crate) children: Children,
    pub(crate) mounting: Mounting,
    /// The compute node's until [`Self::bring_up_network`].
    pub(crate) network: Network,
    /// The containers' connections to the cluster.
    pub(crate) egress: Arc<Egress>,
    /// The pod's own address, and those of other pods.
    pub(crate) mesh: Arc<Mesh>,
    /// Of the PID namespace that the containers share, if they share one.
    pub(crate) holder: Holder,
    /// In the helper of a rank: what its container shares with those of other ranks.
    pub(crate) shared: Option<Shared>,
}

impl Pod {
    /// Reads the job file and creates the folders.
    pub(crate) fn open(
        jobdir: JobDir,
        claim: Claim,
        endpoint: Option<&Endpoint>,
    ) -> anyhow::Result<Self> {
        raise_open_files();
        let job = jobdir.spec()?;
        // The agent that wrote it has checked it.
        let uid = PodUid::try_from(jobdir.uid())?;
        let spec = PodSpec::accepted_before(uid, job.spec.clone().unwrap_or_default());
        anyhow::ensure!(!spec.containers.is_empty(), "the job file has no container");
        let settings = job.settings.clone().unwrap_or_default();
        let fallback = if settings.memory_on_disk {
            Fallback::Disk
        } else {
            Fallback::Error
        };
        let scratch = Scratch::create(&settings.scratch, fallback)?;
        let runtime = runtime::by_name(&job.runtime, job.runtime_path.as_ref())?;
        let host_paths = job.host_paths.clone().unwrap_or_default();
        Ok(Self {
            agent: std::env::current_exe()?,
            facts: facts(&spec, endpoint, runtime.isolates()),
            runtime,
            oom: OomCounter::find(),
            cgroup: JobCgroup::find(),
            volumes: Volumes::create(&spec.volumes, &scratch, &host_paths, &job.images)?
                .with_site_binds(&job.site_binds),
            scratch,
            children: Children::default(),
            mounting: Mounting::of(&job),
            network: Network::Host,
            egress: Arc::default(),
            mesh: Mesh::of(&spec),
            holder: Holder::default(),
            shared: None,
            jobdir,
            claim,
            job,
            spec,
        })
    }

    /// Gives the pod the network that it asks for. `isolated`: compute nodes are known not to reach the agent.
    pub(crate) async fn bring_up_network(&mut self, isolated: bool) -> anyhow::Result<Up> {
        let job = self.spec.job.clone().unwrap_or_default();
        let ranks = job.mpi.is_some();
        let wish = Wish {
            pod: self.spec.network(),
            // Ranks reach each other over the networks of the nodes, whatever the site gives to other pods.
            site: if ranks {
                pb::NetworkMode::Host
            } else {
                self.settings().network()
            },
            joins: self.runtime.isolates() && !self.mounting.by_name(),
            parallel: ranks || job.nodes > 1 || job.ntasks > 1,
        };
        let memory = self.volumes.in_memory(job.memory_bytes);
        let tools = Tools {
            children: &self.children,
            agent: &self.agent,
            users: &self.mounting.users,
            env: &self.job.runtime_env,
            ipv6: self.settings().network_ipv6,
            memory: &memory,
        };
        let mut up = network::bring_up(&tools, wish).await?;
        if let Network::Private(private) = &up.network {
            self.facts.fields.pod_ip = private.address.to_string();
        }
        self.network = up.network.clone();
        if isolated && self.wants_address() {
            self.mesh = Arc::default();
            up.lacks.push(NO_ADDRESS.to_owned());
        }
        up.no_cluster = self.begin_egress(isolated);
        Ok(up)
    }

    /// Takes the cluster's network as it was when the pod was staged. Returns why the pod does not reach the cluster, if it
    /// should.
    fn begin_egress(&self, isolated: bool) -> Option<String> {
        let network = self.job.egress.as_ref();
        // Without ranges the cluster's administrators have turned it off.
        let network = network.filter(|network| !network.ranges.is_empty())?;
        self.egress.set_isolated(isolated);
        if isolated {
            self.egress.keep_resolvers();
        }
        let suffixes = self.settings().node_dns_suffixes;
        if !suffixes.is_empty() {
            self.egress.set_node_names(NodeNames::find(&suffixes));
        }
        if let Err(error) = self.egress.replace(network) {
            return Some(error.to_string());
        }
        match &self.network {
            Network::Host => None,
            Network::Private(private) => private.no_edge.clone(),
        }
    }

    /// The cluster's DNS, if containers started now are to ask it and reach it.
    pub(crate) fn cluster_dns(&self) -> Option<ClusterDns> {
        let resolver = self.spec.resolver.as_ref()?;
        let Network::Private(private) = &self.network else {
            return None;
        };
        let table = self.egress.table();
        let server = table.dns.filter(|_| private.no_edge.is_none())?;
        resolver.cluster_first.then(|| ClusterDns {
            server,
            domain: table.domain.clone(),
            namespace: self.spec.namespace.clone(),
        })
    }

    /// What the pod changes in `/etc/resolv.conf`, given the cluster's DNS; `None`: nothing.
    pub(crate) fn resolver(&self, cluster: Option<&ClusterDns>) -> Option<&pb::Resolver> {
        let resolver = self.spec.resolver.as_ref();
        resolver.filter(|one| cluster.is_some() || one.has_own_settings())
    }

    /// The text of `/etc/resolv.conf` for a pod that changes nothing in it. Blocks on file work.
    pub(crate) fn nodes_resolver(&self) -> io::Result<String> {
        let replaced = self.network.resolv_conf();
        replaced.map_or_else(|| fs::read_to_string(RESOLVER), |text| Ok(text.to_owned()))
    }

    /// Whether the pod is to have an address of its own, for which its containers wait.
    pub(crate) fn wants_address(&self) -> bool {
        matches!(self.network, Network::Private(_)) && self.mesh.range().is_some()
    }

    /// What containers are told that start now. Other pods reach the pod at its own address, if it has one.
    pub(crate) fn facts_now(&self) -> Cow<'_, Facts> {
        let Network::Private(private) = &self.network else {
            return Cow::Borrowed(&self.facts);
        };
        match private.own_address() {
            None => Cow::Borrowed(&self.facts),
            Some(own) => {
                let mut facts = self.facts.clone();
                facts.fields.pod_ip = own.to_string();
                Cow::Owned(facts)
            }
        }
    }

    /// The pod's shape.
    pub(crate) fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The agent's settings for the shim; a zero stands for the default.
    pub(crate) fn settings(&self) -> pb::ShimSettings {
        self.job.settings.clone().unwrap_or_default()
    }

    /// The limits of the log of one attempt of a container of this role.
    pub(crate) fn log_limits(&self, role: Role) -> Limits {
        log_limits(&self.settings(), self.spec.all_containers().count(), role)
    }

    /// Whether no program sees itself as another user than the agent's: the site wants that, or there are several ranks, whose
    /// libraries speak with Slurm.
    pub(crate) fn keeps_ids(&self) -> bool {
        let ranks = self.spec.job.as_ref().is_some_and(|job| job.mpi.is_some());
        ranks || self.settings().own_ids
    }

    /// The containers that the pod starts with, in the order in which their slots are added.
    pub(crate) fn containers(&self) -> impl Iterator<Item = (Role, &pb::Container)> {
        let init = self.spec.init_containers.iter();
        let main = self.spec.containers.iter();
        let role = |container: &pb::Container| {
            if container.is_sidecar() {
                Role::Sidecar
            } else {
                Role::Init
            }
        };
        init.map(move |container| (role(container), container))
            .chain(main.map(|container| (Role::Main, container)))
    }

    /// The image that the agent resolved for the container of this name.
    pub(crate) fn image(&self, container: &str) -> pb::ResolvedImage {
        let mut images = self.job.images.iter();
        let image = images.find(|image| image.volume.is_empty() && image.container == container);
        image.cloned().unwrap_or_default()
    }
}

/// PURE: the limits of the log of one attempt of a container of this role, in a pod that starts with so many containers.
fn log_limits(settings: &pb::ShimSettings, containers: usize, role: Role) -> Limits {
    let pod = positive(settings.log_max_pod_bytes).unwrap_or(LOG_MAX_POD_BYTES);
    let ephemeral = pod / EPHEMERAL_PART;
    let (part, series) = match role {
        // The log of one that is added later must not need what others have written already. It has one attempt.
        Role::Ephemeral => (ephemeral, MAX_EPHEMERAL),
        Role::Init | Role::Sidecar | Role::Main => (pod - ephemeral, containers * KEPT_ATTEMPTS),
    };
    let series = u64::try_from(series).unwrap_or(u64::MAX);
    Limits {
        max_bytes: positive(settings.log_max_bytes).unwrap_or(LOG_MAX_BYTES),
        max_files: u32::try_from(settings.log_max_files)
            .ok()
            .filter(|files| *files > 0)
            .unwrap_or(LOG_MAX_FILES),
        max_total: part / series.max(1),
    }
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn facts(spec: &pb::PodSpec, endpoint: Option<&Endpoint>, isolated: bool) -> Facts {
    let host_ip = host_ip(endpoint)
        .map(|ip| ip.to_string())
        .unwrap_or_default();
    // Without a network of their own, containers listen on the node's address.
    let fields = RuntimeFields {
        pod_ip: host_ip.clone(),
        host_ip,
    };
    Facts {
        hostname: hostname(spec),
        fields,
        devices: gpus::devices(|name| std::env::var(name).ok()),
        binds_libraries: isolated,
        isolated,
        api: None,
    }
}

/// As with a kubelet, a pod that asks for the node's network has its host name, too.
fn hostname(spec: &pb::PodSpec) -> Hostname {
    if !spec.node_hostname {
        return Hostname::of(spec);
    }
    let node = node_name();
    Hostname {
        short: node.clone(),
        qualified: None,
        kernel: node,
    }
}

/// The address from which this node reaches the agent, or else the one that its name resolves to.
fn host_ip(endpoint: Option<&Endpoint>) -> Option<IpAddr> {
    let toward = |address: &String| {
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        // Sends nothing: it only asks the routing table.
        socket.connect(address).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    let addresses = endpoint
        .map(|endpoint| endpoint.addresses.as_slice())
        .unwrap_or_default();
    let usable = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified();
    addresses
        .iter()
        .find_map(toward)
        .filter(usable)
        .or_else(|| {
            let mut named = (node_name(), 0)
                .to_socket_addrs()
                .ok()?
                .map(|address| address.ip());
            named.find(|ip| ip.is_ipv4() && usable(ip))
        })
}

/// Raises the soft limit of open files, for many exec streams. The containers' programs get their own ([`crate::launch`]).
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_in_the_nodes_network_has_the_nodes_host_name() {
        let of = |node_hostname| {
            let spec = pb::PodSpec {
                name: "p".to_owned(),
                namespace: "n".to_owned(),
                subdomain: "s".to_owned(),
                set_hostname_as_fqdn: true,
                node_hostname,
                ..pb::PodSpec::default()
            };
            hostname(&spec)
        };
        assert_eq!(of(false).kernel, "p.s.n.svc.cluster.local");
        let Hostname {
            short,
            qualified,
            kernel,
        } = of(true);
        assert_eq!((short, qualified), (kernel.clone(), None));
        assert_eq!(kernel, node_name());
    }

    #[test]
    fn the_kept_attempts_of_all_containers_share_the_limit_of_a_pods_logs() {
        let settings = pb::ShimSettings {
            log_max_pod_bytes: 48 << 20,
            ..Default::default()
        };
        let limits = log_limits(&settings, 3, Role::Main);
        assert_eq!(limits.max_total, 7 << 20);
        assert_eq!((limits.max_bytes, limits.max_files), (100 << 20, 20));
        // The job file of an older agent does not have the setting.
        let limits = log_limits(&pb::ShimSettings::default(), 1, Role::Main);
        assert_eq!(limits.max_total, 7 << 28);
    }

    #[test]
    fn a_pod_with_all_ephemeral_containers_it_can_have_stays_within_the_limit_of_its_logs() {
        let pod = 1 << 30;
        let settings = pb::ShimSettings {
            log_max_pod_bytes: 1 << 30,
            ..Default::default()
        };
        for containers in [1, 2, 30] {
            let of = |role| log_limits(&settings, containers, role).max_total;
            let (own, added) = (
                u64::try_from(containers * KEPT_ATTEMPTS).unwrap() * of(Role::Main),
                u64::try_from(MAX_EPHEMERAL).unwrap() * of(Role::Ephemeral),
            );
            assert!(own + added <= pod, "{containers}: {own} and {added}");
            assert_eq!(of(Role::Init), of(Role::Main));
            assert_eq!(of(Role::Sidecar), of(Role::Main));
        }
        let of_default = log_limits(&pb::ShimSettings::default(), 1, Role::Ephemeral);
        assert_eq!(of_default.max_total, 8 << 20);
    }
}
