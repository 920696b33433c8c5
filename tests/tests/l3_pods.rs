//! Pods on the real stack: how they end, and their final status.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Event, Pod},
};
use knoc_tests::{
    PodBuilder, World, wait_for,
    world::{SOON, container_reason, exit_code, phase_of, why},
};
use kube::api::{ListParams, PostParams};
use serde_json::json;

/// Slurm checks time limits twice a minute, and they are whole minutes.
const TIME_LIMIT: Duration = Duration::from_mins(6);

#[tokio::test]
async fn a_job_that_slurm_ends_at_its_time_limit_says_so() -> anyhow::Result<()> {
    let world = World::new("time-limit").await?;
    let pod = PodBuilder::new("long")
        .annotation("knoc.io/partition", "short")
        .annotation("knoc.io/time", "1")
        .sh("sleep 600");
    world.create(&pod).await?;
    let ended = world.wait_phase("long", "Failed", TIME_LIMIT).await?;
    ensure!(why(&ended).0 == "SlurmTimeLimit", "{:?}", why(&ended));
    world.finish().await
}

#[tokio::test]
async fn a_job_that_reaches_its_time_limit_in_an_init_container_says_so() -> anyhow::Result<()> {
    let world = World::new("time-limit-init").await?;
    let pod = PodBuilder::new("slow")
        .annotation("knoc.io/partition", "short")
        .annotation("knoc.io/time", "1")
        .sh("echo never")
        .init_container("first")
        .sh("sleep 600");
    world.create(&pod).await?;
    let ended = world.wait_phase("slow", "Failed", TIME_LIMIT).await?;
    let (reason, message) = why(&ended);
    ensure!(
        reason == "SlurmTimeLimit" && message.contains("time limit"),
        "{reason}: {message}"
    );
    for container in ["first", "main"] {
        ensure!(
            exit_code(&ended, container).is_none_or(|code| code != 0),
            "{container}: {:?}",
            ended.status
        );
    }
    world.finish().await
}

