//! `/metrics`: the kubelet's own metrics. [`FAMILIES`] is the complete list, and docs/guide/metrics.md is its copy.
//!
//! Counters are in [`Metrics`], which tasks share; gauges are gathered as [`Gauges`] at each request. Rendering is
//! pure. Locks are held for one addition. The number of series is bounded: paths are routes, never what a client sent.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use knoc_proto::pb;

use self::traffic::Direction;
use crate::stats::resource::{braces, head, line};

pub mod process;
pub mod traffic;

/// One metric family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// The name of the family.
    pub name: &'static str,
    /// Its type: counter, gauge or histogram.
    pub kind: &'static str,
    /// The labels of its samples, separated by commas.
    pub labels: &'static str,
    /// The help text, one line.
    pub help: &'static str,
}

const fn family(
    name: &'static str,
    kind: &'static str,
    labels: &'static str,
    help: &'static str,
) -> Family {
    Family {
        name,
        kind,
        labels,
        help,
    }
}

const AGENT_INFO: Family = family(
    "knoc_agent_info",
    "gauge",
    "version,site,scheduler,runtime",
    "Always 1, labelled with the agent's properties; absent while the link is down",
);
const CERTIFICATES: Family = family(
    "knoc_link_certificate_remaining_seconds",
    "gauge",
    "side",
    "Remaining validity of the certificate of one side of the link (agent or kubelet), negative once it has expired; absent if there is no certificate",
);
const AGENT_REFUSED: Family = family(
    "knoc_agent_connections_refused_total",
    "counter",
    "reason",
    "Connections of pods to the cluster that the agent refused itself, for all its nodes, at most some minutes late: limit_node and limit_pod (too many wait to be taken), malformed, policy (policy.egress of the site file)",
);
const AGENT_WAITING: Family = family(
    "knoc_agent_connections_waiting",
    "gauge",
    "",
    "Connections of pods to the cluster that wait at the agent for a kubelet, for all its nodes, at most some minutes late; absent until the agent has reported it",
);
const CONNECTION_BYTES: Family = family(
    "knoc_connection_bytes_total",
    "counter",
    "direction,to",
    "Bytes carried between pods and the cluster, by who opened the connection (egress: a pod, relay: a client in the cluster) and by whom they were sent to (pod or cluster)",
);
const CONNECTIONS_OPEN: Family = family(
    "knoc_connections_open",
    "gauge",
    "direction",
    "Open connections and flows of datagrams between pods and the cluster, by who opened them (egress: a pod, relay: a client in the cluster)",
);
const CONNECTIONS_REFUSED: Family = family(
    "knoc_connections_refused_total",
    "counter",
    "direction,reason",
    "Connections between pods and the cluster that were not made: dial (the endpoint does not answer), endpoint (its address is one that pods never reach), limit, malformed, no_endpoint, not_listed (egress.allow), not_read (Services are not known yet), pod (its side is gone or does not listen), policy (of the site), unknown (no such Service)",
);
const CONNECTIONS: Family = family(
    "knoc_connections_total",
    "counter",
    "direction",
    "Connections and flows of datagrams between pods and the cluster that were made",
);
const LINK_CHANGED: Family = family(
    "knoc_agent_link_changed_timestamp_seconds",
    "gauge",
    "",
    "Time at which the link to the agent last went up or down, Unix seconds",
);
const LINK_UP: Family = family(
    "knoc_agent_link_up",
    "gauge",
    "",
    "1 while the agent is connected and its pods are known, else 0",
);
const BUILD: Family = family(
    "knoc_build_info",
    "gauge",
    "version",
    "Always 1, labelled with the version of KNoC",
);
const REQUESTS: Family = family(
    "knoc_http_requests_total",
    "counter",
    "path,verb,code",
    "Requests to the kubelet API that were answered, by route, HTTP method and status code",
);
const PODS: Family = family(
    "knoc_pods",
    "gauge",
    "phase",
    "Pods bound to the node, by phase in Kubernetes",
);
const ROUND_AGE: Family = family(
    "knoc_scheduler_round_age_seconds",
    "gauge",
    "",
    "Time since the agent last read the jobs' states from Slurm; absent while it has no job to query",
);
const SCHEDULER_UP: Family = family(
    "knoc_scheduler_up",
    "gauge",
    "",
    "1 if Slurm answered the agent's last query, else 0; absent until the agent has reported it",
);
const PATCHES: Family = family(
    "knoc_status_patch_duration_seconds",
    "histogram",
    "result",
    "Duration of patches of a pod's status; result is ok, gone (the pod was deleted or replaced) or error",
);
const SESSIONS: Family = family(
    "knoc_streaming_sessions_total",
    "counter",
    "verb,protocol",
    "Sessions of exec, attach and portforward that were started, by carrier and subprotocol (spdy/… or websocket/…)",
);
const STREAMS: Family = family(
    "knoc_streams_open",
    "gauge",
    "",
    "Open connections of exec, attach and portforward",
);
const PROCESS_CPU: Family = family(
    "process_cpu_seconds_total",
    "counter",
    "",
    "User and system CPU time of this process",
);
const PROCESS_FDS_MOST: Family = family(
    "process_max_fds",
    "gauge",
    "",
    "Limit of open file descriptors of this process",
);
const PROCESS_FDS: Family = family(
    "process_open_fds",
    "gauge",
    "",
    "Open file descriptors of this process",
);
const PROCESS_MEMORY: Family = family(
    "process_resident_memory_bytes",
    "gauge",
    "",
    "Resident memory of this process",
);
const PROCESS_START: Family = family(
    "process_start_time_seconds",
    "gauge",
    "",
    "Start time of this process, Unix seconds",
);

