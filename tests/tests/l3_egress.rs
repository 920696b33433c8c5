//! What pods reach of the cluster on the real stack: the API server with the pod's own token, cluster DNS, and a Service that
//! nobody allowed. The bed has no cluster DNS: the test is the DNS server behind `kube-system/kube-dns`.

use std::{net::Ipv4Addr, path::PathBuf};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::core::v1::Event;
use knoc_tests::{
    PodBuilder, Run, World,
    cluster::{ClusterDns, host_service},
    wait_for,
    world::SOON,
};
use kube::api::ListParams;
use serde_json::json;

/// The image with kubectl, as the nodes see it.
const IMAGE: &str = "/images/egress-client";

/// Puts kubectl, which the bed has as a part of one static program, into a copy of the image of busybox. The tests do it one by one.
async fn image() -> anyhow::Result<()> {
    let variable =
        |name: &str| std::env::var(name).with_context(|| format!("{name} is not set: make up"));
    let images = PathBuf::from(variable("HPC_PREFIX")?).join("shared/images");
    let kubectl = Run::new("sh")
        .args(["-c", "command -v kubectl"])
        .ok()
        .await?
        .text();
    let program = PathBuf::from(kubectl).with_file_name("controlplane");
    let script = format!(
        "set -e; cd {images}; exec 9<.; flock 9; test -e egress-client && exit; rm -rf egress-client.new; cp -a busybox egress-client.new; \
         cp {program} egress-client.new/controlplane; mv egress-client.new egress-client",
        images = images.display(),
        program = program.display()
    );
    Run::new("sh").args(["-c", &script]).ok().await.map(drop)
}

/// A pod in a network of this kind that may list the pods of its namespace.
fn client(name: &str, network: &str) -> PodBuilder {
    PodBuilder::new(name)
        .annotation("knoc.io/network", network)
        .spec("automountServiceAccountToken", json!(true))
        .image(IMAGE)
        .memory("256Mi")
}

async fn allow_listing(world: &World) -> anyhow::Result<()> {
    let account = format!("--serviceaccount={}:default", world.namespace);
    let binding = ["create", "rolebinding", "view", "--clusterrole=view"];
    let binding = world.kubectl(binding).args([account]);
    binding.ok().await.map(drop)
}

/// Lists the pods of the pod's namespace as any program in a pod does, by its token and its environment.
const LIST: &str = "/controlplane kubectl get pods -o name";

#[tokio::test]
async fn a_pod_lists_the_pods_of_its_namespace_with_its_own_token() -> anyhow::Result<()> {
    image().await?;
    let world = World::new("egress").await?;
    allow_listing(&world).await?;
    for network in ["private", "host"] {
        let pod = client(network, network).sh(LIST);
        world.run(&pod, "Succeeded").await?;
        let log = world.logs(network, "main").await?;
        ensure!(log.contains(&format!("pod/{network}")), "{network}: {log}");
    }
    // Its token is its own: it may not do more, and nothing elsewhere.
    let denied = |what: &str| format!("/controlplane kubectl {what} 2>&1 | grep -i forbidden");
    let attempts = ["get secrets", "get pods -n kube-system", "delete pod none"];
    let attempts = attempts.map(denied).join(" && ");
    let pod = client("denied", "private").sh(&attempts);
    world.run(&pod, "Succeeded").await?;
    world.finish().await
}

/// Sends a request to a port of the loopback interface and prints the answer: that of the API server is that it wants TLS.
const DIAL: &str = "exec 3<>/dev/tcp/127.0.0.1/$0 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && timeout 20 cat <&3";

#[tokio::test]
async fn other_users_of_the_node_do_not_reach_the_api_server_by_the_port_of_a_pod()
-> anyhow::Result<()> {
    let world = World::new("egress-user").await?;
    let pod = PodBuilder::new("port")
        .annotation("knoc.io/network", "host")
        .sh("echo $KUBERNETES_SERVICE_HOST at $KUBERNETES_SERVICE_PORT; exec sleep 600");
    let uid = world.running(&pod).await?;
    world.wait_log("port", "main", " at ").await?;
    let log = world.logs("port", "main").await?;
    let (_, port) = log.trim().split_once(" at ").context(log.clone())?;
    let node = world.compute_node(&uid).await?;
    let dial = async |user: &str| {
        let run = world.on_as(user, &node, ["bash", "-c", DIAL, port]);
        run.output().await
    };
    wait_for("an answer for the pod's user", SOON, async || {
        let answer = dial("hpcuser").await?;
        ensure!(answer.text().contains("HTTP/1.0 400"), "{answer}");
        Ok(())
    })
    .await?;
    for user in ["hpcuser2", "root"] {
        for _ in 0..5 {
            let answer = dial(user).await?;
            // It is reset at once. 124: it has waited.
            let reset = answer.stdout.is_empty() && ![0, 124].contains(&answer.code);
            ensure!(reset, "{user}: {answer}");
        }
    }
    let answer = dial("hpcuser").await?;
    ensure!(answer.text().contains("HTTP/1.0 400"), "{answer}");
    // Strangers cause no Event of the pod.
    let events = world.events("port").await?;
    let told = events.iter().any(|event| event.starts_with("Egress"));
    ensure!(!told, "{events:?}");
    world.finish().await
}

/// The messages of the pod's Events about connections that were refused.
async fn refusals(world: &World, pod: &str) -> anyhow::Result<Vec<String>> {
    let of = ListParams::default().fields(&format!("involvedObject.name={pod}"));
    let events = world.api::<Event>().list(&of).await?.items;
    let refused = events
        .into_iter()
        .filter(|event| event.reason.as_deref() == Some("EgressRefused"));
    Ok(refused.filter_map(|event| event.message).collect())
}

