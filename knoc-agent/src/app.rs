//! The composition root of `serve`: builds everything in order, owns all tasks, and ends them in
//! order.
//!
//! ```text
//! listener unix ─┐                        ┌─ poller ──rounds────┐
//! listener tcp  ─┤
//! dial out      ─┴─► api ──► registry ──► actors (one per pod) ─┴─► board ──► WatchPods
//! listener shim ───► links ──reports──────┘                        node ───► WatchNode
//! site file, CA ───► policy ──rules─► gate: checks every request, closes connections
//! ```
//!
//! On shutdown it stops accepting, finishes the requests in flight and releases the lease. Jobs are
//! never touched.

#[cfg(test)]
pub(crate) mod fake;
mod hop;
mod prepare;

use std::{sync::Arc, time::Duration};

use knoc_link::pinned::KeyPair;
use knoc_proto::{error::chain, pb};
pub use prepare::{PrepareError, socket_places};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{self, gate::Gate},
    config::Config,
    dial_out, lease,
    linger::Links,
    policy,
    registry::{self, Registry, cluster::Pin, poll},
    renewal, shim_carry, shim_links, shim_route, shim_steps,
    site::Site,
};

/// How long open streams may go on after shutdown was requested.
const DRAIN: Duration = Duration::from_secs(5);
/// How many carried connections may wait to be accepted.
const CARRIED: usize = 16;

/// An agent whose sockets are bound, ready to run.
#[derive(Debug)]
pub struct App {
    site: Arc<Site>,
    registry: Arc<Registry>,
    node: watch::Sender<pb::NodeInfo>,
    ended: mpsc::Receiver<knoc_proto::ids::PodUid>,
    service: api::Service,
    near: Vec<knoc_link::Incoming>,
    shims: Shims,
    /// Stops the tasks that accept requests; the registry's own token stops the actors after them.
    stop: CancellationToken,
    actors: CancellationToken,
    policy: policy::watch::Watcher,
    gate: Gate,
    credentials: Option<knoc_link::Credentials>,
    links: Links,
    /// For how long it goes on without a link; `None`: until it is stopped.
    linger: Option<Duration>,
    dial_out: Vec<knoc_link::dial_out::Target>,
    heartbeat: Heartbeat,
}

impl App {
    /// Checks the site, acquires the lease, binds the sockets and restores the pods.
    pub async fn build(config: Config) -> Result<Self, PrepareError> {
        let (stop, actors) = (CancellationToken::new(), CancellationToken::new());
        let (ended_by, ended) = mpsc::channel(registry::ENDED);
        let taken = prepare::take(&config)?;
        let heartbeat = Heartbeat::start(taken.1.clone(), actors.child_token());
        let prepared = prepare::prepare(config, taken, ended_by).await?;
        let prepare::Prepared {
            site,
            pod_limit,
            pair,
            policy,
            step_requests,
        } = prepared;
        let shim_hop = knoc_link::pinned::listen(site.config.listen.shim, pair.clone())
            .await
            .map_err(prepare::listen)?;
        let credentials = prepare::credentials(&site.config)?;
        let dial_out = dial_out::targets(&site.config)?;
        let near = prepare::near_listeners(&site.config, credentials.clone()).await?;
        let (rules, ruling) = watch::channel(Arc::default());
        let policy = policy::watch::Watcher::new(&site.config, credentials.clone(), policy, rules);
        let gate = Gate::new(ruling);
        let told = prepare::tell_shims(&site, &shim_hop, &pair)?;
        let pin = Arc::new(Pin::load(&site.state)?.under(site.lease.clone()));
        let (node, watched) = watch::channel(node_info(&site, pod_limit, credentials.as_ref()));
        let registry = Registry::new(Arc::clone(&site), pod_limit, actors.clone());
        let count = registry.recover().await?;
        tracing::info!(count, epoch = site.lease.epoch(), "pods were restored");
        let service = api::Service::new(
            Arc::clone(&site),
            Arc::clone(&registry),
            watched,
            pin,
            gate.clone(),
            stop.clone(),
        );
        Ok(Self {
            site,
            registry,
            node,
            ended,
            service,
            near,
            shims: Shims {
                incoming: shim_hop,
                pair,
                step_requests,
                told,
            },
            stop,
            actors,
            policy,
            gate,
            credentials,
            links: Links::default(),
            linger: None,
            dial_out,
            heartbeat,
        })
    }

