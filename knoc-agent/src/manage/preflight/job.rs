//! A job of some seconds that looks at a compute node before anything is installed.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use knoc_contract::host::node_name;

use super::{Failed, Found, PORTS, wrong};
use crate::run_mode::Login;

/// How long the job may wait for its start, in the words of srun.
const IMMEDIATE: &str = "--immediate=60";
/// How long all of it may take.
const LIMIT: Duration = Duration::from_mins(3);
/// What each line of the answer begins with, behind whatever a prolog prints.
const MARK: &str = "knoc-preflight ";

/// The script that the job runs. Its arguments are the marker file, this host and the port for jobs.
const SCRIPT: &str = r#"
say() { printf 'knoc-preflight %s %s\n' "$1" "$2"; }
say node "$(uname -n)"
say machine "$(uname -m)"
if [ -f "$1" ]; then say shared yes; else say shared no; fi
if unshare --user --map-root-user true 2>/dev/null; then say namespaces yes; else say namespaces no; fi
for program in apptainer singularity; do
    if command -v $program >/dev/null; then say runtime "$($program --version 2>/dev/null)"; break; fi
done
if command -v pasta >/dev/null; then say pasta yes; else say pasta no; fi
if [ -c /dev/net/tun ] && [ -r /dev/net/tun ] && [ -w /dev/net/tun ]; then say tun yes; else say tun no; fi
say shm "$(stat -f -c %T /dev/shm 2>/dev/null)"
while read -r _ place _ options _; do
    case $place:,$options, in /dev/shm:*,noexec,*) say programs no ;; esac
done </proc/mounts
said=$(LC_ALL=C timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$2" "$3" 2>&1)
case $?:$said in
0:* | *refused*) say dial reached ;;
*) say dial not ;;
esac
"#;

/// The marker file in the home directory; dropping it removes it.
struct Marker(PathBuf);

impl Marker {
    fn create(home: &Path) -> std::io::Result<Self> {
        let path = home.join(format!(".knoc-preflight.{}", std::process::id()));
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        // If it is left over, it is an empty file of the user's own.
        fs::remove_file(&self.0).ok();
    }
}

/// Runs the job; returns what it found.
pub(super) async fn run(login: &Login, home: &Path) -> Vec<(&'static str, Found)> {
    let marker = match Marker::create(home) {
        Ok(marker) => marker,
        Err(error) => {
            let text = format!("create a file in {}: {error}", home.display());
            return vec![("job", wrong(text, "make room in the home directory"))];
        }
    };
    let command = login
        .command("srun")
        .args([
            IMMEDIATE,
            "--job-name=knoc-preflight",
            "--ntasks=1",
            "--time=1",
        ])
        .args(["/bin/sh", "-s", "--"])
        .arg(&marker.0)
        .args([node_name(), PORTS[1].to_string()])
        .stdin(SCRIPT.as_bytes().to_vec())
        .deadline(LIMIT);
    match command.run().await {
        Ok(output) => findings(&output.text(), output.elapsed),
        Err(error) => vec![(
            "job",
            Err(Failed::new(
                knoc_proto::error::chain(&error),
                "submit a job by hand (`srun --time=1 hostname`); if the site wants an account or a partition, set SLURM_ACCOUNT or \
                 SLURM_PARTITION for this command and name them under [job] of the site file later",
            )),
        )],
    }
}

/// PURE: the findings in the job's output.
fn findings(output: &str, took: Duration) -> Vec<(&'static str, Found)> {
    let said = |name: &str| {
        let lines = output.lines().filter_map(|line| line.strip_prefix(MARK));
        let mut pairs = lines.filter_map(|line| line.split_once(' '));
        pairs.find_map(|(found, value)| (found == name).then(|| value.trim()))
    };
    let Some(node) = said("node") else {
        let cure = "see that `srun --time=1 hostname` prints a name";
        return vec![("job", wrong("the job has printed nothing", cure))];
    };
    let yes = |name: &str, good: &str, bad: &str, cure: &str| match said(name) {
        Some("yes") => Ok(good.to_owned()),
        _ => wrong(bad, cure),
    };
    let machine = match said("machine") {
        Some("x86_64") => Ok(format!("ran on {node} after {} s", took.as_secs())),
        other => wrong(
            format!("{node} is {}", other.unwrap_or("of an unknown kind")),
            "KNoC is built for x86-64 only; use a partition of that kind",
        ),
    };
    vec![
        ("job", machine),
        (
            "job: home directory",
            yes(
                "shared",
                "the compute node sees files of this host's home directory",
                "the compute node does not see files of this host's home directory",
                "set state_dir of the site file to a folder that both share",
            ),
        ),
        ("job: runtime", job_runtime(said("runtime"))),
        (
            "job: user namespaces",
            yes(
                "namespaces",
                "the account may create them on the compute node",
                "the account may not create them on the compute node",
                "containers need them unless the runtime is setuid, and exec always: ask the site to allow user namespaces",
            ),
        ),
        ("job: private networks", Ok(job_pasta(said("pasta")))),
        ("job: addresses of pods", Ok(job_tun(said("tun")))),
        ("job: memory", job_memory(said("shm"), said("programs"))),
        ("job: way to this host", Ok(job_dial(said("dial")))),
    ]
}

