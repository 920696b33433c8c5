//! PURE: the host names of a pod, and the bounds of its host ports, its DNS configuration and the range of its address.

use std::net::IpAddr;

use crate::{egress::is_port, mesh::PodRange, names, pb, text::quote};

use super::{SHOWN, check};

/// The longest host name that Linux accepts, in bytes (sethostname(2)).
pub const MAX_HOSTNAME: usize = 64;
/// The most name servers that the C library's resolver uses (`MAXNS`); the API server accepts no more.
const MAX_NAMESERVERS: usize = 3;
/// The most search domains that the API server accepts.
const MAX_SEARCHES: usize = 32;
/// A bound of our own, larger than any pod needs.
const MAX_OPTIONS: usize = 64;

/// The most host ports of a pod.
const MAX_HOST_PORTS: usize = 64;

/// The cluster domain if the kubelet sends none.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// The host names of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hostname {
    /// The name without the domain.
    pub short: String,
    /// The name with the domain; `None` if the pod has no domain.
    pub qualified: Option<String>,
    /// The name that the kernel reports in a container: one of the two.
    pub kernel: String,
}

impl Hostname {
    /// The host names of a pod, by the rules of `GeneratePodHostNameAndDomain` and `GetNodenameForKernel` of the kubelet.
    #[must_use]
    pub fn of(spec: &pb::PodSpec) -> Self {
        let short = if spec.hostname.is_empty() {
            names::host_name(&spec.name)
        } else {
            &spec.hostname
        };
        let domain = match spec.cluster_domain.as_str() {
            "" => CLUSTER_DOMAIN,
            domain => domain,
        };
        let (subdomain, namespace) = (&spec.subdomain, &spec.namespace);
        let qualified = (!subdomain.is_empty())
            .then(|| format!("{short}.{subdomain}.{namespace}.svc.{domain}"));
        let kernel = match &qualified {
            Some(qualified) if spec.set_hostname_as_fqdn => qualified.clone(),
            Some(_) | None => short.to_owned(),
        };
        Self {
            short: short.to_owned(),
            qualified,
            kernel,
        }
    }
}

impl pb::Resolver {
    /// Whether the pod has DNS settings of its own, whether or not it asks the cluster's DNS first.
    #[must_use]
    pub fn has_own_settings(&self) -> bool {
        let nothing = Self {
            cluster_first: self.cluster_first,
            ..Self::default()
        };
        *self != nothing
    }
}

/// Checks host name, host ports and DNS configuration; adds what is wrong with them to `problems`.
pub(super) fn check_network(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    let Hostname { kernel, .. } = Hostname::of(spec);
    if kernel.len() > MAX_HOSTNAME && !spec.node_hostname {
        problems.push(format!(
            "setHostnameAsFQDN: the host name {} is too long ({MAX_HOSTNAME} characters is the max, {} characters requested)",
            quote(&kernel, SHOWN),
            kernel.len()
        ));
    }
    check_host_ports(spec, problems);
    if let Some(resolver) = &spec.resolver {
        check_resolver(resolver, problems);
    }
    if !spec.pod_range.is_empty()
        && let Err(why) = spec.pod_range.parse::<PodRange>()
    {
        problems.push(format!("the range of the node's pods: {why}"));
    }
}

fn check_host_ports(spec: &pb::PodSpec, problems: &mut Vec<String>) {
    let containers = spec.init_containers.iter().chain(&spec.containers);
    let all: Vec<_> = containers.flat_map(|one| &one.host_ports).collect();
    if all.len() > MAX_HOST_PORTS {
        problems.push(format!(
            "ports: {} host ports; the limit is {MAX_HOST_PORTS}",
            all.len()
        ));
    }
    for port in all.into_iter().take(MAX_HOST_PORTS) {
        if !is_port(port.host_port) || !is_port(port.container_port) {
            problems.push(format!(
                "ports: hostPort {} and containerPort {} must be from 1 to 65535",
                port.host_port, port.container_port
            ));
        }
        if !port.host_ip.is_empty() && port.host_ip.parse::<IpAddr>().is_err() {
            problems.push(format!(
                "ports: hostIP {} is not an IP address",
                quote(&port.host_ip, SHOWN)
            ));
        }
    }
}

