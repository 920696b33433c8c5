//! PURE: checks values of the site file that parse but make no sense. All are reported, each with
//! what is allowed.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use knoc_link::{Carrier, Identity};
use knoc_proto::{egress::AllowList, ids::SiteName, mesh::NamespacePairs, settings::Document};

use super::{Config, Convert, SchedulerKind, dial_out, host_ports::HostPorts, network};
use crate::policy::{denied::Denied, nodes::assigned};

/// Less would not hold what a program writes at once.
const LEAST_POD_LOGS: i64 = 1 << 20;

/// More threads than a login node allows one user.
const MAX_THREADS: usize = 256;
/// More job steps than any login node should carry for one user.
const MAX_SRUN_LINKS: usize = 1000;

/// Reports every mistake of `config` in the document that it was read from.
pub(super) fn check(config: &Config, home: &Path, document: &mut Document) {
    let check = Check {
        config,
        home,
        document,
    };
    check.all();
}

/// The maximum number of entries; every request is compared with each of them.
const MAX_DENIED: usize = 1000;

/// Whether names of images could begin with `text`.
fn is_image_prefix(text: &str) -> bool {
    let host = text.split('/').next().unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/[]".contains(c);
    !host.is_empty() && !text.contains("//") && !text.ends_with('/') && text.chars().all(plain)
}

struct Check<'a> {
    config: &'a Config,
    home: &'a Path,
    document: &'a mut Document,
}