fn job_runtime(said: Option<&str>) -> Found {
    match said.filter(|version| !version.is_empty()) {
        Some(version) => Ok(version.to_owned()),
        None => wrong(
            "neither apptainer nor singularity is in PATH of a job",
            "the site file's `prelude` can load a module: prelude = \"module load apptainer\"",
        ),
    }
}

fn job_pasta(said: Option<&str>) -> String {
    match said {
        Some("yes") => "pasta is on the compute node, so pods can have a network of their own",
        _ => "pasta is not on the compute node: pods use the network of their node",
    }
    .to_owned()
}

fn job_tun(said: Option<&str>) -> String {
    match said {
        Some("yes") => {
            "the account may use /dev/net/tun on the compute node, so pods can have addresses of their own (node.podIP: own)"
        }
        _ => {
            "the account may not use /dev/net/tun on the compute node: pods have no addresses of their own (node.podIP: own)"
        }
    }
    .to_owned()
}

fn job_memory(said: Option<&str>, programs: Option<&str>) -> Found {
    match said {
        Some("tmpfs") if programs == Some("no") => Ok(
            "/dev/shm is a tmpfs, so Secrets stay in memory; it is mounted with noexec, so no file of a ConfigMap or a Secret can be \
             executed, only read by a program (`sh FILE`)"
                .to_owned(),
        ),
        Some("tmpfs") => Ok("/dev/shm is a tmpfs, so Secrets stay in memory".to_owned()),
        other => wrong(
            format!(
                "/dev/shm is {}",
                other.filter(|kind| !kind.is_empty()).unwrap_or("missing")
            ),
            "set memory_fallback = \"disk\" under [values] of the site file, if Secrets may be on the node's disk",
        ),
    }
}

/// If there is no way, a job step carries the link.
fn job_dial(said: Option<&str>) -> String {
    let port = PORTS[1];
    match said {
        Some("reached") => format!("compute nodes reach port {port} of {}", node_name()),
        _ => format!(
            "compute nodes do not reach port {port} of {}: job steps (srun --overlap) will carry exec, attach, port-forward and cp",
            node_name()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "Welcome\nknoc-preflight node c1\nknoc-preflight machine x86_64\nknoc-preflight shared yes\n\
        knoc-preflight namespaces yes\nknoc-preflight runtime apptainer version 1.4.5\nknoc-preflight pasta no\n\
        knoc-preflight tun yes\nknoc-preflight shm tmpfs\nknoc-preflight dial reached\n";

    fn bad(output: &str) -> Vec<&'static str> {
        let found = findings(output, Duration::from_secs(3)).into_iter();
        found
            .filter(|(_, found)| found.is_err())
            .map(|(what, _)| what)
            .collect()
    }

    #[test]
    fn each_line_of_the_job_is_a_finding() {
        assert!(bad(GOOD).is_empty());
        assert_eq!(findings(GOOD, Duration::ZERO).len(), 8);
        for (line, worse, what) in [
            ("machine x86_64", "machine aarch64", "job"),
            ("shared yes", "shared no", "job: home directory"),
            ("namespaces yes", "namespaces no", "job: user namespaces"),
            ("runtime apptainer version 1.4.5", "", "job: runtime"),
            ("shm tmpfs", "shm ", "job: memory"),
        ] {
            assert_eq!(bad(&GOOD.replace(line, worse)), [what]);
        }
        let noexec = format!("{GOOD}knoc-preflight programs no\n");
        assert!(bad(&noexec).is_empty());
        let said = job_memory(Some("tmpfs"), Some("no"));
        assert!(said.is_ok_and(|text| text.contains("noexec")));
        // Neither is a reason not to install.
        assert!(bad(&GOOD.replace("dial reached", "dial not")).is_empty());
        assert!(bad(&GOOD.replace("tun yes", "tun no")).is_empty());
        assert_eq!(bad("srun: job 7 queued\n"), ["job"]);
    }
}
