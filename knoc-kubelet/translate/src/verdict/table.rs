//! The rows of the table. Fields with the same verdict and reason share a row; the first row that matches decides. If a
//! row changes to or from "honoured", the group of its field in [`crate::carried`] must change too, otherwise the crate
//! does not compile.

use super::{
    Row, Type,
    Verdict::{self, Honoured, Inside, Mapped, Rejected, Satisfied},
    When::{self, Any, Empty, Is, Starts},
};

const LATER: &str = "not supported yet; leave it out";
const CSI: &str = "a volume of this kind cannot be mounted by an ordinary user on a compute node; use a claim or a path that the site lets pods mount (`persistentVolumeClaim`, `hostPath`)";
const INLINE: &str = "an inline volume of a driver cannot be mounted by an ordinary user on a compute node; use a claim or a path that the site lets pods mount (`persistentVolumeClaim`, `hostPath`), and for the files of a secret store a Secret that it writes";
const OWNER: &str = "files belong to the HPC user";
const FS_GROUP: &str = "files belong to the HPC user; inside of the container their group is `runAsGroup`, else this one, which may read every file of a ConfigMap, Secret, downward API or projected volume: see [users](#users)";
const IS_HPC_USER: &str = "containers run as the HPC user of the agent";
const IDS: &str = "inside of the container, in a user namespace of the program's own; to the node the program is the HPC user. Where that is not possible it is the HPC user inside, too, with the Event `Mapped`: see [users](#users)";
const WINDOWS: &str = "compute nodes run Linux; leave it out";
const FOREIGN: &str = "a probe or hook goes to the pod's own listeners only; leave it out (for a virtual host, set the header `Host`)";
const NON_ROOT: &str = "checked against `runAsUser`, else the image's user, as on any node; a container that would be root waits with `CreateContainerConfigError`. An image that is a SIF file or a sandbox and names no user runs as the HPC user, who is never root";
const SE_LINUX: &str = "ignored, as on any node without SELinux";
const SCHEDULER: &str = "handled by the Kubernetes scheduler";

const fn row(fields: &'static str, when: When, verdict: Verdict, note: &'static str) -> Row {
    Row {
        fields,
        when,
        verdict,
        note,
    }
}

const fn of(name: &'static str, heading: &'static str, rows: &'static [Row]) -> Type {
    Type {
        name,
        heading,
        rows,
    }
}

