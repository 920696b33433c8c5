use std::path::Path;

use super::{settings::CertificateSource, *};

fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    let variables = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let file = Some((Path::new("kubelet.yaml"), text));
    Config::load(file, variables).map_err(|mistakes| mistakes.to_string())
}

const GOOD: &str = "\
# comment
agent:
  address: login:10350
  ca: /ca
  cert: /cert
  key: /key
  site: trixie
node:
  labels:
    a: b
    zone: hpc
  queueFactor: 3
server:
  listen: :10255
";

#[test]
fn a_good_file_with_its_defaults() {
    let config = load(GOOD, &[]).unwrap();
    assert_eq!(config.node.name, "knoc-trixie");
    assert_eq!(config.node.queue_factor, 3);
    assert_eq!(config.node.pods, 1000);
    assert_eq!(config.node.labels["zone"], "hpc");
    assert_eq!(config.server.listen.to_string(), "0.0.0.0:10255");
    assert!(config.node.taint);
}

#[test]
fn the_environment_goes_before_the_file() {
    let config = load(
        GOOD,
        &[
            ("KNOC_NODE_NAME", "other"),
            ("KNOC_KUBELET_SERVICE_HOST", "1"),
        ],
    )
    .unwrap();
    assert_eq!(config.node.name, "other");
}

#[test]
fn the_environment_alone_is_enough() {
    let config = load(
        "",
        &[
            ("KNOC_AGENT_ADDRESS", "unix:/run/agent.sock"),
            ("KNOC_NODE_NAME", "n"),
        ],
    )
    .unwrap();
    assert!(config.agent.credentials.is_none());
}

#[test]
fn which_side_dials_and_through_which_proxy() {
    let way = |variables: &[(&str, &str)]| load(GOOD, variables).unwrap().agent.way;
    let AgentWay::Dial(route, Via::Environment) = way(&[]) else {
        panic!("the kubelet should dial, with the proxy of its environment");
    };
    assert!(matches!(route.carriers(), [Carrier::Tcp(_)]));
    assert!(matches!(
        way(&[("KNOC_AGENT_PROXY", "none")]),
        AgentWay::Dial(_, Via::Direct)
    ));
    assert!(matches!(
        way(&[
            ("KNOC_AGENT_PROXY", "http://p:3128"),
            ("KNOC_AGENT_PROXY_CREDENTIALS", "/p")
        ]),
        AgentWay::Dial(_, Via::Proxy(_))
    ));
    for (address, listen) in [
        ("accept", "0.0.0.0:10350"),
        ("accept:127.0.0.1:443", "127.0.0.1:443"),
        ("accept:[::]:443", "[::]:443"),
    ] {
        let listen = AgentWay::Accept(listen.parse().unwrap());
        assert_eq!(way(&[("KNOC_AGENT_ADDRESS", address)]), listen, "{address}");
    }
    let named = way(&[("KNOC_AGENT_ADDRESS", "acceptance.example.org:10350")]);
    assert!(matches!(named, AgentWay::Dial(..)), "{named:?}");
}

