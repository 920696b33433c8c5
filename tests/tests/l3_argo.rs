//! Argo Workflows, unmodified, on the real stack: the examples in `deploy/examples/argo`, and what its controller and executor ask of a
//! node. `tests/testbed/argo.sh up` starts Argo Workflows and the store; without it the API server does not know workflows.
//!
//! `two_hundred_steps_run_beside_two_hundred_plain_pods` takes minutes and is left to `make argo`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Pod;
use knoc_tests::{
    PodBuilder,
    argo::{Argo, LIMIT, SHARED, count, in_turn, node, nodes, sh, summary},
    stays, wait_for,
    world::{exit_code, why},
};
use kube::{ResourceExt as _, api::ListParams};
use serde_json::{Value, json};

/// As [`LIMIT`], and the image with OpenMPI has to be converted first.
const WITH_IMAGE: Duration = Duration::from_mins(8);
/// The time in which a program has ended by TERM: less than the 30 s after which the controller sends KILL.
const BY_TERM: Duration = Duration::from_secs(25);
/// The time for 200 steps.
const LONG: Duration = Duration::from_mins(20);

// ---- the examples ----

#[tokio::test]
async fn the_example_hello_prints_its_parameter() -> anyhow::Result<()> {
    let argo = Argo::new("argo-hello").await?;
    let name = argo.run_example("hello.yaml").await?;
    let log = argo.logs(&name).await?;
    ensure!(log.contains("hello from a step"), "{log}");
    argo.finish().await
}

#[tokio::test]
async fn the_example_coin_flip_takes_the_branches_of_its_results() -> anyhow::Result<()> {
    let argo = Argo::new("argo-coin-flip").await?;
    let name = argo.example("coin-flip.yaml").await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    ensure!(
        count(&workflow, "heads", "Succeeded") == 4,
        "{}",
        summary(&workflow)
    );
    ensure!(
        count(&workflow, "flip", "Succeeded") >= 4,
        "{}",
        summary(&workflow)
    );
    let log = argo.logs(&name).await?;
    let heads = log.lines().filter(|line| *line == "it was heads");
    ensure!(heads.count() == 4, "{log}");
    argo.finish().await
}

#[tokio::test]
async fn the_example_diamond_gives_its_flags_to_slurm() -> anyhow::Result<()> {
    let argo = Argo::new("argo-diamond").await?;
    let name = argo.run_example("diamond.yaml").await?;
    let log = argo.logs(&name).await?;
    // The executor writes lines of its own.
    for step in ["A", "B", "C", "D"] {
        ensure!(log.lines().any(|line| line == step), "no {step}: {log}");
    }
    for pod in argo.pods(&name).await? {
        let job = pod.annotations().get("knoc.io/job-id").context("no job")?;
        let show = ["scontrol", "show", "job", job];
        let shown = argo.world.on("login", show).ok().await?.text();
        ensure!(
            shown.contains("MailUser=alice@example.org") && shown.contains("TimeLimit=00:10:00"),
            "{shown}"
        );
    }
    argo.finish().await
}

#[tokio::test]
async fn the_example_intentional_failure_omits_only_what_needs_the_failed_step()
-> anyhow::Result<()> {
    let argo = Argo::new("argo-failure").await?;
    let name = argo.example("intentional-failure.yaml").await?;
    let workflow = argo.phase(&name, "Failed", LIMIT).await?;
    for (step, phase) in [
        ("A", "Succeeded"),
        ("B", "Failed"),
        ("D", "Succeeded"),
        ("E", "Failed"),
        ("G", "Omitted"),
    ] {
        let step = node(&workflow, step)?;
        ensure!(step["phase"] == phase, "{step}: {}", summary(&workflow));
    }
    let code = &node(&workflow, "E")?["outputs"]["exitCode"];
    ensure!(code == "1", "{code}: {}", summary(&workflow));
    argo.finish().await
}

#[tokio::test]
async fn the_example_nested_dag_runs_its_sixteen_steps() -> anyhow::Result<()> {
    let argo = Argo::new("argo-nested").await?;
    let name = argo.example("nested-dag.yaml").await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    ensure!(
        count(&workflow, "echo", "Succeeded") == 16,
        "{}",
        summary(&workflow)
    );
    let log = argo.logs(&name).await?;
    for outer in ["A", "B", "C", "D"] {
        for inner in ["A", "B", "C", "D"] {
            let both = format!("{outer}{inner}");
            ensure!(log.lines().any(|line| line == both), "no {both}: {log}");
        }
    }
    argo.finish().await
}