#[rustfmt::skip]
pub(super) const TABLE: &[Type] = &[
    of("PodSpec", "The pod: `spec`", POD),
    of("Container", "A container: `spec.containers[]`, `spec.initContainers[]`", CONTAINER),
    of("EphemeralContainer", "An ephemeral container: `spec.ephemeralContainers[]`", EPHEMERAL),
    of("EnvVar", "Environment: `env[]`", &[
        row("name value", Any, Honoured, "any printable ASCII name without `=`; `$(VAR)` is expanded, in all variables of a container by at most 8 MiB, more than Linux starts a program with"),
        row("valueFrom", Any, Inside("EnvVarSource"), ""),
    ]),
    of("EnvVarSource", "Environment: `env[].valueFrom`", &[
        row("configMapKeyRef secretKeyRef", Any, Inside("KeySelector"), ""),
        row("fieldRef", Any, Inside("EnvFieldRef"), ""),
        row("resourceFieldRef", Any, Inside("ResourceFieldSelector"), ""),
        row("fileKeyRef", Any, Inside("FileKeySelector"), ""),
    ]),
    of("FileKeySelector", "`fileKeyRef`", &[
        row("volumeName path key optional", Any, Honoured, "read when the container starts, in a kubelet's format (`NAME='value'`); the account of the job must be able to read the file, of at most 1 MiB. While the file or the key is missing, the container waits with `CreateContainerConfigError` and is tried again every 10 s, whatever its `restartPolicy`"),
    ]),
    of("KeySelector", "`configMapKeyRef`, `secretKeyRef`", &[row("name key optional", Any, Honoured, "")]),
    of("EnvFieldRef", "`fieldRef` of a variable", &[
        row("apiVersion", Any, Satisfied, ""),
        row("fieldPath", Is(&["metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName"]), Honoured, ""),
        row("fieldPath", Starts(&["metadata.labels['", "metadata.annotations['"]), Honoured, ""),
        row("fieldPath", Is(&["status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs"]), Honoured, "resolved on the compute node"),
        row("fieldPath", Any, Rejected, "this field is not available to containers"),
    ]),
    of("ResourceFieldSelector", "`resourceFieldRef`", &[
        row("containerName divisor", Any, Honoured, ""),
        row("resource", Is(&["limits.cpu", "limits.memory", "limits.ephemeral-storage", "requests.cpu", "requests.memory", "requests.ephemeral-storage"]), Honoured, "if the limit is not set, the node's allocatable"),
        row("resource", Any, Rejected, "only cpu, memory and ephemeral-storage are supported; leave it out"),
    ]),
    of("EnvFromSource", "Environment: `envFrom[]`", &[
        row("prefix", Any, Honoured, ""),
        row("configMapRef secretRef", Any, Inside("Reference"), ""),
    ]),
    of("Reference", "`configMapRef`, `secretRef`", &[row("name optional", Any, Honoured, "")]),
    of("ResourceRequirements", "`resources` of a container or of the pod", &[
        row("requests limits", Any, Inside("ResourceList"), ""),
        row("claims", Empty, Satisfied, ""),
        row("claims", Any, Rejected, "dynamic resource allocation is not supported; ask for an extended resource, such as `nvidia.com/gpu`"),
    ]),
    of("ResourceList", "`resources.requests`, `resources.limits`, `spec.overhead`", &[
        row("cpu memory ephemeral-storage", Any, Honoured, "of the job as a whole: those of the pod (`spec.resources`), or else the larger of the init containers, the sum of the others; with the `overhead`; local disk is reserved only if the site's nodes have TmpDisk, and a pod that exceeds its limits of it is evicted: see [files](#files-in-a-container). A container's `limits.cpu`, if it has no `requests.cpu`, only adds to the CPUs of the job: it is not enforced for this container alone, which may use all of them"),
        row("hugepages-*", Is(&["0"]), Satisfied, ""),
        row("hugepages-*", Any, Rejected, "huge pages cannot be requested from Slurm; leave them out"),
        row("*", Any, Honoured, "extended resources: the agent's site file maps each of them to `--gres` (`[gres]`; by default `nvidia.com/gpu` is `gpu`), and one that is not mapped is rejected. If `knoc.io/gres` is more specific (`gpu:a100:1`), it replaces them. A container with `nvidia.com/gpu` or `amd.com/gpu`, and no other, sees the driver's files and devices (`--nv`, `--rocm`), `CUDA_VISIBLE_DEVICES` or `ROCR_VISIBLE_DEVICES` as Slurm set it unless it sets its own, and `/.singularity.d/libs` at the end of `LD_LIBRARY_PATH`. If the compute node lacks the driver, Apptainer only warns"),
    ]),
    of("ContainerPort", "`ports[]`", &[
        row("name containerPort protocol", Any, Satisfied, "informative, as on any node"),
        row("hostPort", Any, Honoured, "TCP and UDP; the site's policy lists the ports (`policy.host_ports`); with `hostNetwork` the program listens on the node itself: see [networks](networks.md#host-ports)"),
        row("hostIP", Any, Honoured, "`127.0.0.1` or the address of the compute node; not given: both"),
    ]),
    of("Probe", "`startupProbe`, `livenessProbe`, `readinessProbe`", &[
        row("initialDelaySeconds periodSeconds timeoutSeconds successThreshold failureThreshold terminationGracePeriodSeconds", Any, Honoured, "see [probes and hooks](#probes-and-hooks)"),
        row("exec", Any, Inside("ExecAction"), ""),
        row("httpGet", Any, Inside("HTTPGetAction"), ""),
        row("tcpSocket", Any, Inside("TCPSocketAction"), ""),
        row("grpc", Any, Inside("GRPCAction"), ""),
    ]),
    of("ContainerRestartRule", "`restartPolicyRules[]`", &[
        row("action", Is(&["Restart", "RestartAllContainers"]), Honoured, "`RestartAllContainers` kills the other containers at once and starts all of them again, beginning with the first init container, in the same job and with the same volumes; ephemeral containers go on. The container that caused it waits for its own back-off"),
        row("action", Any, Rejected, "must be `Restart` or `RestartAllContainers`"),
        row("exitCodes", Any, Inside("ContainerRestartRuleOnExitCodes"), ""),
    ]),
    of("ContainerRestartRuleOnExitCodes", "`restartPolicyRules[].exitCodes`", &[
        row("operator", Is(&["In", "NotIn"]), Honoured, ""),
        row("operator", Any, Rejected, "must be `In` or `NotIn`"),
        row("values", Any, Honoured, ""),
    ]),
    of("Lifecycle", "`lifecycle`", &[
        row("postStart preStop", Any, Inside("LifecycleHandler"), ""),
        row("stopSignal", Any, Honoured, "instead of `SIGTERM`; `SIGRTMIN` is 34 and `SIGRTMAX` 64, as in other runtimes"),
    ]),
    of("LifecycleHandler", "`lifecycle.postStart`, `lifecycle.preStop`", &[
        row("exec", Any, Inside("ExecAction"), ""),
        row("httpGet", Any, Inside("HTTPGetAction"), ""),
        row("sleep", Any, Inside("SleepAction"), ""),
        row("tcpSocket", Any, Rejected, "a hook cannot be a TCP connection on any node: use `exec`, `httpGet` or `sleep`"),
    ]),
    of("ExecAction", "`exec` of a probe or hook", &[row("command", Any, Honoured, "in the container, without a shell")]),
    of("HTTPGetAction", "`httpGet` of a probe or hook", &[
        row("path port", Any, Honoured, ""),
        row("scheme", Is(&["HTTP", "HTTPS"]), Honoured, "with `HTTPS` the certificate is not verified"),
        row("scheme", Any, Rejected, "must be `HTTP` or `HTTPS`"),
        row("httpHeaders", Any, Inside("HTTPHeader"), ""),
        row("host", Is(&["", "localhost", "127.0.0.1", "::1"]), Satisfied, ""),
        row("host", Any, Rejected, FOREIGN),
        row("protocol", Any, Rejected, LATER),
    ]),
    of("HTTPHeader", "`httpHeaders[]`", &[row("name value", Any, Honoured, "")]),
    of("TCPSocketAction", "`tcpSocket` of a probe", &[
        row("port", Any, Honoured, ""),
        row("host", Is(&["", "localhost", "127.0.0.1", "::1"]), Satisfied, ""),
        row("host", Any, Rejected, FOREIGN),
    ]),
    of("GRPCAction", "`grpc` of a probe", &[
        row("port service", Any, Honoured, ""),
        row("mode", Is(&["Plaintext", "TLS"]), Honoured, "with `TLS` the certificate is not verified"),
        row("mode", Any, Rejected, "must be `Plaintext` or `TLS`"),
    ]),
    of("SleepAction", "`sleep` of a hook", &[row("seconds", Any, Honoured, "")]),
    of("VolumeMount", "`volumeMounts[]`", &[
        row("name mountPath readOnly subPath", Any, Honoured, "see [files](#files-in-a-container) for what a path may be"),
        row("subPathExpr", Any, Honoured, "`$(VAR)` is expanded from the container's environment when it starts; until all variables have values, and the path stays in the volume, the container waits with `CreateContainerConfigError`"),
        row("mountPropagation", Is(&["None"]), Satisfied, ""),
        row("mountPropagation", Any, Rejected, "mounts are not propagated; leave it out"),
        row("recursiveReadOnly", Is(&["Disabled", "IfPossible"]), Satisfied, ""),
        row("recursiveReadOnly", Any, Rejected, LATER),
        row("bindMountOptions", Any, Rejected, LATER),
    ]),
    of("PodSecurityContext", "`spec.securityContext`", &[
        row("runAsUser runAsGroup", Any, Honoured, IDS),
        row("supplementalGroups supplementalGroupsPolicy", Any, Mapped, IS_HPC_USER),
        row("fsGroup fsGroupChangePolicy", Any, Mapped, FS_GROUP),
        row("runAsNonRoot", Any, Honoured, NON_ROOT),
        row("seccompProfile appArmorProfile", Any, Inside("Profile"), ""),
        row("seLinuxChangePolicy", Any, Satisfied, ""),
        row("seLinuxOptions", Any, Satisfied, SE_LINUX),
        row("sysctls", Any, Inside("Sysctl"), ""),
        row("windowsOptions", Any, Rejected, WINDOWS),
    ]),
    of("Sysctl", "`sysctls[]`", &[
        row("name", Is(&["net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"]), Mapped, "not set: in a network of its own, a pod binds any port and sends pings without it"),
        row("name", Any, Rejected, "kernel parameters cannot be set by an ordinary user, so leave them out; a pod with one that is not safe fails with `SysctlForbidden`, as on any node"),
        row("value", Any, Satisfied, ""),
    ]),
    of("SecurityContext", "`securityContext` of a container", &[
        row("runAsUser runAsGroup", Any, Honoured, IDS),
        row("runAsNonRoot", Any, Honoured, NON_ROOT),
        row("privileged", Is(&["false"]), Satisfied, ""),
        row("privileged", Any, Mapped, "the container runs without privileges, which an ordinary user cannot give. Only if the site allows it (`policy.privileged` of the site file is `unprivileged`); otherwise the pod is rejected"),
        row("allowPrivilegeEscalation", Any, Satisfied, "no_new_privs is always set"),
        row("readOnlyRootFilesystem", Any, Honoured, "`/tmp` and `/var/tmp` too, unless a volume is mounted there"),
        row("capabilities", Any, Inside("Capabilities"), ""),
        row("procMount", Is(&["Default"]), Satisfied, ""),
        row("procMount", Any, Rejected, "only `Default` is supported"),
        row("seccompProfile appArmorProfile", Any, Inside("Profile"), ""),
        row("seLinuxOptions", Any, Satisfied, SE_LINUX),
        row("windowsOptions", Any, Rejected, WINDOWS),
    ]),
    of("Capabilities", "`capabilities`", &[
        row("drop", Any, Satisfied, "containers have none"),
        row("add", Empty, Satisfied, ""),
        row("add", Is(&["NET_BIND_SERVICE", "SYS_PTRACE"]), Mapped, "not granted: in a network of its own, a pod binds any port without it; a program may trace those of its own user, as far as the node allows it (`kubectl debug` asks for it)"),
        row("add", Any, Rejected, "an ordinary user cannot grant capabilities; leave them out"),
    ]),
    of("Profile", "`seccompProfile`, `appArmorProfile`", &[
        row("type", Is(&["RuntimeDefault", "Unconfined"]), Satisfied, ""),
        row("type", Any, Rejected, "profiles of the compute node cannot be loaded; use `RuntimeDefault`"),
        row("localhostProfile", Any, Rejected, "profiles of the compute node cannot be loaded; use `RuntimeDefault`"),
    ]),
    of("HostAlias", "`hostAliases[]`", &[row("ip hostnames", Any, Honoured, "")]),
    of("PodDNSConfig", "`dnsConfig`", &[
        row("nameservers searches", Any, Honoured, "in `/etc/resolv.conf`, after those of the compute node unless the policy is `None`; with the `process` runtime the compute node's file stays"),
        row("options", Any, Inside("PodDNSConfigOption"), ""),
    ]),
    of("PodDNSConfigOption", "`dnsConfig.options[]`", &[row("name value", Any, Honoured, "")]),
    of("ReadinessGate", "`readinessGates[]`", &[row("conditionType", Any, Honoured, "")]),
    of("PodOS", "`os`", &[
        row("name", Is(&["linux"]), Satisfied, ""),
        row("name", Any, Rejected, "only Linux; the pod fails with `PodOSNotSupported`, as on any node"),
    ]),
    of("Volume", "Volumes: `spec.volumes[]`", VOLUME),
    of("EmptyDirVolumeSource", "`emptyDir`", &[
        row("medium", Is(&["", "Memory"]), Honoured, ""),
        row("medium", Any, Rejected, "only the default medium and `Memory` are supported"),
        row("sizeLimit", Any, Honoured, "a volume in memory is a file system of that size if the pod has a network of its own; any other volume is measured every 10 s, and the pod is evicted if the volume exceeds it"),
        row("mode", Any, Rejected, LATER),
    ]),
    of("PersistentVolumeClaimVolumeSource", "`persistentVolumeClaim`", &[
        row("claimName readOnly", Any, Honoured, "a volume of the kind `hostPath`, `local`, `nfs` or `csi`: see [claims](#claims-and-nfs)"),
    ]),
    of("NFSVolumeSource", "`nfs`", &[
        row("server path readOnly", Any, Honoured, "if the site file maps the export to a path of the compute nodes: see [claims](#claims-and-nfs)"),
    ]),
    of("ImageVolumeSource", "`image`", &[
        row("reference", Any, Honoured, "pulled like the images of containers, and mounted read-only; a `subPath` must be a directory of the image and needs user namespaces on the compute node, and nothing can be mounted below it"),
        row("pullPolicy", Any, Honoured, ""),
    ]),
    of("HostPathVolumeSource", "`hostPath`", &[
        row("path", Any, Honoured, "of the compute node, if the site lets pods mount it: see [host paths](#host-paths)"),
        row("type", Is(&["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"]), Honoured, "checked when a container starts; a path of no type that is missing becomes a directory"),
        row("type", Any, Rejected, "this type is not known"),
    ]),
    of("ConfigMapVolumeSource", "`configMap`", &[
        row("name optional defaultMode", Any, Honoured, ""),
        row("items", Any, Inside("KeyToPath"), ""),
        row("defaultUser", Any, Mapped, OWNER),
    ]),
    of("SecretVolumeSource", "`secret`", &[
        row("secretName optional defaultMode", Any, Honoured, ""),
        row("items", Any, Inside("KeyToPath"), ""),
        row("defaultUser", Any, Mapped, OWNER),
    ]),
    of("KeyToPath", "`items[]` of configMap and secret", &[
        row("key path mode", Any, Honoured, "one key may be written to several files"),
        row("user", Any, Mapped, OWNER),
    ]),
    of("DownwardAPIVolumeSource", "`downwardAPI`", &[
        row("defaultMode", Any, Honoured, ""),
        row("items", Any, Inside("DownwardAPIVolumeFile"), ""),
        row("defaultUser", Any, Mapped, OWNER),
    ]),
    of("DownwardAPIVolumeFile", "`items[]` of downwardAPI", &[
        row("path mode", Any, Honoured, ""),
        row("fieldRef", Any, Inside("FileFieldRef"), ""),
        row("resourceFieldRef", Any, Inside("ResourceFieldSelector"), ""),
        row("user", Any, Mapped, OWNER),
    ]),
    of("FileFieldRef", "`fieldRef` of a file", &[
        row("apiVersion", Any, Satisfied, ""),
        row("fieldPath", Is(&["metadata.name", "metadata.namespace", "metadata.uid", "metadata.labels", "metadata.annotations"]), Honoured, ""),
        row("fieldPath", Starts(&["metadata.labels['", "metadata.annotations['"]), Honoured, ""),
        row("fieldPath", Any, Rejected, "this field is not available to containers"),
    ]),
    of("ProjectedVolumeSource", "`projected`", &[
        row("defaultMode", Any, Honoured, ""),
        row("sources", Any, Inside("VolumeProjection"), ""),
        row("defaultUser", Any, Mapped, OWNER),
    ]),
    of("VolumeProjection", "`projected.sources[]`", &[
        row("configMap", Any, Inside("ConfigMapVolumeSource"), ""),
        row("secret", Any, Inside("SecretProjection"), ""),
        row("downwardAPI", Any, Inside("DownwardAPIVolumeSource"), ""),
        row("serviceAccountToken", Any, Inside("ServiceAccountTokenProjection"), ""),
        row("clusterTrustBundle", Any, Inside("ClusterTrustBundleProjection"), ""),
        row("podCertificate", Any, Rejected, LATER),
    ]),
    of("ClusterTrustBundleProjection", "`projected.sources[].clusterTrustBundle`", &[
        row("labelSelector name optional path signerName", Any, Honoured, "if the cluster has ClusterTrustBundles; a change arrives like that of a ConfigMap"),
        row("user", Any, Mapped, OWNER),
    ]),
    of("SecretProjection", "`projected.sources[].secret`", &[
        row("name optional", Any, Honoured, ""),
        row("items", Any, Inside("KeyToPath"), ""),
    ]),
    of("ServiceAccountTokenProjection", "`projected.sources[].serviceAccountToken`", &[
        row("audience expirationSeconds path", Any, Honoured, "bound to the pod, renewed at 80 % of its lifetime"),
        row("user", Any, Mapped, OWNER),
    ]),
    of("Annotations", "Annotations", ANNOTATIONS),
];

