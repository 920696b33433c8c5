//! Certificates over their whole lifetimes: paused time, an authority that the test controls, real keys and files.

mod life;
mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;
use knoc_link::pki::{CertifiedKey, Validity};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer as Signer,
    KeyPair,
};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Authority, Health, Issuer, Keep, Pairs, Purpose, Rotator, Wanted,
    authority::{Answer, AuthorityError},
    request::Request,
};
use crate::pods::events::{Events, Notes};

/// Twice the longest wait of the rotator, in paused time.
const PATIENCE: Duration = Duration::from_hours(24 * 900);
const START: &str = "2026-11-22T00:00:00Z";

fn wanted(purpose: Purpose, names: &[&str]) -> Wanted {
    Wanted {
        purpose,
        node: "knoc-site".to_owned(),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
    }
}

/// Signs approved requests, as kube-controller-manager does.
struct FakeAuthority {
    signer: Signer<'static, KeyPair>,
    state: Mutex<State>,
    /// When the paused clock started.
    began: Instant,
}

#[derive(Default)]
struct State {
    requests: BTreeMap<String, (String, Answer)>,
    /// The validity of the certificates that it issues.
    life: Duration,
    approve_all: bool,
    down: bool,
    looks: usize,
}

impl FakeAuthority {
    fn new() -> Arc<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let signer = Signer::new(params, KeyPair::generate().unwrap());
        let life = Duration::from_hours(24 * 365);
        Arc::new(Self {
            signer,
            state: Mutex::new(State {
                life,
                ..State::default()
            }),
            began: Instant::now(),
        })
    }

    fn with(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn names(&self) -> Vec<String> {
        self.state
            .lock()
            .unwrap()
            .requests
            .keys()
            .cloned()
            .collect()
    }

    fn now(&self) -> Timestamp {
        now(self.began)
    }

    fn sign(&self, pem: &str, life: Duration) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(pem).unwrap();
        Validity::starting(self.now(), life)
            .apply(&mut request.params)
            .unwrap();
        request.signed_by(&self.signer).unwrap().pem()
    }

    fn approve(&self, name: &str) {
        let mut state = self.state.lock().unwrap();
        let life = state.life;
        let (pem, answer) = state.requests.get_mut(name).unwrap();
        *answer = Answer::Issued(self.sign(pem, life));
    }

    fn answer(&self, name: &str, answer: Answer) {
        self.with(|state| state.requests.get_mut(name).unwrap().1 = answer);
    }
}

fn now(began: Instant) -> Timestamp {
    let start: Timestamp = START.parse().unwrap();
    start + jiff::SignedDuration::try_from(began.elapsed()).unwrap()
}

fn down() -> AuthorityError {
    AuthorityError::Late {
        what: "get",
        name: "any".to_owned(),
    }
}

impl Authority for FakeAuthority {
    fn look(&self, name: &str) -> BoxFuture<'_, Result<Answer, AuthorityError>> {
        let mut state = self.state.lock().unwrap();
        state.looks += 1;
        let answer = if state.down {
            Err(down())
        } else {
            let found = state.requests.get(name);
            Ok(found.map_or(Answer::Absent, |(_, answer)| answer.clone()))
        };
        async move { answer }.boxed()
    }

    fn ask(&self, request: &Request) -> BoxFuture<'_, Result<(), AuthorityError>> {
        let mut state = self.state.lock().unwrap();
        let answer = if state.down { Err(down()) } else { Ok(()) };
        if answer.is_ok() {
            let entry = (request.pem.clone(), Answer::Waiting);
            state.requests.entry(request.name.clone()).or_insert(entry);
            if state.approve_all {
                drop(state);
                self.approve(&request.name);
            }
        }
        async move { answer }.boxed()
    }
}

/// A running rotator and its output.
struct Running {
    pairs: Pairs,
    health: watch::Receiver<Health>,
    notes: Notes,
    tasks: JoinSet<()>,
    _stop: DropGuard,
}

impl Running {
    async fn start(
        wanted: Wanted,
        folder: &std::path::Path,
        issuer: Issuer,
        began: Instant,
    ) -> Self {
        let (events, notes) = Events::channel();
        let (newest, pairs) = watch::channel(None);
        let keep = Keep::Folder(folder.to_owned());
        let clock = Box::new(move || now(began));
        let rotator = Rotator::start_at(wanted, keep, issuer, events, newest, clock)
            .await
            .unwrap();
        let health = rotator.health();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(rotator.run(stop.clone()));
        Self {
            pairs,
            health,
            notes,
            tasks,
            _stop: stop.drop_guard(),
        }
    }

    async fn until(&mut self, what: &str, is: impl FnMut(&Health) -> bool) -> Health {
        let last = self.health.clone();
        let waited = tokio::time::timeout(PATIENCE, self.health.wait_for(is)).await;
        match waited {
            Ok(health) => health.unwrap().clone(),
            Err(late) => panic!("not {what}, {late}: {:?}", last.borrow()),
        }
    }

    async fn valid(&mut self) -> Health {
        let is = |health: &Health| matches!(health, Health::Valid { .. });
        self.until("valid", is).await
    }

    /// The name of the pending request.
    async fn waits(&mut self) -> String {
        let is = |health: &Health| matches!(health, Health::Waiting { .. });
        let health = self.until("waiting", is).await;
        let Health::Waiting { request, .. } = health else {
            panic!("{health:?}")
        };
        request
    }

    fn pair(&self) -> Option<Arc<CertifiedKey>> {
        self.pairs.borrow().clone()
    }

    /// Ends the task as a kill would.
    async fn kill(mut self) {
        self.tasks.shutdown().await;
    }
}

fn addresses() -> BTreeSet<String> {
    ["10.0.0.7".to_owned()].into()
}
