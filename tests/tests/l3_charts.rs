//! Well-known charts on the real stack: pods as they render them, whose programs are asked what their users would ask, rolled out again as
//! their charts would be, and deleted (`make charts`; docs/guide/charts.md has the results).
//!
//! The tests of several pods start the kubelet with addresses of pods, and are the cluster's DNS: they run alone, one after the other.

use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{
    batch::v1::{CronJob, Job},
    core::v1::Service,
};
use knoc_tests::{
    World,
    charts::{LIMIT, Release, get},
    cluster::ClusterDns,
    own_addresses, wait_for,
    world::SOON,
};

// ---- redis ----

/// The client of Redis with the password of the chart's file.
const REDIS: &str = "REDISCLI_AUTH=$(<$REDIS_PASSWORD_FILE) redis-cli";

#[tokio::test]
async fn redis_has_its_keys_after_a_rollout() -> anyhow::Result<()> {
    let release = Release::install("redis").await?;
    let asked = redis(&release).await;
    release.finish(asked).await
}

async fn redis(release: &Release) -> anyhow::Result<()> {
    let ask = async |words: &str| {
        let command = format!("{REDIS} {words}");
        release
            .exec("redis-master-0", ["bash", "-ec", &command])
            .await
    };
    release.rolled_out("statefulset/redis-master").await?;
    for (words, answer) in [("PING", "PONG"), ("SET chart works", "OK")] {
        let said = ask(words).await?;
        ensure!(said == answer, "{words}: {said}");
    }
    let anonymous = release
        .exec("redis-master-0", ["redis-cli", "GET", "chart"])
        .await?;
    ensure!(anonymous.contains("NOAUTH"), "{anonymous}");
    release.restart("statefulset/redis-master").await?;
    let kept = ask("GET chart").await?;
    ensure!(kept == "works", "{kept}");
    Ok(())
}

// ---- postgresql ----

#[tokio::test]
async fn postgresql_has_its_tables_after_a_rollout() -> anyhow::Result<()> {
    let release = Release::install("postgresql").await?;
    let asked = postgresql(&release).await;
    release.finish(asked).await
}

async fn postgresql(release: &Release) -> anyhow::Result<()> {
    let ask = async |statement: &str| {
        let command = format!(
            "PGPASSWORD=$(<$POSTGRES_PASSWORD_FILE) psql -h 127.0.0.1 -U postgres -d app -qAtc '{statement}'"
        );
        release
            .exec("postgresql-0", ["bash", "-ec", &command])
            .await
    };
    release.rolled_out("statefulset/postgresql").await?;
    ask("create table numbers as select generate_series(1, 100) as n").await?;
    release.restart("statefulset/postgresql").await?;
    let sum = ask("select sum(n) from numbers").await?;
    ensure!(sum == "5050", "{sum}");
    Ok(())
}

// ---- nginx ----

#[tokio::test]
async fn nginx_serves_its_page_before_and_after_a_rollout() -> anyhow::Result<()> {
    let release = Release::install("nginx").await?;
    let asked = nginx(&release).await;
    release.finish(asked).await
}

async fn nginx(release: &Release) -> anyhow::Result<()> {
    for path in ["/before", "/after"] {
        release.rolled_out("deployment/nginx").await?;
        let request = get(path, "");
        let page = "the chart of nginx";
        let answers = release.answers("deployment/nginx", 8080, &request, page);
        answers.await?;
        // The links of the image in a volume lead to the log of the container.
        wait_for("the line of the access log", SOON, async || {
            let of = "app.kubernetes.io/name=nginx";
            let logs = ["logs", "-c", "nginx", "--tail=-1", "-l", of];
            let log = release.world.kubectl(logs).ok().await?.text();
            let line = format!("\"GET {path} HTTP/1.1\" 200");
            ensure!(log.contains(&line), log);
            Ok(())
        })
        .await?;
        if path == "/before" {
            release.restart("deployment/nginx").await?;
        }
    }
    Ok(())
}