#[rustfmt::skip]
const POD: &[Row] = &[
    row("containers initContainers", Any, Inside("Container"), ""),
    row("ephemeralContainers", Any, Inside("EphemeralContainer"), ""),
    row("restartPolicy terminationGracePeriodSeconds", Any, Honoured, ""),
    row("activeDeadlineSeconds", Any, Honoured, "counted from the start of the allocation, not from its submission; also part of `--time`; may be lowered while the pod runs"),
    row("volumes", Any, Inside("Volume"), ""),
    row("serviceAccountName serviceAccount automountServiceAccountToken", Any, Honoured, ""),
    row("enableServiceLinks", Any, Honoured, ""),
    row("hostname", Any, Honoured, "in the pod's environment and files, and the container's own name; with `hostNetwork` or the `process` runtime, the host name of the compute node stays"),
    row("hostAliases", Any, Inside("HostAlias"), ""),
    row("readinessGates", Any, Inside("ReadinessGate"), ""),
    row("nodeSelector affinity tolerations", Any, Honoured, "by the scheduler; selector, required node affinity and tolerations of `NoExecute` taints also at admission (`NodeAffinity`, `TaintToleration`)"),
    row("nodeName topologySpreadConstraints schedulerName schedulingGates schedulingGroup", Any, Satisfied, SCHEDULER),
    row("priority priorityClassName preemptionPolicy", Any, Satisfied, SCHEDULER),
    row("evictionResponders", Any, Satisfied, "handled by the eviction API"),
    row("securityContext", Any, Inside("PodSecurityContext"), ""),
    row("dnsPolicy", Is(&["ClusterFirst", "ClusterFirstWithHostNet"]), Honoured, "as by a kubelet, in a network of the pod's own (`private`) that reaches the cluster's DNS; elsewhere names resolve as on the compute node"),
    row("dnsPolicy", Is(&["Default"]), Honoured, "names resolve as on the compute node"),
    row("dnsPolicy", Is(&["None"]), Honoured, "only what `dnsConfig` has"),
    row("dnsPolicy", Any, Rejected, "this policy is not known; use `ClusterFirst`, `Default` or `None`"),
    row("dnsConfig", Any, Inside("PodDNSConfig"), ""),
    row("subdomain", Any, Honoured, "in `/etc/hosts`; with the cluster domain of the kubelet's `node.clusterDomain`"),
    row("hostnameOverride setHostnameAsFQDN", Any, Honoured, "as `hostname`"),
    row("hostNetwork", Any, Honoured, "with `true` the pod is in the compute node's network; otherwise the annotation `knoc.io/network` (`private` or `host`) decides, or else the site: see [networks](networks.md)"),
    row("hostPID hostIPC", Is(&["false"]), Satisfied, ""),
    row("hostPID hostIPC", Any, Rejected, "namespaces of the compute node are not shared with pods; leave it out (`shareProcessNamespace` shares those of the pod)"),
    row("hostUsers", Is(&["true"]), Satisfied, ""),
    row("hostUsers", Any, Mapped, "as with user namespaces, root inside is an ordinary user to the node: the HPC user of the agent. But that one user is the same for all its pods, and a setuid runtime makes no user namespace: see [users](#users)"),
    row("shareProcessNamespace", Any, Honoured, "see [containers](#containers)"),
    row("imagePullSecrets", Empty, Satisfied, ""),
    row("imagePullSecrets", Any, Honoured, "also those of the ServiceAccount; the credentials are in the agent's memory only until the image is pulled"),
    row("os", Any, Inside("PodOS"), ""),
    row("overhead", Any, Inside("ResourceList"), ""),
    row("resourceClaims", Empty, Satisfied, ""),
    row("resourceClaims", Any, Rejected, "dynamic resource allocation is not supported; ask for an extended resource, such as `nvidia.com/gpu`"),
    row("resources", Any, Inside("ResourceRequirements"), ""),
    row("runtimeClassName", Is(&["knoc"]), Satisfied, ""),
    row(
        "runtimeClassName",
        Starts(&["knoc-"]),
        Satisfied,
        "for one of several sites",
    ),
    row(
        "runtimeClassName",
        Any,
        Rejected,
        "only RuntimeClasses whose names are `knoc` or begin with `knoc-` are supported",
    ),
];