#[tokio::test]
async fn the_example_mpi_benchmark_runs_once_for_each_number_of_ranks() -> anyhow::Result<()> {
    let argo = Argo::new("argo-mpi").await?;
    let name = argo.example("mpi-benchmark.yaml").await?;
    argo.phase(&name, "Succeeded", WITH_IMAGE).await?;
    let log = argo.logs(&name).await?;
    for ranks in ["(2 processes", "(4 processes"] {
        ensure!(log.contains(ranks), "no {ranks}: {log}");
    }
    argo.finish().await
}

/// Lets the account of the workflows create pods, and look whether they have ended.
async fn allow_pods(argo: &Argo) -> anyhow::Result<()> {
    let role = "create role pods --verb=create,get --resource=pods";
    let role = argo.world.kubectl(role.split(' '));
    role.ok().await?;
    let account = format!("--serviceaccount={}:default", argo.world.namespace);
    let binding = ["create", "rolebinding", "pods", "--role=pods", &account];
    argo.world.kubectl(binding).ok().await.map(drop)
}

#[tokio::test]
async fn the_example_mpi_nodes_runs_on_two_nodes_for_each_number_of_ranks() -> anyhow::Result<()> {
    let argo = Argo::new("argo-mpi-nodes").await?;
    allow_pods(&argo).await?;
    let name = argo.example("mpi-nodes.yaml").await?;
    argo.phase(&name, "Succeeded", WITH_IMAGE).await?;
    for ranks in ["2", "4"] {
        let of = ListParams::default().labels(&format!("app=mpi-nodes,ranks={ranks}"));
        let pods = argo.world.api::<Pod>().list(&of).await?.items;
        ensure!(pods.len() == 1, "{} pods of {ranks} ranks", pods.len());
        let pod = &pods[0];
        let log = argo.world.logs(&pod.name_any(), "main").await?;
        ensure!(log.contains(&format!("({ranks} processes")), "{log}");
        let job = pod.annotations().get("knoc.io/job-id").context("no job")?;
        let show = ["scontrol", "show", "job", job];
        let shown = argo.world.on("login", show).ok().await?.text();
        ensure!(shown.contains("NumNodes=2 "), "{shown}");
    }
    argo.finish().await
}

#[tokio::test]
async fn the_example_image_root_runs_a_file_of_the_site() -> anyhow::Result<()> {
    let argo = Argo::new("argo-image-root").await?;
    let name = argo.run_example("image-root.yaml").await?;
    let log = argo.logs(&name).await?;
    ensure!(
        log.contains(&format!("a file of the site runs as {name}")),
        "{log}"
    );
    argo.finish().await
}

// ---- what the controller and the executor ask of a node ----

#[tokio::test]
async fn parameters_and_artifacts_pass_from_step_to_step_through_the_store() -> anyhow::Result<()> {
    let argo = Argo::new("argo-artifacts").await?;
    let mut make = sh(
        "make",
        "echo 42 >/tmp/answer; mkdir /tmp/set; echo one >/tmp/set/1; echo two >/tmp/set/2; echo text >/tmp/file",
    );
    make["outputs"] = json!({
        "parameters": [{"name": "answer", "valueFrom": {"path": "/tmp/answer"}}],
        "artifacts": [{"name": "set", "path": "/tmp/set"}, {"name": "file", "path": "/tmp/file", "archive": {"none": {}}}],
    });
    let mut take = sh(
        "take",
        "echo the answer is {{inputs.parameters.answer}}; cat /in/set/1 /in/set/2 /in/file",
    );
    take["inputs"] = json!({
        "parameters": [{"name": "answer"}],
        "artifacts": [{"name": "set", "path": "/in/set"}, {"name": "file", "path": "/in/file"}],
    });
    let output = |kind: &str, name: &str| format!("{{{{steps.make.outputs.{kind}.{name}}}}}");
    let arguments = json!({
        "parameters": [{"name": "answer", "value": output("parameters", "answer")}],
        "artifacts": [
            {"name": "set", "from": output("artifacts", "set")},
            {"name": "file", "from": output("artifacts", "file")},
        ],
    });
    let steps = json!({"name": "steps", "steps": [
        [{"name": "make", "template": "make"}],
        [{"name": "take", "template": "take", "arguments": arguments}],
    ]});
    let spec = json!({"entrypoint": "steps", "templates": [steps, make, take]});
    let name = argo.workflow("artifacts", spec).await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    let log = argo.logs(&name).await?;
    ensure!(log.contains("the answer is 42\none\ntwo\ntext"), "{log}");
    let artifacts = node(&workflow, "make")?["outputs"]["artifacts"].as_array();
    let file = artifacts
        .into_iter()
        .flatten()
        .find(|one| one["name"] == "file");
    let key = file.and_then(|file| file["s3"]["key"].as_str());
    let key = key.with_context(|| summary(&workflow))?;
    let stored = argo.stored(key).await?;
    ensure!(stored == "text", "{key}: {stored:?}");
    argo.finish().await
}

