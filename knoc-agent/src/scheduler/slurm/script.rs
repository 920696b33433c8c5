//! PURE: the batch script and sbatch's arguments.
//!
//! The script contains nothing from the pod, and in the arguments each string of the pod is a
//! single argv element. The script is the site's prelude and one `exec` of the shim, with two paths
//! that the agent chose.

use std::path::Path;

use knoc_proto::{ids::PodUid, pb};

use super::{
    Settings, flags,
    shape::{PartitionLimits, Shape, partition},
};
use crate::{
    config::Policy,
    scheduler::{Rendered, SubmitError, SubmitRequest},
};

/// The first word of every comment: the version of its format.
const COMMENT_VERSION: &str = "knoc/1";
/// Slurm limits a comment to 1024 bytes; the parts that come from Kubernetes are cut to this
/// length.
const COMMENT_PART: usize = 253;

/// The name of every job of a pod.
#[must_use]
pub(in crate::scheduler) fn job_name(uid: &PodUid) -> String {
    format!("knoc-{uid}")
}

/// The pod's UID, if the job's name is one of ours.
#[must_use]
pub(in crate::scheduler) fn uid_of_name(name: &str) -> Option<PodUid> {
    name.strip_prefix("knoc-")
        .and_then(|uid| PodUid::try_from(uid).ok())
}

/// `knoc/1 <cluster ID> <namespace>/<pod> <UID> <attempt>`; `-` means no cluster.
fn comment(request: &SubmitRequest) -> String {
    let SubmitRequest {
        uid, spec, attempt, ..
    } = request;
    let cluster = word(&request.cluster_id);
    let (namespace, name) = (word(&spec.namespace), word(&spec.name));
    format!("{COMMENT_VERSION} {cluster} {namespace}/{name} {uid} {attempt}")
}

/// A string as one word of the comment.
fn word(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let clean = |c: char| {
        if c.is_ascii_graphic() && c != '|' {
            c
        } else {
            '_'
        }
    };
    text.chars().take(COMMENT_PART).map(clean).collect()
}

/// The cluster ID and the attempt in a comment of ours; `None` if it is not ours, or of another
/// pod.
#[must_use]
pub(super) fn parse_comment(comment: &str, uid: &PodUid) -> Option<(String, u32)> {
    let mut words = comment.split(' ');
    let (version, cluster) = (words.next()?, words.next()?);
    let (_pod, its_uid) = (words.next()?, words.next()?);
    let attempt = words.next()?.parse().ok()?;
    let ours = version == COMMENT_VERSION && its_uid == uid.as_str();
    let cluster = if cluster == "-" { "" } else { cluster };
    ours.then(|| (cluster.to_owned(), attempt))
}

/// The pod that a comment names, if it is one of ours.
#[must_use]
pub(super) fn uid_of_comment(comment: &str) -> Option<PodUid> {
    let uid = PodUid::try_from(comment.split(' ').nth(3)?).ok()?;
    parse_comment(comment, &uid).map(|_| uid)
}

/// Renders what is submitted for a pod.
pub(super) fn render(
    request: &SubmitRequest,
    site: &Settings,
    partitions: &[PartitionLimits],
) -> Result<Rendered, SubmitError> {
    let shape = Shape::of(&request.spec, site, partitions)?;
    let job = request.spec.job.clone().unwrap_or_default();
    let policy = site.policy.now();
    flags::check(&job.flags, &policy.flags).map_err(SubmitError::permanent)?;
    let foreign = foreign_choices(&job, &policy);
    if !foreign.is_empty() {
        return Err(SubmitError::permanent(foreign.join("; ")));
    }
    let mut argv = vec![site.sbatch.to_string_lossy().into_owned()];
    argv.extend(identity(request, &shape)?);
    argv.extend(resources(&shape));
    argv.extend(job.mpi.as_ref().map(ranks).unwrap_or_default());
    argv.extend(choices(&job, site));
    argv.extend(job.flags.iter().cloned());
    let script = script(&site.prelude, &request.shim, &request.jobdir)?;
    Ok(Rendered {
        argv,
        script,
        notes: shape.notes,
    })
}

/// The partitions, accounts and QOS that the pod names and the site's policy does not allow, one
/// sentence each.
fn foreign_choices(job: &pb::JobRequest, policy: &Policy) -> Vec<String> {
    let lists = [
        (
            "partition",
            &job.partition,
            &policy.partitions,
            "partitions",
        ),
        ("account", &job.account, &policy.accounts, "accounts"),
        ("qos", &job.qos, &policy.qos, "qos"),
    ];
    let mut problems = Vec::new();
    for (what, named, allowed, key) in lists {
        // Slurm accepts several, separated by commas.
        let foreign = named
            .split(',')
            .filter(|name| !name.is_empty() && !allowed.is_empty())
            .filter(|name| !allowed.iter().any(|allowed| allowed == name));
        problems.extend(foreign.map(|name| {
            let list = allowed.join(", ");
            format!("{what} {name:?} is not among policy.{key} of this site ({list})")
        }));
    }
    problems
}