// ---- grafana ----

/// The user and the password of the chart's Secret.
const GRAFANA: &str = "Authorization: Basic YWRtaW46Y2hhcnQtb2YtZ3JhZmFuYQ==\r\n";

#[tokio::test]
async fn grafana_is_healthy_before_and_after_a_rollout() -> anyhow::Result<()> {
    let release = Release::install("grafana").await?;
    let asked = grafana(&release).await;
    release.finish(asked).await
}

async fn grafana(release: &Release) -> anyhow::Result<()> {
    let ask = async |request: &str, text: &str| {
        let answer = release.answers("deployment/grafana", 3000, request, text);
        answer.await.map(drop)
    };
    release.rolled_out("deployment/grafana").await?;
    ask(&get("/api/health", ""), "\"database\": \"ok\"").await?;
    ask(&get("/api/datasources", ""), "401 Unauthorized").await?;
    ask(&get("/api/datasources", GRAFANA), "Prometheus").await?;
    release.restart("deployment/grafana").await?;
    // What the first pod wrote is on the claim.
    ask(&get("/api/health", ""), "\"starts\": 2").await
}

// ---- jupyter ----

/// The token of the chart's Secret.
const JUPYTER: &str = "Authorization: token chart-of-jupyter\r\n";
/// A kernel as a notebook starts it.
const KERNEL: &str = r#"
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
client.execute_interactive("print(6 * 7)")
client.stop_channels()
manager.shutdown_kernel(now=True)
"#;

#[tokio::test]
async fn jupyter_computes_and_has_its_files_when_it_is_started_again() -> anyhow::Result<()> {
    let release = Release::install("jupyter").await?;
    let asked = jupyter(&release).await;
    release.finish(asked).await
}

async fn jupyter(release: &Release) -> anyhow::Result<()> {
    let pod = "jupyter-ann";
    let ask = async |request: &str, text: &str| {
        let answer = release.answers("pod/jupyter-ann", 8888, request, text);
        answer.await.map(drop)
    };
    release.ready(pod).await?;
    ask(&get("/api/status", JUPYTER), "\"started\"").await?;
    let file = r#"{"type": "file", "format": "text", "content": "this is kept"}"#;
    let length = file.len();
    let put = format!(
        "PUT /api/contents/note.txt HTTP/1.1\r\nHost: chart\r\nConnection: close\r\n{JUPYTER}Content-Length: {length}\r\n\r\n{file}"
    );
    ask(&put, "note.txt").await?;
    let computed = release.exec(pod, ["python3", "-c", KERNEL]).await?;
    ensure!(computed == "42", "{computed}");
    // As the hub stops the server of a user and starts it again.
    release.world.delete(pod, None).await?;
    release.world.wait_gone(pod, SOON * 2).await?;
    release.apply().await?;
    release.ready(pod).await?;
    ask(&get("/api/contents/note.txt", JUPYTER), "this is kept").await
}

// ---- spark ----

#[tokio::test]
async fn an_executor_of_spark_serves_its_block_until_it_is_told_to_stop() -> anyhow::Result<()> {
    let release = Release::install("spark").await?;
    let asked = spark(&release).await;
    release.finish(asked).await
}

async fn spark(release: &Release) -> anyhow::Result<()> {
    let pod = "chart-exec-1";
    release.ready(pod).await?;
    let of = "executor 1 of spark-chart at ";
    let container = "spark-kubernetes-executor";
    release.world.wait_log(pod, container, of).await?;
    for (words, answer) in [("fetch\n", "block of executor 1"), ("stop\n", "stopped")] {
        release.answers(pod, 7079, words, answer).await?;
    }
    release.world.wait_phase(pod, "Succeeded", SOON).await?;
    Ok(())
}

// ---- gitlab-runner ----

