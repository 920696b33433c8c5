//! Level 2: arguments and environment arrive byte for byte, from a pod in the API server to what the
//! kernel reports for the process, through the real kubelet, agent and shim.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::stream::{self, TryStreamExt as _};
use knoc_proto::pb::agent_client::AgentClient;
use knoc_tests::cases::{self, Container, Size};
use knoc_tests::site::{Kubelet, Options, Pod, Site};
use serde_json::{Value, json};
use tonic::transport::Channel;

const READBACK: &str = env!("CARGO_BIN_EXE_knoc-readback");

/// 5,000 cases in pods of 50 containers.
const SIZE: Size = Size {
    pods: 10,
    containers: 50,
    cases: 10,
};

/// The seed of the plan; any other would do.
const SEED: u64 = 0x6b6e_6f63;

/// Variables in a container's environment that its pod did not set.
const GIVEN: [&str; 6] = ["PATH", "HOME", "HOSTNAME", "TERM", "PWD", "TMPDIR"];

/// The limit for each pod, beside all others.
const LIMIT: Duration = Duration::from_mins(8);

/// Logs read at the same time.
const READERS: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_cases_of_argv_and_environment_arrive_byte_for_byte() -> anyhow::Result<()> {
    let site = Site::new(Options::default())?;
    let agent = site.agent(&[]).await?;
    let kubelet = Kubelet::prepare(&site).await?;
    let running = kubelet.start(&site, &[]).await?;
    let plan = cases::exhaustive(SIZE, SEED);
    let began = Instant::now();
    let mut uids = Vec::new();
    for (at, containers) in plan.iter().enumerate() {
        uids.push(kubelet.create_pod(&format!("cases-{at}"), spec(containers))?);
    }
    for (at, (uid, containers)) in uids.iter().zip(&plan).enumerate() {
        kubelet
            .phase(&format!("cases-{at}"), "Succeeded", LIMIT)
            .await
            .with_context(|| site.log())?;
        check(uid, containers, &site.client()?).await?;
    }
    println!("5,000 cases in {:.1?}", began.elapsed());
    for at in 0..plan.len() {
        let options = json!({"gracePeriodSeconds": 1});
        kubelet
            .api
            .delete("pods", "default", &format!("cases-{at}"), &options)?;
    }
    for at in 0..plan.len() {
        kubelet.gone(&format!("cases-{at}"), LIMIT).await?;
    }
    running.terminate().await?;
    agent.terminate().await?;
    Ok(())
}

/// The classes by name, without the kubelet: if this test fails, the agent or the shim is at fault.
#[tokio::test(flavor = "multi_thread")]
async fn each_nasty_class_arrives_through_agent_and_shim() -> anyhow::Result<()> {
    let (site, agent, client) = Site::start(Options::default()).await?;
    let bounds = Size {
        pods: 2,
        containers: 3,
        cases: 20,
    };
    for (at, containers) in cases::nasty(bounds, SEED).iter().enumerate() {
        let mut pod = Pod::new(&format!("nasty-{at}"), Vec::new());
        for (number, cases) in containers.iter().enumerate() {
            let name = name(number);
            let container = knoc_tests::site::container(&name, &[READBACK], &cases.args);
            if let Some(spec) = &mut pod.request.spec {
                spec.containers.push(container);
            }
            pod = pod.env(&name, &cases.env);
        }
        pod.ensure(&client).await?;
        pod.succeeded(&client, LIMIT)
            .await
            .with_context(|| site.log())?;
        check(pod.uid(), containers, &client).await?;
        pod.remove(&client).await?;
    }
    agent.terminate().await?;
    Ok(())
}

/// Reads every container's log and compares it with its cases.
async fn check(
    uid: &str,
    containers: &[Container],
    client: &AgentClient<Channel>,
) -> anyhow::Result<()> {
    let pod = Pod::new(uid, Vec::new());
    stream::iter(containers.iter().enumerate().map(anyhow::Ok))
        .try_for_each_concurrent(READERS, |(number, cases)| {
            let pod = &pod;
            async move {
                let log = pod.log(client, &name(number)).await?;
                let others = cases::check(cases, &log)
                    .with_context(|| format!("container {number} of {uid}"))?;
                let given: BTreeSet<String> = GIVEN.map(str::to_owned).into();
                let foreign: Vec<_> = others
                    .difference(&given)
                    .filter(|name| !name.starts_with("KUBERNETES_"))
                    .collect();
                anyhow::ensure!(
                    foreign.is_empty(),
                    "container {number} of {uid} has {foreign:?} too"
                );
                Ok(())
            }
        })
        .await
}

fn spec(containers: &[Container]) -> Value {
    let containers = containers.iter().enumerate().map(|(number, cases)| {
        let env = cases
            .env
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value}));
        json!({
            "name": name(number),
            "image": "none",
            "command": [READBACK],
            "args": cases.args,
            "env": env.collect::<Vec<_>>(),
        })
    });
    json!({"containers": containers.collect::<Vec<_>>()})
}

fn name(number: usize) -> String {
    format!("c{number:02}")
}
