//! What controllers and the API server make of our pods on the real stack: evictions under a PodDisruptionBudget, readiness gates, and the
//! pod failure policy of a Job.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::{
    batch::v1::{Job, JobStatus},
    core::v1::{Pod, PodCondition},
    policy::v1::PodDisruptionBudget,
};
use knoc_kubelet::api_client;
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, has_condition, phase_of, why},
};
use kube::{
    ResourceExt as _,
    api::{Api, EvictParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

/// How long a pod may take on a busy machine until its end is that of its Job, or until another pod follows: the Job's controller waits between
/// two looks, and before it creates another pod.
const JUDGED: Duration = Duration::from_mins(5);

/// The status code of an eviction that a budget forbids.
const TOO_MANY_REQUESTS: u16 = 429;

/// A label of the pods that a budget protects.
const APP: (&str, &str) = ("app", "protected");

/// Evicts once. The client of the other tests tries a request that is answered with 429 again, for minutes.
async fn evict(world: &World, name: &str) -> anyhow::Result<()> {
    let mut config = kube::Config::infer().await?;
    config.default_retry = false;
    let pods = Api::<Pod>::namespaced(api_client::connect(config)?, &world.namespace);
    pods.evict(name, &EvictParams::default()).await?;
    Ok(())
}

/// Checks that the budget forbids the eviction, with the message of Kubernetes.
async fn forbidden(world: &World, name: &str) -> anyhow::Result<()> {
    let Err(error) = evict(world, name).await else {
        bail!("{name} was evicted");
    };
    let Some(kube::Error::Api(told)) = error.downcast_ref::<kube::Error>() else {
        bail!("{error:#}");
    };
    ensure!(
        told.code == TOO_MANY_REQUESTS && told.message.contains("disruption budget"),
        "{told:?}"
    );
    Ok(())
}

/// Creates a budget with one pod, which must stay.
async fn budget(world: &World) -> anyhow::Result<()> {
    let (key, value) = APP;
    let budget = serde_json::from_value(json!({
        "metadata": {"name": "budget"},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {key: value}}},
    }))?;
    let budgets = world.api::<PodDisruptionBudget>();
    budgets.create(&PostParams::default(), &budget).await?;
    wait_for("the budget counts the pod as healthy", SOON, async || {
        let budget = world.api::<PodDisruptionBudget>().get("budget").await?;
        let status = budget.status.context("no status")?;
        let counted = (
            status.expected_pods,
            status.current_healthy,
            status.disruptions_allowed,
        );
        ensure!(counted == (Some(1), Some(1), Some(0)), "{status:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_budget_forbids_an_eviction_until_it_allows_a_disruption() -> anyhow::Result<()> {
    let world = World::new("eviction").await?;
    let (key, value) = APP;
    let pod = PodBuilder::new("protected")
        .label(key, value)
        .sh("trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let uid = world.running(&pod).await?;
    budget(&world).await?;
    forbidden(&world, "protected").await?;
    let now = world.pod("protected").await?;
    ensure!(
        phase_of(&now) == "Running" && now.metadata.deletion_timestamp.is_none(),
        "{now:?}"
    );
    let loose = Patch::Merge(json!({"spec": {"minAvailable": 0}}));
    let budgets = world.api::<PodDisruptionBudget>();
    let how = PatchParams::default();
    budgets.patch("budget", &how, &loose).await?;
    // The controller counts again, and until then the API server goes by the old number.
    wait_for("the eviction is allowed", SOON, async || {
        evict(&world, "protected").await
    })
    .await?;
    world.wait_gone("protected", SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

/// A condition that another controller would set.
const GATE: &str = "example.org/registered";

/// Sets the pod's gate, as a controller does.
async fn set_gate(world: &World, name: &str, status: &str) -> anyhow::Result<()> {
    let conditions = json!([{"type": GATE, "status": status}]);
    let patch = Patch::Strategic(json!({"status": {"conditions": conditions}}));
    let how = PatchParams::default();
    world
        .api::<Pod>()
        .patch_status(name, &how, &patch)
        .await
        .context("set the gate")?;
    Ok(())
}

/// A condition of the pod.
fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let mut all = pod.status.as_ref()?.conditions.iter().flatten();
    all.find(|one| one.type_ == kind)
}

/// Waits until the gate holds up the pod's readiness, and nothing else does.
async fn held_up(world: &World, name: &str, expected: &str) -> anyhow::Result<()> {
    let is = |pod: &Pod| {
        let ready = condition(pod, "Ready")?;
        let gate = ready.reason.as_deref() == Some("ReadinessGatesNotReady");
        (gate && ready.status == "False" && has_condition(pod, "ContainersReady"))
            .then(|| ready.message.clone().unwrap_or_default())
    };
    let message = world
        .wait_for_state(name, "the gate is closed", SOON, is)
        .await?;
    ensure!(message == expected, "{message}");
    Ok(())
}

#[tokio::test]
async fn a_pod_is_ready_once_its_readiness_gate_is_open_and_as_long_as_it_is() -> anyhow::Result<()>
{
    let world = World::new("gates").await?;
    let pod = PodBuilder::new("gated")
        .spec("readinessGates", json!([{"conditionType": GATE}]))
        .sh("sleep 600");
    world.running(&pod).await?;
    let missing =
        format!("corresponding condition of pod readiness gate \"{GATE}\" does not exist.");
    held_up(&world, "gated", &missing).await?;
    set_gate(&world, "gated", "True").await?;
    let is = |pod: &Pod| has_condition(pod, "Ready").then(|| pod.clone());
    let ready = world
        .wait_for_state("gated", "it is ready", SOON, is)
        .await?;
    // The kubelet leaves the conditions of others as they are.
    ensure!(has_condition(&ready, GATE), "{:?}", ready.status);
    set_gate(&world, "gated", "False").await?;
    let shut = format!("the status of pod readiness gate \"{GATE}\" is not \"True\", but False");
    held_up(&world, "gated", &shut).await?;
    world.finish().await
}

/// Creates a Job with this failure policy whose pods run the script.
async fn create_job(world: &World, retries: u32, rule: Value, script: &str) -> anyhow::Result<()> {
    let template = PodBuilder::new("unused").sh(script).manifest();
    let job = serde_json::from_value(json!({
        "metadata": {"name": "judged"},
        "spec": {
            "backoffLimit": retries,
            "podFailurePolicy": {"rules": [rule]},
            "template": {"spec": template["spec"]},
        },
    }))?;
    let jobs = world.api::<Job>();
    jobs.create(&PostParams::default(), &job).await?;
    Ok(())
}

async fn job_status(world: &World) -> anyhow::Result<JobStatus> {
    let job = world.api::<Job>().get("judged").await?;
    Ok(job.status.unwrap_or_default())
}

/// The Job's pods, the oldest first.
async fn pods(world: &World) -> anyhow::Result<Vec<Pod>> {
    let of = ListParams::default().labels("batch.kubernetes.io/job-name=judged");
    let mut pods = world.api::<Pod>().list(&of).await?.items;
    pods.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
    Ok(pods)
}

#[tokio::test]
async fn an_exit_code_fails_a_job_at_once() -> anyhow::Result<()> {
    let world = World::new("fail-job").await?;
    let codes = json!({"containerName": "main", "operator": "In", "values": [42]});
    let rule = json!({"action": "FailJob", "onExitCodes": codes});
    create_job(&world, 3, rule, "exit 42").await?;
    wait_for("the Job fails by its policy", JUDGED, async || {
        let status = job_status(&world).await?;
        let mut conditions = status.conditions.iter().flatten();
        let failed = conditions.any(|one| {
            one.type_ == "Failed"
                && one.status == "True"
                && one.reason.as_deref() == Some("PodFailurePolicy")
        });
        ensure!(failed, "{status:?}");
        anyhow::Ok(())
    })
    .await?;
    let pods = pods(&world).await?;
    ensure!(pods.len() == 1, "it was tried again: {pods:?}");
    world.finish().await
}

#[tokio::test]
async fn a_disruption_by_slurm_does_not_count_against_a_job() -> anyhow::Result<()> {
    let world = World::new("ignored").await?;
    let disrupted = json!([{"type": "DisruptionTarget", "status": "True"}]);
    let rule = json!({"action": "Ignore", "onPodConditions": disrupted});
    create_job(&world, 0, rule, "sleep 600").await?;
    let first = wait_for("the first pod runs", SOON, async || {
        let pods = pods(&world).await?;
        let first = pods.into_iter().next().context("no pod")?;
        ensure!(phase_of(&first) == "Running", "{:?}", first.status);
        anyhow::Ok(first)
    })
    .await?;
    let job = world.wait_job(&first.uid().context("no UID")?).await?;
    world.requeue(&job).await?;
    let name = first.name_any();
    let ended = world.wait_phase(&name, "Failed", JUDGED).await?;
    ensure!(
        has_condition(&ended, "DisruptionTarget") && why(&ended).0 == "SlurmJobRequeued",
        "{:?}",
        ended.status
    );
    // Any failure that counts would be the Job's end.
    wait_for("another pod runs", JUDGED, async || {
        let pods = pods(&world).await?;
        let runs = |pod: &Pod| pod.name_any() != name && phase_of(pod) == "Running";
        let status = job_status(&world).await?;
        ensure!(pods.iter().any(runs), "{status:?}: {pods:?}");
        anyhow::Ok(())
    })
    .await?;
    let status = job_status(&world).await?;
    let has_failed = status
        .conditions
        .iter()
        .flatten()
        .any(|one| one.type_ == "Failed");
    ensure!(
        !has_failed && status.failed.unwrap_or_default() == 0,
        "{status:?}"
    );
    world.finish().await
}
