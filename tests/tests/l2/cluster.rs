//! Level 2: what a container in the node's network exchanges with the API server, through the real agent and shim. The test is
//! the kubelet and the API server.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use knoc_proto::pb::{
    self, EgressControl, EgressInput, agent_client::AgentClient, egress_control::Control,
    egress_input::Input, egress_output::Output, env_var::Value,
};
use knoc_tests::{
    endpoint,
    site::{CLUSTER, Options, Pod, Site, container},
    wait_for,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

const SOON: Duration = Duration::from_mins(2);

/// What the container sends on each connection.
const SIZE: usize = 3 << 20;

/// Connects as often as it is told, one connection after the other: sends, ends its direction, and says what came back.
const CLIENT: &str = r#"
import os, socket, sys
target = (os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"]))
print("port", target[1], flush=True)
for number in range(int(sys.argv[1])):
    total = 0
    try:
        with socket.create_connection(target) as peer:
            peer.sendall(b"x" * int(sys.argv[2]))
            peer.shutdown(socket.SHUT_WR)
            while data := peer.recv(65536): total += len(data)
        print(number, "got", total, flush=True)
    except OSError as error:
        print(number, "reset after", total, error.__class__.__name__, flush=True)
sys.stdin.read()
"#;

/// The test as the kubelet.
struct Kubelet {
    client: AgentClient<Channel>,
    controls: mpsc::Sender<EgressControl>,
    attempts: Streaming<pb::EgressAttempt>,
}

impl Kubelet {
    async fn watch(client: &AgentClient<Channel>) -> anyhow::Result<Self> {
        let (controls, stream) = mpsc::channel(4);
        let network = pb::EgressNetwork {
            ranges: vec!["10.96.0.0/12".to_owned()],
            tcp_ports: vec![443],
            api_address: "10.96.0.1".to_owned(),
            api_port: 443,
            ..pb::EgressNetwork::default()
        };
        let caller = pb::EgressCaller {
            cluster_id: CLUSTER.to_owned(),
            ..pb::EgressCaller::default()
        };
        controls
            .send(EgressControl {
                control: Some(Control::Network(network)),
                caller: Some(caller),
            })
            .await?;
        let mut client = client.clone();
        let attempts = client.watch_egress(ReceiverStream::new(stream)).await?;
        Ok(Self {
            client,
            controls,
            attempts: attempts.into_inner(),
        })
    }

    async fn attempt(&mut self) -> anyhow::Result<pb::EgressAttempt> {
        let next = tokio::time::timeout(SOON, self.attempts.message()).await;
        let attempt = next.context("no connection was announced")??;
        let attempt = attempt.context("the watch ended")?;
        ensure!(
            (attempt.address.as_str(), attempt.port) == ("10.96.0.1", 443),
            "{attempt:?}"
        );
        Ok(attempt)
    }

    /// Takes a connection.
    async fn take(&mut self, attempt: &pb::EgressAttempt) -> Result<Call, tonic::Status> {
        let (input, inputs) = mpsc::channel(4);
        let start = pb::EgressStart {
            uid: attempt.uid.clone(),
            id: attempt.id,
            service: "default/kubernetes".to_owned(),
            port: 443,
        };
        // There is room for it.
        input.try_send(message(Input::Start(start))).ok();
        let output = self.client.egress_stream(ReceiverStream::new(inputs));
        let mut output = output.await?.into_inner();
        let first = output.message().await?.and_then(|message| message.output);
        assert_eq!(first, Some(Output::Connected(true)));
        Ok(Call { input, output })
    }
}

fn message(input: Input) -> EgressInput {
    EgressInput { input: Some(input) }
}

struct Call {
    input: mpsc::Sender<EgressInput>,
    output: Streaming<pb::EgressOutput>,
}

impl Call {
    /// Reads what the container sends until it ends its direction.
    async fn read(&mut self) -> anyhow::Result<usize> {
        let mut total = 0;
        loop {
            let message = self.output.message().await?.context("no end")?;
            match message.output.context("an empty message")? {
                Output::Data(data) => total += data.len(),
                Output::Closed(_) => return Ok(total),
                Output::Connected(_) => anyhow::bail!("connected twice"),
            }
        }
    }
}

fn pod(connections: u32) -> Pod {
    let args = [connections.to_string(), SIZE.to_string()];
    let mut main = container("main", &["python3", "-c", CLIENT], &args);
    // The end of its input never comes.
    main.stdin = true;
    let mut pod = Pod::new("inside", vec![main]);
    let var = |name: &str, value: &str| pb::EnvVar {
        name: name.to_owned(),
        value: Some(Value::Literal(value.as_bytes().to_vec().into())),
    };
    let env = pb::ContainerEnv {
        container: "main".to_owned(),
        vars: vec![
            var("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            var("KUBERNETES_SERVICE_PORT", "443"),
        ],
    };
    if let Some(values) = &mut pod.request.values {
        values.env.push(env);
    }
    pod
}

async fn says(pod: &Pod, client: &AgentClient<Channel>, expected: &str) -> anyhow::Result<String> {
    wait_for(expected, SOON, async || {
        let log = pod
            .log(client, "main")
            .await
            .map_err(|error| error.to_string())?;
        let log = String::from_utf8_lossy(&log).into_owned();
        if log.contains(expected) {
            Ok(log)
        } else {
            Err(log)
        }
    })
    .await
}

#[tokio::test]
async fn a_container_reaches_the_api_server_and_no_broken_connection_looks_complete()
-> anyhow::Result<()> {
    let (site, _agent, _) = Site::start(Options::default()).await?;
    let client = site.socket_client()?;
    let mut kubelet = Kubelet::watch(&client).await?;
    let pod = pod(4);
    pod.ensure(&client).await?;
    // Both directions, each of which ends alone.
    let attempt = kubelet.attempt().await?;
    let mut call = kubelet.take(&attempt).await?;
    ensure!(call.read().await? == SIZE);
    for data in [vec![1; 40_000], vec![2; 30_000]] {
        call.input.send(message(Input::Data(data.into()))).await?;
    }
    call.input.send(message(Input::Closed(true))).await?;
    let end = call.output.message().await?;
    ensure!(end.is_none(), "{end:?}");
    says(&pod, &client, "0 got 70000").await?;
    // It was taken before.
    let again = kubelet.take(&attempt).await.err().context("taken twice")?;
    ensure!(again.code() == Code::NotFound, "{again:?}");
    // One that is refused.
    let attempt = kubelet.attempt().await?;
    let refusal = pb::EgressRefusal {
        uid: attempt.uid,
        id: attempt.id,
    };
    kubelet
        .controls
        .send(EgressControl {
            control: Some(Control::Refusal(refusal)),
            caller: None,
        })
        .await?;
    says(&pod, &client, "1 reset after 0").await?;
    // One that ends before the cluster's side has said that it is complete.
    let attempt = kubelet.attempt().await?;
    let mut call = kubelet.take(&attempt).await?;
    ensure!(call.read().await? == SIZE);
    call.input
        .send(message(Input::Data(vec![3; 5].into())))
        .await?;
    drop(call);
    says(&pod, &client, "2 reset after").await?;
    // A watch that begins anew gets what waits.
    let attempt = kubelet.attempt().await?;
    let mut kubelet = Kubelet::watch(&client).await?;
    let same = kubelet.attempt().await?;
    ensure!(same.id == attempt.id, "{same:?} after {attempt:?}");
    let mut call = kubelet.take(&same).await?;
    ensure!(call.read().await? == SIZE);
    call.input.send(message(Input::Closed(true))).await?;
    says(&pod, &client, "3 got 0").await?;
    pod.remove(&client).await
}

#[tokio::test]
async fn a_connection_that_nobody_takes_is_reset_after_ten_seconds() -> anyhow::Result<()> {
    let (site, _agent, _) = Site::start(Options::default()).await?;
    let client = site.socket_client()?;
    let mut kubelet = Kubelet::watch(&client).await?;
    let pod = pod(1);
    pod.ensure(&client).await?;
    let began = Instant::now();
    let attempt = kubelet.attempt().await?;
    let log = says(&pod, &client, "0 reset after 0").await?;
    ensure!(began.elapsed() > Duration::from_secs(8), "{log}");
    let late = kubelet
        .take(&attempt)
        .await
        .err()
        .context("taken too late")?;
    ensure!(late.code() == Code::NotFound, "{late:?}");
    // The port ends with the pod.
    let port = log
        .split_whitespace()
        .nth(1)
        .context("no port")?
        .parse::<u16>()?;
    pod.remove(&client).await?;
    wait_for("nobody listens", SOON, async || {
        endpoint::refuses((Ipv4Addr::LOCALHOST, port)).await
    })
    .await
}
