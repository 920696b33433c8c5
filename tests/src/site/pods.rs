//! Pods as the agent takes them, and what the tests do with one: ensure, wait, read, delete.

use std::time::Duration;

use bytes::Bytes;
use knoc_proto::pb;
use knoc_proto::pb::agent_client::AgentClient;
use tonic::transport::Channel;

use super::{CLUSTER, Site};
use crate::wait_for;

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
        };
        Self { request }
    }

    /// A pod whose program notes in `runs/UID` that it ran, and takes so long.
    pub fn counting(site: &Site, uid: &str, seconds: f32) -> anyhow::Result<Self> {
        let runs = site.path("runs");
        std::fs::create_dir_all(&runs)?;
        let script = format!(
            "echo $$ >> {}/{uid}; sleep {seconds}; echo done",
            runs.display()
        );
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

    /// Its key.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.request.spec.as_ref().map_or("", |spec| &spec.uid)
    }

    /// Makes it exist, again and again until the agent says that it does.
    pub async fn ensure(&self, client: &AgentClient<Channel>) -> anyhow::Result<()> {
        wait_for(
            "the agent has the pod",
            Duration::from_secs(30),
            async || {
                let answer = client.clone().ensure_pod(self.request.clone()).await;
                answer.map(|_| ()).map_err(|status| status.to_string())
            },
        )
        .await
    }

    /// What the agent knows of it.
    pub async fn observe(&self, client: &AgentClient<Channel>) -> Result<pb::PodObserved, String> {
        let request = pb::GetPodRequest {
            uid: self.uid().to_owned(),
        };
        let answer = client.clone().get_pod(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| status.to_string())
    }

    /// Waits until it is finished.
    pub async fn finished(
        &self,
        client: &AgentClient<Channel>,
        deadline: Duration,
    ) -> anyhow::Result<pb::Outcome> {
        let what = format!("the pod {} is finished", self.uid());
        wait_for(&what, deadline, async || {
            let pod = self.observe(client).await?;
            match (pod.phase(), &pod.outcome) {
                (pb::PodPhase::Finished, Some(outcome)) => Ok(outcome.clone()),
                _ => Err(brief(&pod)),
            }
        })
        .await
    }

    /// Waits until it has ended well.
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
        let what = format!("the pod {} runs", self.uid());
        wait_for(&what, deadline, async || {
            let pod = self.observe(client).await?;
            let running = |status: &pb::ContainerStatus| {
                matches!(status.state, Some(pb::container_status::State::Running(_)))
            };
            let all = !pod.containers.is_empty() && pod.containers.iter().all(running);
            if all && pod.shim_connected {
                Ok(pod)
            } else {
                Err(brief(&pod))
            }
        })
        .await
    }

    /// Runs a command in a container with that standard input; answers its output and exit code.
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

    /// All log bytes of a container.
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

    /// Deletes it, waits for its end, and has it forgotten.
    pub async fn remove(&self, client: &AgentClient<Channel>) -> anyhow::Result<()> {
        let request = pb::DeletePodRequest {
            leadership_epoch: 0,
            cluster_id: CLUSTER.to_owned(),
            uid: self.uid().to_owned(),
            grace_seconds: 1,
            reason: "deleted by the test".to_owned(),
        };
        client.clone().delete_pod(request).await?;
        let finished = self.finished(client, Duration::from_secs(30)).await;
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
