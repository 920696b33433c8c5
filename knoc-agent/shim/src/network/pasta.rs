//! pasta(1), which leads from the pod's network namespace to the networks of the node, without privileges: it translates
//! the pod's connections to sockets of its own.
//!
//! It gives nothing else away. No port is forwarded in either direction, and no address of the pod's network stands for
//! the node's loopback interface, on which services of other users rely on being local.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{ADDRESS, holder::Holder};
use crate::{
    children::{Child, Children, Exit},
    fdio::Stream,
    launch::network::protocol::{GATEWAY, OUTWARD},
    output,
};

/// The size of the network that the pod shares with the first hop to other networks.
const PREFIX: &str = "29";

/// How long pasta may take to configure the pod's interface, and how often the shim looks.
const PATIENCE: Duration = Duration::from_secs(10);
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// How long its standard error is read after it has ended.
const STDERR_GRACE: Duration = Duration::from_millis(500);
const STDERR_BYTES: usize = 1024;

/// The node's IPv4 routes.
const ROUTES: &str = "/proc/self/net/route";

/// What pasta is started with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Options<'a> {
    /// Where the program is looked for first.
    pub(super) path: &'a str,
    /// The process whose namespaces are the pod's.
    pub(super) holder: u32,
    /// Whether the pod has the node's IPv6 addresses and routes too.
    pub(super) ipv6: bool,
}

/// Folders in which pasta is looked for after those of `PATH`.
const FOLDERS: &str = "/usr/bin:/bin:/usr/local/bin";

/// Why the pod reaches no other network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PastaError {
    #[error("pasta (package passt) is not installed on the compute node")]
    Missing,
    #[error("start {}", path.display())]
    Start {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("pasta ended with code {code}: {message}")]
    Ended { code: i32, message: String },
    #[error("pasta did not configure the pod's network within {} s", PATIENCE.as_secs())]
    Slow,
    #[error("look for the pod's routes")]
    Holder(#[source] io::Error),
}

/// A running pasta, which is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Pasta {
    child: Child,
    children: Children,
    stderr: Arc<Mutex<Vec<u8>>>,
    /// Reads standard error.
    tasks: JoinSet<io::Result<()>>,
}

impl Pasta {
    /// Starts it on the pod's namespaces.
    pub(super) fn start(children: &Children, options: &Options<'_>) -> Result<Self, PastaError> {
        let program = find(options.path).ok_or(PastaError::Missing)?;
        let routes = fs::read_to_string(ROUTES).unwrap_or_default();
        let arguments = arguments(options, interface(&routes));
        let started = spawn(children, &program, &arguments);
        started.map_err(|source| PastaError::Start {
            path: program,
            source,
        })
    }

    /// Waits until the pod has a default route.
    pub(super) async fn wait_until_routed(
        &mut self,
        holder: &Arc<Holder>,
    ) -> Result<(), PastaError> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            tokio::select! {
                biased;
                exit = self.child.wait() => return Err(self.end(exit).await),
                routed = holder.is_routed() => {
                    if routed.map_err(PastaError::Holder)? {
                        return Ok(());
                    }
                }
            }
            sleep(BETWEEN_LOOKS).await;
        }
        Err(PastaError::Slow)
    }

    /// Waits for its end, which it should not reach before the pod does.
    pub(crate) async fn ended(&mut self) -> PastaError {
        let exit = self.child.wait().await;
        self.end(exit).await
    }

    async fn end(&mut self, exit: Exit) -> PastaError {
        tokio::time::timeout(STDERR_GRACE, self.tasks.join_next())
            .await
            .ok();
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&stderr);
        let lines: Vec<_> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        PastaError::Ended {
            code: exit.code,
            message: lines.join("; "),
        }
    }
}

impl Drop for Pasta {
    /// It must not outlive its purpose: if the pod is in the node's network after all, nothing else would end it.
    fn drop(&mut self) {
        self.children.kill_group(self.child.pid);
    }
}

fn find(path: &str) -> Option<PathBuf> {
    let folders = path.split(':').chain(FOLDERS.split(':'));
    let absolute = folders.filter(|folder| folder.starts_with('/'));
    absolute
        .map(|folder| Path::new(folder).join("pasta"))
        .find(|path| path.is_file())
}