fn check_resolver(resolver: &pb::Resolver, problems: &mut Vec<String>) {
    for (what, count, most) in [
        ("nameservers", resolver.nameservers.len(), MAX_NAMESERVERS),
        ("searches", resolver.searches.len(), MAX_SEARCHES),
        ("options", resolver.options.len(), MAX_OPTIONS),
    ] {
        if count > most {
            problems.push(format!(
                "dnsConfig has {count} {what}, and at most {most} are possible"
            ));
        }
    }
    for server in &resolver.nameservers {
        check(
            "nameserver of dnsConfig",
            server,
            names::ip_address(server),
            problems,
        );
    }
    for search in &resolver.searches {
        // As in the API server, `.` is the root, and an underscore is allowed wherever a letter is.
        let name = search.strip_suffix('.').unwrap_or(search).replace('_', "x");
        if search != "." {
            check(
                "search domain of dnsConfig",
                search,
                names::dns_subdomain(&name),
                problems,
            );
        }
    }
    for option in &resolver.options {
        for word in [Some(&option.name), option.value.as_ref()]
            .into_iter()
            .flatten()
        {
            let broken = word.chars().any(|c| c.is_whitespace() || c.is_control());
            if broken || (word.is_empty() && *word == option.name) {
                problems.push(format!(
                    "the option {} of dnsConfig must be one word",
                    quote(word, SHOWN)
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ports_are_ports_and_few() {
        let of = |ports: Vec<(u32, u32, &str)>| {
            let host_ports = ports.into_iter().map(|(host_port, container_port, ip)| {
                let host_ip = ip.to_owned();
                pb::HostPort {
                    host_port,
                    container_port,
                    host_ip,
                    udp: false,
                }
            });
            let container = pb::Container {
                host_ports: host_ports.collect(),
                ..pb::Container::default()
            };
            let spec = pb::PodSpec {
                containers: vec![container],
                ..pb::PodSpec::default()
            };
            let mut problems = Vec::new();
            check_host_ports(&spec, &mut problems);
            problems
        };
        assert!(of(vec![(1, 65_535, ""), (8080, 80, "127.0.0.1")]).is_empty());
        assert_eq!(
            of(vec![(0, 80, ""), (80, 65_536, ""), (80, 80, "here")]).len(),
            3
        );
        assert_eq!(of(vec![(8080, 80, ""); 65]).len(), 1);
    }

    fn spec(change: impl FnOnce(&mut pb::PodSpec)) -> pb::PodSpec {
        let mut spec = pb::PodSpec {
            name: "web-0".to_owned(),
            namespace: "shop".to_owned(),
            ..pb::PodSpec::default()
        };
        change(&mut spec);
        spec
    }

    fn problems(spec: &pb::PodSpec) -> Vec<String> {
        let mut problems = Vec::new();
        check_network(spec, &mut problems);
        problems
    }

    #[test]
    fn the_range_of_the_pods_is_checked() {
        let of = |range: &str| problems(&spec(|spec| spec.pod_range = range.to_owned()));
        assert!(of("").is_empty() && of("10.200.0.0/16").is_empty());
        let said = of("127.0.0.0/8").join("; ");
        assert!(
            said.contains("range of the node's pods") && said.contains("no host"),
            "{said}"
        );
    }

    #[test]
    fn a_pod_with_a_subdomain_has_a_qualified_name() {
        let names = |change: fn(&mut pb::PodSpec)| {
            let Hostname {
                short,
                qualified,
                kernel,
            } = Hostname::of(&spec(change));
            format!("{short} {} {kernel}", qualified.unwrap_or_default())
        };
        assert_eq!(names(|_| {}), "web-0  web-0");
        assert_eq!(names(|spec| spec.hostname = "a".into()), "a  a");
        assert_eq!(
            names(|spec| spec.subdomain = "web".into()),
            "web-0 web-0.web.shop.svc.cluster.local web-0"
        );
        assert_eq!(
            names(|spec| {
                spec.hostname = "a".into();
                spec.subdomain = "web".into();
                spec.cluster_domain = "k8s.example".into();
                spec.set_hostname_as_fqdn = true;
            }),
            "a a.web.shop.svc.k8s.example a.web.shop.svc.k8s.example"
        );
        // Without a subdomain there is no domain.
        assert_eq!(
            names(|spec| spec.set_hostname_as_fqdn = true),
            "web-0  web-0"
        );
    }

    #[test]
    fn a_host_name_that_linux_does_not_take_is_refused() {
        let long = |as_fqdn| {
            spec(|spec| {
                spec.hostname = "h".repeat(63);
                spec.subdomain = "web".into();
                spec.set_hostname_as_fqdn = as_fqdn;
            })
        };
        assert!(problems(&long(false)).is_empty());
        let said = problems(&long(true)).join("; ");
        assert!(
            said.contains("64 characters is the max, 90 characters"),
            "{said}"
        );
        // A pod with the name of the node has none of its own.
        let mut of_node = long(true);
        of_node.node_hostname = true;
        assert!(problems(&of_node).is_empty());
    }

    type Change = fn(&mut pb::Resolver);

    #[test]
    fn nothing_but_words_reaches_the_resolver() {
        let with = |change: fn(&mut pb::Resolver)| {
            let mut resolver = pb::Resolver {
                nameservers: vec!["10.1.2.3".to_owned(), "2001:db8::1".to_owned()],
                searches: vec![".".to_owned(), "a.example.".to_owned(), "_tcp.b".to_owned()],
                options: vec![pb::ResolverOption {
                    name: "ndots".to_owned(),
                    value: Some("2".to_owned()),
                }],
                ..pb::Resolver::default()
            };
            change(&mut resolver);
            problems(&spec(|spec| spec.resolver = Some(resolver)))
        };
        assert_eq!(with(|_| {}), Vec::<String>::new());
        let bad: [(Change, &str); 6] = [
            (|it| it.nameservers[0] = "dns.example".into(), "nameserver"),
            (
                |it| it.nameservers.extend(["1.1.1.1".into(), "1.1.1.2".into()]),
                "at most 3",
            ),
            (|it| it.searches[0] = "a b".into(), "search domain"),
            (
                |it| it.searches[0] = "a\nnameserver 6.6.6.6".into(),
                "search domain",
            ),
            (|it| it.options[0].name = String::new(), "one word"),
            (
                |it| it.options[0].value = Some("2\nsearch x".into()),
                "one word",
            ),
        ];
        for (change, words) in bad {
            let said = with(change).join("; ");
            assert!(said.contains(words), "{words}: {said}");
        }
    }
}
