use std::path::Path;

use super::*;

fn yaml(text: &str) -> YamlFile {
    YamlFile::parse(Path::new("kubelet.yaml"), text)
}

fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    let file = yaml(text);
    let environment = Environment::new(
        variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
    );
    Config::load(&[&environment, &file]).map_err(|invalid| invalid.to_string())
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
fn all_mistakes_are_named_at_once_with_line_and_allowed_values() {
    let text = GOOD.replace("queueFactor: 3", "queueFactor: lots\n  colour: blue")
        + "log:\n  format: xml\nextra: 1\n";
    let error = load(&text, &[("KNOC_NODE_NAEM", "x")]).unwrap_err();
    for expected in [
        "$KNOC_NODE_NAEM: unknown variable; known: KNOC_AGENT_ADDRESS, ",
        "kubelet.yaml:13: unknown key `node.colour`; known here: internalIP, labels, name, pods, queueFactor, taint",
        "kubelet.yaml:18: unknown key `extra`; known here: agent, identity, keys, kubernetes, log, node, server",
        "kubelet.yaml:17: log.format: `xml` is not one of: text, json",
        "kubelet.yaml:12: node.queueFactor: `lots` is not a number from 1 to 10000",
    ] {
        assert!(error.contains(expected), "{expected}\nis not in\n{error}");
    }
    assert_eq!(error.lines().count(), 5, "{error}");
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
            "`acme` is not one of: self-signed, csr, files",
        ),
        (
            &[("KNOC_SERVER_CERTIFICATE", "files")],
            "server.cert and server.key is missing: server.certificate is `files`",
        ),
        (&[("KNOC_SERVER_CERT", "/c")], "both or neither"),
        (
            &[
                ("KNOC_SERVER_CERTIFICATE", "csr"),
                ("KNOC_SERVER_CERT", "/c"),
                ("KNOC_SERVER_KEY", "/k"),
            ],
            "`csr` is not `files`",
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