    /// The same agent, which ends once it had no link for this long.
    #[must_use]
    pub fn lingering(self, linger: Duration) -> Self {
        Self {
            linger: Some(linger),
            ..self
        }
    }

    /// Runs until `shutdown` is cancelled, then ends everything in order.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self {
            site,
            registry,
            node,
            ended,
            service,
            near,
            shims,
            stop,
            actors,
            policy,
            gate,
            credentials,
            links,
            linger,
            dial_out,
            heartbeat,
        } = self;
        let Heartbeat { mut tasks, fenced } = heartbeat;
        let background = actors.child_token();
        shims.serve(&mut tasks, &site, &background);
        let poller = poll::Poller::new(Arc::clone(&site), Arc::clone(&registry), node.clone());
        tasks.spawn(poller.run(background.clone()));
        let capacity = poll::capacity(Arc::clone(&site), node.clone(), background.clone());
        tasks.spawn(capacity);
        let dialled = credentials
            .as_ref()
            .filter(|_| !dial_out.is_empty())
            .map(|keys| start_dialling(&site, keys, dial_out, &stop, &mut tasks));
        let renewal = renewal::Renewal::new(Arc::clone(&site), credentials, node);
        watch_certificates(&mut tasks, policy, gate, renewal, &background);
        let (swept, until) = (Arc::clone(&registry), background.clone());
        tasks.spawn(registry::sweep(swept, ended, until));
        if let Some(linger) = linger {
            let (links, stop) = (links.clone(), background);
            tasks.spawn(links.end_without(linger, shutdown.clone(), stop));
        }
        let mut servers = JoinSet::new();
        for incoming in near.into_iter().chain(dialled) {
            let (links, stop) = (links.clone(), stop.child_token());
            servers.spawn(api::serve(service.clone(), incoming, links, stop));
        }
        drop(service);
        site.poll_soon.notify_one();
        tokio::select! {
            biased;
            () = shutdown.cancelled() => tracing::info!("stopping; jobs are not touched"),
            () = fenced.cancelled() => {}
            // A server ends by itself only if it failed; it has logged why.
            Some(_) = servers.join_next() => tracing::error!("a listener has ended"),
        }
        stop.cancel();
        drain(servers).await;
        actors.cancel();
        registry.join().await;
        while tasks.join_next().await.is_some() {}
        release(site.lease.clone()).await;
        tracing::info!("stopped");
    }
}

/// What a watch of the node shows before Slurm was asked.
fn node_info(
    site: &Site,
    pod_limit: usize,
    credentials: Option<&knoc_link::Credentials>,
) -> pb::NodeInfo {
    pb::NodeInfo {
        certificate_until: renewal::until(credentials),
        pid_isolation: site.runtime.name != "process",
        pod_limit: pod_limit.try_into().unwrap_or(i32::MAX),
        maps_privileged: site.policy.now().maps_privileged(),
        egress: Some(site.egress.counted()),
        ..pb::NodeInfo::default()
    }
}

/// Starts the tasks that dial the kubelets of `[[dial_out]]`.
fn start_dialling(
    site: &Site,
    credentials: &knoc_link::Credentials,
    targets: Vec<knoc_link::dial_out::Target>,
    stop: &CancellationToken,
    tasks: &mut JoinSet<()>,
) -> knoc_link::Incoming {
    let (epoch, stop) = (site.lease.epoch(), stop.child_token());
    dial_out::start(targets, credentials, epoch, &site.dial_out, &stop, tasks)
}

