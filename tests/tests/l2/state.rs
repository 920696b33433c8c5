//! Level 2: what lies in the state directory, and for how long: installed versions, values.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_contract::jobdir::atomic;
use knoc_proto::pb::{self, agent_client::AgentClient, container_status::State};
use knoc_tests::{
    relay::Relay,
    site::{CLUSTER, Kubelet, Options, Pod, Site, brief, container},
    wait_for,
};
use prost::Message as _;
use serde_json::json;
use tonic::transport::Channel;

const SOON: Duration = Duration::from_secs(20);

/// Stands nowhere but in the pod's environment.
const SECRET: &str = "s3cr3t-that-is-nowhere-on-disk";

fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Every file below the folder that has the text in it.
pub(super) fn holding(folder: &Path, text: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(holding(&path, text)?);
        } else if path.is_file() {
            // What vanished meanwhile holds nothing.
            let bytes = std::fs::read(&path).unwrap_or_default();
            let there = bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes());
            found.extend(there.then(|| path.display().to_string()));
        }
    }
    Ok(found)
}

#[tokio::test]
async fn an_installed_version_stays_as_long_as_a_job_directory_names_it() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let agent = site.agent(&[]).await?;
    let client = site.client()?;
    let versions = site.path("state/versions");
    let own = names(&versions)?;
    ensure!(own.len() == 1, "{own:?}");
    let pod = Pod::counting(&site, "older", 600.0)?;
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    agent.terminate().await?;
    // As if it had been submitted by an agent of another version.
    for name in ["0.0.1", "0.0.2"] {
        std::fs::create_dir(versions.join(name))?;
        let program = versions.join(name).join("knoc-agent");
        std::fs::copy(versions.join(&own[0]).join("knoc-agent"), &program)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    }
    let job_file = site.jobdir("older").join("job.pb");
    let mut job = pb::JobFile::decode(&*std::fs::read(&job_file)?)?;
    ensure!(
        job.version == own[0],
        "the job file names {:?}",
        job.version
    );
    "0.0.2".clone_into(&mut job.version);
    atomic::write(&job_file, &job.encode_to_vec(), 0o600)?;
    let _agent = site.agent(&[]).await?;
    ensure!(
        names(&versions)? == ["0.0.2", &own[0]],
        "{:?}",
        names(&versions)?
    );
    pod.remove(&client).await?;
    ensure!(names(&versions)? == own, "{:?}", names(&versions)?);
    Ok(())
}

/// Values in memory only; jobs do not come to their shim before `gate` is there.
fn in_memory() -> anyhow::Result<Site> {
    let site = Site::new(Options {
        tables: "[values]\nat_rest = \"none\"\nwait = \"4s\"".to_owned(),
        prelude: "while [ ! -e \"$HOME/gate\" ]; do sleep 0.05; done\n".to_owned(),
        ..Options::default()
    })?;
    Ok(site)
}

fn checks(uid: &str) -> Pod {
    let script = format!("[ \"$TOKEN\" = {SECRET} ] || exit 9");
    Pod::new(
        uid,
        vec![container("main", &["/bin/sh", "-c", &script], &[])],
    )
}

fn with_secret(pod: Pod) -> Pod {
    pod.env("main", &[("TOKEN".to_owned(), SECRET.to_owned())])
}

#[tokio::test]
async fn values_that_are_not_to_lie_on_disk_never_do() -> anyhow::Result<()> {
    let site = in_memory()?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    // Its command does not tell the secret: it looks for any of that length.
    let script = format!("[ ${{#TOKEN}} = {} ] && sleep 1", SECRET.len());
    let pod = Pod::new(
        "memory",
        vec![container("main", &["/bin/sh", "-c", &script], &[])],
    );
    let pod = with_secret(pod);
    pod.ensure(&client).await?;
    let state = site.path("state");
    ensure!(
        holding(&state, SECRET)?.is_empty(),
        "{:?}",
        holding(&state, SECRET)?
    );
    site.put("gate", "")?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    ensure!(
        holding(&state, SECRET)?.is_empty(),
        "{:?}",
        holding(&state, SECRET)?
    );
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    ensure!(
        holding(&state, SECRET)?.is_empty(),
        "{:?}",
        holding(&state, SECRET)?
    );
    Ok(())
}

