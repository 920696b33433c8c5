//! Pods as well-known charts render them (the folder `tests/charts`), each installed in a namespace of its own, asked something, and deleted.
//!
//! `tests/testbed/charts.sh up` makes the images, and lets pods write where the claims lie. [`Release::finish`] writes the row of the chart
//! into docs/guide/charts.md if `KNOC_CHARTS_PAGE` is set to that page (`make charts`).

mod page;

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt as _, api::ListParams};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{Forward, World, guide::root, wait_for, world::has_condition};

/// The time in which an image is fetched and converted, and its pod becomes ready, beside others.
pub const LIMIT: Duration = Duration::from_mins(10);
/// The time for an answer of a program that runs.
const ANSWER: Duration = Duration::from_mins(3);
/// The time for one attempt to get it.
const ATTEMPT: Duration = Duration::from_secs(20);
/// The time in which the pods of a chart are gone, with their grace periods.
const GONE: Duration = Duration::from_mins(3);
/// The folder of the nodes in which `charts.sh` lets pods write.
const VOLUMES: &str = "/scratch/charts";

/// A manifest in the folder `tests/charts`.
#[derive(Debug)]
struct Chart {
    /// The file's name without its ending.
    name: &'static str,
    /// The chart, or the program that makes such pods, whose form the pods have.
    form: &'static str,
    /// What runs in them here.
    program: &'static str,
    /// What the test does with it, once it is ready.
    asked: &'static str,
    /// Its claims, which get volumes.
    claims: &'static [&'static str],
}

static CHARTS: [Chart; 10] = [
    Chart {
        name: "cronjob",
        form: "CronJob with a PVC, as charts render backups",
        program: "real: a shell script",
        asked: "a Job by the schedule and one by hand write to the claim",
        claims: &["backup"],
    },
    Chart {
        name: "dask",
        form: "dask/dask: scheduler and workers",
        program: "real: Dask of Debian 13",
        asked: "two workers compute a sum, then three",
        claims: &[],
    },
    Chart {
        name: "gitlab-runner",
        form: "build pod of GitLab Runner's Kubernetes executor: init, build, helper, service",
        program: "real: shells, git and Redis of Debian 13; the test attaches in place of the runner",
        asked: "helper and build get scripts on their standard input; the build reaches the service",
        claims: &[],
    },
    Chart {
        name: "grafana",
        form: "grafana/grafana with persistence and a data source",
        program: "stand-in: an HTTP server in Python, not Grafana",
        asked: "health and data sources with the password, before and after a rollout",
        claims: &["grafana"],
    },
    Chart {
        name: "jupyter",
        form: "user's pod of jupyterhub/jupyterhub",
        program: "real: Jupyter Server and ipykernel of Debian 13, with a token in place of the hub's login",
        asked: "a kernel computes; a file is there after the pod was replaced",
        claims: &["claim-ann"],
    },
    Chart {
        name: "nginx",
        form: "bitnami/nginx, two replicas, a read-only root",
        program: "real: nginx of Debian 13",
        asked: "a page by port-forward before and after a rollout; the access log",
        claims: &[],
    },
    Chart {
        name: "postgresql",
        form: "bitnami/postgresql, primary",
        program: "real: PostgreSQL of Debian 13",
        asked: "psql: a table is there after a rollout",
        claims: &["data-postgresql-0"],
    },
    Chart {
        name: "ray",
        form: "head and worker of KubeRay, with its init container, probes and hooks",
        program: "real: Ray 2.60 of PyPI, without KubeRay",
        asked: "the worker computes for a driver on the head",
        claims: &[],
    },
    Chart {
        name: "redis",
        form: "bitnami/redis, standalone",
        program: "real: Redis of Debian 13",
        asked: "PING, SET, and GET after a rollout",
        claims: &["redis-data-redis-master-0"],
    },
    Chart {
        name: "spark",
        form: "executor of Spark on Kubernetes",
        program: "stand-in: a server in Python at the port of the block manager, not Spark",
        asked: "a block by port-forward; the pod succeeds when it is told to stop",
        claims: &[],
    },
];

/// What was installed of a chart.
#[derive(Debug)]
pub struct Release {
    /// Its namespace, and the tools.
    pub world: World,
    chart: &'static Chart,
    manifest: String,
    began: Instant,
}

impl Release {
    /// Installs the chart in a new namespace, with a volume for each claim.
    pub async fn install(name: &str) -> anyhow::Result<Self> {
        let found = CHARTS.iter().find(|chart| chart.name == name);
        let chart = found.with_context(|| format!("there is no chart {name}"))?;
        let world = World::new(name).await?;
        let path = root().join(format!("tests/charts/{name}.yaml"));
        let manifest = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        // Where helm would render the namespace of the release.
        let namespace = format!(".{}.svc.", world.namespace);
        let release = Self {
            manifest: manifest.replace(".NAMESPACE.svc.", &namespace),
            began: Instant::now(),
            world,
            chart,
        };
        for claim in chart.claims {
            release.volume(claim).await?;
        }
        release.apply().await?;
        Ok(release)
    }

    /// Applies the manifest, which creates what is missing.
    pub async fn apply(&self) -> anyhow::Result<()> {
        let apply = self.world.kubectl(["apply", "-f", "-"]);
        apply.stdin(self.manifest.clone()).ok().await.map(drop)
    }

