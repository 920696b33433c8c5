//! Level 2: the agent and its child processes run on a kernel as old as Linux 3.10, which is simulated by a filter that answers every
//! later system call with ENOSYS. `make test` runs the static release binaries.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use knoc_proto::pb;
use knoc_tests::cases::{self, Size};
use knoc_tests::site::{self, Options, Pod, Site, container};

const OLD_KERNEL: &str = env!("CARGO_BIN_EXE_knoc-oldkernel");
const READBACK: &str = env!("CARGO_BIN_EXE_knoc-readback");

const SOON: Duration = Duration::from_mins(2);

fn old_site() -> anyhow::Result<Site> {
    Site::new(Options {
        wrapper: Some(PathBuf::from(OLD_KERNEL)),
        ..Options::default()
    })
}

/// Whether the ELF file needs a dynamic linker (`PT_INTERP`).
fn asks_for_a_linker(elf: &[u8]) -> Option<bool> {
    let word = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    // 64-bit, little endian: offset, size and number of program headers.
    let (first, size, count) = (long(32)?, word(54)?, word(56)?);
    let kinds = (0..usize::from(count)).map(|index| {
        let at = usize::try_from(first).ok()? + index * usize::from(size);
        Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?))
    });
    let kinds: Option<Vec<u32>> = kinds.collect();
    Some(kinds?.contains(&3))
}

/// `make test` sets `KNOC_BIN` to the release build, which then runs under the filter.
#[test]
fn the_tested_binary_is_the_static_one_that_is_shipped() -> anyhow::Result<()> {
    let binary = site::binary("knoc-agent")?;
    let elf = std::fs::read(&binary)?;
    let dynamic = asks_for_a_linker(&elf).context("no ELF file")?;
    let shipped = binary
        .components()
        .any(|part| part.as_os_str() == "release");
    anyhow::ensure!(!(shipped && dynamic), "{} is not static", binary.display());
    let own = asks_for_a_linker(&std::fs::read(std::env::current_exe()?)?);
    anyhow::ensure!(
        own == Some(true),
        "the check does not see a linker where there is one"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_run_and_their_exit_codes_and_logs_arrive() -> anyhow::Result<()> {
    let site = old_site()?;
    let agent = site.agent(&[]).await.with_context(|| site.log())?;
    let client = site.client()?;
    let good = Pod::counting(&site, "good", 0.1)?;
    let script = "echo out; echo err >&2; exit 3";
    let bad = Pod::new(
        "bad",
        vec![container("main", &["/bin/sh", "-c", script], &[])],
    );
    good.ensure(&client).await?;
    bad.ensure(&client).await?;
    good.succeeded(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let outcome = bad.finished(&client, SOON).await?;
    assert_eq!(outcome.kind(), pb::OutcomeKind::Failed, "{outcome:?}");
    let ended = bad.terminated(&client, "main").await?;
    assert_eq!(ended.exit_code, 3);
    let log = bad.log(&client, "main").await?;
    let mut lines: Vec<&[u8]> = log.split(|byte| *byte == b'\n').collect();
    lines.sort_unstable();
    assert_eq!(lines, [&b""[..], b"err", b"out"]);
    good.remove(&client).await?;
    bad.remove(&client).await?;
    agent.terminate().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_and_environment_arrive() -> anyhow::Result<()> {
    let site = old_site()?;
    let agent = site.agent(&[]).await.with_context(|| site.log())?;
    let client = site.client()?;
    let bounds = Size {
        pods: 1,
        containers: 1,
        cases: 20,
    };
    for cases in cases::nasty(bounds, 1).iter().flatten() {
        let pod = Pod::new("argv", vec![container("main", &[READBACK], &cases.args)]);
        let pod = pod.env("main", &cases.env);
        pod.ensure(&client).await?;
        pod.succeeded(&client, SOON)
            .await
            .with_context(|| site.log())?;
        cases::check(cases, &pod.log(&client, "main").await?)?;
        pod.remove(&client).await?;
    }
    agent.terminate().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_stop_and_a_killed_agent() -> anyhow::Result<()> {
    let site = old_site()?;
    let agent = site.agent(&[]).await.with_context(|| site.log())?;
    let client = site.client()?;
    let pod = Pod::counting(&site, "long", 600.0)?;
    pod.ensure(&client).await?;
    pod.running(&client, SOON)
        .await
        .with_context(|| site.log())?;
    let (output, code) = pod
        .exec(&client, "main", &["/bin/sh", "-c", "cat; exit 5"], b"typed")
        .await?;
    assert_eq!((output.as_slice(), code), (&b"typed"[..], 5));
    agent.kill().await?;
    let agent = site.agent(&[]).await?;
    pod.running(&client, SOON).await?;
    assert_eq!(site.runs("long")?, 1);
    pod.remove(&client).await?;
    site::nothing_names(&site.path("runs"), agent.pid()).await?;
    agent.terminate().await?;
    Ok(())
}
