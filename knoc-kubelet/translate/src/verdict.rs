//! PURE: decides how every field of a pod is handled, by one table from which both the code and the docs are made.
//!
//! The pod's JSON is examined as the API server sent it, so a field that this build does not know is found too and
//! rejected by its path. All rejections are collected, so that the user sees them in one message.
//! `docs/guide/pod-support.md` is the output of [`table()`]; a test checks that they are equal.

pub(crate) mod fields;
mod table;

use std::fmt::Write as _;

use serde_json::Value;

use table::TABLE;

/// How a field is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The field does what Kubernetes says.
    Honoured,
    /// The field holds anyway, or is not the kubelet's responsibility.
    Satisfied,
    /// The field has a different meaning here, and the pod gets an Event.
    Mapped,
    /// The pod is not admitted.
    Rejected,
    /// Each field inside has its own verdict in the rows of this type.
    Inside(&'static str),
}

/// The values to which a row applies. The first matching row decides.
#[derive(Clone, Copy, Debug)]
enum When {
    Any,
    /// The value, as text, is one of these; of a list, each value is.
    Is(&'static [&'static str]),
    /// The value is a string that begins with one of these.
    Starts(&'static [&'static str]),
    /// An empty list, map or string.
    Empty,
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    /// Field names, separated by blanks; `*` at the end of a name matches any rest.
    fields: &'static str,
    when: When,
    verdict: Verdict,
    note: &'static str,
}

/// The rows of one Kubernetes type.
#[derive(Debug)]
struct Type {
    name: &'static str,
    heading: &'static str,
    rows: &'static [Row],
}

/// The findings about one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Why the pod is rejected, as `path: why`; empty if it is admitted.
    pub rejected: Vec<String>,
    /// The fields with a different meaning here, as `path: meaning`; they become the Event `Mapped`.
    pub mapped: Vec<String>,
}

/// Decides about a pod, given as its JSON from the API server.
#[must_use]
pub fn judge(pod: &Value) -> Findings {
    let mut findings = Findings::default();
    if let Some(spec) = pod.get("spec") {
        walk("PodSpec", "spec", spec, &mut findings);
    }
    if let Some(annotations) = pod.pointer("/metadata/annotations") {
        walk(
            "Annotations",
            "metadata.annotations",
            annotations,
            &mut findings,
        );
    }
    findings
}