/// Every family of `/metrics`, by name.
pub const FAMILIES: &[Family] = &[
    AGENT_REFUSED,
    AGENT_WAITING,
    AGENT_INFO,
    LINK_CHANGED,
    LINK_UP,
    BUILD,
    CONNECTION_BYTES,
    CONNECTIONS_OPEN,
    CONNECTIONS_REFUSED,
    CONNECTIONS,
    REQUESTS,
    CERTIFICATES,
    PODS,
    ROUND_AGE,
    SCHEDULER_UP,
    PATCHES,
    SESSIONS,
    STREAMS,
    PROCESS_CPU,
    PROCESS_FDS_MOST,
    PROCESS_FDS,
    PROCESS_MEMORY,
    PROCESS_START,
];

/// The families of `/metrics/probes`, with the names that a kubelet has. They have no samples, because the shims run
/// the probes and do not count them.
pub const PROBE_FAMILIES: &[Family] = &[
    family(
        "prober_probe_duration_seconds",
        "histogram",
        "container,namespace,pod,probe_type",
        "How long a probe of a container took",
    ),
    family(
        "prober_probe_total",
        "counter",
        "container,namespace,pod,pod_uid,probe_type,result",
        "Probes of a container, by result",
    ),
];

/// The upper bounds of a histogram's buckets, in milliseconds.
const BUCKETS: [u64; 11] = [5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000];

/// How a status patch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PatchResult {
    /// The API server accepted it.
    Ok,
    /// The pod is gone, or another one has its name.
    Gone,
    /// It failed and is retried.
    Error,
}

impl PatchResult {
    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Gone => "gone",
            Self::Error => "error",
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: Duration,
}

impl Histogram {
    fn observe(&mut self, value: Duration) {
        for (bucket, bound) in self.buckets.iter_mut().zip(BUCKETS) {
            if value <= Duration::from_millis(bound) {
                *bucket += 1;
            }
        }
        self.count += 1;
        self.sum += value;
    }
}

