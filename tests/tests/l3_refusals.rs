//! Submissions that the real sbatch refuses: its message is in the pod's status and in an Event. Permanent refusals are not retried; a
//! pod that waits for a limit runs when the limit is lifted.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, STATE, phase_of, why},
};

/// The time from lifting a limit to the next attempt and the pod's end; the delays are 10, 20, 40 seconds.
const LIFTED: Duration = Duration::from_mins(8);

const POLICY: &str = "Batch job submission failed: Job violates accounting/QOS policy";

/// Changes Slurm's accounts as administrator; retries while the change is refused because jobs are still ending.
async fn sacctmgr(world: &World, change: &str) -> anyhow::Result<()> {
    let change = format!("sacctmgr -i {change}");
    wait_for(&change, SOON, async || {
        world.on_as_root("ctl", ["sh", "-c", &change]).ok().await
    })
    .await?;
    Ok(())
}

/// A QOS only for this test, which the agent's user can use.
async fn make_qos(world: &World, settings: &str) -> anyhow::Result<String> {
    let name = world.namespace.clone();
    sacctmgr(world, &format!("add qos {name} set {settings}")).await?;
    sacctmgr(world, &format!("modify user hpcuser set qos+={name}")).await?;
    Ok(name)
}

/// "Reason: message" of the pod's Events with that reason.
async fn events(world: &World, pod: &str, reason: &str) -> anyhow::Result<Vec<String>> {
    let mut events = world.events(pod).await?;
    events.retain(|event| event.starts_with(&format!("{reason}: ")));
    Ok(events)
}

/// Checks that the pod has failed permanently with this message of Slurm after one attempt.
async fn rejected(world: &World, name: &str, uid: &str, expected: &str) -> anyhow::Result<()> {
    let ended = world.wait_phase(name, "Failed", SOON).await?;
    let (reason, message) = why(&ended);
    ensure!(
        reason == "Rejected" && message.contains(expected),
        "{name}: {reason}: {message}"
    );
    let told = wait_for("an Event with Slurm's message", SOON, async || {
        let told = events(world, name, "SlurmRejected").await?;
        ensure!(!told.is_empty(), "{:?}", world.events(name).await?);
        Ok(told)
    })
    .await?;
    ensure!(told == [format!("SlurmRejected: {message}")], "{told:?}");
    let record = format!("{STATE}/pods/{uid}/record.json");
    let record = world.on("login", ["cat", &record]).ok().await?;
    let record: serde_json::Value = serde_json::from_slice(&record.stdout)?;
    ensure!(record["attempt"] == 1, "{name}: {record}");
    let jobs = world.jobs(uid).await?;
    ensure!(jobs.is_empty(), "{name}: {jobs:?}");
    Ok(())
}

