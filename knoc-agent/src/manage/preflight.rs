//! What can be checked on a login node before anything is installed there, for `knocctl doctor --preflight`. Nothing is
//! changed. With `probe`, a job runs for some seconds and a file lies in the home directory meanwhile.
//!
//! Each finding stands alone: one that fails ends nothing.

mod job;

use std::{path::Path, time::Duration};

use knoc_contract::setuid;
use knoc_proto::{error::chain, manage::RunMode};
use nix::sys::{
    statfs::{FsType, statfs},
    statvfs::statvfs,
};
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpSocket, TcpStream};

use super::{Account, Failed, Steps};
use crate::run_mode::{Login, choose, detect};

/// How long a program or a connection may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The commands of Slurm that the agent runs.
const COMMANDS: [&str; 6] = ["sbatch", "squeue", "scancel", "sinfo", "sacct", "srun"];
/// The first version of Slurm that knows `srun --overlap`.
const OLDEST: (u32, u32) = (20, 11);
/// Fewer open files allow few pods only.
const FEW_FILES: u64 = 1024;
/// Less free space is not enough for images.
const LITTLE_SPACE: u64 = 2 << 30;
/// The ports on which an agent listens unless its site file says otherwise: for kubelets and for jobs.
const PORTS: [u16; 2] = [10350, 10351];
/// Where images without a registry's name come from.
const REGISTRY: &str = "registry-1.docker.io:443";

type Found = Result<String, Failed>;

fn wrong(detail: impl Into<String>, cure: &str) -> Found {
    Err(Failed::new(detail.into(), cure))
}

impl Account {
    /// Lists what an installation would find here.
    pub(super) async fn preflight(&self, probe: bool, steps: &mut Steps) {
        let login = &self.login;
        let mut note = |what: &str, found: Found| {
            // The next finding does not depend on this one.
            steps.add(what, found).ok();
        };
        note("machine", machine(std::env::consts::ARCH));
        note("limits", limits());
        note("home directory", folder(&self.home.home));
        note("slurm: commands", commands(login));
        note("slurm: version", version(login).await);
        note("slurm: controller", controller(login).await);
        note("slurm: accounting", accounting(login).await);
        note("runtime", runtime(login).await);
        note("user namespaces", namespaces(login).await);
        note("private networks", Ok(pasta(login)));
        note("run mode", Ok(run_modes(login).await));
        note("ports", ports());
        note("registry", registry(login).await);
        if probe {
            for (what, found) in job::run(login, &self.home.home).await {
                note(what, found);
            }
        }
        self.forget_upload();
    }
}

/// Whether there is a program for this processor.
fn machine(architecture: &str) -> Found {
    let host = knoc_contract::host::node_name();
    let system = rustix::system::uname();
    let text = format!(
        "Linux {} on {architecture}, {host}",
        system.release().to_string_lossy()
    );
    if architecture == "x86_64" {
        Ok(text)
    } else {
        wrong(
            text,
            "KNoC is built for x86-64 only; use a login node and a partition of that kind",
        )
    }
}

fn limits() -> Found {
    let most = |resource| getrlimit(resource).maximum;
    judge_limits(
        most(Resource::Nofile),
        most(Resource::Nproc),
        most(Resource::Cpu),
    )
}

/// PURE: judges the hard limits of open files, processes and seconds of processor time; `None` is unlimited.
fn judge_limits(files: Option<u64>, processes: Option<u64>, cpu: Option<u64>) -> Found {
    let show = |limit: Option<u64>| {
        limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
    };
    let text = format!(
        "open files {}, processes {}, processor time {}",
        show(files),
        show(processes),
        cpu.map_or_else(|| "unlimited".to_owned(), |cpu| format!("{cpu} s"))
    );
    if cpu.is_some() {
        return wrong(
            text,
            "the site ends processes that use more processor time: run the agent elsewhere (--run-mode job or scrontab), or ask for an exception",
        );
    }
    if files.is_some_and(|files| files < FEW_FILES) {
        return wrong(
            text,
            "the agent needs about four open files for each pod: ask the site to raise the hard limit (ulimit -Hn)",
        );
    }
    Ok(text)
}

/// The folder that will hold the state, or the part of its path that exists.
fn folder(home: &Path) -> Found {
    let wanted = home.join(".local/state/knoc");
    let mut parts = wanted.ancestors();
    let there = parts.find(|path| path.is_dir()).unwrap_or(home);
    let looked = statfs(there).and_then(|kind| Ok((kind, statvfs(there)?)));
    match looked {
        Ok((kind, space)) => {
            let free = space
                .blocks_available()
                .saturating_mul(space.fragment_size());
            judge_folder(&wanted, kind.filesystem_type(), free)
        }
        Err(error) => wrong(
            format!("{}: {error}", there.display()),
            "see that the home directory of the account exists on this host",
        ),
    }
}