#[tokio::test]
async fn a_service_that_nobody_allowed_is_refused_with_one_event() -> anyhow::Result<()> {
    let world = World::new("egress-refused").await?;
    let address = host_service(&world, &world.namespace, "web", ("TCP", 8080, 9)).await?;
    // The shim learns of the port while the pod runs, so the pod tries it until the test ends.
    let script = format!(
        "while :; do wget -T 20 -O- http://{address}:8080/ 2>&1; echo tried; sleep 0.5; done"
    );
    let pod = PodBuilder::new("curious")
        .annotation("knoc.io/network", "private")
        .sh(&script);
    world.running(&pod).await?;
    let expected = format!("{}/web", world.namespace);
    wait_for("the Event", SOON, async || {
        let refused = refusals(&world, "curious").await?;
        ensure!(
            !refused.is_empty(),
            "{:?}",
            world.logs("curious", "main").await
        );
        Ok(())
    })
    .await?;
    // Further connections are refused like the first one, and that is no news.
    let tries = async || {
        let log = world.logs("curious", "main").await?;
        ensure!(!log.contains("200 OK"), "{log}");
        anyhow::Ok(log.matches("tried").count())
    };
    let before = tries().await?;
    wait_for("further tries", SOON, async || {
        let now = tries().await?;
        ensure!(now >= before + 3, "{now} tries, {before} before");
        Ok(())
    })
    .await?;
    let refused = refusals(&world, "curious").await?;
    ensure!(refused.len() == 1, "{refused:?}");
    ensure!(
        refused[0].contains(&expected) && refused[0].contains("egress.allow"),
        "{refused:?}"
    );
    // Others see how many there were, and why.
    let path = format!("/api/v1/nodes/{}/proxy/metrics", world.node);
    let series = "knoc_connections_refused_total{direction=\"egress\",reason=\"not_listed\"} ";
    wait_for("the count of those that were refused", SOON, async || {
        let metrics = world.kubectl(["get", "--raw", &path]).ok().await?.text();
        let count = metrics.lines().find_map(|line| line.strip_prefix(series));
        let count: u64 = count.context(metrics.clone())?.parse()?;
        ensure!(count > 3, "{count}");
        Ok(())
    })
    .await?;
    world.finish().await
}

/// The shim keeps answers, so most of many questions never leave the node.
async fn answers_are_kept(
    world: &World,
    pod: &str,
    name: &str,
    dns: &ClusterDns,
) -> anyhow::Result<()> {
    let before = dns.asked();
    let many = format!(
        "for i in $(seq 300); do nslookup -type=a {name} >/dev/null || nslookup -type=a {name} || exit 1; done"
    );
    let many = world.exec(pod, "main", ["sh", "-c", &many]);
    many.deadline(SOON * 2).ok().await?;
    let passed_on = dns.asked() - before;
    ensure!(
        passed_on < 150,
        "{passed_on} of 300 questions were passed on"
    );
    Ok(())
}

#[tokio::test]
async fn names_of_services_resolve_and_lead_to_them() -> anyhow::Result<()> {
    image().await?;
    let world = World::new("egress-dns").await?;
    allow_listing(&world).await?;
    let domain = format!("{}.svc.cluster.local", world.namespace);
    let web = format!("web.{domain}");
    let api = "kubernetes.default.svc.cluster.local";
    let dns = ClusterDns::start(&world).await?;
    dns.add(&web, Ipv4Addr::new(10, 96, 77, 77));
    dns.add(api, Ipv4Addr::new(10, 96, 0, 1));
    // A pod has the resolver that was known when it was staged.
    let mut number = 0;
    let pod = wait_for("a pod with the cluster's resolver", SOON * 2, async || {
        number += 1;
        let name = format!("names{number}");
        let pod = client(&name, "private").command(["sleep", "600"]);
        let uid = world.running(&pod).await?;
        let file = world
            .exec(&uid, "main", ["cat", "/etc/resolv.conf"])
            .ok()
            .await?
            .text();
        let own = format!("search {domain} svc.cluster.local");
        for wanted in [&format!("nameserver {}\n", dns.address), &*own, "ndots:5"] {
            ensure!(file.contains(wanted), "{wanted}: {file}");
        }
        Ok(uid)
    })
    .await?;
    let inside = async |script: &str| {
        let run = world.exec(&pod, "main", ["sh", "-c", script]);
        anyhow::Ok(run.output().await?)
    };
    // The shim may learn of the port of DNS after the pod has started.
    wait_for("the name of a Service", SOON, async || {
        let found = inside(&format!("nslookup {web}")).await?;
        ensure!(found.text().contains("10.96.77.77"), "{found}");
        Ok(())
    })
    .await?;
    // It has no address of IPv6, and is there all the same.
    let ipv6 = wait_for("an answer about IPv6", SOON, async || {
        let ipv6 = inside(&format!("nslookup -type=aaaa {web} 2>&1")).await?;
        ensure!(!ipv6.text().contains("timed out"), "{ipv6}");
        Ok(ipv6)
    })
    .await?;
    let wrong = ["NXDOMAIN", "SERVFAIL"];
    ensure!(!wrong.iter().any(|one| ipv6.text().contains(one)), "{ipv6}");
    answers_are_kept(&world, &pod, &web, &dns).await?;
    let missing = inside(&format!("nslookup no-such-name.{domain}")).await?;
    ensure!(missing.code != 0, "{missing}");
    // Through the search domains.
    wait_for("the list of pods", SOON, async || {
        let list = format!("KUBERNETES_SERVICE_HOST=kubernetes.default.svc {LIST}");
        let listed = inside(&list).await?;
        ensure!(listed.text().contains("pod/names"), "{listed}");
        Ok(())
    })
    .await?;
    dns.withdraw(&world).await;
    world.finish().await
}
