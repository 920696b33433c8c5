//! `knoc-bench [--quick] [PAGE]` measures the running stack and writes docs/performance.md;
//! `knoc-bench [--quick] streams [NAME]` measures only the streams whose names contain NAME (such as `port-forward` or `pod-to-pod`), and
//! prints the results;
//! `knoc-bench [--quick] egress` measures only what pods open to the cluster, and prints the results;
//! `knoc-bench [--quick] probes` measures only what probes cost, and prints the results;
//! `knoc-bench [--quick] beside` measures only T3 beside a copy, and prints the results;
//! `knoc-bench [--quick] submitted` measures only T1 of pods whose jobs wait, and prints the results;
//! `knoc-bench pods COUNT [ROUNDS]` measures T1 to T3 of that many pods at once, and prints the results;
//! `knoc-bench [--quick] links FILE` measures what the way to the agent of the current profile costs, and adds a row to FILE;
//! `knoc-bench links-page FILE` writes the table in docs/guide/links.md from these rows;
//! `knoc-bench relay PORT ROLE KEYS` is one of the relays that serve as the lower bound of streams, and `knoc-bench pipe ADDRESS KEYS`
//! connects standard input and output with one; `knoc-bench plain PORT ADDRESS KEYS` is one whose clients have no TLS, and
//! `knoc-bench send ADDRESS BYTES KEYS` sends bytes to one and prints the microseconds.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use knoc_tests::bench::{self, relay};
use tokio::runtime::Runtime;

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if ran_as_relay(&arguments)? {
        return Ok(());
    }
    let links = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/links.md");
    if let [word, rows] = arguments.as_slice()
        && word == "links-page"
    {
        return bench::links::page(Path::new(rows), &links);
    }
    let quick = arguments
        .iter()
        .position(|word| word == "--quick")
        .map(|at| arguments.remove(at));
    let rows = match arguments.as_slice() {
        [word, rows] if word == "links" => Some(PathBuf::from(rows)),
        _ => None,
    };
    // The client uses only one thread, so that it does not compete with the measured processes.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    if let Some(rows) = rows {
        return runtime.block_on(bench::links::measure(&rows, quick.is_some()));
    }
    measure(&runtime, &arguments, quick.is_some())
}

/// Runs a relay if the arguments ask for one; returns whether they did.
fn ran_as_relay(arguments: &[String]) -> anyhow::Result<bool> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let mut runtime = || runtime.enable_all().build();
    match words.as_slice() {
        ["relay", port, role, keys] => {
            let role = relay::Role::parse(role)?;
            runtime()?.block_on(relay::serve(port.parse()?, role, Path::new(keys)))?;
        }
        ["relay", ..] => anyhow::bail!(
            "usage: knoc-bench relay PORT file=PATH|program=COMMAND|listener=ADDRESS|server=ADDRESS|relay=ADDRESS KEYS"
        ),
        ["plain", port, to, keys] => {
            runtime()?.block_on(relay::plain(port.parse()?, to.parse()?, Path::new(keys)))?;
        }
        ["send", to, bytes, keys] => {
            let sent = relay::send_bytes(to.parse()?, bytes.parse()?, Path::new(keys));
            let took = runtime()?.block_on(sent)?;
            writeln!(std::io::stdout(), "{}", took.as_micros())?;
        }
        ["pipe", to, keys] => {
            runtime()?.block_on(relay::pipe(to.parse()?, Path::new(keys)))?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Measures the section that the first argument names, or everything if it names none.
fn measure(runtime: &Runtime, arguments: &[String], quick: bool) -> anyhow::Result<()> {
    match arguments.first().map_or("", String::as_str) {
        "beside" => runtime.block_on(bench::beside(quick)),
        "egress" => runtime.block_on(bench::egress(quick)),
        "submitted" => runtime.block_on(bench::submitted(quick)),
        "probes" => runtime.block_on(bench::probes(quick)),
        "pods" => {
            let count = arguments
                .get(1)
                .context("usage: knoc-bench pods COUNT [ROUNDS]")?;
            let rounds = arguments.get(2).map_or(Ok(1), |rounds| rounds.parse())?;
            runtime.block_on(bench::pods(count.parse()?, rounds))
        }
        "streams" => {
            let name = arguments.get(1).map_or("", String::as_str);
            runtime.block_on(bench::streams(quick, name))
        }
        _ => {
            let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
            let page = arguments.first().map_or(page, PathBuf::from);
            runtime.block_on(bench::run(&page, quick))
        }
    }
}