impl Check<'_> {
    fn all(mut self) {
        if self.config.site.is_empty() {
            self.wrong("site", "is missing: the name of this site, a DNS label");
        } else if let Err(error) = SiteName::try_from(self.config.site.as_str()) {
            let what = format!("must be a DNS label of at most 58 characters: {error}");
            self.wrong("site", what);
        }
        self.paths();
        self.addresses();
        self.library();
        self.dial_out();
        self.gres();
        self.limits();
        let flags = self.config.policy.flags.iter();
        let short: Vec<_> = flags.filter(|flag| !flag.starts_with("--")).collect();
        if !short.is_empty() {
            self.wrong("policy.flags", format!("names begin with `--`: {short:?}"));
        }
        self.identities();
    }

    /// Checks which certificates are denied, and which kubelet leads which node.
    fn identities(&mut self) {
        let config = self.config;
        let denied = &config.policy.denied;
        if denied.len() > MAX_DENIED {
            let what = format!("has {} entries; the limit is {MAX_DENIED}", denied.len());
            self.wrong("policy.denied", what);
        }
        let wrong = denied
            .iter()
            .filter_map(|entry| entry.parse::<Denied>().err());
        let wrong: Vec<String> = wrong.map(|error| error.to_string()).collect();
        if !wrong.is_empty() {
            self.wrong("policy.denied", wrong.join("; "));
        }
        let host_ports = config.policy.host_ports.iter();
        for wrong in host_ports.filter_map(|text| text.parse::<HostPorts>().err()) {
            self.wrong("policy.host_ports", wrong);
        }
        if let Err(wrong) = AllowList::parse(&config.policy.egress) {
            self.wrong("policy.egress", wrong.join("; "));
        }
        if let Err(wrong) = NamespacePairs::parse(&config.policy.pod_traffic) {
            self.wrong("policy.pod_traffic", wrong.join("; "));
        }
        let wrong = network::suffix_mistakes(&config.job.node_dns_suffixes);
        if !wrong.is_empty() {
            self.wrong("job.node_dns_suffixes", wrong.join("; "));
        }
        for (node, identity) in &config.policy.nodes {
            let name = assigned(identity).unwrap_or_default();
            let kubelet = |name: &str| format!("spiffe://knoc/kubelet/{name}").parse::<Identity>();
            // Node names follow the rules for kubelet names.
            if kubelet(name).is_err() || kubelet(node).is_err() {
                let what =
                    format!("must be like `\"NODE\" = \"kubelet/NAME\"`: {node:?} = {identity:?}");
                self.wrong("policy.nodes", what);
            }
        }
    }

    fn wrong(&mut self, key: &str, what: impl Display) {
        let path: Vec<&str> = key.split('.').collect();
        self.document.wrong(&path, what);
    }

    fn paths(&mut self) {
        let config = self.config;
        self.absolute("state_dir", [&config.state_dir]);
        self.absolute("image_roots", &config.image_roots);
        self.absolute("listen.socket", &config.listen.socket);
        if let Some(tls) = &config.tls {
            self.absolute("tls.ca", [&tls.ca]);
            self.absolute("tls.cert", [&tls.cert]);
            self.absolute("tls.key", [&tls.key]);
            self.absolute("tls.ca_key", &tls.ca_key);
        }
        let scratch = config.job.scratch.as_ref().map(PathBuf::from);
        self.absolute("job.scratch", &scratch);
        for (name, path) in config.tools.named() {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                self.wrong(&format!("tools.{name}"), "must be absolute");
            }
        }
        let wrong = config.host_path_mistakes(self.home);
        if !wrong.is_empty() {
            self.wrong("policy.host_paths", wrong.join("; "));
        }
        for (key, what) in config.mount_mistakes(self.home) {
            self.wrong(key, what);
        }
    }

    fn absolute<'p>(&mut self, key: &str, paths: impl IntoIterator<Item = &'p PathBuf>) {
        let relative = |path: &&PathBuf| !path.is_absolute();
        let wrong: Vec<&Path> = paths
            .into_iter()
            .filter(relative)
            .map(|path| &**path)
            .collect();
        if !wrong.is_empty() {
            self.wrong(
                key,
                format!("must be absolute or begin with `~/`: {wrong:?}"),
            );
        }
    }

    fn addresses(&mut self) {
        let config = self.config;
        for address in &config.listen.shim_addresses {
            let what = match address.parse() {
                Ok(Carrier::Tcp(_)) => continue,
                Ok(_) => format!("{address:?} is not HOST:PORT"),
                Err(error) => error.to_string(),
            };
            self.wrong("listen.shim_addresses", what);
        }
        if config
            .registries
            .iter()
            .any(|registry| registry.prefix.is_empty())
        {
            let what = "must be the name of a registry, or the beginning of images' names in it";
            self.wrong("registry.prefix", what);
        }
        let mirrors = config.registries.iter().filter_map(|r| r.mirror.as_ref());
        let wrong: Vec<_> = mirrors.filter(|mirror| !is_image_prefix(mirror)).collect();
        if !wrong.is_empty() {
            let what = format!("must be like `HOST[:PORT][/FOLDER]`, without a scheme: {wrong:?}");
            self.wrong("registry.mirror", what);
        }
        let allowed = config.policy.registries.iter();
        let wrong: Vec<_> = allowed.filter(|prefix| !is_image_prefix(prefix)).collect();
        if !wrong.is_empty() {
            let what = format!("must be like `HOST[:PORT][/FOLDER]`, without a scheme: {wrong:?}");
            self.wrong("policy.registries", what);
        }
    }

    fn library(&mut self) {
        let config = self.config;
        let images = &config.images;
        let address = images.library.as_deref();
        let right = |address: &str| {
            let plain = address.strip_prefix("http://");
            let rest = address.strip_prefix("https://").or(plain);
            // Names may begin with the host, which must not be read as an entity.
            rest.is_some_and(|rest| {
                let host = rest.split('/').next().unwrap_or_default();
                is_image_prefix(rest) && host.contains(['.', ':'])
            })
        };
        if address.is_some_and(|address| !right(address)) {
            let what = format!(
                "must be like `https://HOST[:PORT][/FOLDER]`, with a dot or a port: {address:?}"
            );
            self.wrong("images.library", what);
        }
        if images.library_token.is_some() && address.is_none() {
            self.wrong("images.library_token", "needs `images.library`");
        }
        self.absolute("images.library_token", &images.library_token);
    }

    fn dial_out(&mut self) {
        let config = self.config;
        let count = config.dial_out.len();
        if count > dial_out::MOST {
            let what = format!("has {count} entries; the limit is {}", dial_out::MOST);
            self.wrong("dial_out", what);
        }
        if count > 0 && config.tls.is_none() {
            let what = "needs [tls]: kubelets are known by their certificates";
            self.wrong("dial_out", what);
        }
        for entry in &config.dial_out {
            for (key, what) in entry.mistakes() {
                self.wrong(&format!("dial_out.{key}"), what);
            }
        }
    }

    fn gres(&mut self) {
        for (resource, gres) in &self.config.gres {
            let word = |text: &str| !text.is_empty() && !text.contains([',', '=', ' ']);
            if !resource.contains('/') || !word(resource) || !word(gres) {
                let what =
                    format!("must be like `\"nvidia.com/gpu\" = \"gpu\"`: {resource:?} = {gres:?}");
                self.wrong("gres", what);
            }
        }
    }

    fn limits(&mut self) {
        let config = self.config;
        let limits = &config.limits;
        let above_0 = [
            (
                "limits.sbatch_rate",
                limits.sbatch_rate.is_finite() && limits.sbatch_rate > 0.0,
            ),
            ("limits.sbatch_burst", limits.sbatch_burst > 0),
            ("limits.sbatch_concurrency", limits.sbatch_concurrency > 0),
            ("limits.image_concurrency", limits.image_concurrency > 0),
            ("limits.image_size", limits.image_size > 0),
            ("limits.image_unpacked", limits.image_unpacked > 0),
            ("limits.image_stall", !limits.image_stall.is_zero()),
            ("images.convert_cpus", config.images.convert_cpus > 0),
            ("images.convert_memory", config.images.convert_memory > 0),
            ("images.convert_time", !config.images.convert_time.is_zero()),
            ("limits.pods", limits.pods != Some(0)),
            ("limits.poll_min", !limits.poll_min.is_zero()),
            ("limits.srun_idle", !limits.srun_idle.is_zero()),
            ("serve.linger", !config.serve.linger.is_zero()),
            ("backoff.initial", !config.backoff.initial.is_zero()),
            ("logs.max_files", config.logs.max_files > 0),
            ("job.time_minutes", config.job.time_minutes != Some(0)),
        ];
        for (key, _) in above_0.iter().filter(|(_, right)| !right) {
            self.wrong(key, "must be above 0");
        }
        if limits.poll_min > limits.poll_max {
            let what = format!("must be at most `poll_max`, {:?}", limits.poll_max);
            self.wrong("limits.poll_min", what);
        }
        if limits.image_cache < limits.image_size {
            let what = format!("must be at least `image_size`, {} bytes", limits.image_size);
            self.wrong("limits.image_cache", what);
        }
        if config.images.convert == Convert::Job && config.scheduler == SchedulerKind::Local {
            self.wrong("images.convert", "`job` needs the scheduler slurm");
        }
        if config.backoff.initial > config.backoff.max {
            let what = format!("must be at most `max`, {:?}", config.backoff.max);
            self.wrong("backoff.initial", what);
        }
        if !(1..=MAX_THREADS).contains(&limits.threads) {
            let what = format!("must be between 1 and {MAX_THREADS}");
            self.wrong("limits.threads", what);
        }
        if limits.srun_links > MAX_SRUN_LINKS {
            let what = format!("must be at most {MAX_SRUN_LINKS}, because each is a process");
            self.wrong("limits.srun_links", what);
        }
        if config.logs.max_bytes < 4096 {
            self.wrong("logs.max_bytes", "must be at least 4096");
        }
        if config.logs.max_pod_bytes < LEAST_POD_LOGS {
            let what = format!("must be at least {LEAST_POD_LOGS} (1 MiB)");
            self.wrong("logs.max_pod_bytes", what);
        }
    }
}
