//! Every setting with its name, default and help: one table for reading, errors and documentation.

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// The path in the YAML file.
    pub key: &'static str,
    /// The environment variable.
    pub variable: &'static str,
    /// The default, in words where it is computed; empty where there is none.
    pub default: &'static str,
    /// What it is and which values it takes.
    pub help: &'static str,
}

const fn setting(
    key: &'static str,
    variable: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting {
        key,
        variable,
        default,
        help,
    }
}

/// Every setting there is.
pub const SETTINGS: &[Setting] = &[
    setting(
        "agent.address",
        "KNOC_AGENT_ADDRESS",
        "",
        "the agent: `host:port`, `tcp:host:port` or `unix:/path`",
    ),
    setting(
        "agent.ca",
        "KNOC_AGENT_CA",
        "",
        "PEM file: the CA of the link's certificates",
    ),
    setting(
        "agent.cert",
        "KNOC_AGENT_CERT",
        "",
        "PEM file: our certificate on the link",
    ),
    setting("agent.key", "KNOC_AGENT_KEY", "", "PEM file: its key"),
    setting(
        "agent.site",
        "KNOC_AGENT_SITE",
        "",
        "the agent's site name: its certificate must say `spiffe://knoc/agent/<site>`",
    ),
    setting(
        "identity.bootstrapKubeconfig",
        "KNOC_IDENTITY_BOOTSTRAP_KUBECONFIG",
        "the ServiceAccount asks",
        "path of a kubeconfig, such as one with a bootstrap token, that asks for the node's first client certificate",
    ),
    setting(
        "identity.kind",
        "KNOC_IDENTITY_KIND",
        "serviceaccount",
        "`serviceaccount` or `node`: as whom the kubelet speaks to the API server; `node` is system:node:NAME by a client certificate",
    ),
    setting(
        "keys.folder",
        "KNOC_KEYS_FOLDER",
        "none: the Secret",
        "folder for the kubelet's own keys and certificates, instead of the Secret",
    ),
    setting(
        "keys.secret",
        "KNOC_KEYS_SECRET",
        "knoc-kubelet-<node>-keys",
        "Secret in kubernetes.namespace for the kubelet's own keys and certificates",
    ),
    setting(
        "kubernetes.kubeconfig",
        "KNOC_KUBERNETES_KUBECONFIG",
        "in-cluster, else $KUBECONFIG",
        "path of a kubeconfig",
    ),
    setting(
        "kubernetes.namespace",
        "KNOC_KUBERNETES_NAMESPACE",
        "the pod's own, else default",
        "namespace of the leadership Lease",
    ),
    setting(
        "kubernetes.identity",
        "KNOC_KUBERNETES_IDENTITY",
        "the host name",
        "holder of the leadership Lease",
    ),
    setting("log.format", "KNOC_LOG_FORMAT", "text", "`text` or `json`"),
    setting(
        "log.level",
        "KNOC_LOG_LEVEL",
        "info",
        "a tracing filter, such as `info` or `knoc_kubelet=debug,info`",
    ),
    setting(
        "node.internalIP",
        "KNOC_NODE_INTERNAL_IP",
        "the address towards the API server",
        "where the API server reaches our port",
    ),
    setting(
        "node.labels",
        "KNOC_NODE_LABELS",
        "",
        "further labels: a map, or `a=b,c=d`",
    ),
    setting(
        "node.name",
        "KNOC_NODE_NAME",
        "knoc-<site>",
        "name of the virtual node",
    ),
    setting(
        "node.pods",
        "KNOC_NODE_PODS",
        "1000",
        "how many pods the node takes, 1 to 100000",
    ),
    setting(
        "node.queueFactor",
        "KNOC_NODE_QUEUE_FACTOR",
        "10",
        "allocatable = total × this, 1 to 10000: Slurm owns the queue",
    ),
    setting(
        "node.taint",
        "KNOC_NODE_TAINT",
        "true",
        "`true` or `false`: the taint virtual-kubelet.io/provider=knoc:NoSchedule",
    ),
    setting(
        "server.cert",
        "KNOC_SERVER_CERT",
        "",
        "PEM file: the serving certificate of the kubelet API",
    ),
    setting(
        "server.certificate",
        "KNOC_SERVER_CERTIFICATE",
        "files where server.cert is set, else self-signed",
        "where the serving certificate is from: `self-signed`, `csr` (signer kubernetes.io/kubelet-serving) or `files`",
    ),
    setting(
        "server.clientCA",
        "KNOC_SERVER_CLIENT_CA",
        "ConfigMap kube-system/extension-apiserver-authentication",
        "PEM file: the CA of client certificates",
    ),
    setting(
        "server.key",
        "KNOC_SERVER_KEY",
        "",
        "PEM file: the key of the serving certificate",
    ),
    setting(
        "server.listen",
        "KNOC_SERVER_LISTEN",
        "0.0.0.0:10250",
        "address and port of the kubelet API",
    ),
    setting(
        "server.websockets",
        "KNOC_SERVER_WEBSOCKETS",
        "true",
        "`true` or `false`: declares to API servers of 1.36 or later that WebSockets may come as they are (ExtendWebSocketsToKubelet)",
    ),
];