/// What the runner sends to the helper, and to the build. Their output is in a file, because an attached client leaves with its input.
const CLONE: &str = r#"
(mkdir -p "$CI_PROJECT_DIR" && cd "$CI_PROJECT_DIR" && git init -q . && echo 'echo "built in $CI_PROJECT_DIR"' >build && git add build &&
    git -c user.name=chart -c user.email=chart@example.org commit -q -m 'the commit' && echo "the helper has cloned" >>/logs-1-2/output.log) &
"#;
const BUILD: &str = r#"
cat >/scripts-1-2/step_script <<'END'
cd "$CI_PROJECT_DIR" && git log --format=%s && sh build
until (exec 3<>/dev/tcp/redis/6379) 2>/dev/null; do sleep 0.2; done
exec 3<>/dev/tcp/redis/6379 && printf 'PING\r\n' >&3 && read -r line <&3 && echo "the service says $line"
END
(bash /scripts-1-2/step_script 2>&1 | tee -a /logs-1-2/output.log) &
"#;
/// What is in that file then.
const BUILT: &str =
    "the helper has cloned\nthe commit\nbuilt in /builds/group/project\nthe service says +PONG";

#[tokio::test]
async fn a_build_pod_of_gitlab_runner_runs_what_is_attached() -> anyhow::Result<()> {
    let release = Release::install("gitlab-runner").await?;
    let asked = gitlab_runner(&release).await;
    release.finish(asked).await
}

