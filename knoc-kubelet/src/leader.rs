//! Task: the leadership Lease `knoc-kubelet-<node>`, which makes sure that only one of two kubelets of a node acts.
//!
//! This is not the node's own Lease, whose holder must be the node. `leaseTransitions` is the leadership epoch: it
//! grows with every start of a kubelet and every change of holder, every mutating request to the agent carries it, and
//! the agent rejects a lower one. A process that starts with the holder's own identity (the same pod) takes the Lease
//! over at once.
//!
//! The agent keeps the highest epoch that it saw, but the Lease may lose it: it is deleted with its namespace, or an
//! older one is restored from a backup. So the epoch is also at least the Unix time of the take-over in seconds, which
//! is larger than any possible number of starts. It fits `leaseTransitions` (int32) until January 2038; after that, or
//! if the clock is behind, the epoch only counts up.
//!
//! ```text
//!  Candidate ── free, released, ours, or unchanged for 15 s ──► Leader ── renewed every 2 s ──► Leader
//!                                                                 │ another holds it
//!                                                                 ▼
//!                                                               Lost: stop mutating, end the process
//! ```
//!
//! While the API server is down nobody can take the Lease and nothing new is wanted, so the leader stays and retries.
//! If another kubelet took it meanwhile, the agent rejects the older epoch at once, and the next renewal fails.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a Lease is valid without renewal.
const DURATION: Duration = Duration::from_secs(15);
/// The pause between renewals, and between the attempts of a candidate.
const RENEW: Duration = Duration::from_secs(2);
const DEADLINE: Duration = Duration::from_secs(5);

/// Why the Lease could not be acquired, kept or released.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The API server denied the request or failed.
    #[error("{what} the leadership lease {name}")]
    Lease {
        /// What was tried.
        what: &'static str,
        /// The name of the Lease.
        name: String,
        /// The error of the API server.
        #[source]
        source: kube::Error,
    },
    /// The API server did not answer in time.
    #[error("{what} the leadership lease {name}: no answer within {} s", DEADLINE.as_secs())]
    Late {
        /// What was tried.
        what: &'static str,
        /// The name of the Lease.
        name: String,
    },
    /// Another kubelet holds the Lease.
    #[error("the leadership lease {name} is held by {holder}")]
    Taken {
        /// The name of the Lease.
        name: String,
        /// The identity of the holder.
        holder: String,
    },
    /// The kubelet was stopped before it became the leader.
    #[error("stopped while waiting for leadership")]
    Shutdown,
}

/// PURE: what a candidate may do with the Lease.
#[derive(Debug, PartialEq, Eq)]
enum Claim {
    /// Take it with this epoch.
    Take(i32),
    /// Wait, since another kubelet holds it.
    Wait,
}

/// The epoch of a take-over at `now`, if the Lease has the epoch `known`.
fn next_epoch(known: Option<i32>, now: Timestamp) -> i32 {
    let clock = i32::try_from(now.as_second()).unwrap_or(0);
    known.unwrap_or(0).saturating_add(1).max(clock)
}

/// Decides whether to take the Lease. `unchanged` is how long we have seen the Lease unchanged, since the clocks of
/// others are not trusted. Our own clock (`now`) can only make the epoch larger.
fn claim(spec: &LeaseSpec, identity: &str, unchanged: Duration, now: Timestamp) -> Claim {
    let holder = spec.holder_identity.as_deref().unwrap_or_default();
    let duration = spec
        .lease_duration_seconds
        .and_then(|seconds| u64::try_from(seconds).ok());
    let duration = duration.map_or(DURATION, Duration::from_secs);
    if holder.is_empty() || holder == identity || unchanged >= duration {
        Claim::Take(next_epoch(spec.lease_transitions, now))
    } else {
        Claim::Wait
    }
}

/// The holder of the Lease.
#[expect(missing_debug_implementations, reason = "kube::Client has none")]
pub struct Leader {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The Lease as the API server has it.
    lease: Lease,
}