/// PURE: the interface over which the node reaches other networks: that of its default route with the lowest metric, else
/// the first one. `routes` is the text of `/proc/net/route`.
fn interface(routes: &str) -> Option<&str> {
    let rows = routes.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (name, destination) = (fields.next()?, fields.next()?);
        let metric: u32 = fields.nth(4)?.parse().ok()?;
        let is_default = destination == "00000000" && fields.next()? == "00000000";
        (name != "lo").then_some((!is_default, metric, name))
    });
    // Of several with the same metric the first one counts, as in the kernel.
    let first = rows.min_by_key(|(is_other, metric, _)| (*is_other, *metric));
    first.map(|(.., name)| name)
}

/// PURE: its arguments.
fn arguments(options: &Options<'_>, interface: Option<&str>) -> Vec<OsString> {
    let namespace = |kind: &str| format!("/proc/{}/ns/{kind}", options.holder);
    let mut arguments: Vec<OsString> = ["--foreground", "--quiet", "--config-net", "--no-map-gw"]
        .map(OsString::from)
        .into();
    // Neither the node's ports in the pod nor the pod's on the node.
    for forwarding in ["-t", "-u", "-T", "-U"] {
        arguments.extend([forwarding, "none"].map(OsString::from));
    }
    let (address, gateway) = (ADDRESS.to_string(), GATEWAY.to_string());
    for (option, value) in [
        ("--address", address.as_str()),
        ("--netmask", PREFIX),
        ("--gateway", gateway.as_str()),
        ("--ns-ifname", OUTWARD),
    ] {
        arguments.extend([option, value].map(OsString::from));
    }
    // Otherwise pasta gives the pod the node's own IPv6 addresses.
    if !options.ipv6 {
        arguments.push("--ipv4-only".into());
    }
    if let Some(name) = interface {
        arguments.extend(["--interface", name].map(OsString::from));
    }
    arguments.extend([
        "--userns".into(),
        namespace("user").into(),
        "--netns".into(),
        namespace("net").into(),
    ]);
    arguments
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shim's one module that starts pasta"
)]
fn spawn(children: &Children, program: &Path, arguments: &[OsString]) -> io::Result<Pasta> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = children.spawn(&mut command, true)?;
    let stderr = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    if let Some(pipe) = child.stderr.take() {
        let stream = Stream::new(pipe.into())?;
        tasks.spawn(output::keep_tail(stream, STDERR_BYTES, Arc::clone(&stderr)));
    }
    Ok(Pasta {
        child,
        children: children.clone(),
        stderr,
        tasks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str =
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";

    #[test]
    fn the_interface_of_the_best_default_route_is_taken() {
        let line = |name: &str, destination: &str, metric: u32, mask: &str| {
            format!("{name}\t{destination}\t00000000\t0001\t0\t0\t{metric}\t{mask}\t0\t0\t0\n")
        };
        let near = line("ib0", "00000A0A", 0, "0000FFFF");
        let slow = line("eth1", "00000000", 200, "00000000");
        let fast = line("eth0", "00000000", 100, "00000000");
        let lo = line("lo", "0000007F", 0, "000000FF");
        let text = |lines: &[&String]| lines.iter().fold(HEAD.to_owned(), |all, line| all + line);
        assert_eq!(interface(&text(&[&near, &slow, &fast])), Some("eth0"));
        // A node without a default route.
        assert_eq!(interface(&text(&[&lo, &near])), Some("ib0"));
        assert_eq!(interface(&text(&[&lo])), None);
        assert_eq!(interface("rubbish\nx\n"), None);
    }

    #[test]
    fn nothing_of_the_node_is_given_away() {
        let line = |ipv6| {
            let options = Options {
                path: "",
                holder: 7,
                ipv6,
            };
            let all = arguments(&options, Some("eth0"));
            let all: Vec<_> = all.iter().map(|one| one.to_str().unwrap()).collect();
            all.join(" ")
        };
        assert!(!line(true).contains("ipv4"));
        let line = line(false);
        for needed in [
            "--ipv4-only",
            "--no-map-gw",
            "-t none -u none -T none -U none",
            "--userns /proc/7/ns/user --netns /proc/7/ns/net",
            "--interface eth0",
        ] {
            assert!(line.contains(needed), "{line}");
        }
    }

    /// Not reaped here, a killed process stays a zombie.
    #[tokio::test]
    async fn a_pasta_that_is_not_needed_after_all_is_killed() {
        let children = Children::default();
        let pasta = spawn(&children, Path::new("/bin/sleep"), &["600".into()]).unwrap();
        let stat = format!("/proc/{}/stat", pasta.child.pid);
        drop(pasta);
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let state = fs::read_to_string(&stat).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                return;
            }
            assert!(Instant::now() < until, "{state}");
            sleep(BETWEEN_LOOKS).await;
        }
    }
}