#[tokio::test]
async fn a_step_in_the_network_of_its_node_reports_its_outputs() -> anyhow::Result<()> {
    let argo = Argo::new("argo-host-network").await?;
    let mut step = sh("make", "echo 42 >/tmp/answer");
    step["outputs"] =
        json!({"parameters": [{"name": "answer", "valueFrom": {"path": "/tmp/answer"}}]});
    let spec = json!({"entrypoint": "make", "hostNetwork": true, "templates": [step]});
    let name = argo.workflow("host", spec).await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    let made = nodes(&workflow).find(|node| node["templateName"] == "make");
    let made = made.with_context(|| summary(&workflow))?;
    let answer = &made["outputs"]["parameters"][0]["value"];
    ensure!(answer == "42", "{answer}: {}", summary(&workflow));
    for pod in argo.pods(&name).await? {
        let network = pod.spec.and_then(|spec| spec.host_network);
        ensure!(network == Some(true), "{network:?}");
    }
    argo.finish().await
}

/// The template with the volume of its workflow mounted at `/work`.
fn mounted(mut template: Value) -> Value {
    template["container"]["volumeMounts"] = json!([{"name": "work", "mountPath": "/work"}]);
    template
}

/// The volumes of a workflow whose steps share this folder of the compute nodes.
fn volumes(folder: &str) -> Value {
    json!([{"name": "work", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}}])
}

#[tokio::test]
async fn steps_share_a_volume_of_the_site_and_store_what_lies_there() -> anyhow::Result<()> {
    let argo = Argo::new("argo-volume").await?;
    let folder = format!("{SHARED}/{}", argo.world.namespace);
    // The wait container reads the artifact from the volume, which it mounts elsewhere.
    let mut write = mounted(sh("write", "echo from the volume >/work/result"));
    write["outputs"] =
        json!({"artifacts": [{"name": "result", "path": "/work/result", "archive": {"none": {}}}]});
    let read = mounted(sh("read", "cat /work/result"));
    let spec = json!({
        "entrypoint": "steps",
        "volumes": volumes(&folder),
        "templates": [in_turn("steps", &["write", "read"]), write, read],
    });
    let name = argo.workflow("volume", spec).await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    let log = argo.logs(&name).await?;
    ensure!(log.contains("from the volume"), "{log}");
    let key = &node(&workflow, "write")?["outputs"]["artifacts"][0]["s3"]["key"];
    let stored = argo.stored(key.as_str().unwrap_or_default()).await?;
    ensure!(stored == "from the volume", "{key}: {stored:?}");
    argo.world.on("login", ["rm", "-r", &folder]).ok().await?;
    argo.finish().await
}

#[tokio::test]
async fn an_exit_handler_runs_after_a_failure_and_knows_of_it() -> anyhow::Result<()> {
    let argo = Argo::new("argo-exit").await?;
    let handler = sh("handler", "echo the workflow has {{workflow.status}}");
    let spec = json!({"entrypoint": "fail", "onExit": "handler", "templates": [sh("fail", "exit 7"), handler]});
    let name = argo.workflow("exit", spec).await?;
    let workflow = argo.phase(&name, "Failed", LIMIT).await?;
    ensure!(
        count(&workflow, "handler", "Succeeded") == 1,
        "{}",
        summary(&workflow)
    );
    let code = nodes(&workflow).find(|node| node["templateName"] == "fail");
    ensure!(
        code.is_some_and(|node| node["outputs"]["exitCode"] == "7"),
        "{code:?}"
    );
    let log = argo.logs(&name).await?;
    ensure!(log.contains("the workflow has Failed"), "{log}");
    argo.finish().await
}