#[tokio::test]
async fn a_kubernetes_job_of_twenty_pods_succeeds() -> anyhow::Result<()> {
    let world = World::new("job").await?;
    let mut template = PodBuilder::new("unused")
        .sh("echo $JOB_COMPLETION_INDEX")
        .manifest();
    template["spec"]["automountServiceAccountToken"] = json!(true);
    let job = serde_json::from_value(json!({
        "metadata": {"name": "twenty"},
        "spec": {
            "completions": 20, "parallelism": 20, "completionMode": "Indexed", "backoffLimit": 0,
            "template": {"spec": template["spec"]},
        },
    }))?;
    world
        .api::<Job>()
        .create(&PostParams::default(), &job)
        .await?;
    wait_for("the Job complete", Duration::from_mins(8), async || {
        let status = world
            .api::<Job>()
            .get("twenty")
            .await
            .map_err(|error| error.to_string())?
            .status;
        let status = status.unwrap_or_default();
        let done = status.succeeded == Some(20);
        if done {
            Ok(())
        } else {
            Err(serde_json::to_string(&status).unwrap_or_default())
        }
    })
    .await?;
    let pods = world.api::<Pod>().list(&ListParams::default()).await?.items;
    ensure!(pods.len() == 20, "{} pods", pods.len());
    for pod in pods {
        let name = pod.metadata.name.clone().unwrap_or_default();
        ensure!(
            exit_code(&pod, "main") == Some(0),
            "{name}: {:?}",
            pod.status
        );
        let index = name.split('-').nth(1).unwrap_or_default().to_owned();
        let log = world.logs(&name, "main").await?;
        ensure!(log.trim_end() == index, "{name} wrote {log:?}");
        let uid = pod.metadata.uid.unwrap_or_default();
        world.one_job(&uid, "COMPLETED").await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_pod_that_fails_keeps_its_exit_code_and_message() -> anyhow::Result<()> {
    let world = World::new("fails").await?;
    let pod = PodBuilder::new("fails").sh("echo because >/dev/termination-log; exit 7");
    let ended = world.run(&pod, "Failed").await?;
    ensure!(exit_code(&ended, "main") == Some(7), "{:?}", ended.status);
    let reason = container_reason(&ended, "main").context("no reason")?;
    ensure!(reason == ("Error".into(), "because\n".into()), "{reason:?}");
    world.finish().await
}

#[tokio::test]
async fn a_program_killed_by_a_signal_has_its_code() -> anyhow::Result<()> {
    let world = World::new("signal").await?;
    // The shell is PID 1, which cannot be killed from inside; its child can. `$$` is a `$` in Kubernetes.
    let pod = PodBuilder::new("signal").sh("sh -c 'kill -9 $$$$'; exit $?");
    let ended = world.run(&pod, "Failed").await?;
    ensure!(exit_code(&ended, "main") == Some(137), "{:?}", ended.status);
    world.finish().await
}

#[tokio::test]
async fn a_pod_over_its_memory_is_oom_killed() -> anyhow::Result<()> {
    let world = World::new("oom").await?;
    let pod = PodBuilder::new("oom")
        .memory("64Mi")
        .command(["tail", "/dev/zero"]);
    let ended = world.run(&pod, "Failed").await?;
    ensure!(exit_code(&ended, "main") == Some(137), "{:?}", ended.status);
    let reason = container_reason(&ended, "main").context("no reason")?;
    ensure!(reason.0 == "OOMKilled", "{reason:?}");
    world.finish().await
}

#[tokio::test]
async fn of_two_containers_the_one_that_takes_all_memory_is_oom_killed() -> anyhow::Result<()> {
    let world = World::new("oom-of-two").await?;
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    // The job's memory is that of both. From the moment at which the other one takes it, `modest` starts no process that would need
    // some.
    let pod = PodBuilder::new("two")
        .spec("volumes", json!([{"name": "shared", "emptyDir": {}}]))
        .memory("128Mi")
        .set("volumeMounts", mount.clone())
        .sh("until [ -e /shared/up ]; do sleep 0.1; done; exec tail /dev/zero")
        .container("modest")
        .memory("128Mi")
        .set("volumeMounts", mount)
        .sh("mkfifo /shared/go; touch /shared/up; read word </shared/go; echo $word");
    world.create(&pod).await?;
    let ended = |pod: &Pod| {
        (exit_code(pod, "main").is_some() || !why(pod).0.is_empty()).then(|| pod.clone())
    };
    let now = world
        .wait_for_state("two", "a container has ended", SOON, ended)
        .await?;
    let reason = container_reason(&now, "main").context("main has not ended")?;
    ensure!(
        reason.0 == "OOMKilled" && exit_code(&now, "main") == Some(137),
        "{reason:?}: {:?}",
        now.status
    );
    ensure!(phase_of(&now) == "Running", "{:?}", now.status);
    ensure!(exit_code(&now, "modest").is_none(), "{:?}", now.status);
    let go = "echo still here >/shared/go";
    let go = ["exec", "two", "-c", "modest", "--", "sh", "-c", go];
    world.kubectl(go).ok_or_killed().await?;
    let ended = world.wait_phase("two", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "modest") == Some(0), "{:?}", ended.status);
    ensure!(world.logs("two", "modest").await? == "still here\n");
    world.finish().await
}

#[tokio::test]
async fn a_pod_past_its_own_deadline_says_deadline_exceeded() -> anyhow::Result<()> {
    let world = World::new("deadline").await?;
    let pod = PodBuilder::new("late")
        .spec("activeDeadlineSeconds", json!(3))
        .sh("sleep 600");
    let ended = world.run(&pod, "Failed").await?;
    ensure!(why(&ended).0 == "DeadlineExceeded", "{:?}", why(&ended));
    let told = "DeadlineExceeded: Pod was active on the node longer than the specified deadline";
    wait_for("the Event of the deadline", SOON, async || {
        let events = world.events("late").await?;
        ensure!(events.iter().any(|event| event == told), "{events:?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_job_cancelled_by_the_administrator_names_who_cancelled_it() -> anyhow::Result<()> {
    let world = World::new("cancelled").await?;
    let uid = world
        .running(&PodBuilder::new("victim").sh("sleep 600"))
        .await?;
    let job = world.wait_job(&uid).await?;
    world.on_as_root("ctl", ["scancel", &job]).ok().await?;
    let ended = world.wait_phase("victim", "Failed", SOON).await?;
    let (reason, message) = why(&ended);
    ensure!(reason == "Cancelled", "{reason}: {message}");
    ensure!(
        message.contains("root") || message.contains("user id 0"),
        "{message}"
    );
    world.finish().await
}

#[tokio::test]
async fn init_containers_run_in_order_before_the_containers_run_together() -> anyhow::Result<()> {
    let world = World::new("containers").await?;
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let meet = |mine: &str, other: &str| {
        format!(
            "touch /shared/{mine}; until [ -e /shared/{other} ]; do sleep 0.1; done; cat /shared/order"
        )
    };
    let pod = PodBuilder::new("several")
        .spec("volumes", json!([{"name": "shared", "emptyDir": {}}]))
        .sh(&meet("main", "side"))
        .set("volumeMounts", mount.clone())
        .container("side")
        .sh(&meet("side", "main"))
        .set("volumeMounts", mount.clone())
        .init_container("first")
        .sh("sleep 0.5; echo first >>/shared/order")
        .set("volumeMounts", mount.clone())
        .init_container("second")
        .sh("echo second >>/shared/order")
        .set("volumeMounts", mount);
    let ended = world.run(&pod, "Succeeded").await?;
    for container in ["main", "side", "first", "second"] {
        ensure!(
            exit_code(&ended, container) == Some(0),
            "{container}: {:?}",
            ended.status
        );
    }
    for container in ["main", "side"] {
        ensure!(world.logs("several", container).await? == "first\nsecond\n");
    }
    world.finish().await
}

#[tokio::test]
async fn a_failing_init_container_fails_the_pod() -> anyhow::Result<()> {
    let world = World::new("init-fails").await?;
    let pod = PodBuilder::new("unlucky")
        .sh("echo never")
        .init_container("init")
        .sh("exit 3");
    let ended = world.run(&pod, "Failed").await?;
    ensure!(exit_code(&ended, "init") == Some(3), "{:?}", ended.status);
    ensure!(
        exit_code(&ended, "main").is_none_or(|code| code != 0),
        "{:?}",
        ended.status
    );
    world.finish().await
}

#[tokio::test]
async fn a_container_is_restarted_and_its_previous_log_kept() -> anyhow::Result<()> {
    let world = World::new("restart").await?;
    let pod = PodBuilder::new("again")
        .restart("OnFailure")
        .spec("volumes", json!([{"name": "memory", "emptyDir": {}}]))
        .sh("n=$(cat /m/n 2>/dev/null || echo 0); echo $((n+1)) >/m/n; echo life $n; [ $n = 1 ]")
        .set(
            "volumeMounts",
            json!([{"name": "memory", "mountPath": "/m"}]),
        );
    let ended = world.run(&pod, "Succeeded").await?;
    let statuses = ended
        .status
        .and_then(|status| status.container_statuses)
        .unwrap_or_default();
    ensure!(statuses[0].restart_count == 1, "{statuses:?}");
    ensure!(world.logs("again", "main").await? == "life 1\n");
    let previous = world.kubectl(["logs", "again", "--previous"]).ok().await?;
    ensure!(previous.text() == "life 0", "{previous}");
    world.finish().await
}

#[tokio::test]
async fn the_restarts_of_a_container_are_one_event_that_counts_them() -> anyhow::Result<()> {
    let world = World::new("counted").await?;
    let pod = PodBuilder::new("again")
        .restart("Always")
        .empty_dir("/m")
        .sh("n=$(cat /m/n 2>/dev/null || echo 0); echo $((n+1)) >/m/n; [ $n = 3 ] && exec sleep 600; exit 1");
    world.create(&pod).await?;
    let of = ListParams::default().fields("involvedObject.name=again,reason=Started");
    wait_for("the last attempt is counted", SOON * 2, async || {
        let events = world.api::<Event>().list(&of).await?.items;
        let mut counts: Vec<_> = events.iter().filter_map(|event| event.count).collect();
        counts.sort_unstable();
        // Of the first attempt and of the others. A busy kubelet may miss one that was short.
        let counted = matches!(counts.as_slice(), [1, 2 | 3] | [2 | 3]);
        let pod = world.pod("again").await?;
        let statuses = pod.status.and_then(|status| status.container_statuses);
        let restarts = statuses.and_then(|list| Some(list.first()?.restart_count));
        ensure!(counted && restarts == Some(3), "{restarts:?} {events:#?}");
        Ok(())
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn a_pod_of_the_longest_names_runs() -> anyhow::Result<()> {
    let world = World::new("long-names").await?;
    // Its first 63 characters end with a dash, which a host name must not.
    let name = format!("{}-{}", "n".repeat(62), "y".repeat(190));
    let (container, volume, key) = ("c".repeat(63), "v".repeat(63), "K".repeat(253));
    let map = serde_json::from_value(json!({
        "metadata": {"name": "m".repeat(253)}, "data": {&key: "value"},
    }))?;
    world
        .api::<ConfigMap>()
        .create(&PostParams::default(), &map)
        .await?;
    let script = format!(
        "hostname; echo $HOSTNAME; cat /values/{key}; echo; echo ${{{key}}}; \
         until [ -e /tmp/go ]; do sleep 0.1; done"
    );
    let pod = PodBuilder::new(&name)
        .sh(&script)
        .set("name", json!(container))
        .set(
            "envFrom",
            json!([{"configMapRef": {"name": "m".repeat(253)}}]),
        )
        .set(
            "volumeMounts",
            json!([{"name": volume, "mountPath": "/values"}]),
        )
        .spec(
            "volumes",
            json!([{"name": volume, "configMap": {"name": "m".repeat(253)}}]),
        );
    let uid = world.running(&pod).await?;
    let touch = ["exec", &name, "--", "touch", "/tmp/go"];
    world.kubectl(touch).ok_or_killed().await?;
    world.wait_phase(&name, "Succeeded", SOON).await?;
    let log = world.logs(&name, &container).await?;
    let host = "n".repeat(62);
    ensure!(log == format!("{host}\n{host}\nvalue\nvalue\n"), "{log}");
    let started = format!("Started: Started container {container}");
    wait_for("the Event of its start", SOON, async || {
        let events = world.events(&name).await?;
        ensure!(events.contains(&started), "{events:?}");
        Ok(())
    })
    .await?;
    world.delete(&name, None).await?;
    world.wait_gone(&name, SOON).await?;
    world.wait_no_job(&uid, SOON).await?;
    world.finish().await
}

#[tokio::test]
async fn containers_wait_for_an_init_container_and_for_one_that_failed() -> anyhow::Result<()> {
    let world = World::new("initializing").await?;
    let script = "until [ -e /tmp/go ]; do sleep 0.1; done; exit 4";
    let pod = PodBuilder::new("two").init_container("first").sh(script);
    world.create(&pod).await?;
    let runs = |pod: &Pod| {
        let status = pod.status.as_ref()?.init_container_statuses.as_ref()?;
        status[0]
            .state
            .as_ref()?
            .running
            .clone()
            .map(|_| pod.clone())
    };
    let now = world
        .wait_for_state("two", "its init container runs", SOON, runs)
        .await?;
    let initializing = Some(("PodInitializing".to_owned(), String::new()));
    ensure!(container_reason(&now, "main") == initializing, "{now:?}");
    let touch = ["exec", "two", "-c", "first", "--", "touch", "/tmp/go"];
    world.kubectl(touch).ok_or_killed().await?;
    let ended = world.wait_phase("two", "Failed", SOON).await?;
    ensure!(exit_code(&ended, "first") == Some(4), "{ended:?}");
    ensure!(
        container_reason(&ended, "main") == initializing,
        "{ended:?}"
    );
    world.finish().await
}

#[tokio::test]
async fn a_pod_for_windows_fails_with_the_message_of_kubernetes() -> anyhow::Result<()> {
    let world = World::new("windows").await?;
    let pod = PodBuilder::new("panes")
        .spec("os", json!({"name": "windows"}))
        .spec("nodeName", json!(world.node));
    let ended = world.run(&pod, "Failed").await?;
    let expected = "Pod was rejected: Failed to admit pod as the OS field doesn't match node OS";
    ensure!(
        why(&ended) == ("PodOSNotSupported".to_owned(), expected.to_owned()),
        "{:?}",
        why(&ended)
    );
    world.finish().await
}
