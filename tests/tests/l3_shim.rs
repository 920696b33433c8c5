//! Tests of the shim (`knoc-agent/tests`) with containers of the real Apptainer, on a compute node, as the agent's user and without Slurm. By
//! themselves they run with plain processes, and what needs containers is left out.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use knoc_tests::World;
use tokio::sync::Mutex;

/// How long the tests of one program may take, which start a container each, one after the other, on a busy machine.
const LIMIT: Duration = Duration::from_mins(6);

/// Where they run.
const NODE: &str = "c1";

/// The image of all containers, and the agent whose shim is tested.
const IMAGE: &str = "/images/busybox.sif";
const AGENT: &str = "/home/hpcuser/bin/knoc-agent";

/// They run one at a time: each has deadlines, and starts containers.
static TURN: Mutex<()> = Mutex::const_new(());

/// The test program of that name. cargo builds it into the folder of this one; of several, the newest counts.
fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().context("this program is in no folder")?;
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let hash = file
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'));
        // Beside NAME-HASH there is NAME-HASH.d.
        if hash.is_some_and(|hash| !hash.contains('.')) {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    let newest = found.into_iter().max().with_context(|| {
        format!("{name} is not built: cargo test --no-run -p knoc-agent --test {name}")
    })?;
    Ok(newest.1)
}

/// Runs these tests of the program, or all, one at a time. `world` is the name of their world.
async fn under_apptainer(world: &str, name: &str, tests: &[&str]) -> anyhow::Result<()> {
    let world = World::new(world).await?;
    pass(&world, name, tests).await?;
    world.finish().await
}

async fn pass(world: &World, name: &str, tests: &[&str]) -> anyhow::Result<()> {
    let folder = format!("/scratch/{}", world.namespace);
    let make = ["mkdir", "-p", &folder];
    world.on(NODE, make).ok().await?;
    let prefix = std::env::var("HPC_PREFIX").context("HPC_PREFIX is not set: make up")?;
    let shared = Path::new(&prefix).join("shared");
    let here = shared.join(folder.trim_start_matches('/')).join(name);
    tokio::fs::copy(program(name)?, here).await?;
    let filter = if tests.is_empty() {
        String::new()
    } else {
        format!("--exact {}", tests.join(" "))
    };
    let script = format!(
        "export KNOC_TEST_RUNTIME=apptainer KNOC_TEST_RUNTIME_PATH=$(command -v apptainer) KNOC_TEST_IMAGE={IMAGE} KNOC_TEST_AGENT={AGENT}\n\
         exec timeout -k 5 {} {folder}/{name} --test-threads=1 {filter}",
        LIMIT.as_secs()
    );
    let turn = TURN.lock().await;
    let run = world.on(NODE, ["sh", "-c", &script]);
    // The limit on the node comes first and ends the program's processes too.
    let ran = run.deadline(LIMIT * 2).output().await?;
    drop(turn);
    world.on(NODE, ["rm", "-rf", &folder]).ok().await?;
    let (shown, errors) = (ran.text(), &ran.stderr);
    ensure!(ran.code == 0, "code {}\n{shown}\n{errors}", ran.code);
    let passed = shown
        .split_once("test result: ok. ")
        .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let wanted = tests.len().max(1);
    ensure!(
        passed.is_some_and(|passed: usize| passed >= wanted),
        "{wanted} tests were to pass:\n{shown}"
    );
    Ok(())
}

#[tokio::test]
async fn programs_of_real_containers_have_the_users_that_pods_ask_for() -> anyhow::Result<()> {
    under_apptainer("shim-users", "shim_users", &[]).await
}

#[tokio::test]
async fn commands_and_volumes_are_inside_of_real_containers() -> anyhow::Result<()> {
    let tests = [
        "an_exec_is_where_the_container_is",
        "volumes_are_mounted_and_refreshed",
    ];
    under_apptainer("shim-link", "shim_link", &tests).await
}

#[tokio::test]
async fn real_containers_start_again_and_leave_their_last_words() -> anyhow::Result<()> {
    let tests = [
        "restarts_back_off_and_the_logs_of_the_last_two_stay",
        "the_last_words_of_a_failed_container",
    ];
    under_apptainer("shim-words", "shim", &tests).await
}
