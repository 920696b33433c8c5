//! A Kubernetes API server for tests without Kubernetes. It stores any object without validation, and supports list,
//! watch, create, patch, replace and delete as far as a kubelet and its tests use them, over plain HTTP on loopback. Tests
//! that depend on validation belong to level 3.

mod patch;
mod routes;
mod store;
mod tokens;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::store::{Store, Target};
use self::tokens::Tokens;

pub use self::tokens::IssuedToken;

/// The running server; dropping this stops it.
#[derive(Debug)]
pub struct FakeApi {
    shared: Arc<Shared>,
    address: SocketAddr,
    tasks: JoinSet<()>,
    _stop: DropGuard,
}

#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    /// The newest resource version: wakes the watches.
    newest: watch::Sender<u64>,
    /// The resources that nobody may list or watch.
    denied: Mutex<BTreeSet<String>>,
    /// The resources of which the API creates none, as beyond a quota.
    full: Mutex<BTreeSet<String>>,
    /// The tokens of service accounts.
    tokens: Mutex<Tokens>,
}

impl Shared {
    fn tokens(&self) -> MutexGuard<'_, Tokens> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn denied(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.denied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn full(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change and wakes the watches.
    fn change<T>(&self, act: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let answer = act(&mut store);
        self.newest.send_replace(store.version);
        answer
    }
}

impl FakeApi {
    /// Starts on a free port, with the namespaces `default` and `kube-system`.
    pub async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .context("listening")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::default()),
            newest: watch::Sender::new(0),
            denied: Mutex::default(),
            full: Mutex::default(),
            tokens: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&shared), stop.clone()));
        let server = Self {
            shared,
            address,
            tasks,
            _stop: stop.drop_guard(),
        };
        for name in ["default", "kube-system"] {
            server.create("v1", "namespaces", "", json!({"metadata": {"name": name}}))?;
        }
        let account = json!({"metadata": {"name": "default"}});
        server.create("v1", "serviceaccounts", "default", account)?;
        Ok(server)
    }

    /// The URL of the server, `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Writes a kubeconfig that names this server.
    pub fn kubeconfig(&self, path: &Path) -> anyhow::Result<()> {
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url()}}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake",
                "context": {"cluster": "fake", "user": "fake", "namespace": "default"}}],
        });
        #[expect(
            clippy::disallowed_methods,
            reason = "a file of the test, read after this"
        )]
        std::fs::write(path, text.to_string()).with_context(|| path.display().to_string())
    }

    /// Creates an object, as a user would.
    pub fn create(
        &self,
        version: &str,
        resource: &str,
        namespace: &str,
        object: Value,
    ) -> anyhow::Result<Value> {
        let target = target(version, resource, namespace, "");
        self.shared
            .change(|store| store.create(&target, object))
            .map_err(|refusal| refused(&refusal))
    }

    /// The object as it is now.
    pub fn get(
        &self,
        version: &str,
        resource: &str,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Value> {
        self.shared
            .store()
            .get(&target(version, resource, namespace, name))
            .map_err(|refusal| refused(&refusal))
    }

    /// All objects of a collection.
    #[must_use]
    pub fn list(&self, version: &str, resource: &str, namespace: &str) -> Vec<Value> {
        self.shared
            .store()
            .list(&target(version, resource, namespace, ""))
    }

    /// Deletes an object, as `kubectl delete` would; `options` are `DeleteOptions`.
    pub fn delete(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        options: &Value,
    ) -> anyhow::Result<Value> {
        let target = target("v1", resource, namespace, name);
        self.shared
            .change(|store| store.delete(&target, options))
            .map_err(|refusal| refused(&refusal))
    }

    /// From now on nobody may list or watch this resource, or everybody may again.
    pub fn deny_list(&self, resource: &str, denied: bool) {
        if denied {
            self.shared.denied().insert(resource.to_owned());
        } else {
            self.shared.denied().remove(resource);
        }
    }

    /// From now on requests to create objects of this resource are rejected, as beyond a quota, or no longer.
    pub fn exceed_quota(&self, resource: &str, exceeded: bool) {
        if exceeded {
            self.shared.full().insert(resource.to_owned());
        } else {
            self.shared.full().remove(resource);
        }
    }

    /// From now on tokens live that long, whatever their requests ask for.
    pub fn token_life(&self, seconds: i64) {
        self.shared.tokens().life = Some(seconds);
    }

    /// The tokens that were issued, oldest first.
    #[must_use]
    pub fn tokens_issued(&self) -> Vec<IssuedToken> {
        self.shared.tokens().issued.clone()
    }

    /// A counter that increases with every change of any object. Tests wait on it instead of polling.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.newest.subscribe()
    }

    /// Ends the server and waits for it.
    pub async fn stop(self) {
        let Self {
            mut tasks,
            _stop: stop,
            ..
        } = self;
        drop(stop);
        while tasks.join_next().await.is_some() {}
    }
}

fn target(version: &str, resource: &str, namespace: &str, name: &str) -> Target {
    Target {
        version: version.to_owned(),
        resource: resource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn refused(error: &store::ApiError) -> anyhow::Error {
    anyhow::anyhow!("{} {}: {}", error.code, error.reason, error.message)
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        // If accepting a connection fails, its client sees the error.
        let Ok((stream, _)) = accepted else { continue };
        let shared = Arc::clone(&shared);
        let service = service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(routes::answer(shared, request).await) }
        });
        connections.spawn(async move {
            // If a client disconnects during a request, its own test fails.
            let _ended = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
    connections.shutdown().await;
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;
    use k8s_openapi::api::core::v1::Pod;
    use kube::api::{Api, DeleteParams, Patch, PatchParams, WatchEvent, WatchParams};
    use serde_json::json;

    use super::FakeApi;

    #[tokio::test]
    async fn a_client_sees_its_pod_come_change_and_go() -> anyhow::Result<()> {
        let server = FakeApi::start().await?;
        let config = kube::Config::new(server.url().parse()?);
        let client = kube::Client::try_from(config)?;
        let pods: Api<Pod> = Api::default_namespaced(client);
        let list = pods.list(&kube::api::ListParams::default()).await?;
        let version = list.metadata.resource_version.unwrap_or_default();
        let mine = WatchParams::default().fields("spec.nodeName=here");
        let events = pods.watch(&mine, &version).await?;
        for (name, node) in [("a", "here"), ("b", "there")] {
            let pod =
                json!({"metadata": {"name": name}, "spec": {"nodeName": node, "containers": []}});
            server.create("v1", "pods", "default", pod)?;
        }
        let status = json!({"status": {"phase": "Running"}});
        pods.patch_status("a", &PatchParams::default(), &Patch::Merge(&status))
            .await?;
        pods.delete("a", &DeleteParams::default()).await?;
        pods.delete("a", &DeleteParams::default().grace_period(0))
            .await?;
        let mut seen = Vec::new();
        futures::pin_mut!(events);
        while let Some(event) = events.try_next().await? {
            match event {
                WatchEvent::Added(pod) => seen.push(format!("added {:?}", pod.metadata.name)),
                WatchEvent::Modified(pod) => seen.push(format!(
                    "{:?} {:?}",
                    pod.status.and_then(|status| status.phase),
                    pod.metadata.deletion_timestamp.is_some()
                )),
                WatchEvent::Deleted(_) => break,
                WatchEvent::Bookmark(_) | WatchEvent::Error(_) => {}
            }
        }
        let expected = [
            "added Some(\"a\")",
            "Some(\"Running\") false",
            "Some(\"Running\") true",
        ];
        assert_eq!(seen, expected);
        server.stop().await;
        Ok(())
    }
}