impl Leader {
    /// Waits until this kubelet leads, or until `shutdown`, which is the only error. Errors of the API server are
    /// logged when they change and retried: they may pass in a moment, and a restart would only lose time.
    pub async fn acquire(
        client: Client,
        namespace: &str,
        node: &str,
        identity: &str,
        shutdown: &CancellationToken,
    ) -> Result<Self, LeaderError> {
        let api: Api<Lease> = Api::namespaced(client, namespace);
        let name = format!("knoc-kubelet-{node}");
        let mut seen = None;
        let mut told = String::new();
        loop {
            match attempt(&api, &name, identity, &mut seen).await {
                Ok(Ok(lease)) => {
                    return Ok(Self {
                        api,
                        name,
                        identity: identity.to_owned(),
                        lease,
                    });
                }
                Ok(Err(holder)) => {
                    if holder != told {
                        tracing::info!(name, holder, "waiting for leadership");
                    }
                    told = holder;
                }
                Err(error) => {
                    let error = knoc_proto::error::chain(&error);
                    if error != told {
                        tracing::warn!(%error, "could not acquire leadership, trying again");
                    }
                    told = error;
                }
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Err(LeaderError::Shutdown),
                () = tokio::time::sleep(RENEW) => {}
            }
        }
    }

    /// The leadership epoch.
    #[must_use]
    pub fn epoch(&self) -> i64 {
        let spec = self.lease.spec.as_ref();
        i64::from(spec.and_then(|spec| spec.lease_transitions).unwrap_or(0))
    }

    /// Renews until `shutdown`, or returns an error when leadership is lost.
    pub async fn keep(&mut self, shutdown: &CancellationToken) -> Result<(), LeaderError> {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(RENEW) => {}
            }
            match self.renew().await {
                Ok(()) => {}
                Err(error @ LeaderError::Taken { .. }) => return Err(error),
                Err(error) => {
                    let error = knoc_proto::error::chain(&error);
                    tracing::warn!(%error, "could not renew leadership, trying again");
                }
            }
        }
    }

    async fn renew(&mut self) -> Result<(), LeaderError> {
        let mut lease = self.lease.clone();
        if let Some(spec) = &mut lease.spec {
            spec.renew_time = Some(MicroTime(Timestamp::now()));
        }
        let params = PostParams::default();
        let answer = self.api.replace(&self.name, &params, &lease);
        match within("renew", &self.name, answer).await {
            Ok(lease) => {
                self.lease = lease;
                Ok(())
            }
            Err(LeaderError::Lease {
                source: kube::Error::Api(status),
                ..
            }) if status.code == 409 || status.code == 404 => self.look().await,
            Err(error) => Err(error),
        }
    }

    /// Somebody else wrote the Lease: do we still hold it?
    async fn look(&mut self) -> Result<(), LeaderError> {
        let found = within("get", &self.name, self.api.get_opt(&self.name)).await?;
        let holder = found
            .as_ref()
            .and_then(|lease| lease.spec.as_ref())
            .and_then(|spec| spec.holder_identity.clone())
            .unwrap_or_default();
        let epoch = self.epoch();
        match found {
            Some(lease) if holder == self.identity => {
                self.lease = lease;
                if self.epoch() == epoch {
                    Ok(())
                } else {
                    Err(self.taken(holder))
                }
            }
            Some(_) | None => Err(self.taken(holder)),
        }
    }

    fn taken(&self, holder: String) -> LeaderError {
        LeaderError::Taken {
            name: self.name.clone(),
            holder,
        }
    }

    /// Releases the Lease, so that the next kubelet need not wait.
    pub async fn release(mut self) -> Result<(), LeaderError> {
        if let Some(spec) = &mut self.lease.spec {
            spec.holder_identity = Some(String::new());
            spec.lease_duration_seconds = Some(1);
        }
        let params = PostParams::default();
        let answer = self.api.replace(&self.name, &params, &self.lease);
        within("release", &self.name, answer).await.map(drop)
    }
}

/// The resource version of the Lease as last seen (None inside if it does not exist), and since when.
type Seen = Option<(Option<String>, Instant)>;

/// Tries once to take the Lease; otherwise returns its holder. If the Lease cannot be read `seen` does not change.
async fn attempt(
    api: &Api<Lease>,
    name: &str,
    identity: &str,
    seen: &mut Seen,
) -> Result<Result<Lease, String>, LeaderError> {
    let found = within("get", name, api.get_opt(name)).await?;
    let version = found
        .as_ref()
        .and_then(|lease| lease.metadata.resource_version.clone());
    let since = match seen {
        Some((before, since)) if *before == version => *since,
        Some(_) | None => Instant::now(),
    };
    *seen = Some((version, since));
    take(api, name, identity, found, since.elapsed()).await
}