async fn are_rejected(world: &World, qos: &str) -> anyhow::Result<()> {
    let cases = [
        (
            "partition",
            vec![("knoc.io/partition", "nowhere")],
            "invalid partition specified: nowhere",
        ),
        (
            "flag",
            vec![("knoc.io/flags", "--hint=nonsense")],
            "unrecognized --hint argument \"nonsense\"",
        ),
        (
            "qos",
            vec![("knoc.io/qos", "nothing")],
            "Batch job submission failed: Invalid qos specification",
        ),
        (
            "account",
            vec![("knoc.io/account", "nobody")],
            "Batch job submission failed: Invalid account or account/partition combination specified",
        ),
        (
            "wall",
            vec![("knoc.io/qos", qos), ("knoc.io/time", "60")],
            "QOSMaxWallDurationPerJobLimit",
        ),
    ];
    let mut uids = Vec::new();
    for (name, annotations, _) in &cases {
        let pod = annotations
            .iter()
            .fold(PodBuilder::new(name), |pod, (key, value)| {
                pod.annotation(key, value)
            });
        uids.push(world.create(&pod).await?);
    }
    for ((name, _, expected), uid) in cases.iter().zip(&uids) {
        rejected(world, name, uid, expected).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_permanent_refusal_of_slurm_fails_the_pod_with_its_message_and_is_not_retried()
-> anyhow::Result<()> {
    let world = World::new("rejected").await?;
    let qos = make_qos(&world, "MaxWall=00:05:00 flags=DenyOnLimit").await?;
    let outcome = are_rejected(&world, &qos).await;
    sacctmgr(&world, &format!("delete qos {qos}")).await?;
    outcome?;
    world.finish().await
}

/// Checks that the pod waits with this message of Slurm until `lift` has changed the accounts, and then runs as one job.
async fn waits_for_the_limit(
    world: &World,
    pod: PodBuilder,
    expected: &str,
    lift: &str,
) -> anyhow::Result<()> {
    let pod = pod.sh("echo at last");
    let (uid, name) = (world.create(&pod).await?, pod.name());
    let message = world
        .wait_for_state(name, &format!("held back by {expected}"), SOON, |pod| {
            let (_, message) = why(pod);
            message.contains(expected).then_some(message)
        })
        .await?;
    ensure!(
        message.starts_with("submission is held back: Throttled: ") && message.contains(POLICY),
        "{message}"
    );
    ensure!(phase_of(&world.pod(name).await?) == "Pending");
    wait_for("an Event with Slurm's message", SOON, async || {
        let told = events(world, name, "Throttled").await?;
        let has_message = told
            .iter()
            .any(|event| event.contains(expected) && event.contains(POLICY));
        ensure!(has_message, "{:?}", world.events(name).await?);
        Ok(())
    })
    .await?;
    let jobs = world.jobs(&uid).await?;
    ensure!(jobs.is_empty(), "{jobs:?}");
    sacctmgr(world, lift).await?;
    world.wait_phase(name, "Succeeded", LIFTED).await?;
    ensure!(world.logs(name, "main").await? == "at last\n");
    world.one_job(&uid, "").await
}

#[tokio::test]
async fn a_pod_over_the_submit_limit_of_its_qos_runs_when_the_limit_is_lifted() -> anyhow::Result<()>
{
    let world = World::new("qos-limit").await?;
    let qos = make_qos(&world, "MaxSubmitJobsPerUser=1").await?;
    // The QOS allows only one job, which is a foreign one.
    let option = format!("--qos={qos}");
    let hold = ["sbatch", "--parsable", "--hold", &option, "--wrap", "true"];
    let other = world.on("login", hold).ok().await?.text();
    let outcome = waits_for_the_limit(
        &world,
        PodBuilder::new("second").annotation("knoc.io/qos", &qos),
        "QOSMaxSubmitJobPerUserLimit",
        &format!("modify qos {qos} set MaxSubmitJobsPerUser=-1"),
    )
    .await;
    world.on("login", ["scancel", &other]).ok().await?;
    sacctmgr(&world, &format!("delete qos {qos}")).await?;
    outcome?;
    world.finish().await
}

#[tokio::test]
async fn a_pod_over_the_submit_limit_of_its_account_runs_when_the_limit_is_lifted()
-> anyhow::Result<()> {
    let world = World::new("account-limit").await?;
    let account = &world.namespace;
    sacctmgr(&world, &format!("add account {account}")).await?;
    let user = format!("user hpcuser account={account}");
    sacctmgr(&world, &format!("add {user} MaxSubmitJobs=0")).await?;
    let outcome = waits_for_the_limit(
        &world,
        PodBuilder::new("patient").annotation("knoc.io/account", account),
        "AssocMaxSubmitJobLimit",
        &format!("modify user hpcuser where account={account} set MaxSubmitJobs=-1"),
    )
    .await;
    sacctmgr(&world, &format!("delete {user}")).await?;
    sacctmgr(&world, &format!("delete account {account}")).await?;
    outcome?;
    world.finish().await
}