#[tokio::test]
async fn an_agent_that_lost_the_values_asks_for_them_and_the_pod_waits() -> anyhow::Result<()> {
    let site = in_memory()?;
    let agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = with_secret(checks("waits"));
    pod.ensure(&client).await?;
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    site.put("gate", "")?;
    wait_for("the values are wanted", SOON, async || {
        let seen = pod.observe(&client).await?;
        let state = seen.containers.first().and_then(|one| one.state.clone());
        match state {
            Some(State::Waiting(waiting))
                if seen.values_wanted && waiting.reason == "CreateContainerConfigError" =>
            {
                Ok(())
            }
            _ => Err(brief(&seen)),
        }
    })
    .await?;
    let mut values = pod.request.values.clone().unwrap_or_default();
    values.revision += 1;
    let request = pb::UpdateValuesRequest {
        cluster_id: CLUSTER.to_owned(),
        uid: "waits".to_owned(),
        values: Some(values),
        ..pb::UpdateValuesRequest::default()
    };
    client.clone().update_values(request).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())
}

#[tokio::test]
async fn a_pod_whose_values_never_come_gives_its_nodes_back() -> anyhow::Result<()> {
    let site = in_memory()?;
    let agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = with_secret(checks("starves"));
    pod.ensure(&client).await?;
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    site.put("gate", "")?;
    let outcome = pod.finished(&client, SOON).await?;
    ensure!(
        outcome.kind() == pb::OutcomeKind::Failed && outcome.reason == "ValuesMissing",
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test]
async fn the_kubelet_sends_values_again_that_the_agent_lost() -> anyhow::Result<()> {
    let site = in_memory()?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let _process = kubelet.start(&site, &[]).await?;
    let script = format!("[ ${{#TOKEN}} = {} ]", SECRET.len());
    let env = json!([{"name": "TOKEN", "value": SECRET}]);
    let uid = kubelet.create_pod(
        "again",
        json!({"containers": [{"name": "main", "image": "none", "command": ["/bin/sh", "-c", script], "env": env}]}),
    )?;
    let jobdir = site.jobdir(&uid);
    wait_for("the pod is submitted", SOON, async || {
        if jobdir.join("batch.out").exists() {
            Ok(())
        } else {
            Err(site.log())
        }
    })
    .await?;
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    site.put("gate", "")?;
    kubelet
        .phase("again", "Succeeded", SOON)
        .await
        .with_context(|| site.log())?;
    Ok(())
}

/// A pod whose program fails, and is started again, until its environment says `two`.
fn awaits_two(site: &Site, uid: &str) -> anyhow::Result<Pod> {
    let runs = site.path("runs");
    std::fs::create_dir_all(&runs)?;
    let script = format!("echo >>{}/{uid}; [ \"$MARK\" = two ]", runs.display());
    let mut pod = Pod::new(
        uid,
        vec![container("main", &["/bin/sh", "-c", &script], &[])],
    );
    if let Some(spec) = &mut pod.request.spec {
        spec.restart_policy = pb::RestartPolicy::OnFailure.into();
    }
    Ok(pod.env("main", &[("MARK".to_owned(), "one".to_owned())]))
}

/// The same values, of revision 2 and with `MARK=two`.
fn two(pod: &Pod) -> pb::PodValues {
    let mut values = pod.request.values.clone().unwrap_or_default();
    values.revision = 2;
    for var in values.env.iter_mut().flat_map(|env| &mut env.vars) {
        var.value = Some(pb::env_var::Value::Template("two".to_owned()));
    }
    values
}

async fn update(
    client: &AgentClient<Channel>,
    uid: &str,
    values: pb::PodValues,
) -> anyhow::Result<()> {
    let request = pb::UpdateValuesRequest {
        cluster_id: CLUSTER.to_owned(),
        uid: uid.to_owned(),
        values: Some(values),
        ..pb::UpdateValuesRequest::default()
    };
    client.clone().update_values(request).await?;
    Ok(())
}

/// Waits until the pod's program ran with the values that were staged first.
async fn ran(site: &Site, uid: &str) -> anyhow::Result<()> {
    wait_for("the program ran", SOON, async || match site.runs(uid) {
        Ok(0) => Err(site.log()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
    .await
}

/// The shim has copied what was staged, and has no link yet: so it cannot say so.
#[tokio::test]
async fn values_that_come_between_the_jobs_start_and_its_link_reach_it() -> anyhow::Result<()> {
    let mut relay = Relay::start().await?;
    let site = Site::new(Options {
        shims_dial: Some(relay.address()),
        ..Options::default()
    })?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = awaits_two(&site, "between")?;
    pod.ensure(&client).await?;
    ran(&site, "between").await?;
    update(&client, "between", two(&pod)).await?;
    relay.lead_to(site.shim_address());
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let left = names(&site.jobdir("between").join("values"))?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Where no link ever comes up the shim looks itself for what was staged later.
#[tokio::test]
async fn values_reach_a_pod_that_runs_without_a_link() -> anyhow::Result<()> {
    let site = Site::new(Options {
        // Nobody listens there.
        shims_dial: Some(([127, 0, 0, 1], 1).into()),
        ..Options::default()
    })?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = awaits_two(&site, "unlinked")?;
    pod.ensure(&client).await?;
    wait_for("the agent knows that it ran", 2 * SOON, async || {
        let seen = pod.observe(&client).await?;
        let restarts = seen.containers.first().map_or(0, |one| one.restart_count);
        if restarts > 0 {
            Ok(())
        } else {
            Err(brief(&seen))
        }
    })
    .await
    .with_context(|| site.log())?;
    update(&client, "unlinked", two(&pod)).await?;
    pod.succeeded(&client, 2 * SOON)
        .await
        .with_context(|| site.log())?;
    Ok(())
}

/// Held in memory for a link that is cut, and lost with the agent: then the newest are asked for.
#[tokio::test]
async fn an_agent_that_lost_newer_values_asks_for_them() -> anyhow::Result<()> {
    let mut relay = Relay::start().await?;
    let site = Site::new(Options {
        tables: "[values]\nat_rest = \"none\"".to_owned(),
        shims_dial: Some(relay.address()),
        ..Options::default()
    })?;
    relay.lead_to(site.shim_address());
    let agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = awaits_two(&site, "newer")?;
    pod.ensure(&client).await?;
    ran(&site, "newer").await?;
    relay.cut();
    wait_for("the link is down", SOON, async || {
        let seen = pod.observe(&client).await?;
        if seen.shim_connected {
            Err(brief(&seen))
        } else {
            Ok(())
        }
    })
    .await?;
    update(&client, "newer", two(&pod)).await?;
    let seen = pod.observe(&client).await.map_err(anyhow::Error::msg)?;
    ensure!(!seen.values_wanted, "the agent has them");
    agent.kill().await?;
    let _agent = site.agent(&[]).await?;
    let seen = pod.observe(&client).await.map_err(anyhow::Error::msg)?;
    ensure!(seen.values_wanted, "{}", brief(&seen));
    Ok(())
}

/// The kubelet sends its newest values with a newer generation, and counts them as sent.
#[tokio::test]
async fn newer_values_that_come_with_a_newer_generation_count() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    let pod = awaits_two(&site, "generation")?;
    pod.ensure(&client).await?;
    ran(&site, "generation").await?;
    let mut newer = pod.clone();
    newer.request.values = Some(two(&pod));
    if let Some(spec) = &mut newer.request.spec {
        spec.generation = 2;
        spec.labels.insert("colour".into(), "blue".into());
    }
    newer.ensure(&client).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())
}