/// PURE: judges the type of the file system and its free space.
fn judge_folder(wanted: &Path, kind: FsType, free: u64) -> Found {
    let name = file_system(kind);
    let text = format!(
        "{} is on {name}, with {} GiB free",
        wanted.display(),
        free >> 30
    );
    match name {
        "tmpfs" => wrong(
            text,
            "compute nodes do not see this host's memory: set state_dir to a folder that they share",
        ),
        _ if free < LITTLE_SPACE => wrong(
            text,
            "images and logs need space: make room, or set state_dir to a folder of a larger file system",
        ),
        "ext4" | "xfs" | "btrfs" | "overlay" => Ok(format!(
            "{text}; this host's own disk? Whether compute nodes see it is found out with --probe"
        )),
        _ => Ok(text),
    }
}

/// PURE: the name of a type of file systems, see statfs(2).
fn file_system(kind: FsType) -> &'static str {
    match kind {
        FsType(0x0102_1994) => "tmpfs",
        FsType(0xEF53) => "ext4",
        FsType(0x5846_5342) => "xfs",
        FsType(0x9123_683E) => "btrfs",
        FsType(0x794C_7630) => "overlay",
        FsType(0x6969) => "nfs",
        FsType(0x0BD0_0BD0) => "lustre",
        FsType(0x4750_4653) => "gpfs",
        FsType(0x1983_0326) => "beegfs",
        FsType(0x00C3_6400) => "ceph",
        FsType(0x6573_5546) => "fuse",
        _ => "a file system of another kind",
    }
}

fn commands(login: &Login) -> Found {
    let missing: Vec<&str> = COMMANDS
        .into_iter()
        .filter(|name| login.find(name).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(format!("{} are in PATH", COMMANDS.join(", ")));
    }
    wrong(
        format!("not in PATH: {}", missing.join(", ")),
        "load the site's module of Slurm and run this again; the agent finds the commands by PATH under [env] of its site file",
    )
}

/// Runs a program of the site; returns what it printed.
async fn said(login: &Login, program: &str, args: &[&str]) -> Result<String, String> {
    let run = login.command(program).args(args).deadline(PATIENCE).run();
    match run.await {
        Ok(output) => Ok(output.text().trim().to_owned()),
        Err(error) => Err(chain(&error)),
    }
}

async fn version(login: &Login) -> Found {
    let cure = "see that `sinfo --version` works in a fresh login";
    match said(login, "sinfo", &["--version"]).await {
        Ok(text) => judge_version(&text),
        Err(error) => wrong(error, cure),
    }
}

/// PURE: judges what `sinfo --version` prints, such as `slurm 24.11.5` or `slurm-wlm 22.05.8`.
fn judge_version(text: &str) -> Found {
    let number = text.split_whitespace().last().unwrap_or_default();
    let mut parts = number.split('.').map(|part| part.parse().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => Ok(text.to_owned()),
        (Some(_), Some(_)) => wrong(
            text,
            "KNoC needs `srun --overlap`, which Slurm has since 20.11",
        ),
        _ => wrong(
            format!("{text:?} is not a version"),
            "see that `sinfo --version` works in a fresh login",
        ),
    }
}

async fn controller(login: &Login) -> Found {
    let cure = "the account must be able to use Slurm from this host: `sinfo` shows why it cannot";
    match said(login, "sinfo", &["--noheader", "--format=%R (%a, %l)"]).await {
        Ok(text) if text.is_empty() => wrong("the account sees no partition", cure),
        Ok(text) => {
            let mut names: Vec<&str> = text.lines().map(str::trim).collect();
            names.sort_unstable();
            names.dedup();
            let more = names.len().saturating_sub(8);
            names.truncate(8);
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            Ok(format!("answers; partitions {}{more}", names.join(", ")))
        }
        Err(error) => wrong(error, cure),
    }
}

async fn accounting(login: &Login) -> Found {
    let asked = said(
        login,
        "sacct",
        &["--allocations", "--noheader", "--starttime=now"],
    )
    .await;
    match asked {
        Ok(_) => Ok("sacct answers".to_owned()),
        Err(error) => wrong(
            error,
            "KNoC works without the accounting database, but the ends of jobs that left no report are less exact",
        ),
    }
}

async fn runtime(login: &Login) -> Found {
    let found = ["apptainer", "singularity"]
        .into_iter()
        .find_map(|name| Some((name, login.find(name)?)));
    let Some((name, path)) = found else {
        return wrong(
            "neither apptainer nor singularity is in PATH",
            "load the site's module and run this again; the agent loads it by `prelude` of its site file",
        );
    };
    let version = match said(login, name, &["--version"]).await {
        Ok(version) => version,
        Err(error) => return wrong(error, "see that the runtime works in a fresh login"),
    };
    match setuid::starter(name, &path) {
        None => Ok(format!("{version}, {}", path.display())),
        Some(starter) => wrong(
            format!("{version} is set up by root ({})", starter.display()),
            "containers run, but exec, hostPath, subPath of a writable volume and private networks do not: ask the site to install \
             Apptainer without its setuid part, or to set `allow setuid = no`",
        ),
    }
}