#[rustfmt::skip]
const CONTAINER: &[Row] = &[
    row("name image command args workingDir", Any, Honoured, "byte for byte, without a shell"),
    row("imagePullPolicy", Any, Honoured, "pulled once on the login node, before the job is submitted"),
    row("env", Any, Inside("EnvVar"), ""),
    row("envFrom", Any, Inside("EnvFromSource"), ""),
    row("resources", Any, Inside("ResourceRequirements"), ""),
    row("resizePolicy", Any, Satisfied, "a job cannot be resized: a request to resize a pod is answered with the condition `PodResizePending`, reason `Infeasible`"),
    row("volumeMounts", Any, Inside("VolumeMount"), ""),
    row("volumeDevices", Empty, Satisfied, ""),
    row("volumeDevices", Any, Rejected, "block devices cannot be given to a job; mount a file system (`volumeMounts`)"),
    row("ports", Any, Inside("ContainerPort"), ""),
    row("stdin stdinOnce tty", Any, Honoured, ""),
    row("terminationMessagePath terminationMessagePolicy", Any, Honoured, "at most 4 KiB of a container, and 12 KiB of a pod, which its containers share equally"),
    row("securityContext", Any, Inside("SecurityContext"), ""),
    row("livenessProbe readinessProbe startupProbe", Any, Inside("Probe"), ""),
    row("lifecycle", Any, Inside("Lifecycle"), ""),
    row("restartPolicy", Is(&["Always", "OnFailure", "Never"]), Honoured, "of an init container, `Always` makes it a sidecar: see [containers](#containers)"),
    row("restartPolicy", Any, Rejected, "must be `Always`, `OnFailure` or `Never`"),
    row("restartPolicyRules", Any, Inside("ContainerRestartRule"), ""),
];