#[tokio::test]
async fn a_step_that_fails_is_tried_again_in_a_pod_of_its_own() -> anyhow::Result<()> {
    let argo = Argo::new("argo-retry").await?;
    let mut flaky = sh("flaky", "echo attempt {{retries}}; test {{retries}} -ge 2");
    flaky["retryStrategy"] = json!({"limit": "4"});
    let spec = json!({"entrypoint": "flaky", "templates": [flaky]});
    let name = argo.workflow("retry", spec).await?;
    argo.phase(&name, "Succeeded", LIMIT).await?;
    let pods = argo.pods(&name).await?;
    ensure!(pods.len() == 3, "{} pods", pods.len());
    let log = argo.logs(&name).await?;
    for attempt in 0..3 {
        ensure!(log.contains(&format!("attempt {attempt}")), "{log}");
    }
    argo.finish().await
}

/// A step that says when it runs, and ends with the code 9 when it gets TERM.
fn until_term(name: &str) -> Value {
    sh(
        name,
        "trap 'echo got TERM; exit 9' TERM; echo started; while :; do sleep 1; done",
    )
}

/// Shuts a workflow down while its step runs, and checks that the step's program got TERM: the controller runs `argoexec kill 15 1` in
/// each container.
async fn shut_down(strategy: &str, handled: usize) -> anyhow::Result<()> {
    let argo = Argo::new(&format!("argo-{}", strategy.to_lowercase())).await?;
    let last = sh("handler", "echo after the stop");
    let spec = json!({"entrypoint": "endless", "onExit": "handler", "templates": [until_term("endless"), last]});
    let name = argo.workflow("endless", spec).await?;
    let pod = argo.only_pod(&name, "Running").await?.name_any();
    wait_for("the program's first line", LIMIT, async || {
        let log = argo.world.logs(&pod, "main").await?;
        ensure!(log.contains("started"), "{log:?}");
        anyhow::Ok(())
    })
    .await?;
    argo.change(&name, &json!({"shutdown": strategy})).await?;
    argo.world
        .wait_for_state(&pod, "ended by TERM", BY_TERM, |pod| {
            (exit_code(pod, "main")? == 9).then_some(())
        })
        .await?;
    let log = argo.world.logs(&pod, "main").await?;
    ensure!(log.contains("got TERM"), "{log}");
    let workflow = argo.phase(&name, "Failed", LIMIT).await?;
    ensure!(
        count(&workflow, "handler", "Succeeded") == handled,
        "{}",
        summary(&workflow)
    );
    argo.finish().await
}

#[tokio::test]
async fn terminate_ends_a_running_program_by_kill_1() -> anyhow::Result<()> {
    shut_down("Terminate", 0).await
}

#[tokio::test]
async fn stop_ends_a_running_program_by_kill_1_and_runs_the_exit_handler() -> anyhow::Result<()> {
    shut_down("Stop", 1).await
}

#[tokio::test]
async fn a_daemon_runs_beside_the_next_steps_and_is_ended_after_them() -> anyhow::Result<()> {
    let argo = Argo::new("argo-daemon").await?;
    let folder = format!("{SHARED}/{}", argo.world.namespace);
    // It is ready some time after it started, and answers what the next step writes.
    let serve = "trap 'exit 0' TERM; sleep 3; touch /work/ready; \
                 while :; do [ ! -e /work/question ] || echo answered >/work/answer; sleep 1; done";
    let mut daemon = mounted(sh("daemon", serve));
    daemon["daemon"] = json!(true);
    daemon["container"]["readinessProbe"] =
        json!({"exec": {"command": ["test", "-e", "/work/ready"]}, "periodSeconds": 1});
    let ask = "test -e /work/ready && touch /work/question; \
               for i in $(seq 60); do [ ! -e /work/answer ] || break; sleep 1; done; cat /work/answer";
    let spec = json!({
        "entrypoint": "steps",
        "volumes": volumes(&folder),
        "templates": [in_turn("steps", &["daemon", "ask"]), daemon, mounted(sh("ask", ask))],
    });
    let name = argo.workflow("daemon", spec).await?;
    argo.phase(&name, "Succeeded", LIMIT).await?;
    let pods = argo.pods(&name).await?;
    ensure!(pods.len() == 2, "{} pods", pods.len());
    for pod in pods {
        let name = pod.name_any();
        let ended = |pod: &Pod| exit_code(pod, "main");
        argo.world
            .wait_for_state(&name, "ended", LIMIT, ended)
            .await?;
    }
    argo.world.on("login", ["rm", "-r", &folder]).ok().await?;
    argo.finish().await
}