/// Waits until the servers have ended, or ends them and their streams after [`DRAIN`].
async fn drain(mut servers: JoinSet<()>) {
    let drained = tokio::time::timeout(DRAIN, async {
        while servers.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        tracing::info!("streams that were still open were closed");
        servers.shutdown().await;
    }
}

/// What the tasks around the shims' links need.
#[derive(Debug)]
struct Shims {
    incoming: knoc_link::Incoming,
    pair: KeyPair,
    step_requests: mpsc::Receiver<shim_steps::Request>,
    told: shim_route::Told,
}

impl Shims {
    /// Starts the tasks that accept links, carry links, and tell the shims where the agent is.
    fn serve(self, tasks: &mut JoinSet<()>, site: &Arc<Site>, stop: &CancellationToken) {
        let (connections, carried) = mpsc::channel(CARRIED);
        tasks.spawn(shim_links::serve(
            site.shim_links.clone(),
            self.incoming,
            carried,
            site.shim_route.clone(),
            stop.clone(),
        ));
        tasks.spawn(shim_carry::serve(
            Arc::clone(site),
            self.pair,
            self.step_requests,
            connections,
            stop.clone(),
        ));
        let lease = site.lease.clone();
        tasks.spawn(shim_route::keep(
            site.shim_route.clone(),
            self.told,
            move || lease.fenced().is_none(),
            stop.clone(),
        ));
    }
}

async fn release(lease: lease::Holder) {
    match tokio::task::spawn_blocking(move || lease.release()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = chain(&error), "cannot release the lease"),
        Err(error) => tracing::warn!(error = chain(&error), "cannot release the lease"),
    }
}

/// Starts the tasks that decide which certificates are valid, and until when.
fn watch_certificates(
    tasks: &mut JoinSet<()>,
    policy: policy::watch::Watcher,
    gate: Gate,
    renewal: renewal::Renewal,
    stop: &CancellationToken,
) {
    tasks.spawn(policy.run(stop.clone()));
    tasks.spawn(gate.sweep(stop.clone()));
    tasks.spawn(renewal.run(stop.clone()));
}

/// The task that renews the lease, from the moment it is taken: to restore thousands of pods from a slow file system may take
/// longer than the lease is valid, and then another agent would take it.
#[derive(Debug)]
struct Heartbeat {
    tasks: JoinSet<()>,
    /// Cancelled once a newer agent has the lease.
    fenced: CancellationToken,
}

impl Heartbeat {
    fn start(lease: lease::Holder, stop: CancellationToken) -> Self {
        let (mut tasks, fenced) = (JoinSet::new(), CancellationToken::new());
        tasks.spawn(heartbeat(lease, stop, fenced.clone()));
        Self { tasks, fenced }
    }
}

/// Task: renews the lease. An agent that was fenced stops, because its jobs belong to the newer
/// agent.
async fn heartbeat(lease: lease::Holder, stop: CancellationToken, fenced: CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(lease::HEARTBEAT) => {}
        }
        let (lease, now) = (lease.clone(), jiff::Timestamp::now());
        match tokio::task::spawn_blocking(move || lease.heartbeat(now)).await {
            Ok(Ok(())) => {}
            Ok(Err(error @ lease::LeaseError::Fenced { .. })) => {
                tracing::error!(error = chain(&error), "stopping");
                fenced.cancel();
            }
            Ok(Err(error)) => tracing::warn!(error = chain(&error), "heartbeat"),
            Err(error) => tracing::warn!(error = chain(&error), "heartbeat"),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};
    use knoc_contract::jobdir::{self, StateDir, schema::Lease};

    use super::*;

    /// Nothing else runs yet: pods are restored, or the runtime is asked for its version.
    #[tokio::test(start_paused = true)]
    async fn the_lease_is_renewed_from_the_moment_it_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::new(folder.path());
        let taken = Timestamp::now() - SignedDuration::from_secs(50);
        let lease = lease::Holder::take(&state, &lease::Process::own(), taken).unwrap();
        let (stop, deadline) = (CancellationToken::new(), lease::HEARTBEAT * 2);
        let _renewed = Heartbeat::start(lease, stop);
        let renewed = async {
            loop {
                let known: Option<Lease> = jobdir::read_json(&state.lease()).unwrap();
                if known.unwrap().heartbeat > taken.as_second() {
                    return;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(deadline, renewed).await.unwrap();
    }
}
