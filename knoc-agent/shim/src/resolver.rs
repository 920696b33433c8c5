//! PURE: the text of a container's `/etc/resolv.conf`: the settings of the compute node or the cluster, and those of the pod.

use std::{fmt::Write as _, net::Ipv4Addr};

use knoc_proto::pb;

/// The most entries that the C library's resolver uses; a kubelet leaves out any others too.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
/// The longest list of search domains, with the blanks between them, and the longest one of them.
const MAX_SEARCH_BYTES: usize = 2048;
const MAX_DOMAIN: usize = 253;
/// The root as a search domain. It says that there is none: without it the C library takes that of the host name. Beside others it is
/// left out, because names are tried without a domain anyway, and older musl fails on it.
const ROOT: &str = ".";

/// The settings of a `resolv.conf`.
#[derive(Debug, Default)]
struct Config {
    nameservers: Vec<String>,
    searches: Vec<String>,
    /// Each option's name, and `:value` or nothing.
    options: Vec<(String, String)>,
}

impl Config {
    /// As many servers as the file may have.
    fn applied_servers(&self) -> &[String] {
        let most = self.nameservers.len().min(MAX_NAMESERVERS);
        self.nameservers.get(..most).unwrap_or_default()
    }

    /// As many search domains as the file may have.
    fn applied_searches(&self) -> Vec<&str> {
        let first = self.searches.iter().take(MAX_SEARCHES);
        let fit = first.filter(|search| search.len() <= MAX_DOMAIN);
        // The blanks between them count.
        let mut bytes = 0;
        fit.take_while(|search| {
            bytes += search.len() + usize::from(bytes > 0);
            bytes <= MAX_SEARCH_BYTES
        })
        .map(String::as_str)
        .collect()
    }
}

/// The DNS of the cluster, for a pod that asks it first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterDns {
    pub(crate) server: Ipv4Addr,
    /// Of the cluster; empty if it is not known.
    pub(crate) domain: String,
    /// Of the pod.
    pub(crate) namespace: String,
}

impl ClusterDns {
    /// The settings, given those of the compute node: its server is not asked, since the cluster's forwards what it does
    /// not know.
    fn instead_of(&self, node: &Config) -> Config {
        let Self {
            domain, namespace, ..
        } = self;
        let mut searches = if domain.is_empty() {
            Vec::new()
        } else {
            vec![
                format!("{namespace}.svc.{domain}"),
                format!("svc.{domain}"),
                domain.clone(),
            ]
        };
        for search in node.searches.iter().filter(|search| *search != ROOT) {
            add(&mut searches, search);
        }
        Config {
            nameservers: vec![self.server.to_string()],
            searches,
            options: vec![("ndots".to_owned(), ":5".to_owned())],
        }
    }
}

/// The file for a pod with a DNS configuration, as `GetPodDNS` of the kubelet makes it. `node` is the compute node's file.
pub(crate) fn resolv_conf(
    node: &str,
    wanted: &pb::Resolver,
    cluster: Option<&ClusterDns>,
) -> String {
    render(&configured(node, wanted, cluster))
}

/// What the file leaves out, in a kubelet's words. The arguments are those of [`resolv_conf`].
pub(crate) fn left_out(
    node: &str,
    wanted: &pb::Resolver,
    cluster: Option<&ClusterDns>,
) -> Vec<String> {
    let config = configured(node, wanted, cluster);
    let (servers, searches) = (config.applied_servers(), config.applied_searches());
    let mut said = Vec::new();
    if servers.len() < config.nameservers.len() {
        let servers = servers.join(" ");
        said.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {servers}"
        ));
    }
    if searches.len() < config.searches.len() {
        let searches = searches.join(" ");
        said.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {searches}"
        ));
    }
    said
}

/// All settings for the pod, more than the file may have.
fn configured(node: &str, wanted: &pb::Resolver, cluster: Option<&ClusterDns>) -> Config {
    let mut config = match cluster {
        _ if wanted.only_own => Config::default(),
        Some(cluster) => cluster.instead_of(&parse(node)),
        None => parse(node),
    };
    for server in &wanted.nameservers {
        add(&mut config.nameservers, server);
    }
    if !wanted.searches.is_empty() {
        config.searches.retain(|search| search != ROOT);
    }
    for search in &wanted.searches {
        add(&mut config.searches, search);
    }
    for option in &wanted.options {
        let value = option.value.as_deref().filter(|value| !value.is_empty());
        let value = value.map(|value| format!(":{value}"));
        set(&mut config.options, &option.name, value.unwrap_or_default());
    }
    config
}