#[tokio::test]
async fn deadlines_of_a_step_and_of_a_workflow_end_them() -> anyhow::Result<()> {
    let argo = Argo::new("argo-deadline").await?;
    let mut step = sh("late", "sleep 600");
    step["activeDeadlineSeconds"] = json!(5);
    let of_step = json!({"entrypoint": "late", "templates": [step]});
    // Argo counts the time of a workflow itself, from its creation.
    let of_workflow = json!({"entrypoint": "late", "activeDeadlineSeconds": 30, "templates": [sh("late", "sleep 600")]});
    let (first, second) = tokio::join!(
        argo.workflow("step-deadline", of_step),
        argo.workflow("workflow-deadline", of_workflow)
    );
    let (first, second) = (first?, second?);
    let pod = argo.only_pod(&first, "Failed").await?;
    let (reason, message) = why(&pod);
    ensure!(reason == "DeadlineExceeded", "{reason}: {message}");
    argo.phase(&first, "Failed", LIMIT).await?;
    argo.phase(&second, "Failed", LIMIT).await?;
    argo.finish().await
}

#[tokio::test]
async fn a_suspended_workflow_has_no_pods_until_it_is_resumed() -> anyhow::Result<()> {
    let argo = Argo::new("argo-suspend").await?;
    let pause = json!({"name": "pause", "suspend": {"duration": "5s"}});
    let spec = json!({
        "entrypoint": "steps", "suspend": true,
        "templates": [in_turn("steps", &["before", "pause", "after"]), sh("before", "echo before"), pause, sh("after", "echo after")],
    });
    let name = argo.workflow("suspend", spec).await?;
    stays("no pods", Duration::from_secs(5), async || {
        let pods = argo.pods(&name).await?;
        ensure!(pods.is_empty(), "{} pods", pods.len());
        anyhow::Ok(())
    })
    .await?;
    argo.change(&name, &json!({"suspend": null})).await?;
    let workflow = argo.phase(&name, "Succeeded", LIMIT).await?;
    ensure!(
        node(&workflow, "pause")?["type"] == "Suspend",
        "{}",
        summary(&workflow)
    );
    let log = argo.logs(&name).await?;
    ensure!(log.contains("before") && log.contains("after"), "{log}");
    argo.finish().await
}

/// Waits with one watch instead of many reads; returns the seconds since this call.
async fn watched(argo: &Argo, object: &str, until: &str) -> anyhow::Result<u64> {
    let began = Instant::now();
    let (until, limit) = (
        format!("--for={until}"),
        format!("--timeout={}s", LONG.as_secs()),
    );
    let wait = argo.world.kubectl(["wait", object, &until, &limit]);
    wait.deadline(LONG + Duration::from_secs(30)).ok().await?;
    Ok(began.elapsed().as_secs())
}

#[tokio::test]
async fn two_hundred_steps_run_beside_two_hundred_plain_pods() -> anyhow::Result<()> {
    const STEPS: usize = 200;
    const AT_ONCE: usize = 16;
    let argo = Argo::new("argo-many").await?;
    let many = json!({"name": "many", "steps": [[{
        "name": "step", "template": "step", "withSequence": {"count": STEPS.to_string()},
    }]]});
    let spec = json!({"entrypoint": "many", "parallelism": AT_ONCE, "templates": [many, sh("step", "echo done")]});
    let name = argo.workflow("many", spec).await?;
    let object = format!("workflow/{name}");
    let steps = watched(&argo, &object, "jsonpath={.status.phase}=Succeeded").await?;
    let workflow = argo.get(&name).await?;
    ensure!(
        count(&workflow, "step", "Succeeded") == STEPS,
        "{}",
        summary(&workflow)
    );
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "plain"},
        "spec": {"completions": STEPS, "parallelism": AT_ONCE, "template": {"spec": {
            "runtimeClassName": "knoc", "restartPolicy": "Never",
            "containers": [{"name": "main", "image": PodBuilder::image_name(), "command": ["sh", "-c", "echo done"],
                "resources": {"limits": {"memory": "64Mi"}}}],
        }}},
    });
    let create = argo.world.kubectl(["create", "-f", "-"]);
    create.stdin(job.to_string()).ok().await?;
    let plain = watched(&argo, "job/plain", "condition=Complete").await?;
    println!("{STEPS} steps, {AT_ONCE} at once: {steps} s as a workflow, {plain} s as plain pods");
    argo.finish().await
}
