//! What each way to the agent costs: T3, `exec true` and a stream, measured on the running stack with its profile; and what works
//! there. The rows of all profiles, of one run of `make links`, become the table in docs/guide/links.md.

use std::{fmt::Write as _, io::Write as _, path::Path, process::Stdio, time::Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use super::{
    bed::{Bed, FOLDER},
    kubernetes, machine,
    pods::Batch,
    relay::{self, Location},
    say,
    stats::{Series, now, span},
    streams::{self, Sizes},
};
use crate::{PodBuilder, Run, one_pod::OnePod, world::SOON};

/// Pods for T3, samples of exec, and rounds of the stream.
const ROUNDS: (usize, usize, usize) = (15, 100, 5);
const QUICK: (usize, usize, usize) = (4, 20, 2);

/// The size of the stream, in whole lines of 80 bytes.
const BYTES: u64 = 100_000_000;

/// The table is between these lines.
const BEGIN: &str = "<!-- Written by `make links`: -->";
const END: &str = "<!-- until here. -->";

/// The targets: T3, exec as a multiple of that over TCP, and streams as a share of the floor.
const T3: f64 = 100.0;
const EXEC: f64 = 1.3;
const SHARE: f64 = 0.7;

/// What was measured in one profile. Times are medians in milliseconds, rates medians in megabytes per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Row {
    profile: String,
    /// What a pod needs, and whether it works.
    works: Vec<(String, bool)>,
    t3: f64,
    exec: f64,
    stream: f64,
    /// The same bytes through relays, one in place of each hop.
    floor: f64,
    /// The same bytes through ssh alone, if the profile uses it.
    ssh: Option<f64>,
}

/// Where the relays of the floor are: with SSH in place of the hop from the login node, or with a relay more for the proxy.
fn locations(profile: &str) -> &'static [Location] {
    use Location::{Compute, Host, Login, Ssh};
    match profile {
        "ssh-only" | "two-logins" => &[Compute, Ssh, Host, Host],
        "proxy-only" => &[Compute, Login, Host, Host, Host],
        _ => streams::ALL,
    }
}

/// Measures the running stack and adds a row to the file `rows`.
pub async fn measure(rows: &Path, quick: bool) -> anyhow::Result<()> {
    let profile = std::env::var("PROFILE").context("PROFILE is not set: make env")?;
    let (pods, execs, rounds) = if quick { QUICK } else { ROUNDS };
    let bed = Bed::open().await?;
    say(&format!("{profile}: what works"));
    let works = works(&bed).await;
    say(&format!("{profile}: T3"));
    let mut batch = Batch::new(1);
    for round in 1..=pods {
        batch.measure(&bed, round).await.context("T3")?;
    }
    say(&format!("{profile}: exec"));
    let exec = execs_of(&bed, execs).await.context("exec")?;
    say(&format!("{profile}: a stream"));
    let sizes = Sizes {
        rounds: (rounds, 1),
        bytes: BYTES,
        large: BYTES,
    };
    let locations = locations(&profile);
    let stream = streams::exec_beside(&bed, sizes, locations).await?;
    let ssh = if locations.contains(&Location::Ssh) {
        Some(through_ssh(rounds).await.context("ssh alone")?)
    } else {
        None
    };
    let row = Row {
        profile,
        works,
        t3: batch.t3.median(),
        exec: exec.median(),
        stream: stream.knoc.median(),
        floor: stream.floor.median(),
        ssh: ssh.map(|series| series.median()),
    };
    say(&serde_json::to_string(&row)?);
    let mut file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(rows)
        .with_context(|| rows.display().to_string())?;
    writeln!(file, "{}", serde_json::to_string(&row)?)?;
    bed.close().await
}

/// What one pod needs, and whether it works; the errors are printed.
async fn works(bed: &Bed) -> Vec<(String, bool)> {
    let world = &bed.world;
    let mut found = Vec::new();
    let mut note = |what: &str, result: anyhow::Result<()>| {
        if let Err(error) = &result {
            say(&format!("{what} does not work: {error:#}"));
        }
        found.push((what.to_owned(), result.is_ok()));
    };
    match OnePod::start(world).await {
        Ok(pod) => {
            note("logs", Ok(()));
            note("exec", pod.exec(world).await);
            note("cp", pod.copies(world).await);
            note("port-forward", pod.forward(world).await);
            note("deletion", pod.ends(world).await);
        }
        Err(error) => note("logs", Err(error)),
    }
    found
}

/// `exec true` through the API server with a warm client, once the link is up.
async fn execs_of(bed: &Bed, samples: usize) -> anyhow::Result<Series> {
    let pod = PodBuilder::new("exec")
        .image(&Bed::image_path())
        .command(["/knoc-stamp", "3600000"]);
    bed.world.running(&pod).await?;
    kubernetes::exec(bed, "exec", &["true"]).await?;
    let mut series = Series::default();
    for _ in 0..samples {
        let began = now();
        kubernetes::exec(bed, "exec", &["true"]).await?;
        series.push(span(began, now()));
    }
    bed.world.delete("exec", Some(0)).await?;
    bed.world.wait_gone("exec", SOON).await?;
    Ok(series)
}