fn walk(kind: &'static str, path: &str, value: &Value, findings: &mut Findings) {
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let label = match item.get("name").and_then(Value::as_str) {
                    Some(name) => format!("{path}[{name}]"),
                    None => format!("{path}[{index}]"),
                };
                walk(kind, &label, item, findings);
            }
        }
        Value::Object(fields) => {
            for (field, inner) in fields.iter().filter(|(_, inner)| !inner.is_null()) {
                judge_field(kind, &join(kind, path, field), field, inner, findings);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn join(kind: &str, path: &str, field: &str) -> String {
    if matches!(kind, "Annotations" | "ResourceList") {
        format!("{path}[{field}]")
    } else {
        format!("{path}.{field}")
    }
}

fn judge_field(
    kind: &'static str,
    path: &str,
    field: &str,
    value: &Value,
    findings: &mut Findings,
) {
    let row = rows(kind)
        .iter()
        .find(|row| row.names(field) && row.when.matches(value));
    let Some(row) = row else {
        findings.rejected.push(format!(
            "{path}: this field is not known to this version of KNoC"
        ));
        return;
    };
    match row.verdict {
        Verdict::Honoured | Verdict::Satisfied => {}
        Verdict::Mapped => findings.mapped.push(format!("{path}: {}", row.note)),
        Verdict::Rejected => {
            let value = match value {
                Value::String(text) => format!(" (`{text}`)"),
                Value::Bool(_) | Value::Number(_) => format!(" (`{value}`)"),
                Value::Null | Value::Array(_) | Value::Object(_) => String::new(),
            };
            findings
                .rejected
                .push(format!("{path}{value}: {}", row.note));
        }
        Verdict::Inside(kind) => walk(kind, path, value, findings),
    }
}

fn rows(kind: &str) -> &'static [Row] {
    TABLE
        .iter()
        .find(|entry| entry.name == kind)
        .map_or(&[], |entry| entry.rows)
}

impl Row {
    fn names(&self, field: &str) -> bool {
        self.fields
            .split(' ')
            .any(|name| match name.strip_suffix('*') {
                Some(start) => field.starts_with(start),
                None => field == name,
            })
    }
}

impl When {
    fn matches(self, value: &Value) -> bool {
        match self {
            Self::Any => true,
            Self::Is(allowed) => match value {
                Value::String(text) => allowed.contains(&text.as_str()),
                Value::Bool(_) | Value::Number(_) => allowed.contains(&value.to_string().as_str()),
                Value::Array(items) => {
                    !items.is_empty() && items.iter().all(|item| self.matches(item))
                }
                Value::Null | Value::Object(_) => false,
            },
            Self::Starts(allowed) => value
                .as_str()
                .is_some_and(|text| allowed.iter().any(|start| text.starts_with(start))),
            Self::Empty => match value {
                Value::Array(items) => items.is_empty(),
                Value::Object(fields) => fields.is_empty(),
                Value::String(text) => text.is_empty(),
                Value::Null => true,
                Value::Bool(_) | Value::Number(_) => false,
            },
        }
    }

    fn text(self) -> String {
        match self {
            Self::Any => String::new(),
            Self::Is(values) => format!(" = {}", quoted(values, "")),
            Self::Starts(values) => format!(" = {}", quoted(values, "…")),
            Self::Empty => " (empty)".to_owned(),
        }
    }
}

fn quoted(values: &[&str], end: &str) -> String {
    let texts: Vec<_> = values
        .iter()
        .map(|value| {
            if value.is_empty() {
                "empty".to_owned()
            } else {
                format!("`{value}{end}`")
            }
        })
        .collect();
    texts.join(", ")
}

/// The whole table as Markdown: the contents of `docs/guide/pod-support.md`.
#[must_use]
pub fn table() -> String {
    let mut text = String::from(HEAD);
    for kind in TABLE {
        let mut rendered = kind
            .rows
            .iter()
            .filter(|row| !matches!(row.verdict, Verdict::Inside(_)))
            .peekable();
        if rendered.peek().is_none() {
            continue;
        }
        // Writing to a String cannot fail.
        let _infallible = write!(
            text,
            "\n## {}\n\n| field | verdict | |\n|---|---|---|\n",
            kind.heading
        );
        for row in rendered {
            let fields: Vec<_> = row
                .fields
                .split(' ')
                .map(|name| format!("`{name}`"))
                .collect();
            let _infallible = writeln!(
                text,
                "| {}{} | {} | {} |",
                fields.join(", "),
                row.when.text(),
                row.verdict.word(),
                row.note
            );
        }
    }
    text.push_str(TAIL);
    text
}

const HEAD: &str = "\
# How each field of a pod is handled

This page is generated from the table that the kubelet uses (`knoc-kubelet/translate/src/verdict/table.rs`); a test checks that both
are equal. *Honoured*: the field does what Kubernetes says. *Satisfied*: the field holds anyway, or it is not the kubelet's
responsibility. *Mapped*: the field has a different meaning here, and the pod gets the Event `Mapped`. *Rejected*: the pod is not
admitted. Its phase is `Failed`, its reason is `UnsupportedPodSpec`, and its message names every rejected field at once. A field
that is not in the table (a field of a newer Kubernetes) is rejected too. If a field has several rows, the first row that matches
its value applies.

A running pod is not ended by an update that would be rejected: it continues unchanged and gets the Event `UnsupportedChange`. So
does a pod whose annotations of KNoC (`knoc.io/*`) are changed, because they are read when the pod is accepted. An ephemeral container that
has a rejected field is therefore rejected alone: its own status gives the reason.
";

const TAIL: &str = "
## Files in a container

Everything that is not listed here is as with any other container runtime.

**Paths.** A `..` component in `subPath`, `mountPath`, `workingDir`, `terminationMessagePath` or the path of a file in a volume is
rejected, and the message names the field. All other paths are normalized first: `./x` is `x`, `logs/` is `logs`, `a//b` is `a/b`.
Names such as `..foo` and `a..b` are ordinary names in a `subPath`; as in Kubernetes, the path of a file must not begin with two dots.

**Mounts.** Parent directories are mounted before what is mounted below them, whatever their order in the pod. A mount point that is
missing in a volume is created there. Symbolic links of the image (`/var/run`) are followed inside the container, and those in the
`subPath` of an image volume inside that image, whose root an absolute link begins at. Nothing can be mounted at `/` or in `/.knoc`,
which KNoC uses itself; neither `workingDir` nor `terminationMessagePath` can lie there. A volume at `/dev/x` is mounted
elsewhere, and `/dev/x` is a symbolic link to it, except at `/dev/shm` and below it. `/dev/null` and the other devices that every container
has (`full`, `ptmx`, `random`, `tty`, `urandom`, `zero`, and the links `fd`, `stdin`, `stdout` and `stderr`) stay: a `mountPath` there is
rejected. So is one on a device of the GPUs that the container requests (`nvidia*` with `nvidia.com/gpu`, `dri` and `kfd` with
`amd.com/gpu`), and one below `/dev/pts` or `/dev/mqueue`, unless a volume is mounted at that directory. If a volume is mounted at `/dev`
itself, all of this is possible. If the compute node has something else at `/dev/x`, the container ends with `StartError`. A volume that the
image declares (`VOLUME`) at such a place is left out, with the Event `Mapped`.

**Termination messages.** If `terminationMessagePath` is a directory, lies below a file, or cannot be written by the container, the container
ends with an error that names the field. Without its default, `/dev/termination-log`, it runs all the same. In a read-only volume a file of the
container's own is mounted there; in an image volume, or a read-only directory of the node, the file must exist.

**Temporary directories.** `/tmp` and `/var/tmp` are the image's, with the files that the image has there, and everybody can write to
them (mode 1777); files that are written go to the node's disk. If the site's runtime has no writable root directory (Singularity, no
overlay), they are empty directories on the node's disk, and the image's files in them are hidden.

**`/dev/shm`.** A tmpfs that the containers of one pod share, and no other pod can see. It has no size limit of its own (other
runtimes limit it to 64 MiB): its contents count against the memory of the job. So do those of an `emptyDir` in memory.

**`sizeLimit`.** An `emptyDir` in memory with a `sizeLimit` is a file system of that size (or of the job's memory, if that is less) if the
pod has a [network of its own](networks.md): a program that fills it gets `No space left on device`. Any other `emptyDir`, on disk or in
memory, is measured every 10 s. If it holds more than the `sizeLimit`, the pod fails with the reason `Evicted`, as on any node. Of a volume
with so many files that measuring takes more than 5 s, those count that were measured by then.

**`limits.ephemeral-storage`** is enforced in the same way: the pod is evicted if a container has written more than its limit to the node's
disk (its root and temporary directories), or all of them, with the `emptyDir` volumes on disk, more than their limits together. Logs do not
count, as they do not lie on the node's disk, and neither do volumes of the image, nor `emptyDir` volumes in memory, wherever they lie. Of a pod
of several ranks, only the volumes on the first node are measured.

**Volumes of the image.** If the root is read-only, each folder that the image declares as a volume, and in which the pod mounts nothing,
is a writable folder on the node's disk, new for each start of the container, with a copy of what the image has there: at most 16 GiB,
1,000,000 files and 64 levels, copied within five minutes, else the container ends with `CreateContainerError`. Pipes, sockets, devices and what
the HPC user cannot read are left out. With a setuid runtime it is empty at first. If the root is not read-only, it is the image's folder.

**The user.** Every program runs as the HPC user, whatever it [sees itself as](#users). If neither the pod nor the image sets `HOME`, it is
the home directory, according to the image's `/etc/passwd`, of the user that the pod (`runAsUser`) or the image names: root if neither
names one, and `/` if the image does not know the user. The container's `/etc/passwd` has a line for the HPC user with the user's name on
the node, that home directory and that user's shell; if the program sees itself as a user of whom the image has no line, this line has
that user's number. With a setuid runtime, the home directory of a user that has the HPC user's own uid in the image is not known.

**Names.** `/etc/hosts` has the lines of the compute node, then the pod's own name (first `HOSTNAME.SUBDOMAIN.NAMESPACE.svc.CLUSTERDOMAIN`
if the pod has a `subdomain`) and its `hostAliases`. Leading zeros in an address (`127.000.0.1`), which the API server may accept, are left
out there, in `dnsConfig.nameservers` and in `hostIP`. `/etc/resolv.conf` names the cluster's DNS if
the pod asks it (`dnsPolicy`) and reaches it, else it is the compute node's; with `dnsConfig` it also has the lines of the pod, and with
`dnsPolicy: None` only those. A file that the pod mounts there comes before both. `/etc/localtime` is the image's.

## Users

To the node, to its file systems and to other jobs every program is the HPC user. Inside of the container it sees itself as the user and the
group that the pod asks for (`runAsUser`, `runAsGroup`); if the pod asks for no user, as those of the image, unless that user is root
(`USER 1234:5678`, or `USER redis:data`, whose numbers the image's `/etc/passwd` and `/etc/group` have). Without a group it is that of the user in
that `/etc/passwd`, else 0. A name that the image's file lacks ends the container with `CreateContainerError`. Commands of `kubectl exec`,
of probes and of hooks see themselves as the program does. They enter the container as it was when the program began: a sandbox that the
program makes for itself (`unshare`) is not theirs.

- What belongs to the HPC user belongs, inside, to the program's user: in every container that looks at it, whatever its user. Outside, new
  files belong to the HPC user. What belongs to anybody else is shown as 65534, `nobody`.
- There is no other user and no other group inside, and user 0 has no capabilities either. So nothing can be given to another user
  (`chown`), and a program that starts as root to become somebody else (`gosu`, `su`, `apt`) cannot: do not ask for `runAsUser: 0` then, and
  it runs as the HPC user, which is not root. `kubectl cp` into a container with `runAsUser: 0` needs `--no-preserve`.
- The HPC user's further groups still count for files, but have no names and no numbers inside. `supplementalGroups` adds none; `fsGroup` is the
  group of the program, and so of its files, if there is no `runAsGroup`.
- `srun` and other programs that compare their own number with that of the HPC user need a container that asks for none, or
  `user_ids = \"own\"` under `[job]` of the site file. MPI's libraries are such programs, so pods of several ranks keep the HPC user.

The program is the HPC user inside, too, if the site wants it (`user_ids = \"own\"`), with several ranks, with a setuid runtime, without
a runtime (`process`), on compute nodes that allow no further user namespace, and with an agent of an older version. If the pod asks for
another user, the Event `Mapped` says so. `status.containerStatuses[].user.linux` has the numbers that the first process began with, as it sees
them, from Kubernetes 1.33 on; the pod's `supplementalGroups` and groups without a number inside are not among them. Containers of several
ranks have none.

## Containers

**Order.** Containers start in the order of the list, as on any node: each once the program of the one before it runs (and its `postStart`
hook has ended), or could not be started.

**Sidecars** are init containers with `restartPolicy: Always`. They start in the order of the list; what comes after one starts once it
has started (its `startupProbe` has passed, if it has one). They are restarted whenever they end, do not keep a pod from completing, and
are stopped one after the other in reverse order, each with what is left of the grace period, after the containers have ended. Their
readiness counts for the pod's. As on any node, a pod whose `activeDeadlineSeconds` pass before they have stopped has failed with
`DeadlineExceeded`, however well its containers ended. However little is left, also without a grace period, a program has two seconds between its stop signal and
SIGKILL.

**Restarts** happen in the running job, which keeps its allocation. The first restart comes at once, the next one after 10 s, then the wait
doubles up to 5 minutes; it starts over once a container has run for 10 minutes. Meanwhile the container waits with `CrashLoopBackOff`. A
site may choose other times (`[backoff]` of its site file).

**Another image** for a container (`kubectl set image pod/…`) restarts it in the running job, whatever its restart policy is, once the image is
on the login node. Until then, and if the image cannot be used, the container goes on with the one that it has, and an Event says why.
A pod that waits in the queue starts with the new image. As on any node, an init container that runs goes on, and one that has ended is not
run again. Before Kubernetes 1.33 the generation of a pod does not grow, so another image is not noticed.

**Ephemeral containers** (`kubectl debug`) start in the running job, within its allocation, and are never restarted. They share the pod's
volumes and network; one with a target waits with `CreateContainerConfigError` while the target does not run. Once the containers of the
pod have ended, they are stopped with it. They reach only pods whose job was started by a KNoC that knows them, and need Kubernetes 1.33,
where adding one raises `metadata.generation`.

**Shared processes.** With `shareProcessNamespace`, and in an ephemeral container with a target, the containers see each other's processes
and those of the runtime, may signal them, and are not PID 1. They run as one user, but each in a user namespace of its own, so one cannot
read the files (`/proc/PID/root`) or the memory of another's processes. This needs user namespaces: with a setuid runtime such a container
fails with `CreateContainerError`.

## Host paths

A pod can mount the paths of the compute nodes that the site file names in `policy.host_paths`, and what lies below them: read-only unless the
entry is `writable`. If several entries cover a path, the most specific one decides. Without an entry, every `hostPath` is rejected.

- A path that the site has read-only must have `readOnly: true` in every `volumeMounts` of the pod, or the pod is rejected. It is then
  read-only together with every file system that is mounted below it.
- The path is opened on the compute node when a container starts: node-local paths are those of that node. Symbolic links in the site's
  own path are followed. Below it, a link that leads out of it is not followed, and neither is an absolute link.
- The HPC user's home directory itself, `~/.ssh`, keys, sockets, `/proc` and KNoC's own folders are never mounted, and neither is a
  directory that contains one of them, such as `/tmp` if the jobs' own files lie there (`job.scratch`).
- A path that is missing or of another type fails the start of the container with `hostPath type check failed`, which is repeated
  by the pod's `restartPolicy`.
- Containers write with the rights of the HPC user. The node needs user namespaces; with a setuid runtime, the container does not start.

The site may also mount paths of its own into every container (`[[bind]]` in the site file, for all partitions or some). A volume that
the pod mounts at the same path replaces such a mount.

## Claims and NFS

The kubelet resolves a claim to its PersistentVolume. A pod whose claim is not bound waits with the Event `FailedMount`; usually the
scheduler does not bind such a pod to the node, and says so. What can be mounted:

- `hostPath` and `local`: the path must be among the [host paths](#host-paths) of the site.
- `nfs` (also in a pod) and `csi`: nothing is mounted over the network for a pod. The site file maps exports and drivers to paths at
  which the compute nodes have them already (`[[policy.nfs]]`, `[[policy.csi]]`), which must be among the host paths too.

A volume of another kind, or one of `volumeMode: Block`, is rejected. Mount options and access modes are not enforced.

## Probes and hooks

They run inside the job, also while the agent or the kubelet is away, by Kubernetes' rules for delays, thresholds, the startup probe,
grace periods and Events. What is particular here:

- They reach only what the pod itself listens on: at the loopback address or, if nothing listens there, at the address where the pod
  does. If another pod or the node listens on the port, the probe fails and says so, and nothing is sent there.
- A port that is given by its name must be among the `ports` of the same container.
- While its `postStart` hook runs, a container is shown as on any node: waiting, with the reason `ContainerCreating` or `PodInitializing`,
  and a pod that has not run before is Pending. The containers behind it in the list wait for the hook. `kubectl exec` and
  `kubectl logs` work already. If the pod is deleted meanwhile, the hook is ended.
- Once a container is being stopped, only its readiness probe goes on, until its program has ended.
- Redirects are followed on the same host only, at most ten. Of a response or an output, 10 KiB are read.
- A probe that fails again and again gives one Event whose count grows, every 30 seconds at most.
";

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Honoured => "honoured",
            Self::Satisfied => "satisfied",
            Self::Mapped => "mapped",
            Self::Rejected => "**rejected**",
            Self::Inside(_) => "see its fields",
        }
    }
}

#[cfg(test)]
mod tests;