    /// The folder behind a claim, as the nodes see it.
    #[must_use]
    pub fn folder(&self, claim: &str) -> String {
        format!("{VOLUMES}/{}-{claim}", self.world.namespace)
    }

    fn volume_name(&self, claim: &str) -> String {
        format!("{}-{claim}", self.world.namespace)
    }

    async fn volume(&self, claim: &str) -> anyhow::Result<()> {
        let folder = self.folder(claim);
        let make = self.world.on("login", ["mkdir", "-p", &folder]);
        make.ok().await?;
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": self.volume_name(claim)},
            "spec": {
                "capacity": {"storage": "10Gi"}, "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "persistentVolumeReclaimPolicy": "Retain", "storageClassName": "",
                "hostPath": {"path": folder, "type": "Directory"},
                "claimRef": {"namespace": self.world.namespace, "name": claim},
            },
        });
        let apply = self.world.kubectl(["apply", "-f", "-"]);
        apply.stdin(volume.to_string()).ok().await.map(drop)
    }

    /// Waits until the workload, such as `deployment/web`, is what its template says, and ready.
    pub async fn rolled_out(&self, workload: &str) -> anyhow::Result<()> {
        let seconds = format!("--timeout={}s", LIMIT.as_secs());
        let status = self
            .world
            .kubectl(["rollout", "status", workload, &seconds]);
        status.deadline(LIMIT + ATTEMPT).ok().await.map(drop)
    }

    /// Replaces the pods of the workload, and waits until the new ones are ready.
    pub async fn restart(&self, workload: &str) -> anyhow::Result<()> {
        let restart = self.world.kubectl(["rollout", "restart", workload]);
        restart.ok().await?;
        self.rolled_out(workload).await
    }

    /// Waits until the pod is ready.
    pub async fn ready(&self, pod: &str) -> anyhow::Result<()> {
        let is_ready = |pod: &Pod| has_condition(pod, "Ready").then_some(());
        self.world
            .wait_for_state(pod, "ready", LIMIT, is_ready)
            .await
    }

    /// The output of a command in the first container of a pod, or of one pod of a workload.
    pub async fn exec<const N: usize>(
        &self,
        target: &str,
        command: [&str; N],
    ) -> anyhow::Result<String> {
        let exec = self.world.kubectl(["exec", target, "--"]).args(command);
        Ok(exec.deadline(ANSWER).ok().await?.text())
    }

    /// Waits until what the program answers to these bytes at its port contains the text; returns the answer.
    pub async fn answers(
        &self,
        target: &str,
        port: u16,
        request: &str,
        text: &str,
    ) -> anyhow::Result<String> {
        let what = format!("{text:?} in an answer of {target} at port {port}");
        wait_for(&what, ANSWER, async || {
            let answer = self.answer(target, port, request).await?;
            ensure!(answer.contains(text), "{answer}");
            Ok(answer)
        })
        .await
    }

    async fn answer(&self, target: &str, port: u16, request: &str) -> anyhow::Result<String> {
        let any = format!(":{port}");
        let forward = self.world.kubectl(["port-forward", target, &any]);
        let forward = Forward::start(forward).await?;
        let mut stream = forward.connect().await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let read = timeout(ATTEMPT, stream.read_to_end(&mut answer)).await;
        read.with_context(|| forward.program.shown())??;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Deletes what was installed, waits until no pod is left, and writes the row. If something failed, the namespace is left for
    /// inspection.
    pub async fn finish(self, asked: anyhow::Result<()>) -> anyhow::Result<()> {
        let outcome = match asked {
            Ok(()) => self.delete().await,
            Err(error) => Err(error),
        };
        let server = self.world.server_version().await?;
        let seconds = self.began.elapsed().as_secs();
        page::write(&server, self.chart, outcome.is_ok(), seconds)?;
        for claim in self.chart.claims {
            let name = self.volume_name(claim);
            let delete = ["delete", "persistentvolume", &name, "--wait=false"];
            self.world.kubectl(delete).ok().await?;
        }
        if let Err(error) = outcome {
            return Err(error.context(self.seen().await?));
        }
        self.world.finish().await
    }

    async fn delete(&self) -> anyhow::Result<()> {
        let delete = ["delete", "--wait=false", "--ignore-not-found", "-f", "-"];
        let delete = self.world.kubectl(delete).stdin(self.manifest.clone());
        delete.ok().await?;
        wait_for("no pod of the chart", GONE, async || {
            let pods = self.world.api::<Pod>().list(&ListParams::default()).await?;
            let left: Vec<_> = pods.items.iter().map(Pod::name_any).collect();
            ensure!(left.is_empty(), "{left:?}");
            anyhow::Ok(())
        })
        .await
    }

    /// The pods and the Events of the namespace, for the error of a test.
    async fn seen(&self) -> anyhow::Result<String> {
        let pods = self.world.kubectl(["get", "pods", "-o", "wide"]);
        let columns =
            "custom-columns=OF:.involvedObject.name,REASON:.reason,MESSAGE:.message,COUNT:.count";
        let events = self.world.kubectl(["get", "events", "-o", columns]);
        let (pods, events) = (pods.output().await?, events.output().await?);
        Ok(format!("{}\n{}", pods.text(), events.text()))
    }
}

/// A GET request after whose answer the connection is closed. Each header ends with CR LF.
#[must_use]
pub fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: chart\r\nConnection: close\r\n{headers}\r\n")
}
