//! Level 2: what lies in the state directory, and for how long: installed versions, values.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use knoc_agent::jobdir::atomic;
use knoc_proto::pb::{self, container_status::State};
use knoc_tests::{
    site::{CLUSTER, Kubelet, Options, Pod, Site, brief, container},
    wait_for,
};
use prost::Message as _;
use serde_json::json;

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
fn holding(folder: &Path, text: &str) -> anyhow::Result<Vec<String>> {
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
