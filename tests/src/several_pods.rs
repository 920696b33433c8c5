//! Examples of programs of several pods, which find each other by the name of a headless Service and reach each other at addresses of their
//! own. The images have the programs of the examples, as the bed can install them, and the test is the cluster's DNS.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, ensure};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod, discovery::v1::EndpointSlice};
use kube::{ResourceExt as _, api::ListParams};

use crate::{World, cluster::ClusterDns, guide::root, own_addresses, wait_for};

/// An example in `deploy/examples`: one pod that the others look for, three workers, and the pod of a Job that computes something with them.
#[derive(Debug)]
pub struct Example {
    /// Its file.
    pub file: &'static str,
    /// The image in it, and the one with the same programs on the bed.
    pub images: (&'static str, &'static str),
    /// The headless Service of the pod that the others look for.
    pub service: &'static str,
    /// The Job, whose container is called `client`.
    pub job: &'static str,
    /// How the host names of the workers begin.
    pub workers: &'static str,
    /// The time until the first pod is ready, and again until the Job is complete.
    pub limit: Duration,
}

impl Example {
    /// Runs the example with pods that have addresses of their own. Its client is to say that the sum of the squares below 1000 was computed
    /// on three workers.
    pub async fn check(&self, world: &World) -> anyhow::Result<()> {
        let dns = ClusterDns::start(world).await?;
        own_addresses::begin(world).await?;
        let log = self.run(world, &dns).await;
        own_addresses::end(world).await?;
        dns.withdraw(world).await;
        let log = log?;
        ensure!(
            log.contains("the sum of the squares is 332833500\n"),
            "{log}"
        );
        let hosts = log
            .lines()
            .find_map(|line| line.strip_prefix("computed on "));
        let hosts: BTreeSet<_> = hosts.unwrap_or_default().split(' ').collect();
        let all_workers = hosts.iter().all(|host| host.starts_with(self.workers));
        ensure!(hosts.len() == 3 && all_workers, "{log}");
        Ok(())
    }

    /// Runs the example until its Job is complete. Returns the log of the client.
    async fn run(&self, world: &World, dns: &ClusterDns) -> anyhow::Result<String> {
        dns.reaches_pods(world).await?;
        let (image, here) = self.images;
        let path = root().join("deploy/examples").join(self.file);
        let example = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        ensure!(example.matches(image).count() == 3, "{example}");
        let apply = world.kubectl(["apply", "-f", "-"]);
        apply.stdin(example.replace(image, here)).ok().await?;
        // Cluster DNS reads the addresses of a headless Service from what Kubernetes publishes.
        let first = async || self.first_pod(world).await;
        let first = wait_for(self.service, self.limit, first).await?;
        let name = format!("{}.{}.svc.cluster.local", self.service, world.namespace);
        dns.add(&name, first);
        wait_for("the client's Job", self.limit, async || {
            let job = world.api::<Job>().get(self.job).await?;
            let status = job.status.unwrap_or_default();
            ensure!(status.succeeded == Some(1), "{status:?}");
            Ok(())
        })
        .await?;
        self.log(world).await
    }

    /// The address of the pod that the others look for, once it is ready.
    async fn first_pod(&self, world: &World) -> anyhow::Result<Ipv4Addr> {
        let of = format!("kubernetes.io/service-name={}", self.service);
        let of = ListParams::default().labels(&of);
        let slices = world.api::<EndpointSlice>().list(&of).await?.items;
        let mut endpoints = slices
            .iter()
            .flat_map(|slice| slice.endpoints.iter().flatten());
        let ready = endpoints.find(|one| {
            let conditions = one.conditions.as_ref();
            conditions.and_then(|conditions| conditions.ready) == Some(true)
        });
        let address = ready.and_then(|one| one.addresses.first());
        let address = address.with_context(|| format!("{slices:?}"))?;
        Ok(address.parse()?)
    }

    /// The log of the client that has succeeded.
    async fn log(&self, world: &World) -> anyhow::Result<String> {
        let of = format!("batch.kubernetes.io/job-name={}", self.job);
        let of = ListParams::default().labels(&of);
        let pods = world.api::<Pod>().list(&of).await?.items;
        let succeeded = |pod: &&Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_ref());
            phase.is_some_and(|phase| phase == "Succeeded")
        };
        let pod = pods.iter().find(succeeded).context("no client succeeded")?;
        world.logs(&pod.name_any(), "client").await
    }
}