async fn gitlab_runner(release: &Release) -> anyhow::Result<()> {
    let world = &release.world;
    let pod = "runner-chart-project-1-concurrent-0";
    release.ready(pod).await?;
    for (container, script, text) in [
        ("helper", CLONE, "the helper has cloned"),
        ("build", BUILD, BUILT),
    ] {
        let attach = world.kubectl(["attach", "-i", pod, "-c", container]);
        attach.stdin(script).ok().await?;
        // As the runner reads the output, from the helper.
        wait_for(text, SOON, async || {
            let read = world.kubectl(["exec", pod, "-c", "helper", "--"]);
            let output = read.args(["cat", "/logs-1-2/output.log"]).ok().await?;
            ensure!(output.text().starts_with(text), "{output}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

// ---- cronjob ----

#[tokio::test]
async fn a_cronjob_writes_to_its_claim_by_its_schedule_and_by_hand() -> anyhow::Result<()> {
    let release = Release::install("cronjob").await?;
    let asked = cronjob(&release).await;
    release.finish(asked).await
}

async fn cronjob(release: &Release) -> anyhow::Result<()> {
    let world = &release.world;
    wait_for("a backup by the schedule", LIMIT, async || {
        let cronjob = world.api::<CronJob>().get("backup").await?;
        let status = cronjob.status.unwrap_or_default();
        ensure!(status.last_successful_time.is_some(), "{status:?}");
        Ok(())
    })
    .await?;
    let suspend = r#"{"spec": {"suspend": true}}"#;
    let suspend = ["patch", "cronjob", "backup", "-p", suspend];
    world.kubectl(suspend).ok().await?;
    let by_hand = ["create", "job", "by-hand", "--from=cronjob/backup"];
    world.kubectl(by_hand).ok().await?;
    wait_for("a backup by hand", LIMIT, async || {
        let job = world.api::<Job>().get("by-hand").await?;
        let status = job.status.unwrap_or_default();
        ensure!(status.succeeded == Some(1), "{status:?}");
        Ok(())
    })
    .await?;
    let log = world.kubectl(["logs", "job/by-hand"]).ok().await?.text();
    ensure!(
        log.starts_with("a backup beside ") && log.ends_with(" others by 1 CPUs"),
        "{log}"
    );
    let folder = format!("{}/daily", release.folder("backup"));
    let backups = world.on("login", ["ls", &folder]).ok().await?.text();
    ensure!(
        backups.lines().any(|name| name.starts_with("backup-"))
            && backups.lines().any(|name| name.starts_with("by-hand-")),
        "{backups}"
    );
    Ok(())
}

// ---- pods that reach each other ----

/// A cluster whose pods have addresses and its DNS.
struct Addresses {
    world: World,
    dns: ClusterDns,
}

impl Addresses {
    async fn begin() -> anyhow::Result<Self> {
        let world = World::new("chart-addresses").await?;
        let dns = ClusterDns::start(&world).await?;
        own_addresses::begin(&world).await?;
        Ok(Self { world, dns })
    }

    /// Installs the chart, and gives the DNS the name of its Service.
    async fn install(&self, chart: &str, service: &str) -> anyhow::Result<Release> {
        self.dns.reaches_pods(&self.world).await?;
        let release = Release::install(chart).await?;
        let found = release.world.api::<Service>().get(service).await?;
        let address = found.spec.and_then(|spec| spec.cluster_ip);
        let address: Ipv4Addr = address.context("a Service without an address")?.parse()?;
        let namespace = &release.world.namespace;
        let name = format!("{service}.{namespace}.svc.cluster.local");
        self.dns.add(&name, address);
        Ok(release)
    }

    async fn end(self) -> anyhow::Result<()> {
        own_addresses::end(&self.world).await?;
        self.dns.withdraw(&self.world).await;
        self.world.finish().await
    }
}

/// A client of Dask beside the scheduler: it waits for that many workers, and lets them compute.
fn squares(workers: usize) -> String {
    format!(
        r#"
from dask.distributed import Client
client = Client("tcp://127.0.0.1:8786", timeout="120s")
client.wait_for_workers({workers}, timeout=120)
squares = client.map(lambda n: n * n, range(1000))
print("the sum is", client.submit(sum, squares).result())
"#
    )
}

#[tokio::test]
async fn several_pods_of_dask_compute_a_sum() -> anyhow::Result<()> {
    let addresses = Addresses::begin().await?;
    let outcome = match addresses.install("dask", "dask-scheduler").await {
        Ok(release) => {
            let asked = dask(&release).await;
            release.finish(asked).await
        }
        Err(error) => Err(error),
    };
    addresses.end().await?;
    outcome
}

async fn dask(release: &Release) -> anyhow::Result<()> {
    let scheduler = "deployment/dask-scheduler";
    for workers in [2, 3] {
        release.rolled_out(scheduler).await?;
        release.rolled_out("deployment/dask-worker").await?;
        let squares = squares(workers);
        let said = release.exec(scheduler, ["python3", "-c", &squares]).await?;
        ensure!(said == "the sum is 332833500", "{said}");
        if workers == 2 {
            let scale = ["scale", "deployment/dask-worker", "--replicas=3"];
            release.world.kubectl(scale).ok().await?;
        }
    }
    Ok(())
}

/// A driver of Ray beside the head, which has no CPUs for tasks.
const DRIVER: &str = r#"
import os, socket, ray
ray.init(address=os.environ["RAY_POD_IP"] + ":6379", log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=1)
def square(n):
    return n * n, socket.gethostname()

found = ray.get([square.remote(n) for n in range(10)], timeout=120)
print("the sum is", sum(n for n, _ in found), "on", *{host for _, host in found})
"#;

#[tokio::test]
async fn several_pods_of_ray_compute_a_sum() -> anyhow::Result<()> {
    let addresses = Addresses::begin().await?;
    let outcome = match addresses.install("ray", "raycluster-head-svc").await {
        Ok(release) => {
            let asked = ray(&release).await;
            release.finish(asked).await
        }
        Err(error) => Err(error),
    };
    addresses.end().await?;
    outcome
}

async fn ray(release: &Release) -> anyhow::Result<()> {
    let (head, worker) = ("raycluster-head", "raycluster-small-group-worker");
    release.ready(head).await?;
    release.ready(worker).await?;
    let said = release.exec(head, ["python3", "-c", DRIVER]).await?;
    let expected = format!("the sum is 285 on {worker}");
    ensure!(said.ends_with(&expected), "{said}");
    Ok(())
}
