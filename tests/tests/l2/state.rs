//! Level 2: what is stored in the state directory and for how long: installed versions and values.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_contract::jobdir::atomic;
use knoc_proto::pb::{self, container_status::State};
use knoc_tests::{
    relay::Relay,
    site::{Daemon, Kubelet, Options, Pod, Site, container},
    wait_for,
};
use prost::Message as _;
use serde_json::json;

const SOON: Duration = Duration::from_mins(2);

/// A value that appears only in the pod's environment.
const SECRET: &str = "s3cr3t-that-is-nowhere-on-disk";

fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Every file below the folder that contains the text.
pub(super) fn holding(folder: &Path, text: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(holding(&path, text)?);
        } else if path.is_file() {
            // A file that was removed meanwhile contains nothing.
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
    let (site, agent, client) = Site::start(Options::default()).await?;
    let versions = site.path("state/versions");
    let own = names(&versions)?;
    ensure!(own.len() == 1, "{own:?}");
    let pod = Pod::counting(&site, "older", 600.0)?;
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    agent.terminate().await?;
    // As if an agent of another version had submitted it.
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
    let are = async |wanted: &[&str]| {
        wait_for("the versions that are used are left", SOON, async || {
            let left = names(&versions)?;
            ensure!(left == wanted, "{left:?}");
            Ok(())
        })
        .await
    };
    are(&["0.0.2", &own[0]]).await?;
    pod.remove(&client).await?;
    are(&[&own[0]]).await
}

/// Values are kept in memory only, and a job waits that long for them; jobs do not start their shim before `gate` exists.
fn in_memory(wait: &str) -> anyhow::Result<Site> {
    let site = Site::new(Options {
        tables: format!("[values]\nat_rest = \"none\"\nwait = \"{wait}\""),
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
async fn values_that_must_not_be_on_disk_never_are() -> anyhow::Result<()> {
    let site = in_memory("10m")?;
    let _agent = site.agent(&[]).await?;
    let client = site.client()?;
    // The command does not contain the secret: it checks only the length.
    let script = format!(
        "[ ${{#TOKEN}} = {} ] && until test -e {}; do sleep 0.05; done",
        SECRET.len(),
        site.path("end").display()
    );
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
    site.put("end", "")?;
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

/// Starts an agent that keeps values in memory, gives it the pod, restarts it, and lets the pod's job start.
async fn starts_after_the_agent_lost_its_values(
    pod: &Pod,
    wait: &str,
) -> anyhow::Result<(Site, Daemon)> {
    let site = in_memory(wait)?;
    let agent = site.agent(&[]).await?;
    pod.ensure(&site.client()?).await?;
    agent.kill().await?;
    let agent = site.agent(&[]).await?;
    site.put("gate", "")?;
    Ok((site, agent))
}

#[tokio::test]
async fn an_agent_that_lost_the_values_asks_for_them_and_the_pod_waits() -> anyhow::Result<()> {
    let pod = with_secret(checks("waits"));
    let (site, _agent) = starts_after_the_agent_lost_its_values(&pod, "10m").await?;
    let client = site.client()?;
    let wants_values = |seen: &pb::PodObserved| {
        let state = seen.containers.first().and_then(|one| one.state.as_ref());
        seen.values_wanted
            && matches!(state, Some(State::Waiting(waiting)) if waiting.reason == "CreateContainerConfigError")
    };
    pod.wait_for_state(&client, "it waits for its values", SOON, wants_values)
        .await?;
    let mut values = pod.request.values.clone().unwrap_or_default();
    values.revision += 1;
    pod.update_values(&client, values).await?;
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())
}

#[tokio::test]
async fn a_pod_whose_values_never_arrive_releases_its_nodes() -> anyhow::Result<()> {
    let pod = with_secret(checks("starves"));
    let (site, _agent) = starts_after_the_agent_lost_its_values(&pod, "4s").await?;
    let outcome = pod.finished(&site.client()?, SOON).await?;
    ensure!(
        outcome.kind() == pb::OutcomeKind::Failed && outcome.reason == "ValuesMissing",
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test]
async fn the_kubelet_sends_values_again_that_the_agent_lost() -> anyhow::Result<()> {
    let site = in_memory("10m")?;
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

/// A pod whose program fails and is restarted until its environment says `two`.
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

/// Waits until the pod's program has run with the values that were staged first.
async fn ran(site: &Site, uid: &str) -> anyhow::Result<()> {
    wait_for("the program ran", SOON, async || match site.runs(uid) {
        Ok(0) => Err(site.log()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
    .await
}

/// The shim has copied the staged values and has no link yet, so it cannot report that.
#[tokio::test]
async fn values_that_arrive_between_the_jobs_start_and_its_link_reach_it() -> anyhow::Result<()> {
    let mut relay = Relay::start().await?;
    let (site, _agent, client) = Site::start(Options {
        shims_dial: Some(relay.address()),
        ..Options::default()
    })
    .await?;
    let pod = awaits_two(&site, "between")?;
    pod.ensure(&client).await?;
    ran(&site, "between").await?;
    pod.update_values(&client, two(&pod)).await?;
    relay.lead_to(site.shim_address());
    pod.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    wait_for("no values are left", SOON, async || {
        let left = names(&site.jobdir("between").join("values"))?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

/// If no link is ever established, the shim looks for newer staged values itself.
#[tokio::test]
async fn values_reach_a_pod_that_runs_without_a_link() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::without_link()).await?;
    let pod = awaits_two(&site, "unlinked")?;
    pod.ensure(&client).await?;
    let restarted = |seen: &pb::PodObserved| {
        let first = seen.containers.first();
        first.is_some_and(|one| one.restart_count > 0)
    };
    pod.wait_for_state(&client, "its container was restarted", 2 * SOON, restarted)
        .await
        .with_context(|| site.log())?;
    pod.update_values(&client, two(&pod)).await?;
    pod.succeeded(&client, 2 * SOON)
        .await
        .with_context(|| site.log())?;
    Ok(())
}

/// Values are held in memory for a link that is cut, and are lost with the agent: then it asks for the newest ones.
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
    pod.link_down(&client, SOON).await?;
    pod.update_values(&client, two(&pod)).await?;
    let seen = pod.state(&client).await?;
    ensure!(!seen.values_wanted, "the agent has them");
    agent.kill().await?;
    // The agent answers before it has published the pods that it restored.
    let _agent = site.agent(&[]).await?;
    let wanted = |seen: &pb::PodObserved| seen.values_wanted;
    pod.wait_for_state(&client, "its values are wanted", SOON, wanted)
        .await?;
    Ok(())
}

/// The kubelet sends its newest values with a newer generation, and considers them sent.
#[tokio::test]
async fn newer_values_that_come_with_a_newer_generation_count() -> anyhow::Result<()> {
    let (site, _agent, client) = Site::start(Options::default()).await?;
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