/// The servers that a `resolv.conf` names.
pub(crate) fn nameservers(text: &str) -> Vec<String> {
    parse(text).nameservers
}

fn add(list: &mut Vec<String>, word: &str) {
    if !list.iter().any(|known| known == word) {
        list.push(word.to_owned());
    }
}

/// Sets an option; a later value replaces an earlier one.
fn set(options: &mut Vec<(String, String)>, name: &str, value: String) {
    match options.iter_mut().find(|(known, _)| known == name) {
        Some((_, old)) => *old = value,
        None => options.push((name.to_owned(), value)),
    }
}

/// Parses a `resolv.conf`. The last `search` line counts, and the last option of each name.
fn parse(text: &str) -> Config {
    let mut config = Config::default();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                if let Some(server) = words.next() {
                    add(&mut config.nameservers, server);
                }
            }
            Some("search" | "domain") => {
                let names = words.map(|name| name.strip_suffix('.').unwrap_or(name));
                let mut is_any = false;
                config.searches.clear();
                for name in names.inspect(|_| is_any = true) {
                    if !name.is_empty() {
                        add(&mut config.searches, name);
                    }
                }
                if is_any && config.searches.is_empty() {
                    config.searches.push(ROOT.to_owned());
                }
            }
            Some("options") => {
                for word in words {
                    let (name, value) = match word.split_once(':') {
                        Some((name, value)) => (name, format!(":{value}")),
                        None => (word, String::new()),
                    };
                    set(&mut config.options, name, value);
                }
            }
            Some(_) | None => {}
        }
    }
    config
}