#[rustfmt::skip]
const EPHEMERAL: &[Row] = &[
    row("name image command args workingDir", Any, Honoured, "byte for byte, without a shell"),
    row("targetContainerName", Any, Honoured, "see [containers](#containers)"),
    row("imagePullPolicy", Any, Honoured, "pulled on the login node"),
    row("env", Any, Inside("EnvVar"), ""),
    row("envFrom", Any, Inside("EnvFromSource"), ""),
    row("volumeMounts", Any, Inside("VolumeMount"), ""),
    row("stdin stdinOnce tty", Any, Honoured, ""),
    row("terminationMessagePath terminationMessagePolicy", Any, Honoured, "at most 4 KiB of a container, and 12 KiB of a pod, which its containers share equally"),
    row("securityContext", Any, Inside("SecurityContext"), ""),
    row("resources ports volumeDevices resizePolicy restartPolicyRules", Empty, Satisfied, ""),
    row("resources ports volumeDevices resizePolicy restartPolicy restartPolicyRules livenessProbe readinessProbe startupProbe lifecycle", Any, Rejected, "an ephemeral container has none on any node; leave it out"),
];

#[rustfmt::skip]
const VOLUME: &[Row] = &[
    row("name", Any, Honoured, ""),
    row("emptyDir", Any, Inside("EmptyDirVolumeSource"), ""),
    row("configMap", Any, Inside("ConfigMapVolumeSource"), ""),
    row("secret", Any, Inside("SecretVolumeSource"), ""),
    row("downwardAPI", Any, Inside("DownwardAPIVolumeSource"), ""),
    row("projected", Any, Inside("ProjectedVolumeSource"), ""),
    row("hostPath", Any, Inside("HostPathVolumeSource"), ""),
    row("nfs", Any, Inside("NFSVolumeSource"), ""),
    row("persistentVolumeClaim", Any, Inside("PersistentVolumeClaimVolumeSource"), ""),
    row("ephemeral", Any, Honoured, "a claim that Kubernetes creates for the pod; see [claims](#claims-and-nfs)"),
    row("image", Any, Inside("ImageVolumeSource"), ""),
    row("csi", Any, Rejected, INLINE),
    row("iscsi fc cephfs rbd glusterfs flexVolume", Any, Rejected, CSI),
    row("awsElasticBlockStore azureDisk azureFile cinder flocker gcePersistentDisk photonPersistentDisk portworxVolume quobyte scaleIO storageos vsphereVolume", Any, Rejected, CSI),
    row("gitRepo", Any, Rejected, "removed from Kubernetes; fetch it in an init container"),
];

