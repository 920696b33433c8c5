//! Pods as the agent accepts them, and what the tests do with a pod: ensure, wait, read, delete.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use knoc_proto::pb;
use knoc_proto::pb::agent_client::AgentClient;
use tonic::transport::Channel;

use super::{CLUSTER, Site};
use crate::wait_for;

/// How long the agent may take to accept a pod that it may have, and to end one.
const LIMIT: Duration = Duration::from_mins(2);

/// A pod without Kubernetes.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The request that makes it exist, the same every time.
    pub request: pb::EnsurePodRequest,
}

/// A container that runs a program of the host.
#[must_use]
pub fn container(name: &str, command: &[&str], args: &[String]) -> pb::Container {
    pb::Container {
        name: name.to_owned(),
        image: "none".to_owned(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        args: args.to_vec(),
        ..pb::Container::default()
    }
}

impl Pod {
    /// A pod of these containers that never restarts them.
    #[must_use]
    pub fn new(uid: &str, containers: Vec<pb::Container>) -> Self {
        let spec = pb::PodSpec {
            uid: uid.to_owned(),
            namespace: "default".to_owned(),
            name: uid.to_owned(),
            generation: 1,
            containers,
            restart_policy: pb::RestartPolicy::Never.into(),
            termination_grace_period_seconds: 5,
            hostname: "pod".to_owned(),
            job: Some(pb::JobRequest {
                cpu_millis: 1,
                ..pb::JobRequest::default()
            }),
            ..pb::PodSpec::default()
        };
        let values = pb::PodValues {
            revision: 1,
            ..pb::PodValues::default()
        };
        let request = pb::EnsurePodRequest {
            leadership_epoch: 0,
            cluster_id: CLUSTER.to_owned(),
            spec: Some(spec),
            values: Some(values),
            ..pb::EnsurePodRequest::default()
        };
        Self { request }
    }

    /// A pod whose program records in `runs/UID` that it ran, and runs for that many seconds.
    pub fn counting(site: &Site, uid: &str, seconds: f32) -> anyhow::Result<Self> {
        Self::recording(site, uid, &format!("sleep {seconds}"))
    }

    /// A pod whose program records in `runs/UID` that it ran, and runs until the file `go-UID` of the site exists.
    pub fn gated(site: &Site, uid: &str) -> anyhow::Result<Self> {
        let go = site.path(&format!("go-{uid}")).display().to_string();
        Self::recording(
            site,
            uid,
            &format!("until test -e {go}; do sleep 0.05; done"),
        )
    }

    fn recording(site: &Site, uid: &str, then: &str) -> anyhow::Result<Self> {
        let runs = site.path("runs");
        std::fs::create_dir_all(&runs)?;
        let script = format!("echo $$ >> {}/{uid}; {then}; echo done", runs.display());
        Ok(Self::new(
            uid,
            vec![container("main", &["/bin/sh", "-c", &script], &[])],
        ))
    }

    /// Gives a container its environment, as written in a pod.
    #[must_use]
    pub fn env(mut self, container: &str, vars: &[(String, String)]) -> Self {
        let vars = vars.iter().map(|(name, value)| pb::EnvVar {
            name: name.clone(),
            value: Some(pb::env_var::Value::Template(value.clone())),
        });
        let env = pb::ContainerEnv {
            container: container.to_owned(),
            vars: vars.collect(),
        };
        if let Some(values) = &mut self.request.values {
            values.env.push(env);
        }
        self
    }

    /// The uid of the pod.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.request.spec.as_ref().map_or("", |spec| &spec.uid)
    }

    /// Asks the agent for the pod, again and again until the agent accepts it.
    pub async fn ensure(&self, client: &AgentClient<Channel>) -> anyhow::Result<()> {
        wait_for("the agent has the pod", LIMIT, async || {
            let answer = client.clone().ensure_pod(self.request.clone()).await;
            answer.map(|_| ()).map_err(|status| status.to_string())
        })
        .await
    }

    /// The pod as the agent sees it now, or the agent's error as text.
    pub async fn observe(&self, client: &AgentClient<Channel>) -> Result<pb::PodObserved, String> {
        let request = pb::GetPodRequest {
            uid: self.uid().to_owned(),
        };
        let answer = client.clone().get_pod(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| status.to_string())
    }

    /// The pod as the agent sees it now.
    pub async fn state(&self, client: &AgentClient<Channel>) -> anyhow::Result<pb::PodObserved> {
        self.observe(client).await.map_err(anyhow::Error::msg)
    }

    /// Waits until `is` holds for the pod as the agent sees it; returns that state. The error of a time-out has the last one.
    pub async fn wait_for_state(
        &self,
        client: &AgentClient<Channel>,
        what: &str,
        deadline: Duration,
        is: impl Fn(&pb::PodObserved) -> bool,
    ) -> anyhow::Result<pb::PodObserved> {
        let what = format!("the pod {}: {what}", self.uid());
        wait_for(&what, deadline, async || {
            let pod = self.observe(client).await?;
            if is(&pod) { Ok(pod) } else { Err(brief(&pod)) }
        })
        .await
    }

    /// Waits until the pod is finished; returns its outcome.
    pub async fn finished(
        &self,
        client: &AgentClient<Channel>,
        deadline: Duration,
    ) -> anyhow::Result<pb::Outcome> {
        let finished =
            |pod: &pb::PodObserved| pod.phase() == pb::PodPhase::Finished && pod.outcome.is_some();
        let pod = self
            .wait_for_state(client, "it is finished", deadline, finished)
            .await?;
        pod.outcome.context("a finished pod without an outcome")
    }

    /// How a container ended.
    pub async fn terminated(
        &self,
        client: &AgentClient<Channel>,
        container: &str,
    ) -> anyhow::Result<pb::Terminated> {
        let pod = self.state(client).await?;
        let mut statuses = pod.containers.into_iter();
        let status = statuses
            .find(|one| one.name == container)
            .context("no such container")?;
        match status.state {
            Some(pb::container_status::State::Terminated(ended)) => Ok(ended),
            other => anyhow::bail!("{container} is not terminated: {other:?}"),
        }
    }

    /// Waits until the pod has succeeded.
    pub async fn succeeded(
        &self,
        client: &AgentClient<Channel>,
        deadline: Duration,
    ) -> anyhow::Result<()> {
        let outcome = self.finished(client, deadline).await?;
        anyhow::ensure!(
            outcome.kind() == pb::OutcomeKind::Succeeded,
            "the pod {} ended as {outcome:?}",
            self.uid()
        );
        Ok(())
    }

    /// Waits until all its containers run and the shim's link is up.
    pub async fn running(
        &self,
        client: &AgentClient<Channel>,
        deadline: Duration,
    ) -> anyhow::Result<pb::PodObserved> {
        let running = |pod: &pb::PodObserved| containers_run(pod) && pod.shim_connected;
        self.wait_for_state(client, "it runs", deadline, running)
            .await
    }

    /// Waits until the shim's link is down.
    pub async fn link_down(
        &self,
        client: &AgentClient<Channel>,
        deadline: Duration,
    ) -> anyhow::Result<()> {
        let down = |pod: &pb::PodObserved| !pod.shim_connected;
        self.wait_for_state(client, "its link is down", deadline, down)
            .await
            .map(drop)
    }

    /// Sends newer values for the pod.
    pub async fn update_values(
        &self,
        client: &AgentClient<Channel>,
        values: pb::PodValues,
    ) -> anyhow::Result<()> {
        let request = pb::UpdateValuesRequest {
            cluster_id: CLUSTER.to_owned(),
            uid: self.uid().to_owned(),
            values: Some(values),
            ..pb::UpdateValuesRequest::default()
        };
        client.clone().update_values(request).await?;
        Ok(())
    }

    /// Runs a command in a container with that standard input; returns its output and exit code.
    pub async fn exec(
        &self,
        client: &AgentClient<Channel>,
        container: &str,
        command: &[&str],
        stdin: &[u8],
    ) -> anyhow::Result<(Vec<u8>, i32)> {
        use pb::exec_input::Input;
        use pb::exec_output::Output;
        let start = pb::ExecStart {
            uid: self.uid().to_owned(),
            container: container.to_owned(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
            size: None,
            rank: 0,
        };
        let stdin = Bytes::copy_from_slice(stdin);
        let inputs = [
            Input::Start(start),
            Input::Stdin(stdin),
            Input::StdinClosed(true),
        ];
        let inputs = inputs.map(|input| pb::ExecInput { input: Some(input) });
        let mut client = client.clone();
        let mut outputs = client.exec(tokio_stream::iter(inputs)).await?.into_inner();
        let mut stdout = Vec::new();
        while let Some(message) = outputs.message().await? {
            match message.output {
                Some(Output::Stdout(data)) => stdout.extend_from_slice(&data),
                Some(Output::Exit(exit)) => {
                    anyhow::ensure!(exit.error.is_empty(), "not started: {}", exit.error);
                    return Ok((stdout, exit.code));
                }
                Some(Output::Stderr(_) | Output::Started(_)) | None => {}
            }
        }
        anyhow::bail!("the stream ended without an exit code")
    }

    /// The whole log of a container.
    pub async fn log(
        &self,
        client: &AgentClient<Channel>,
        container: &str,
    ) -> anyhow::Result<Bytes> {
        let request = pb::ReadLogsRequest {
            uid: self.uid().to_owned(),
            container: container.to_owned(),
            tail_lines: -1,
            ..pb::ReadLogsRequest::default()
        };
        let mut chunks = client.clone().read_logs(request).await?.into_inner();
        let mut log = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            log.extend_from_slice(&chunk.data);
        }
        Ok(log.into())
    }

    /// Deletes the pod with that grace period; does not wait for its end.
    pub async fn delete(
        &self,
        client: &AgentClient<Channel>,
        grace_seconds: i64,
    ) -> anyhow::Result<()> {
        let request = pb::DeletePodRequest {
            leadership_epoch: 0,
            cluster_id: CLUSTER.to_owned(),
            uid: self.uid().to_owned(),
            grace_seconds,
            reason: "deleted by the test".to_owned(),
        };
        client.clone().delete_pod(request).await?;
        Ok(())
    }

    /// Deletes the pod, waits for its end, and makes the agent forget it.
    pub async fn remove(&self, client: &AgentClient<Channel>) -> anyhow::Result<()> {
        self.delete(client, 1).await?;
        let finished = self.finished(client, LIMIT).await;
        finished?;
        let request = pb::ForgetPodRequest {
            leadership_epoch: 0,
            cluster_id: CLUSTER.to_owned(),
            uid: self.uid().to_owned(),
        };
        client.clone().forget_pod(request).await?;
        Ok(())
    }
}

/// Whether all containers of the pod run.
#[must_use]
pub fn containers_run(pod: &pb::PodObserved) -> bool {
    let running = |status: &pb::ContainerStatus| {
        matches!(status.state, Some(pb::container_status::State::Running(_)))
    };
    !pod.containers.is_empty() && pod.containers.iter().all(running)
}

/// The part of an observation that a failed wait shows.
#[must_use]
pub fn brief(pod: &pb::PodObserved) -> String {
    let states: Vec<String> = pod
        .containers
        .iter()
        .take(3)
        .map(|status| format!("{:?}", status.state))
        .collect();
    format!(
        "{:?} {} {} job {:?} containers {states:?}",
        pod.phase(),
        pod.reason,
        pod.message,
        pod.job
            .as_ref()
            .map(|job| (&job.id, &job.state, &job.reason)),
    )
}
