//! `knoc-conformance [OPTION…] LIST…` runs lists of the upstream end-to-end suite against the running stack and writes
//! docs/conformance.md. LIST is `A`, `B` (tests/conformance) or a file with a name on each line.
//!
//! Options: `--focus WORDS` (only tests whose names contain them; `|` separates alternatives), `--only new|failed` (by what the page says
//! of a test), `--minutes N` (no further test is started then), `--side N` (tests at once), `--limit SECONDS` (of one test),
//! `--page FILE`, `--logs FOLDER`.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use knoc_tests::conformance::{self, List, Only, Options};

fn main() -> anyhow::Result<()> {
    let options = options(std::env::args().skip(1))?;
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    runtime.block_on(conformance::run(&options))
}

fn options(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Options> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bed = std::env::var("KNOC_BED").unwrap_or_else(|_| "/var/lib/knoc-testbed".to_owned());
    let mut options = Options {
        lists: Vec::new(),
        focus: Vec::new(),
        only: Only::All,
        side: 12,
        // Some tests of the suite wait for more than ten minutes before they give up.
        limit: Duration::from_mins(15),
        budget: None,
        page: here.join("../docs/conformance.md"),
        logs: Path::new(&bed).join("log/conformance"),
    };
    while let Some(word) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            value.with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--focus" => options.focus = value()?.split('|').map(str::to_owned).collect(),
            "--only" => {
                options.only = match value()?.as_str() {
                    "all" => Only::All,
                    "new" => Only::New,
                    "failed" => Only::Failed,
                    other => bail!("--only {other}: all, new and failed are known"),
                }
            }
            "--minutes" => {
                let minutes = value()?.parse().context("--minutes needs a number")?;
                options.budget = Some(Duration::from_mins(minutes));
            }
            "--side" => {
                options.side = value()?.parse().context("--side needs a number")?;
                if options.side == 0 {
                    bail!("--side must be at least 1");
                }
            }
            "--limit" => {
                let seconds = value()?.parse().context("--limit needs seconds")?;
                options.limit = Duration::from_secs(seconds);
            }
            "--page" => options.page = PathBuf::from(value()?),
            "--logs" => options.logs = PathBuf::from(value()?),
            option if option.starts_with("--") => bail!("{option}: no such option"),
            name @ ("A" | "B") => {
                let path = here.join("conformance").join(format!("{name}.txt"));
                options.lists.push(List::read(&path)?);
            }
            file => options.lists.push(List::read(Path::new(file))?),
        }
    }
    if options.lists.is_empty() {
        bail!("usage: knoc-conformance [OPTION…] A|B|FILE…");
    }
    Ok(options)
}