/// Takes the Lease if possible; otherwise returns its holder.
async fn take(
    api: &Api<Lease>,
    name: &str,
    identity: &str,
    found: Option<Lease>,
    unchanged: Duration,
) -> Result<Result<Lease, String>, LeaderError> {
    let at = Timestamp::now();
    let now = MicroTime(at);
    let spec = |epoch| LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: Some(now.clone()),
        renew_time: Some(now.clone()),
        lease_transitions: Some(epoch),
        ..LeaseSpec::default()
    };
    let params = PostParams::default();
    let answer = if let Some(mut lease) = found {
        let before = lease.spec.unwrap_or_default();
        let Claim::Take(epoch) = claim(&before, identity, unchanged, at) else {
            return Ok(Err(before.holder_identity.unwrap_or_default()));
        };
        lease.spec = Some(spec(epoch));
        within("take", name, api.replace(name, &params, &lease)).await
    } else {
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        };
        let lease = Lease {
            metadata,
            spec: Some(spec(next_epoch(None, at))),
        };
        within("create", name, api.create(&params, &lease)).await
    };
    match answer {
        Ok(lease) => Ok(Ok(lease)),
        // Another kubelet was faster.
        Err(LeaderError::Lease {
            source: kube::Error::Api(status),
            ..
        }) if status.code == 409 => Ok(Err("another".to_owned())),
        Err(error) => Err(error),
    }
}

async fn within<T>(
    what: &'static str,
    name: &str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, LeaderError> {
    match tokio::time::timeout(DEADLINE, call).await {
        Err(_) => Err(LeaderError::Late {
            what,
            name: name.to_owned(),
        }),
        Ok(Err(source)) => Err(LeaderError::Lease {
            what,
            name: name.to_owned(),
            source,
        }),
        Ok(Ok(answer)) => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use http_body_util::BodyExt as _;
    use kube::client::Body;
    use serde_json::json;

    use super::*;

    fn spec(holder: &str, epoch: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(epoch),
            ..LeaseSpec::default()
        }
    }

    fn second(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_candidate_takes_what_is_free_released_its_own_or_stale() {
        let short = Duration::from_secs(1);
        let claim = |spec: &LeaseSpec, unchanged| claim(spec, "a", unchanged, second(2));
        assert_eq!(claim(&LeaseSpec::default(), short), Claim::Take(2));
        assert_eq!(claim(&spec("", 4), short), Claim::Take(5));
        assert_eq!(claim(&spec("a", 4), short), Claim::Take(5));
        assert_eq!(claim(&spec("b", 4), short), Claim::Wait);
        assert_eq!(
            claim(&spec("b", 4), Duration::from_secs(15)),
            Claim::Take(5)
        );
    }

    #[test]
    fn an_epoch_never_falls_below_what_an_agent_may_know() {
        let now = second(1_795_000_000);
        // Reinstalled, or restored from a backup: larger than any number of starts.
        assert_eq!(next_epoch(None, now), 1_795_000_000);
        assert_eq!(next_epoch(Some(3), now), 1_795_000_000);
        // Twice in one second, and with a clock that was set back: it still grows.
        assert_eq!(next_epoch(Some(1_795_000_000), now), 1_795_000_001);
        assert_eq!(next_epoch(Some(1_795_000_000), second(9)), 1_795_000_001);
        // After 2038 the epoch only counts up.
        assert_eq!(next_epoch(Some(7), second(3_000_000_000)), 8);
        assert_eq!(next_epoch(Some(i32::MAX), now), i32::MAX);
    }

    /// Errors of the API server are no reason to end.
    #[tokio::test(start_paused = true)]
    async fn a_candidate_outlasts_an_api_server_in_trouble() {
        let (service, mut server) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        let client = Client::new(service, "default");
        let failure = |code: u16| {
            let reason = if code == 404 { "NotFound" } else { "Other" };
            let json = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                              "reason": reason, "message": "m", "metadata": {}});
            (code, json)
        };
        let answering = async {
            for answer in [
                Some(failure(500)),
                Some(failure(403)),
                Some(failure(404)),
                Some(failure(503)),
                Some(failure(404)),
                None,
            ] {
                let (request, send) = server.next_request().await.unwrap();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let (code, json) =
                    answer.unwrap_or_else(|| (201, serde_json::from_slice(&body).unwrap()));
                let body = Body::from(serde_json::to_vec(&json).unwrap());
                send.send_response(Response::builder().status(code).body(body).unwrap());
            }
        };
        let shutdown = CancellationToken::new();
        let lead = Leader::acquire(client, "ns", "n", "a", &shutdown);
        let (leader, ()) = tokio::join!(lead, answering);
        assert!(leader.unwrap().epoch() >= 1_700_000_000);
    }
}
