//! Level 3: arguments and environment under Apptainer: 50 pods of 20 cases, each case one class of
//! nasty text and one class of nasty name, alone in the first pod and combined with other text in the others.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::try_join_all;
use knoc_tests::cases::{self, CLASSES, Container, Mismatch, NAME_CLASSES, Size};
use knoc_tests::{PodBuilder, World, image};
use serde_json::json;

const FOLDER: &str = "/scratch/knoc-argv";

const SIZE: Size = Size {
    pods: 50,
    containers: 1,
    cases: 20,
};

const SEED: u64 = 0x6b6e_6f63;

/// The time for all 50 containers on the machine's cores.
const ALL: Duration = Duration::from_mins(8);

/// Variables in a container's environment that its pod did not set.
const GIVEN: [&str; 6] = ["PATH", "HOME", "HOSTNAME", "TERM", "PWD", "TMPDIR"];

#[tokio::test]
async fn each_nasty_class_arrives_under_apptainer() -> anyhow::Result<()> {
    assert_eq!(
        (CLASSES.len(), NAME_CLASSES.len()),
        (SIZE.cases, SIZE.cases)
    );
    let world = World::new("argv").await?;
    image::build(&world, FOLDER).await?;
    let plan = cases::nasty(SIZE, SEED);
    let pods: Vec<PodBuilder> = plan
        .iter()
        .enumerate()
        .map(|(at, pod)| build(at, pod))
        .collect();
    try_join_all(pods.iter().map(|pod| world.create(pod))).await?;
    for (pod, containers) in pods.iter().zip(&plan) {
        world.wait_phase(pod.name(), "Succeeded", ALL).await?;
        let log = world.logs(pod.name(), "main").await?;
        for cases in containers {
            let others = cases::check(cases, log.as_bytes())
                .map_err(|mismatch| named(cases, mismatch))
                .with_context(|| format!("pod {}", pod.name()))?;
            let given: BTreeSet<String> = GIVEN.map(str::to_owned).into();
            let foreign: Vec<_> = others
                .difference(&given)
                .filter(|name| !name.starts_with("KUBERNETES_"))
                .collect();
            anyhow::ensure!(foreign.is_empty(), "pod {} has {foreign:?} too", pod.name());
        }
    }
    world.finish().await
}

fn build(at: usize, containers: &[Container]) -> PodBuilder {
    let pod = PodBuilder::new(&format!("argv-{at}")).spec("enableServiceLinks", json!(false));
    containers.iter().fold(pod, |pod, cases| {
        let env = cases
            .env
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value}));
        pod.image(&image::path(FOLDER))
            .command(["/knoc-readback"])
            .set("args", json!(cases.args))
            .set("env", env.collect())
    })
}

/// The mismatch with the name of its class.
fn named(cases: &Container, mismatch: Mismatch) -> anyhow::Error {
    let class = match &mismatch {
        Mismatch::Argument { at, .. } => CLASSES.get(at - 1),
        Mismatch::Variable { name, .. } => {
            let at = cases
                .expected_env
                .iter()
                .position(|(known, _)| known == name);
            at.and_then(|at| NAME_CLASSES.get(at))
        }
        Mismatch::Truncated { .. } | Mismatch::Count { .. } => None,
    };
    let class = class.map_or("any", |(name, _)| name);
    anyhow::Error::new(mismatch).context(format!("class {class:?}"))
}