#[test]
fn what_contradicts_the_way_to_the_agent_is_named() {
    for (variables, expected) in [
        (
            &[
                ("KNOC_AGENT_ADDRESS", "accept"),
                ("KNOC_AGENT_SSH_FOLDER", "/ssh"),
            ][..],
            "agent.sshFolder: belongs to an `ssh:` address, and there is none",
        ),
        (
            &[("KNOC_AGENT_ADDRESS", "accept:443")],
            "agent.address: `accept:443` is not `accept`, or like `accept:0.0.0.0:10350`",
        ),
        (
            &[
                ("KNOC_AGENT_ADDRESS", "accept"),
                ("KNOC_AGENT_PROXY", "p:1"),
            ],
            "agent.proxy: is of no use with `agent.address: accept`",
        ),
        (
            &[("KNOC_AGENT_PROXY", "socks5://p:1")],
            "agent.proxy: begins with socks5://, and only http:// proxies are supported",
        ),
        (
            &[
                ("KNOC_NODE_POD_IP", "own"),
                ("KNOC_NODE_POD_RANGE", "10.200.0.0"),
            ],
            "node.podRange: \"10.200.0.0\" is not a range of IPv4 addresses for pods such as `10.200.0.0/16`",
        ),
        (
            &[("KNOC_NODE_POD_RANGE", "10.200.0.0/16")],
            "node.podRange: is of use with `node.podIP: own` only",
        ),
        (
            &[("KNOC_NODE_POD_LISTENERS", "true")],
            "node.podListeners: needs `node.podIP: own`",
        ),
        (
            &[("KNOC_AGENT_PROXY_CREDENTIALS", "/p")],
            "agent.proxyCredentials: belongs to a proxy, and `proxy` names none",
        ),
        (
            &[
                ("KNOC_AGENT_ADDRESS", "unix:/a"),
                ("KNOC_AGENT_PROXY", "p:1"),
            ],
            "agent.proxy: does not lead to any address of agent.address",
        ),
    ] {
        let error = load(GOOD, variables).unwrap_err();
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    let text = GOOD.replace("  site: trixie\n", "");
    let text = text.replace("node:\n", "node:\n  name: n\n");
    let error = load(&text, &[("KNOC_AGENT_ADDRESS", "accept")]).unwrap_err();
    assert!(error.contains("agent.site: is missing"), "{error}");
}

#[test]
fn all_mistakes_are_named_at_once_with_line_and_allowed_values() {
    let text = GOOD.replace("queueFactor: 3", "queueFactor: lots\n  colour: blue")
        + "log:\n  format: xml\nextra: 1\n";
    let error = load(&text, &[("KNOC_NODE_NAEM", "x")]).unwrap_err();
    for expected in [
        "$KNOC_NODE_NAEM: unknown variable; known: KNOC_AGENT_ADDRESS, ",
        "; did you mean KNOC_NODE_NAME?",
        "kubelet.yaml:13: node.colour: unknown field `colour`, expected one of `name`, `internalIP`, `labels`, `pods`, `queueFactor`, `taint`, `clusterDomain`, `podIP`, `podRange`, `podListeners`",
        "kubelet.yaml:18: extra: unknown field `extra`, expected one of `agent`, `egress`, `identity`, `keys`, `kubernetes`, `log`, `node`, `relay`, `server`",
        "kubelet.yaml:17: log.format: unknown variant `xml`, expected `text` or `json`",
        "kubelet.yaml:12: node.queueFactor: invalid type: string \"lots\", expected a number from 1 to 10000",
    ] {
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    assert_eq!(error.lines().count(), 5, "{error}");
}

#[test]
fn every_kind_of_wrong_value_is_reported_with_the_allowed_ones() {
    for (variable, value, expected) in [
        (
            "KNOC_NODE_PODS",
            "0",
            "integer `0`, expected a number from 1 to 100000",
        ),
        (
            "KNOC_NODE_PODS",
            "-5",
            "\"-5\", expected a number from 1 to 100000",
        ),
        (
            "KNOC_NODE_TAINT",
            "maybe",
            "`maybe`, expected `true` or `false`",
        ),
        (
            "KNOC_NODE_INTERNAL_IP",
            "here",
            "`here` is not an IP address",
        ),
        (
            "KNOC_SERVER_LISTEN",
            "10250",
            "`10250` is not an IP address and a port",
        ),
        (
            "KNOC_NODE_LABELS",
            "a,b=c,d",
            "`a` is not `key=value`; `d` is not `key=value`",
        ),
        (
            "KNOC_AGENT_SITE",
            "My_Site",
            "is not a DNS label of at most 58 characters",
        ),
    ] {
        let error = load(GOOD, &[(variable, value)]).unwrap_err();
        assert!(error.starts_with(&format!("${variable}: ")), "{error}");
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    let error = load(
        &GOOD.replace("address: login:10350", "address: {a: b}"),
        &[],
    )
    .unwrap_err();
    let expected = "kubelet.yaml:3: agent.address: invalid type: map, expected an address or a list of addresses";
    assert_eq!(error, expected);
}

#[test]
fn an_empty_value_counts_as_not_given_wherever_it_stands() {
    let text = GOOD.replace("  site: trixie", "  site:\nkeys:\nlog:\n  level: ''");
    let config = load(&text, &[("KNOC_NODE_NAME", "n")]).unwrap();
    assert_eq!(config.agent.site, None);
    assert_eq!(config.log.level, "info");
    // An empty variable resets what the file sets.
    let config = load(GOOD, &[("KNOC_NODE_QUEUE_FACTOR", "")]).unwrap();
    assert_eq!(config.node.queue_factor, 10);
}

#[test]
fn configz_shows_what_is_in_effect() {
    let shown = load(GOOD, &[]).unwrap().effective;
    assert_eq!(shown["node"]["name"], "knoc-trixie");
    assert_eq!(shown["node"]["queueFactor"], 3);
    assert_eq!(shown["node"]["labels"]["zone"], "hpc");
    assert_eq!(shown["keys"]["secret"], "knoc-kubelet-knoc-trixie-keys");
    assert_eq!(shown["server"]["listen"], "0.0.0.0:10255");
    assert_eq!(shown["kubernetes"]["kubeconfig"], serde_json::Value::Null);
}

/// The row that this setting must have in the guide's table, up to its description; None if its default is computed.
fn row(key: &str, default: &serde_json::Value) -> String {
    let variable = knoc_proto::settings::variable(PREFIX, key);
    let default = if default.is_null() {
        return format!("| `{key}` | `{variable}` | ");
    } else if let Some(text) = default.as_str() {
        format!("`{text}`")
    } else if default.is_object() {
        String::new()
    } else {
        format!("`{default}`")
    };
    format!("| `{key}` | `{variable}` | {default} | ").replace("|  |", "| |")
}

#[test]
fn the_guide_has_every_setting_with_its_default() {
    let guide = include_str!("../../../docs/guide/configuration.md");
    let defaults = Settings::default().to_json();
    let keys = Settings::keys();
    for key in &keys {
        let pointer = format!("/{}", key.replace('.', "/"));
        let row = row(key, defaults.pointer(&pointer).unwrap());
        let found = guide.lines().find(|line| line.starts_with(&row));
        let found = found.unwrap_or_else(|| panic!("the guide has no row {row}"));
        let mut cells = found.trim_matches('|').split('|').map(str::trim);
        assert!(
            cells.next_back().is_some_and(|help| help.len() > 10),
            "{found}"
        );
    }
    let rows = guide
        .lines()
        .filter(|line| line.contains("| `KNOC_"))
        .count();
    assert_eq!(
        rows,
        keys.len(),
        "the guide has a row that is not a setting"
    );
}

#[test]
fn the_charts_values_are_the_defaults() {
    let values = include_str!("../../../deploy/chart/knoc/values.yaml");
    let values: serde_json::Value = serde_saphyr::from_str(values).unwrap();
    let schema = include_str!("../../../deploy/chart/knoc/values.schema.json");
    let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
    let defaults = Settings::default().to_json();
    for key in [
        "egress.allow",
        "egress.serviceRanges",
        "egress.podRanges",
        "relay.allow",
        "relay.ports",
        "node.pods",
        "node.queueFactor",
        "node.taint",
        "node.clusterDomain",
        "node.podIP",
        "node.podListeners",
        "server.websockets",
        "identity.kind",
        "log.level",
        "log.format",
    ] {
        let pointer = format!("/{}", key.replace('.', "/"));
        assert_eq!(
            values.pointer(&pointer),
            defaults.pointer(&pointer),
            "{key}"
        );
    }
    assert_eq!(
        values["server"]["port"],
        Settings::default().server.listen.port()
    );
    assert_eq!(
        values["server"]["certificate"],
        CertificateSource::SelfSigned.name()
    );
    for (key, most) in [
        ("pods", settings::MOST_PODS),
        ("queueFactor", settings::MOST_QUEUE_FACTOR),
    ] {
        let bounds = &schema["properties"]["node"]["properties"][key];
        assert_eq!(
            (&bounds["minimum"], &bounds["maximum"]),
            (&1.into(), &most.into()),
            "{key}"
        );
    }
}

#[test]
fn the_kubelet_listens_for_pods_only_if_it_is_told_to() {
    assert!(!load(GOOD, &[]).unwrap().node.pod_listeners);
    let own = ("KNOC_NODE_POD_IP", "own");
    assert!(!load(GOOD, &[own]).unwrap().node.pod_listeners);
    let on = ("KNOC_NODE_POD_LISTENERS", "true");
    assert!(load(GOOD, &[own, on]).unwrap().node.pod_listeners);
    // Kubernetes publishes these addresses itself, so there is no relay beside it.
    let relayed = load(GOOD, &[own, on, ("KNOC_RELAY_ALLOW", "team/*")]);
    let error = relayed.unwrap_err();
    assert!(
        error.contains("relay.allow: needs `node.podIP: none`"),
        "{error}"
    );
}

#[test]
fn what_is_relayed_and_what_contradicts_it() {
    assert_eq!(load(GOOD, &[]).unwrap().relay, None, "it is off by default");
    // The kubelet still deletes the slices that it has written.
    let nothing = load(&format!("{GOOD}relay:\n  allow: []\n"), &[]).unwrap();
    assert!(!nothing.relay.unwrap().allow.permits("team", "a"));
    let on = ("KNOC_RELAY_ALLOW", "team/*,other/web");
    let relay = load(GOOD, &[on, ("KNOC_RELAY_ADDRESS", "10.0.0.7")]).unwrap();
    let relay = relay.relay.unwrap();
    assert!(relay.allow.permits("team", "a") && !relay.allow.permits("other", "a"));
    assert_eq!(relay.ports, 11_000..=12_023);
    assert_eq!(relay.address, Some("10.0.0.7".parse().unwrap()));
    assert_eq!(relay.listen.to_string(), "0.0.0.0");
    for (variable, expected) in [
        (
            ("KNOC_NODE_POD_IP", "node"),
            "relay.allow: needs `node.podIP: none`",
        ),
        (
            ("KNOC_NODE_POD_IP", "own"),
            "relay.allow: needs `node.podIP: none`",
        ),
        (
            ("KNOC_RELAY_PORTS", "11000"),
            "`11000` is not a range of ports",
        ),
        (
            ("KNOC_RELAY_PORTS", "12000-11000"),
            "is not a range of ports",
        ),
        (("KNOC_RELAY_PORTS", "80-90"), "from 1024 on"),
        (("KNOC_RELAY_PORTS", "20000-60000"), "at most 4096 ports"),
        (
            ("KNOC_RELAY_PORTS", "10000-10300"),
            "contains port 10255, on which the kubelet listens already (server.listen)",
        ),
        (
            ("KNOC_RELAY_ADDRESS", "0.0.0.0"),
            "`0.0.0.0` cannot be the address of an endpoint",
        ),
        (
            ("KNOC_RELAY_ADDRESS", "fe80::1"),
            "`fe80::1` cannot be the address of an endpoint",
        ),
        (
            ("KNOC_RELAY_ADDRESS", "fd00::7"),
            "`fd00::7` is an IPv6 address, and the kubelet listens on IPv4 only",
        ),
        (("KNOC_RELAY_ALLOW", "Team"), "is not `NAMESPACE/SERVICE`"),
    ] {
        let error = load(GOOD, &[on, variable]).unwrap_err();
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    let accepts = [
        on,
        ("KNOC_AGENT_ADDRESS", "accept"),
        ("KNOC_RELAY_PORTS", "10300-10400"),
    ];
    let error = load(GOOD, &accepts).unwrap_err();
    assert!(error.contains("contains port 10350"), "{error}");
}

#[test]
fn bad_yaml_is_named_with_its_line() {
    let error = load("agent:\n  address: [unclosed\n", &[]).unwrap_err();
    assert!(error.contains("kubelet.yaml:"), "{error}");
}

#[test]
fn missing_files_are_named() {
    let error = load("agent:\n  address: h:1\nnode:\n  name: n\n", &[]).unwrap_err();
    assert!(
        error.contains("agent.ca, agent.cert and agent.key"),
        "{error}"
    );
}

#[test]
fn certificates_have_one_source_and_a_default_without_manual_steps() {
    let config = load(GOOD, &[]).unwrap();
    assert_eq!(config.server.serving, ServingConfig::SelfSigned);
    assert_eq!(config.identity, IdentityConfig::ServiceAccount);
    let secret = KeysConfig::Secret("knoc-kubelet-knoc-trixie-keys".to_owned());
    assert_eq!(config.keys, secret);
    let files = [("KNOC_SERVER_CERT", "/c"), ("KNOC_SERVER_KEY", "/k")];
    let pair = ServingConfig::Files("/c".into(), "/k".into());
    assert_eq!(load(GOOD, &files).unwrap().server.serving, pair);
    let csr = [
        ("KNOC_SERVER_CERTIFICATE", "csr"),
        ("KNOC_IDENTITY_KIND", "node"),
        ("KNOC_IDENTITY_BOOTSTRAP_KUBECONFIG", "/b"),
        ("KNOC_KEYS_FOLDER", "/f"),
    ];
    let config = load(GOOD, &csr).unwrap();
    assert_eq!(config.server.serving, ServingConfig::Csr);
    let bootstrap = Some("/b".into());
    assert_eq!(config.identity, IdentityConfig::Node { bootstrap });
    assert_eq!(config.keys, KeysConfig::Folder("/f".into()));
}

#[test]
fn sources_that_contradict_each_other_are_named() {
    let cases: [(&[(&str, &str)], &str); 6] = [
        (
            &[("KNOC_SERVER_CERTIFICATE", "acme")],
            "unknown variant `acme`, expected one of `self-signed`, `csr`, `files`",
        ),
        (
            &[("KNOC_SERVER_CERTIFICATE", "files")],
            "server.certificate: is `files`, but server.cert and server.key are missing",
        ),
        (
            &[("KNOC_SERVER_CERT", "/c")],
            "set both server.cert and server.key, or neither",
        ),
        (
            &[
                ("KNOC_SERVER_CERTIFICATE", "csr"),
                ("KNOC_SERVER_CERT", "/c"),
                ("KNOC_SERVER_KEY", "/k"),
            ],
            "server.certificate: is `csr`, but server.cert and server.key need `files`",
        ),
        (
            &[("KNOC_IDENTITY_BOOTSTRAP_KUBECONFIG", "/b")],
            "unless identity.kind is `node`",
        ),
        (
            &[("KNOC_KEYS_FOLDER", "/f"), ("KNOC_KEYS_SECRET", "s")],
            "together with keys.secret",
        ),
    ];
    for (variables, expected) in cases {
        let error = load(GOOD, variables).unwrap_err();
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn names_that_the_api_server_would_refuse_are_named() {
    let long = "n".repeat(63);
    let longer = "n".repeat(64);
    for good in ["n", "1.2-3", &long] {
        let config = load(GOOD, &[("KNOC_NODE_NAME", good)]).unwrap();
        assert_eq!(config.node.name, good);
    }
    for bad in ["N", "a_b", "a.", "a..b", "-a", "a/b", &longer] {
        let error = load(GOOD, &[("KNOC_NODE_NAME", bad)]).unwrap_err();
        assert!(
            error.contains(&format!("node.name: `{bad}` is not a node's name")),
            "{error}"
        );
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for (labels, expected) in [
        (
            "a b=c",
            "node.labels: the key `a b`: the name must consist of",
        ),
        (
            "a=b c",
            "node.labels: the value `b c` of a: a valid label must be",
        ),
        ("e/=c", "node.labels: the key `e/`: must not be empty"),
    ] {
        let error = load(GOOD, &[("KNOC_NODE_LABELS", labels)]).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let labels = [("KNOC_NODE_LABELS", "example.com/a=,b=C.d_e")];
    assert_eq!(load(GOOD, &labels).unwrap().node.labels.len(), 2);
}

#[test]
fn what_pods_reach_is_a_list_or_off() {
    let egress = |value: &str| load(GOOD, &[("KNOC_EGRESS_ALLOW", value)]).unwrap().egress;
    let default = load(GOOD, &[]).unwrap().egress.unwrap();
    assert!(default.allow.names("default", "kubernetes"));
    assert!(default.allow.names("kube-system", "kube-dns"));
    assert!(!default.allow.permits("default", "redis"));
    assert_eq!(egress("off"), None);
    let listed = egress("default/kubernetes, team-*/*").unwrap().allow;
    assert!(listed.permits("team-a", "redis") && !listed.permits("kube-system", "kube-dns"));
    let none = load(&format!("{GOOD}egress: {{allow: []}}\n"), &[]).unwrap();
    assert!(!none.egress.unwrap().allow.permits("default", "kubernetes"));
    for off in ["off", "false"] {
        let text = format!("{GOOD}egress: {{allow: {off}}}\n");
        assert_eq!(load(&text, &[]).unwrap().egress, None, "{off}");
    }
    let text = format!(
        "{GOOD}egress:\n  allow: [a/b]\n  serviceRanges: [10.96.0.0/12]\n  dns: 10.96.0.10\n"
    );
    let config = load(&text, &[]).unwrap();
    let egress = config.egress.unwrap();
    assert!(egress.allow.names("a", "b") && egress.dns.is_some());
    assert_eq!(egress.service_ranges.len(), 1);
    assert_eq!(
        config.effective["egress"]["allow"],
        serde_json::json!(["a/b"])
    );
}

#[test]
fn what_pods_cannot_reach_is_named() {
    for (variable, value, expected) in [
        (
            "KNOC_EGRESS_ALLOW",
            "kubernetes",
            "egress.allow: \"kubernetes\" is not `NAMESPACE/SERVICE`",
        ),
        (
            "KNOC_EGRESS_SERVICE_RANGES",
            "10.96.0.0",
            "egress.serviceRanges: \"10.96.0.0\" is not a range",
        ),
        (
            "KNOC_EGRESS_POD_RANGES",
            "0.0.0.0/0",
            "egress.podRanges: \"0.0.0.0/0\" is not a range",
        ),
        (
            "KNOC_EGRESS_DNS",
            "dns",
            "egress.dns: `dns` is not an IP address",
        ),
    ] {
        let error = load(GOOD, &[(variable, value)]).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