#[rustfmt::skip]
const ANNOTATIONS: &[Row] = &[
    row("knoc.io/partition knoc.io/account knoc.io/qos knoc.io/constraint knoc.io/reservation knoc.io/licenses knoc.io/dependency knoc.io/gres", Any, Honoured, "the sbatch option of this name; at most 64 KiB, without control characters"),
    row("knoc.io/job-id", Any, Satisfied, "written by the kubelet: the id of the pod's job"),
    row("knoc.io/time", Any, Honoured, "minutes, `HH:MM:SS`, `D-HH:MM:SS`, or `90m`, `2h`, `1d`"),
    row("knoc.io/ntasks", Any, Honoured, "a number; the CPUs are shared out evenly; with `knoc.io/mpi` or several nodes, the number of ranks: see [MPI](mpi.md)"),
    row("knoc.io/image-root slurm-job.knoc.io/image-root", Any, Honoured, "a directory that is put before the `image` of every container if that begins with a slash; the result must be below `image_roots` of the site file"),
    row("knoc.io/nodes", Any, Honoured, "a number; more than one: the container is a program of several ranks, see [MPI](mpi.md)"),
    row("knoc.io/mpi", Is(&["pmix", "pmi2", "none"]), Honoured, "`srun` starts the ranks with this interface: see [MPI](mpi.md)"),
    row("knoc.io/mpi", Any, Rejected, "must be `pmix`, `pmi2` or `none`"),
    row("slurm-job.knoc.io/mpi-flags", Any, Honoured, "`true` changes nothing; a list of options of mpiexec is translated for `srun`, and others are rejected by name: see [MPI](mpi.md)"),
    row("knoc.io/exclusive", Is(&["true", "false"]), Honoured, ""),
    row("knoc.io/exclusive", Any, Rejected, "must be `true` or `false`"),
    row("knoc.io/flags slurm-job.knoc.io/flags slurm-job.vk.io/flags slurm.hpk.io/flags", Any, Honoured, "further sbatch options, if the site's allow-list contains them; each at most 64 KiB, without control characters"),
    row("knoc.io/network", Is(&["private", "host"]), Honoured, "instead of the site's setting: see [networks](networks.md)"),
    row("knoc.io/network", Any, Rejected, "must be `private` or `host`"),
    row("knoc.io/requeue", Any, Rejected, LATER),
    row("slurm-job.vk.io/singularity-options slurm-job.vk.io/pre-exec", Any, Rejected, "options and scripts of a pod never reach the runtime or a shell"),
    row("knoc.io/* slurm-job.knoc.io/* slurm-job.vk.io/* slurm.hpk.io/*", Any, Rejected, "KNoC has no annotation of this name"),
    row("*", Any, Satisfied, "not an annotation of KNoC"),
];