fn render(config: &Config) -> String {
    let mut text = String::new();
    let searches = config.applied_searches();
    // Writing to a string cannot fail.
    if !searches.is_empty() {
        writeln!(text, "search {}", searches.join(" ")).ok();
    }
    for server in config.applied_servers() {
        writeln!(text, "nameserver {server}").ok();
    }
    let options: Vec<_> = config
        .options
        .iter()
        .map(|(name, value)| format!("{name}{value}"))
        .collect();
    if !options.is_empty() {
        writeln!(text, "options {}", options.join(" ")).ok();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "# of the site\nnameserver 10.0.0.1\nsearch old.example\n search hpc.example. .\n\
        options ndots:1 rotate\nsortlist 1.2.3.4\n";

    fn wanted() -> pb::Resolver {
        let option = |name: &str, value: Option<&str>| pb::ResolverOption {
            name: name.to_owned(),
            value: value.map(str::to_owned),
        };
        pb::Resolver {
            only_own: false,
            nameservers: ["1.1.1.1", "10.0.0.1"].map(str::to_owned).to_vec(),
            searches: ["my.example", "hpc.example"].map(str::to_owned).to_vec(),
            options: vec![option("ndots", Some("5")), option("edns0", None)],
            cluster_first: false,
        }
    }

    fn alone(node: &str, wanted: &pb::Resolver) -> String {
        super::resolv_conf(node, wanted, None)
    }

    #[test]
    fn the_clusters_dns_replaces_the_nodes_servers_and_options_and_keeps_its_domains() {
        let cluster = ClusterDns {
            server: Ipv4Addr::new(10, 96, 0, 10),
            domain: "cluster.local".to_owned(),
            namespace: "ns".to_owned(),
        };
        let mut wanted = pb::Resolver {
            cluster_first: true,
            ..pb::Resolver::default()
        };
        assert!(!wanted.has_own_settings());
        let of =
            |wanted: &pb::Resolver, cluster: &ClusterDns| resolv_conf(NODE, wanted, Some(cluster));
        let searches = "search ns.svc.cluster.local svc.cluster.local cluster.local hpc.example";
        assert_eq!(
            of(&wanted, &cluster),
            format!("{searches}\nnameserver 10.96.0.10\noptions ndots:5\n")
        );
        // What the pod configures follows, and its options win.
        wanted.nameservers = vec!["1.1.1.1".to_owned()];
        wanted.searches = vec!["my.example".to_owned(), "cluster.local".to_owned()];
        wanted.options = vec![pb::ResolverOption {
            name: "ndots".to_owned(),
            value: Some("2".to_owned()),
        }];
        assert!(wanted.has_own_settings());
        assert_eq!(
            of(&wanted, &cluster),
            format!(
                "{searches} my.example\nnameserver 10.96.0.10\nnameserver 1.1.1.1\noptions ndots:2\n"
            )
        );
        let unnamed = ClusterDns {
            domain: String::new(),
            ..cluster
        };
        let text = of(&wanted, &unnamed);
        assert!(
            text.starts_with("search hpc.example my.example cluster.local\n"),
            "{text}"
        );
    }

    #[test]
    fn the_pods_lines_follow_those_of_the_node() {
        assert_eq!(
            alone(NODE, &wanted()),
            "search hpc.example my.example\nnameserver 10.0.0.1\nnameserver 1.1.1.1\noptions ndots:5 rotate edns0\n"
        );
    }

    #[test]
    fn with_the_policy_none_only_the_pods_lines_count() {
        let only_own = pb::Resolver {
            only_own: true,
            ..wanted()
        };
        assert_eq!(
            alone(NODE, &only_own),
            "search my.example hpc.example\nnameserver 1.1.1.1\nnameserver 10.0.0.1\noptions ndots:5 edns0\n"
        );
        assert_eq!(
            alone(
                NODE,
                &pb::Resolver {
                    only_own: true,
                    ..pb::Resolver::default()
                }
            ),
            ""
        );
    }

    #[test]
    fn no_more_is_written_than_the_resolver_reads() {
        let many = pb::Resolver {
            nameservers: (0..9).map(|n| format!("10.1.1.{n}")).collect(),
            searches: (0..40)
                .map(|n| format!("{n}.{}", "x".repeat(100)))
                .collect(),
            ..pb::Resolver::default()
        };
        let text = alone(NODE, &many);
        assert_eq!(text.matches("nameserver ").count(), MAX_NAMESERVERS);
        let search = text.lines().next().unwrap();
        assert!(
            search.len() <= "search ".len() + MAX_SEARCH_BYTES,
            "{search}"
        );
        assert!(search.split(' ').count() > 15, "{search}");
        let said = left_out(NODE, &many, None);
        let [servers, searches] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert!(
            servers.ends_with("the applied nameserver line is: 10.0.0.1 10.1.1.0 10.1.1.1"),
            "{servers}"
        );
        let line = search.strip_prefix("search ").unwrap();
        assert!(searches.ends_with(line), "{searches}");
        let nothing = Vec::<String>::new();
        assert_eq!(left_out(NODE, &wanted(), None), nothing);
    }

    #[test]
    fn search_domains_are_left_out_as_by_a_kubelet() {
        let searches = |searches: Vec<String>| {
            let wanted = pb::Resolver {
                searches,
                ..pb::Resolver::default()
            };
            let text = alone("nameserver 10.0.0.1\nsearch .\n", &wanted);
            let line = text.lines().next().unwrap().to_owned();
            line.strip_prefix("search ").unwrap().to_owned()
        };
        assert_eq!(searches(Vec::new()), ".", "of the node");
        let own = vec![".".to_owned(), "a".to_owned()];
        assert_eq!(searches(own), ". a", "of the pod");
        // 8 domains of 253 bytes and the blanks after them: 16 bytes are left.
        let long = |n: usize| format!("{n}{}", "x".repeat(252));
        let mut full: Vec<_> = (0..8).map(long).collect();
        full.push("y".repeat(16));
        let all = searches(full.clone());
        assert_eq!(all.len(), MAX_SEARCH_BYTES, "{all}");
        full[8].push('y');
        assert_eq!(searches(full).len(), MAX_SEARCH_BYTES - 17);
        let odd = vec!["a".to_owned(), "x".repeat(254), "b".to_owned()];
        assert_eq!(
            searches(odd),
            "a b",
            "one that is too long hides no other one"
        );
        let many: Vec<_> = (0..40).map(|n| format!("d{n}")).collect();
        assert_eq!(searches(many).split(' ').count(), MAX_SEARCHES);
    }
}