fn identity(request: &SubmitRequest, shape: &Shape) -> Result<Vec<String>, SubmitError> {
    let dir = path_text(&request.jobdir)?;
    // In sbatch's file names, `%` starts a pattern.
    let output = dir.replace('%', "%%");
    Ok(vec![
        "--parsable".to_owned(),
        format!("--job-name={}", job_name(&request.uid)),
        format!("--comment={}", comment(request)),
        format!("--chdir={dir}"),
        format!("--output={output}/batch.out"),
        "--open-mode=append".to_owned(),
        if shape.requeue {
            "--requeue"
        } else {
            "--no-requeue"
        }
        .to_owned(),
        // The environment contains only what the site names, so all of it is exported. A list of
        // names would make slurmd run a login shell for each job.
        "--export=ALL".to_owned(),
        // sbatch would pass on the resource limits of the agent's own process, which come from the
        // shell that started it.
        "--propagate=NONE".to_owned(),
    ])
}

fn resources(shape: &Shape) -> Vec<String> {
    let mut argv = vec![
        format!("--nodes={}", shape.nodes),
        format!("--ntasks={}", shape.ntasks),
        format!("--cpus-per-task={}", shape.cpus_per_task),
    ];
    argv.extend(shape.memory_mib.map(|mib| format!("--mem={mib}M")));
    argv.extend(shape.tmp_mib.map(|mib| format!("--tmp={mib}M")));
    let minutes = shape.time_minutes.map(|minutes| minutes.to_string());
    argv.push(format!(
        "--time={}",
        minutes.as_deref().unwrap_or("UNLIMITED")
    ));
    argv.extend(
        shape
            .signal_seconds
            .map(|seconds| format!("--signal=B:USR2@{seconds}")),
    );
    if !shape.gres.is_empty() {
        argv.push(format!("--gres={}", shape.gres.join(",")));
    }
    argv
}

/// What the allocation must allow for the ranks of the pod. How they are placed within it, the shim tells srun.
fn ranks(mpi: &pb::Mpi) -> Vec<String> {
    let mut argv = Vec::new();
    if mpi.ranks_per_node > 0 {
        argv.push(format!("--ntasks-per-node={}", mpi.ranks_per_node));
    }
    if mpi.overcommit {
        argv.push("--overcommit".to_owned());
    }
    argv
}

fn choices(job: &pb::JobRequest, site: &Settings) -> Vec<String> {
    let named = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
    let options = [
        ("partition", partition(job, site)),
        (
            "account",
            named(&job.account).or_else(|| site.account.clone()),
        ),
        ("qos", named(&job.qos).or_else(|| site.qos.clone())),
        ("constraint", named(&job.constraint)),
        ("reservation", named(&job.reservation)),
        ("licenses", named(&job.licenses)),
        ("dependency", named(&job.dependency)),
        ("nice", (job.nice != 0).then(|| job.nice.to_string())),
    ];
    let options = options
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    let mut argv: Vec<String> = options
        .map(|(name, value)| format!("--{name}={value}"))
        .collect();
    if job.exclusive {
        argv.push("--exclusive".to_owned());
    }
    argv
}

/// Renders the batch script.
pub(in crate::scheduler) fn script(
    prelude: &str,
    shim: &Path,
    jobdir: &Path,
) -> Result<String, SubmitError> {
    let (shim, jobdir) = (quote(path_text(shim)?), quote(path_text(jobdir)?));
    // USR2 announces the time limit, and USR1 is the agent's own stop signal. Both end a process
    // that does not handle them, and the shim of the job directory may be an older one. So they are
    // ignored until a shim installs handlers.
    let words = [shim, "shim".to_owned(), jobdir];
    Ok(batch(prelude, "trap '' USR1 USR2\n", &words))
}

/// A batch script of the site's prelude, further lines, and one `exec` of words that are quoted already.
pub(super) fn batch(prelude: &str, lines: &str, words: &[String]) -> String {
    let mut script = "#!/bin/sh\n".to_owned();
    if !prelude.trim().is_empty() {
        script.push_str(prelude.trim_end());
        script.push('\n');
    }
    script.push_str(lines);
    script.push_str("exec ");
    script.push_str(&words.join(" "));
    script.push('\n');
    script
}

fn path_text(path: &Path) -> Result<&str, SubmitError> {
    let text = path
        .to_str()
        .filter(|text| !text.contains(['\n', '\r', '\0']));
    text.filter(|text| text.starts_with('/')).ok_or_else(|| {
        SubmitError::permanent(format!(
            "{} is not an absolute path of plain characters",
            path.display()
        ))
    })
}

/// Quotes any text as one word of a POSIX shell.
#[must_use]
pub(in crate::scheduler) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests;
