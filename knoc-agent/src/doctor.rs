//! The agent's own diagnostics. Each finding says what was found and, if it is a problem, what to
//! do.
//!
//! Findings are a stream in the order of the chain from the state directory to the compute node, so
//! that the first problem is the one to fix. With `probe`, a one-minute job tests the whole chain
//! ([`probe`]); everything else only reads.

mod network;
mod probe;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use futures::{Stream, StreamExt as _, future::BoxFuture, stream};
use jiff::Timestamp;
use knoc_contract::jobdir::{atomic, schema::Lease};
use knoc_link::{Credentials, Identity, pki};
use knoc_proto::{
    error::chain,
    pb::{self, Finding},
};

use crate::{api::renew, policy::nodes::may_lead, registry::Registry, site::Site};

/// Who leads which node, for the check of leadership.
#[derive(Debug, Clone, Default)]
pub struct Leaders {
    /// Nodes whose leadership epochs are known.
    pub nodes: Vec<String>,
    /// Kubelets that are connected, with the expiry of their certificates.
    pub kubelets: BTreeMap<Identity, Timestamp>,
}

/// Makes one finding; `cure` is what to do about it.
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

/// Examines the site. Each group of findings is sent as soon as it is known.
pub fn examine(
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: pb::NodeInfo,
    leaders: Leaders,
    with_probe: bool,
) -> impl Stream<Item = Finding> + Send {
    let (for_state, for_images) = (Arc::clone(&site), Arc::clone(&site));
    let (for_scheduler, for_shims) = (Arc::clone(&site), Arc::clone(&site));
    let mut groups: Vec<BoxFuture<'static, Vec<Finding>>> = vec![
        Box::pin(async move { state(&for_state).await }),
        Box::pin(async move { for_scheduler.scheduler.checks().await }),
        Box::pin(async move { for_images.images.checks().await }),
        Box::pin(async move {
            let mut found = for_shims.dial_out.findings();
            found.extend([
                policy(&for_shims),
                leadership(&for_shims, &leaders),
                kubelets(&leaders.kubelets, Timestamp::now()),
                pods(&registry, &node),
                shims(&for_shims),
                network::pods(&for_shims),
                network::ranges(&for_shims),
            ]);
            found
        }),
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
    // If it is left over, the next run overwrites it.
    drop(std::fs::remove_file(&path));
    let result = match written {
        Ok(_) if millis < 500 => Ok(format!(
            "{} wrote and synced a file in {millis} ms",
            root.display()
        )),
        Ok(_) => Err(format!(
            "{} needs {millis} ms to write and sync a file",
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
        let lease = knoc_contract::jobdir::read_json::<Lease>(&site.state.lease())
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
    let Some(tls) = &site.config.tls else {
        let none = Err("the site file has no [tls]: kubelets cannot connect".to_owned());
        return finding(
            "link: certificate",
            none,
            "run `knoc-agent init --site SITE`, or name PEM files in [tls]",
        );
    };
    let key = renew::ca(tls);
    let renews = match &key {
        Ok(_) => "renewed here at 70 % of its life".to_owned(),
        Err(error) => format!("not renewed: {}", chain(error)),
    };
    let result = match Credentials::from_files(&tls.ca, &tls.cert, &tls.key) {
        Ok(credentials) => {
            let validity = credentials.info().validity;
            let now = Timestamp::now();
            let days = validity.until.duration_since(now).as_hours() / 24;
            let text = format!("valid for {days} days, until {}; {renews}", validity.until);
            if pki::is_expiring(validity, now) {
                Err(text)
            } else {
                Ok(text)
            }
        }
        Err(error) => Err(chain(&error)),
    };
    let cure = match key {
        Ok(_) => "the agent's log says why it was not renewed",
        Err(_) => {
            "put ca.key back beside the CA and run `knoc-agent init --site SITE` after moving agent.crt and agent.key away, or create a new CA: see \
             \"Certificates\" in the guide"
        }
    };
    finding("link: certificate", result, cure)
}

/// Checks whether the current site file is in effect.
fn policy(site: &Site) -> Finding {
    let result = match site.policy.problem() {
        None => Ok("[policy] of the site file is in effect".to_owned()),
        Some(problem) => Err(problem),
    };
    finding(
        "policy: site file",
        result,
        "fix the line that the finding names",
    )
}

/// Checks whether the kubelets that lead nodes are still allowed to.
fn leadership(site: &Site, leaders: &Leaders) -> Finding {
    let (pods, _) = site.board.snapshot();
    let named = pods.iter().map(|pod| pod.node_name.clone());
    let with_pods = named.filter(|node| !node.is_empty()).collect();
    let before = leaders.nodes.iter().cloned().collect();
    let policy = site.policy.now();
    let (result, cure) = judge_leadership(&with_pods, &before, &leaders.kubelets, &policy.nodes);
    finding("policy: leadership", result, &cure)
}

/// PURE: checks whether the certificates of the connected kubelets expire soon.
fn kubelets(kubelets: &BTreeMap<Identity, Timestamp>, now: Timestamp) -> Finding {
    let list = |soon: bool| {
        let named = kubelets
            .iter()
            .filter(|(_, until)| pki::ends_soon(**until, now) == soon)
            .map(|(identity, until)| format!("{} until {until}", identity.name()));
        named.collect::<Vec<_>>().join(", ")
    };
    let (soon, later) = (list(true), list(false));
    let result = match (soon.is_empty(), later.is_empty()) {
        (true, true) => Ok("no kubelet is connected with a certificate".to_owned()),
        (true, false) => Ok(format!("valid: {later}")),
        (false, _) => Err(format!("expire within 30 days: {soon}")),
    };
    let cure = "a kubelet renews its certificate itself if ca.key is here: its node's condition AgentCertificateExpiring \
                says why it did not";
    finding("link: kubelets' certificates", result, cure)
}

/// PURE: finds nodes that no connected kubelet may lead, and says what would allow one to. A node
/// that is known only from earlier may no longer exist; it counts only if a kubelet is connected
/// that leads no known node.
fn judge_leadership(
    with_pods: &BTreeSet<String>,
    before: &BTreeSet<String>,
    kubelets: &BTreeMap<Identity, Timestamp>,
    assigned: &BTreeMap<String, String>,
) -> (Result<String, String>, String) {
    let may = |kubelet: &Identity, node: &String| may_lead(kubelet.name(), node, assigned);
    let known: BTreeSet<&String> = with_pods.union(before).collect();
    let idle = kubelets
        .keys()
        .any(|kubelet| !known.iter().any(|node| may(kubelet, node)));
    let led = |node: &&&String| kubelets.keys().any(|kubelet| may(kubelet, node));
    let counts = |node: &&&String| idle || with_pods.contains(**node);
    let not: Vec<&&String> = known
        .iter()
        .filter(counts)
        .filter(|node| !led(node))
        .collect();
    let led: Vec<&&String> = known.iter().filter(led).collect();
    let names: Vec<&str> = kubelets.keys().map(Identity::name).collect();
    // Without a connected kubelet, a kubelet that may not lead cannot be told from one that is
    // away.
    let Some(first) = not.first().filter(|_| !names.is_empty()) else {
        let led: Vec<&str> = led.iter().map(|node| node.as_str()).collect();
        let text = match (led.as_slice(), names.as_slice()) {
            ([], []) => "no kubelet is connected".to_owned(),
            (_, []) => {
                "no kubelet is connected; whether it may lead is known once it connects".to_owned()
            }
            ([], _) => format!(
                "kubelets {} are connected and lead no node yet",
                names.join(", ")
            ),
            (led, _) => format!("nodes {} are led by kubelets that may", led.join(", ")),
        };
        return (Ok(text), String::new());
    };
    let list: Vec<&str> = not.iter().map(|node| node.as_str()).collect();
    let text = format!(
        "none of the connected kubelets ({}) may lead {}: their changes to its pods are denied",
        names.join(", "),
        list.join(", ")
    );
    let cure = format!(
        "add \"{first}\" = \"kubelet/{}\" to [policy.nodes] of the site file, or give that kubelet a certificate of \
         kubelet/{first}",
        names.first().copied().unwrap_or("NAME")
    );
    (Err(text), cure)
}

/// Checks whether the state directory is on a file system that compute nodes can see. The type is
/// only a hint.
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
    let text = format!("{count} pods, the limit is {limit}");
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
    let text = format!(
        "{linked} of {} running pods have a link to the agent",
        running.len()
    );
    let (route, works) = site.shim_route.describe();
    let steps = site.shim_steps.running();
    let text = format!("{text}; {route} ({steps} job steps carry links)");
    // On an isolated site, pods have no link on purpose: a job step carries it when somebody needs it.
    let complete = linked == running.len() || site.shim_route.is_isolated();
    let result = if works && complete {
        Ok(text)
    } else {
        Err(text)
    };
    let cure = "compute nodes must be able to reach the agent's port for shims: check listen.shim_addresses and firewalls; \
                until then status comes from files, and exec does not work";
    finding("link: shims", result, cure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_that_would_be_locked_out_is_named_with_what_lets_it_in() {
        let end = Timestamp::UNIX_EPOCH;
        let kubelets = [(Identity::Kubelet { name: "a".into() }, end)].into();
        let none = BTreeMap::new();
        let judge = |pods: &[&str], before: &[&str], kubelets: &BTreeMap<_, _>, assigned: &[_]| {
            let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
            let line = |&(node, who): &(&str, &str)| (node.to_owned(), who.to_owned());
            let assigned = assigned.iter().map(line).collect();
            judge_leadership(&set(pods), &set(before), kubelets, &assigned)
        };
        judge(&["a"], &["a"], &kubelets, &[]).0.unwrap();
        judge(&[], &[], &kubelets, &[]).0.unwrap();
        let assigned = [("b", "kubelet/a")];
        judge(&["a", "b"], &[], &kubelets, &assigned).0.unwrap();
        judge(&["a", "b"], &[], &none, &[]).0.unwrap();
        judge(&["a"], &["a", "gone"], &kubelets, &[]).0.unwrap();
        for (pods, before) in [(&["a", "gpu"][..], &[][..]), (&[], &["gpu"])] {
            let (result, cure) = judge(pods, before, &kubelets, &[]);
            assert!(result.unwrap_err().contains("may lead gpu"));
            assert!(cure.contains("\"gpu\" = \"kubelet/a\""), "{cure}");
        }
    }
}