/// Path, verb and status code.
type Request = (String, &'static str, u16);

/// Verb and protocol.
type Session = (&'static str, String);

#[derive(Debug, Default)]
struct Counted {
    requests: BTreeMap<Request, u64>,
    patches: BTreeMap<PatchResult, Histogram>,
    sessions: BTreeMap<Session, u64>,
}

/// The counters; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    counted: Arc<Mutex<Counted>>,
    /// Connections that pods open to the cluster.
    pub egress: Direction,
    /// Connections that the cluster opens to pods.
    pub relay: Direction,
}

/// The gauges at the time of a request.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    /// Pods by phase.
    pub phases: BTreeMap<String, usize>,
    /// What the agent said about itself, while the link is up.
    pub agent: Option<Arc<pb::AgentInfo>>,
    /// What the agent has counted about connections of pods to the cluster, if it has said it.
    pub agent_egress: Option<pb::EgressCounts>,
    /// When the link last went up or down, Unix seconds.
    pub link_changed: i64,
    /// Whether Slurm answered the last query, and how long ago a query succeeded, if one has.
    pub scheduler: Option<(bool, Option<Duration>)>,
    /// The remaining validity of the certificates of both sides of the link, in seconds.
    pub certificates: Vec<(&'static str, i64)>,
    /// Upgraded connections that are open.
    pub streams: usize,
    /// This process, if `/proc` is readable.
    pub process: Option<process::Process>,
}

impl Metrics {
    /// Counts a request that was answered. `path` is a route.
    pub fn request(&self, path: &str, method: &http::Method, code: u16) {
        let key = (path.to_owned(), verb(method), code);
        *self.lock().requests.entry(key).or_default() += 1;
    }

    /// Counts a patch of a pod's status, and how long it took.
    pub fn patched(&self, result: PatchResult, took: Duration) {
        let mut counted = self.lock();
        counted.patches.entry(result).or_default().observe(took);
    }

    /// Counts a connection that was upgraded for `verb`. `protocol` is one that the server supports.
    pub fn session(&self, verb: &'static str, protocol: String) {
        let mut counted = self.lock();
        *counted.sessions.entry((verb, protocol)).or_default() += 1;
    }

    /// Renders the text of `/metrics`.
    #[must_use]
    pub fn render(&self, gauges: &Gauges) -> String {
        let mut page = Page::default();
        of_agent(&mut page, gauges);
        page.one(BUILD, &[("version", env!("CARGO_PKG_VERSION"))], 1);
        self.connections(&mut page);
        self.requests(&mut page);
        page.head(CERTIFICATES);
        for (side, left) in &gauges.certificates {
            page.sample(CERTIFICATES.name, &[("side", side)], *left);
        }
        let phases: Vec<_> = gauges.phases.iter().collect();
        page.head(PODS);
        for (phase, count) in phases {
            page.sample(PODS.name, &[("phase", phase)], *count);
        }
        if let Some((up, age)) = gauges.scheduler {
            if let Some(age) = age {
                page.one(ROUND_AGE, &[], age.as_secs_f64());
            }
            page.one(SCHEDULER_UP, &[], u8::from(up));
        }
        self.patches(&mut page);
        self.sessions(&mut page);
        page.one(STREAMS, &[], gauges.streams);
        if let Some(process) = &gauges.process {
            page.one(PROCESS_CPU, &[], process.cpu.as_secs_f64());
            page.one(PROCESS_FDS_MOST, &[], process.max_fds);
            page.one(PROCESS_FDS, &[], process.open_fds);
            page.one(PROCESS_MEMORY, &[], process.resident);
            page.one(PROCESS_START, &[], process.started.as_secs_f64());
        }
        page.text
    }

    fn connections(&self, page: &mut Page) {
        let both = [
            ("egress", self.egress.counted()),
            ("relay", self.relay.counted()),
        ];
        page.head(CONNECTION_BYTES);
        for (direction, counted) in &both {
            for (to, bytes) in [("cluster", counted.from_pod), ("pod", counted.to_pod)] {
                let labels = [("direction", *direction), ("to", to)];
                page.sample(CONNECTION_BYTES.name, &labels, bytes);
            }
        }
        page.head(CONNECTIONS_OPEN);
        for (direction, counted) in &both {
            page.sample(
                CONNECTIONS_OPEN.name,
                &[("direction", direction)],
                counted.open,
            );
        }
        page.head(CONNECTIONS_REFUSED);
        for (direction, counted) in &both {
            for (reason, count) in &counted.refused {
                let labels = [("direction", *direction), ("reason", reason.label())];
                page.sample(CONNECTIONS_REFUSED.name, &labels, count);
            }
        }
        page.head(CONNECTIONS);
        for (direction, counted) in &both {
            page.sample(CONNECTIONS.name, &[("direction", direction)], counted.made);
        }
    }

    fn requests(&self, page: &mut Page) {
        page.head(REQUESTS);
        for ((path, verb, code), count) in &self.lock().requests {
            let code = code.to_string();
            let labels = [("path", path.as_str()), ("verb", verb), ("code", &code)];
            page.sample(REQUESTS.name, &labels, count);
        }
    }

    fn patches(&self, page: &mut Page) {
        page.head(PATCHES);
        for (result, histogram) in &self.lock().patches {
            page.histogram(PATCHES.name, ("result", result.label()), histogram);
        }
    }

    fn sessions(&self, page: &mut Page) {
        page.head(SESSIONS);
        for ((verb, protocol), count) in &self.lock().sessions {
            let labels = [("verb", *verb), ("protocol", protocol)];
            page.sample(SESSIONS.name, &labels, count);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The reasons that agents of this version have; those of newer ones are `other`, so that the number of series is bounded.
const AGENT_REASONS: [&str; 4] = ["limit_node", "limit_pod", "malformed", "policy"];

fn of_agent(page: &mut Page, gauges: &Gauges) {
    if let Some(egress) = &gauges.agent_egress {
        page.head(AGENT_REFUSED);
        let mut refused = BTreeMap::new();
        for (reason, count) in &egress.refused {
            let known = AGENT_REASONS.iter().find(|known| **known == reason);
            let sum: &mut u64 = refused.entry(*known.unwrap_or(&"other")).or_default();
            *sum = sum.saturating_add(*count);
        }
        for (reason, count) in &refused {
            page.sample(AGENT_REFUSED.name, &[("reason", reason)], count);
        }
        page.one(AGENT_WAITING, &[], egress.waiting);
    }
    if let Some(agent) = &gauges.agent {
        let labels = [
            ("version", agent.version.as_str()),
            ("site", &agent.site),
            ("scheduler", &agent.scheduler_version),
            ("runtime", &agent.runtime_version),
        ];
        page.one(AGENT_INFO, &labels, 1);
    }
    page.one(LINK_CHANGED, &[], gauges.link_changed);
    page.one(LINK_UP, &[], u8::from(gauges.agent.is_some()));
}

/// Renders the text of `/metrics/probes`.
#[must_use]
pub fn render_probes() -> String {
    let mut page = Page::default();
    for family in PROBE_FAMILIES {
        page.head(*family);
    }
    page.text
}

/// The method in lower case, or `other` for unknown ones, since clients may invent methods.
fn verb(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "get",
        "POST" => "post",
        "HEAD" => "head",
        "PUT" => "put",
        "PATCH" => "patch",
        "DELETE" => "delete",
        "OPTIONS" => "options",
        _ => "other",
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn head(&mut self, family: Family) {
        head(&mut self.text, family.name, family.help, family.kind);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl ToString + Copy) {
        let labels = if labels.is_empty() {
            String::new()
        } else {
            braces(labels)
        };
        line(&mut self.text, name, &labels, &value.to_string(), None);
    }

    fn one(&mut self, family: Family, labels: &[(&str, &str)], value: impl ToString + Copy) {
        self.head(family);
        self.sample(family.name, labels, value);
    }

    fn histogram(&mut self, name: &str, label: (&str, &str), histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        for (bound, count) in BUCKETS.iter().zip(histogram.buckets) {
            let bound = Duration::from_millis(*bound).as_secs_f64().to_string();
            self.sample(&bucket, &[label, ("le", &bound)], count);
        }
        self.sample(&bucket, &[label, ("le", "+Inf")], histogram.count);
        let labels = braces(&[label]);
        let sum = histogram.sum.as_secs_f64();
        // Writing to a String cannot fail.
        writeln!(self.text, "{name}_sum{labels} {sum}").ok();
        writeln!(self.text, "{name}_count{labels} {}", histogram.count).ok();
    }
}

#[cfg(test)]
mod tests;
