//! An image of 5 GB in 20 layers: a pod with it runs, Events say how far its pull is, and meanwhile the agent stays small and other
//! pods are as quick as ever. `tests/testbed/large-image.sh up` makes the image; this is part of `make large-image` only.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use knoc_tests::{
    PodBuilder, World,
    world::{SOON, STATE, phase_of},
};

/// The time for the whole pull on a slow disk.
const PULLED: Duration = Duration::from_mins(30);
/// The time from a pod's creation to its end in its status, while the large image is pulled and converted.
const QUICK: Duration = Duration::from_secs(30);
/// The memory that the agent may have meanwhile, in KiB.
const MEMORY: u64 = 64 << 10;

/// The memory of the test bed's agent now, in KiB.
async fn resident(world: &World) -> anyhow::Result<u64> {
    let script =
        "awk '/^VmRSS:/ { print $2 }' /proc/$(pgrep -o -u hpcuser -f 'knoc-agent[ ]serve')/status";
    let shown = world.on("login", ["sh", "-c", script]).ok().await?;
    Ok(shown.text().trim().parse()?)
}

/// What was seen while the large image was pulled.
#[derive(Debug, Default)]
struct Seen {
    pods: usize,
    slowest: Duration,
    largest: u64,
}

/// Runs one small pod after the other until the large one has ended.
async fn run_beside(world: &World, large: &str) -> anyhow::Result<Seen> {
    let (mut seen, began) = (Seen::default(), Instant::now());
    loop {
        let name = format!("beside-{}", seen.pods);
        let created = Instant::now();
        world.run(&PodBuilder::new(&name), "Succeeded").await?;
        seen.slowest = seen.slowest.max(created.elapsed());
        seen.largest = seen.largest.max(resident(world).await?);
        seen.pods += 1;
        match phase_of(&world.pod(large).await?) {
            "Succeeded" => return Ok(seen),
            "Failed" => bail!("{large} has failed: {:?}", world.events(large).await?),
            _ => {}
        }
        if began.elapsed() > PULLED {
            bail!("{seen:?}: {:?}", world.events(large).await?);
        }
    }
}

#[tokio::test]
async fn an_image_of_5_gb_is_pulled_beside_other_pods() -> anyhow::Result<()> {
    let world = World::new("large").await?;
    let image = PodBuilder::image_name().replace("busybox:latest", "large:1");
    let shows = "ls /large | wc -l; stat -c %s /large/data";
    let pod = PodBuilder::new("large").image(&image).sh(shows);
    world.create(&pod).await?;
    let seen = run_beside(&world, "large").await?;
    println!("{seen:?}");
    let log = world.logs("large", "main").await?;
    ensure!(log == "21\n268435456\n", "{log}");
    let events = world.events("large").await?;
    let steps = ["downloaded in", "checking its layers", "converting it"];
    let tells = |event: &String| {
        event.starts_with("Pulling: ") && steps.iter().any(|step| event.contains(step))
    };
    ensure!(events.iter().any(tells), "{events:?}");
    let size = |event: &String| event.contains("Image size: 53");
    ensure!(events.iter().any(size), "{events:?}");
    ensure!(seen.slowest < QUICK && seen.largest < MEMORY, "{seen:?}");
    // It would stay in the cache.
    let status = world.pod("large").await?.status.unwrap_or_default();
    let statuses = status.container_statuses.unwrap_or_default();
    let id = statuses.first().map(|status| status.image_id.clone());
    let digest = id.as_deref().and_then(|id| id.rsplit_once('@'));
    let (_, digest) = digest.context("no image ID")?;
    let file = format!("{STATE}/images/{}", digest.replace(':', "-"));
    world.delete("large", Some(0)).await?;
    world.wait_gone("large", SOON).await?;
    let (sif, json) = (format!("{file}.sif"), format!("{file}.json"));
    world.on("login", ["rm", "-f", &sif, &json]).ok().await?;
    world.finish().await
}
