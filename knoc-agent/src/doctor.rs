//! The agent's own check-list: each finding says what was found, and where it is not well what to do.
//!
//! Findings are a stream, in the order of the chain from the state directory to the compute node, so that the first
//! one that is not well is the one to cure. With `probe` a one-minute job goes the whole way ([`probe`]). Changes
//! nothing otherwise.

mod probe;

use std::{path::Path, sync::Arc};

use futures::{Stream, StreamExt as _, future::BoxFuture, stream};
use knoc_proto::{
    error::chain,
    link::Credentials,
    pb::{self, Finding},
};

use crate::{
    jobdir::{atomic, schema::Lease},
    registry::Registry,
    site::Site,
};

/// A certificate is worth a word this many days before its end.
const EXPIRY_DAYS: i64 = 30;

/// One answer of the check-list.
fn finding(check: &str, result: Result<String, String>, cure: &str) -> Finding {
    let ok = result.is_ok();
    let (Ok(detail) | Err(detail)) = result;
    let cure = if ok { String::new() } else { cure.to_owned() };
    Finding {
        check: check.to_owned(),
        ok,
        detail,
        cure,
    }
}

/// Examines the site. Each group of findings comes when it is known.
pub fn examine(
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: pb::NodeInfo,
    with_probe: bool,
) -> impl Stream<Item = Finding> + Send {
    let (for_state, for_images) = (Arc::clone(&site), Arc::clone(&site));
    let (for_scheduler, for_shims) = (Arc::clone(&site), Arc::clone(&site));
    let mut groups: Vec<BoxFuture<'static, Vec<Finding>>> = vec![
        Box::pin(async move { state(&for_state).await }),
        Box::pin(async move { for_scheduler.scheduler.checks().await }),
        Box::pin(async move { for_images.images.checks().await }),
        Box::pin(async move { vec![pods(&registry, &node), shims(&for_shims)] }),
    ];
    if with_probe {
        groups.push(Box::pin(async move { probe::run(&site).await }));
    }
    stream::iter(groups)
        .then(|group| group)
        .flat_map(stream::iter)
}

async fn state(site: &Arc<Site>) -> Vec<Finding> {
    let site = Arc::clone(site);
    let examined = tokio::task::spawn_blocking(move || {
        vec![
            writable(site.state.root()),
            lease(&site),
            certificate(&site),
            shared(&site),
        ]
    });
    examined
        .await
        .unwrap_or_else(|error| vec![finding("state", Err(chain(&error)), "see the log")])
}

fn writable(root: &Path) -> Finding {
    let path = root.join(".doctor");
    let began = std::time::Instant::now();
    let written = atomic::write(&path, b"knoc", 0o600).and_then(|()| atomic::read(&path));
    let millis = began.elapsed().as_millis();
    // Left over it would only be written again.
    drop(std::fs::remove_file(&path));
    let result = match written {
        Ok(_) if millis < 500 => Ok(format!(
            "{} takes a synced file in {millis} ms",
            root.display()
        )),
        Ok(_) => Err(format!(
            "{} needs {millis} ms for one synced file",
            root.display()
        )),
        Err(error) => Err(chain(&error)),
    };
    finding(
        "state: writable",
        result,
        "free space or quota, or put state_dir on a faster shared file system",
    )
}

fn lease(site: &Site) -> Finding {
    let held = site.lease.check().map_err(|error| chain(&error)).map(|()| {
        let lease = crate::jobdir::read_json::<Lease>(&site.state.lease())
            .ok()
            .flatten();
        lease.map_or_else(String::new, |lease| {
            format!(
                "epoch {}, process {} on {}",
                lease.epoch, lease.pid, lease.host
            )
        })
    });
    finding(
        "state: lease",
        held,
        "only one agent may serve a state directory: stop the other one",
    )
}

fn certificate(site: &Site) -> Finding {
    let cure =
        "make a new certificate: move the old one away and run `knoc-agent init --site SITE` again";
    let Some(tls) = &site.config.tls else {
        let none = Err("the site file has no [tls]: kubelets cannot connect".to_owned());
        return finding(
            "link: certificate",
            none,
            "run `knoc-agent init --site SITE`, or name PEM files in [tls]",
        );
    };
    let result = match Credentials::from_files(&tls.ca, &tls.cert, &tls.key) {
        Ok(credentials) => {
            let until = credentials.info().validity.until;
            let days = until.duration_since(jiff::Timestamp::now()).as_hours() / 24;
            let text = format!("valid for {days} days, until {until}");
            if days >= EXPIRY_DAYS {
                Ok(text)
            } else {
                Err(text)
            }
        }
        Err(error) => Err(chain(&error)),
    };
    finding("link: certificate", result, cure)
}

/// Is the state directory on a file system that compute nodes can see? The type only hints.
fn shared(site: &Site) -> Finding {
    let root = site.state.root();
    let cure = "put state_dir on a file system that compute nodes share, or check with --probe";
    let local = site.scheduler.name() == "local";
    let kind = nix::sys::statfs::statfs(root).map(|stat| stat.filesystem_type());
    let result = match kind {
        _ if local => Ok("jobs run on this host".to_owned()),
        Ok(nix::sys::statfs::TMPFS_MAGIC) => {
            Err(format!("{} is in this host's memory", root.display()))
        }
        Ok(kind) => Ok(format!(
            "{} (file system type {:#x})",
            root.display(),
            kind.0
        )),
        Err(error) => Err(format!("statfs {}: {error}", root.display())),
    };
    finding("state: shared", result, cure)
}

fn pods(registry: &Registry, node: &pb::NodeInfo) -> Finding {
    let (count, limit) = (registry.len(), usize::try_from(node.pod_limit).unwrap_or(0));
    let text = format!("{count} pods of at most {limit}");
    let result = if count < limit { Ok(text) } else { Err(text) };
    finding(
        "limits: pods",
        result,
        "raise the limit of open files (ulimit -n) or limits.pods",
    )
}

fn shims(site: &Site) -> Finding {
    let (pods, _) = site.board.snapshot();
    let running: Vec<_> = pods
        .iter()
        .filter(|pod| pod.phase() == pb::PodPhase::Running && !pod.host_ip.is_empty())
        .collect();
    let linked = running.iter().filter(|pod| pod.shim_connected).count();
    let text = format!("{linked} of {} running pods have their link", running.len());
    let result = if linked == running.len() {
        Ok(text)
    } else {
        Err(text)
    };
    let cure = "compute nodes must reach the shim hop: check listen.shim_addresses and firewalls; \
                until then status comes from files, and exec does not work";
    finding("link: shims", result, cure)
}