async fn namespaces(login: &Login) -> Found {
    match said(login, "unshare", &["--user", "--map-root-user", "true"]).await {
        Ok(_) => Ok("the account may create them on this host".to_owned()),
        Err(error) => wrong(
            error,
            "ask the site to allow user namespaces (user.max_user_namespaces, kernel.unprivileged_userns_clone, AppArmor)",
        ),
    }
}

/// A pod can do without.
fn pasta(login: &Login) -> String {
    match login.find("pasta") {
        Some(path) => format!("{} is here", path.display()),
        None => "pasta is not on this host; without it on the compute nodes, pods use the network of their node".to_owned(),
    }
}

/// One is always possible.
async fn run_modes(login: &Login) -> String {
    let found = detect(login).await;
    let list = found.iter().map(|one| {
        let may = if one.allowed { "yes" } else { "no" };
        format!("{} {may} ({})", one.mode, one.why)
    });
    let list: Vec<String> = list.collect();
    let chosen = match choose(&found) {
        RunMode::OnDemand => {
            "nothing keeps an agent running here but a job: over SSH each link starts it, over TCP start it by `knoc-agent serve --detach`"
                .to_owned()
        }
        mode @ (RunMode::Systemd | RunMode::Cron | RunMode::Scrontab | RunMode::Job) => {
            format!("the agent would be kept running by {mode}")
        }
    };
    format!("{chosen}; {}", list.join(", "))
}

/// Binds the ports for a moment, without listening.
fn ports() -> Found {
    let taken = |port: &u16| {
        let bound = TcpSocket::new_v4().and_then(|socket| {
            // As the agent does: connections of an earlier agent that linger do not count.
            socket.set_reuseaddr(true)?;
            socket.bind(([0, 0, 0, 0], *port).into())
        });
        bound.is_err()
    };
    let taken: Vec<String> = PORTS
        .iter()
        .filter(|port| taken(port))
        .map(u16::to_string)
        .collect();
    if taken.is_empty() {
        return Ok(format!(
            "{} (kubelets) and {} (jobs) are free on this host",
            PORTS[0], PORTS[1]
        ));
    }
    wrong(
        format!("in use on this host: {}", taken.join(", ")),
        "another agent, perhaps of another user? Set other ports under [listen] of the site file, or let the kubelet come over SSH",
    )
}

async fn registry(login: &Login) -> Found {
    let proxy = ["HTTPS_PROXY", "https_proxy"];
    if proxy.iter().any(|name| login.get(name).is_some()) {
        return Ok("HTTPS_PROXY is set, so registries were not dialled; name the proxy under [env] of the site file".to_owned());
    }
    let cure = "name a proxy under [env] or a mirror ([[registry]]) in the site file, or use SIF files of the site (image_roots)";
    match tokio::time::timeout(PATIENCE, TcpStream::connect(REGISTRY)).await {
        Ok(Ok(_)) => Ok(format!("{REGISTRY} is reached")),
        Ok(Err(error)) => wrong(format!("{REGISTRY}: {error}"), cure),
        Err(_) => wrong(format!("{REGISTRY}: no answer within {PATIENCE:?}"), cure),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn an_old_slurm_is_named() {
        for good in ["slurm 24.11.5", "slurm-wlm 22.05.8", "slurm 20.11.0"] {
            assert_eq!(judge_version(good).unwrap(), good);
        }
        let failed = judge_version("slurm 19.05.2").unwrap_err();
        assert!(failed.cure.contains("20.11"), "{failed:?}");
        judge_version("command not found").unwrap_err();
    }

    #[test]
    fn limits_that_end_an_agent_or_allow_few_pods_are_named() {
        judge_limits(Some(524_288), Some(500), None).unwrap();
        judge_limits(None, None, None).unwrap();
        let few = judge_limits(Some(256), None, None).unwrap_err();
        assert!(few.detail.contains("open files 256"), "{few:?}");
        let short = judge_limits(None, None, Some(600)).unwrap_err();
        assert!(short.detail.contains("processor time 600 s"), "{short:?}");
    }

    #[test]
    fn a_folder_that_compute_nodes_cannot_see_is_named() {
        let path = PathBuf::from("/home/ann/.local/state/knoc");
        let judge = |kind, gib: u64| judge_folder(&path, kind, gib << 30);
        assert!(
            judge(FsType(0x6969), 40)
                .unwrap()
                .contains("on nfs, with 40 GiB")
        );
        assert!(judge(FsType(0xEF53), 40).unwrap().contains("--probe"));
        assert!(
            judge(FsType(0x0102_1994), 40)
                .unwrap_err()
                .cure
                .contains("state_dir")
        );
        assert!(
            judge(FsType(0x6969), 1)
                .unwrap_err()
                .cure
                .contains("make room")
        );
    }

    #[test]
    fn another_processor_is_named() {
        machine("x86_64").unwrap();
        assert!(machine("aarch64").unwrap_err().cure.contains("x86-64"));
    }
}
