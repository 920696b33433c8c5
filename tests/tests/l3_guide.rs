//! The blocks of shell commands of the documents that can run on the test bed, as they are written there. Only the names in
//! capitals are replaced.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    PodBuilder, Run, World,
    guide::{Block, root, shell_blocks},
};

const MINUTES: Duration = Duration::from_mins(5);

/// Runs one block by bash, on the machine with kubectl; Slurm's commands run on the login node.
async fn run(world: &World, block: &Block, uid: &str) -> anyhow::Result<()> {
    let hpc = std::env::var("HPC_PREFIX").context("HPC_PREFIX")?;
    let site = world.node.strip_prefix("knoc-").unwrap_or(&world.node);
    let names = [
        ("knoc-SITE", world.node.as_str()),
        ("SITE", site),
        ("NAMESPACE", &world.namespace),
        ("UID", uid),
        ("POD", "hello"),
    ];
    let script = names.iter().fold(block.script(), |script, (name, value)| {
        script.replace(name, value)
    });
    let slurm = ["squeue", "sacct"]
        .map(|name| {
            format!("{name}() {{ '{hpc}/bin/hpc' exec login -u hpcuser {name} \"$@\"; }}\n")
        })
        .concat();
    let output = Run::new("bash")
        .args(["-euo", "pipefail", "-c"])
        .arg(format!("cd '{}'\n{slurm}{script}", root().display()))
        .deadline(MINUTES)
        .output()
        .await?;
    ensure!(
        output.code == 0,
        "{} failed: {output}\n{script}",
        block.place
    );
    Ok(())
}

#[tokio::test]
async fn the_commands_of_the_guide_run() -> anyhow::Result<()> {
    let world = World::new("guide").await?;
    let all = shell_blocks()?;
    let marked =
        |block: &&Block| block.marker.as_deref() == Some("run: the_commands_of_the_guide_run");
    let (creating, using): (Vec<_>, Vec<_>) = all
        .iter()
        .filter(marked)
        .partition(|block| block.script().contains(" apply "));
    ensure!(
        !creating.is_empty() && using.len() > 3,
        "{} and {} blocks are marked",
        creating.len(),
        using.len()
    );
    for block in creating {
        run(&world, block, "").await?;
    }
    let pod = PodBuilder::new("hello").sh("sleep 600");
    let uid = world.running(&pod).await?;
    for block in using {
        run(&world, block, &uid).await?;
    }
    world.finish().await
}