/// The bytes of the stream from the login node by `ssh login cat FILE`, in megabytes per second.
async fn through_ssh(rounds: usize) -> anyhow::Result<Series> {
    let words = relay::ssh()?;
    let (program, arguments) = words.split_first().context("no words")?;
    let mut series = Series::default();
    for _ in 0..rounds {
        let began = Instant::now();
        let mut run = Run::new(program).args(arguments);
        run = run.arg(format!("cat {FOLDER}/small"));
        let mut child = run.command_mut().stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("no pipe")?;
        let (mut chunk, mut bytes) = (vec![0; 256 << 10], 0);
        loop {
            match output.read(&mut chunk).await? {
                0 => break,
                read => bytes += u64::try_from(read)?,
            }
        }
        anyhow::ensure!(child.wait().await?.success(), "ssh failed");
        anyhow::ensure!(bytes == BYTES, "{bytes} of {BYTES} bytes");
        series.push(streams::rate(bytes, began.elapsed()));
    }
    Ok(series)
}

/// Replaces the table in `page` by one of the rows in `rows`.
pub fn page(rows: &Path, page: &Path) -> anyhow::Result<()> {
    let read =
        |path: &Path| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let rows: Result<Vec<Row>, _> = read(rows)?.lines().map(serde_json::from_str).collect();
    let text = replaced(&read(page)?, &table(&rows?)?)?;
    #[expect(clippy::disallowed_methods, reason = "a page of the documentation")]
    std::fs::write(page, text).with_context(|| page.display().to_string())
}

fn replaced(page: &str, table: &str) -> anyhow::Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("the page has no table")?;
    let (_, after) = rest.split_once(END).context("the table has no end")?;
    Ok(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
}

/// A measured value, marked if it misses its target.
fn shown(value: f64, digits: usize, met: bool) -> String {
    let value = format!("{value:.digits$}");
    if met { value } else { format!("**{value}**") }
}

fn table(rows: &[Row]) -> anyhow::Result<String> {
    let tcp = rows.iter().find(|row| row.profile == "direct");
    let tcp = tcp.context("no row of the profile direct")?.exec;
    let mut out = format!(
        "Measured on {}, {}. The whole test bed runs on this machine, so there is no network delay.\n\n",
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        machine::describe()
    );
    out.push_str(
        "| profile | logs, exec, cp, port-forward, deletion | T3, ms | exec `true`, ms | over `tcp` | exec/s | stream, MB/s | floor, MB/s \
         | ratio | ssh alone, MB/s |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let isolated = row.profile == "isolated";
        let broken: Vec<&str> = row
            .works
            .iter()
            .filter(|one| !one.1)
            .map(|one| one.0.as_str())
            .collect();
        let works = if broken.is_empty() {
            "all".to_owned()
        } else {
            format!("all but **{}**", broken.join(", "))
        };
        let (over, share) = (row.exec / tcp, row.stream / row.floor);
        writeln!(
            out,
            "| `{}` | {works} | {} | {:.1} | {} | {:.0} | {:.0} | {:.0} | {} | {} |",
            row.profile,
            shown(row.t3, 1, isolated || row.t3 <= T3),
            row.exec,
            shown(over, 2, isolated || over <= EXEC),
            1000.0 / row.exec,
            row.stream,
            row.floor,
            shown(share, 2, isolated || share >= SHARE),
            row.ssh
                .map_or_else(String::new, |rate| format!("{rate:.0}")),
        )?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(profile: &str) -> Row {
        Row {
            profile: profile.to_owned(),
            works: vec![("exec".to_owned(), true), ("cp".to_owned(), true)],
            t3: 20.0,
            exec: 10.0,
            stream: 80.0,
            floor: 100.0,
            ssh: None,
        }
    }

    #[test]
    fn a_missed_target_and_what_does_not_work_are_marked() -> anyhow::Result<()> {
        let mut slow = row("ssh-only");
        (slow.t3, slow.exec, slow.stream) = (120.0, 20.0, 50.0);
        slow.works[1].1 = false;
        let text = table(&[row("direct"), slow])?;
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("| `"))
            .collect();
        assert_eq!(
            lines,
            [
                "| `direct` | all | 20.0 | 10.0 | 1.00 | 100 | 80 | 100 | 0.80 |  |",
                "| `ssh-only` | all but **cp** | **120.0** | 20.0 | **2.00** | 50 | 50 | 100 | **0.50** |  |",
            ]
        );
        table(&[row("ssh-only")]).unwrap_err();
        Ok(())
    }

    #[test]
    fn only_the_table_is_replaced() -> anyhow::Result<()> {
        let page = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        assert_eq!(
            replaced(&page, "new\n")?,
            format!("before\n{BEGIN}\n\nnew\n\n{END}\nafter\n")
        );
        replaced("no table", "new").unwrap_err();
        Ok(())
    }
}
