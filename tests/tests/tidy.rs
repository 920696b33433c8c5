//! Rules of the source tree that no lint checks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::ensure;

const LONGEST_FILE: usize = 600;
const LONGEST_FUNCTION: usize = 100;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All Rust sources of the workspace, with their text.
fn sources() -> anyhow::Result<Vec<(String, String)>> {
    let mut folders: Vec<PathBuf> = ["proto", "knoc-agent", "knoc-kubelet", "tests"]
        .map(|name| root().join(name))
        .into();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root())?.display().to_string();
                found.push((name, fs::read_to_string(&path)?));
            }
        }
    }
    found.sort();
    ensure!(found.len() > 20, "the sources were not found");
    Ok(found)
}

#[test]
fn every_module_says_what_it_is() -> anyhow::Result<()> {
    let silent: Vec<_> = sources()?
        .into_iter()
        .filter(|(name, text)| !name.ends_with("tests.rs") && !text.starts_with("//!"))
        .map(|(name, _)| name)
        .collect();
    ensure!(silent.is_empty(), "without a head of `//!`: {silent:#?}");
    Ok(())
}

#[test]
fn no_file_is_too_long() -> anyhow::Result<()> {
    let long: Vec<_> = sources()?
        .into_iter()
        .map(|(name, text)| (name, text.lines().count()))
        .filter(|(_, lines)| *lines > LONGEST_FILE)
        .collect();
    ensure!(long.is_empty(), "over {LONGEST_FILE} lines: {long:#?}");
    Ok(())
}

#[test]
fn no_function_is_too_long() -> anyhow::Result<()> {
    let long: Vec<_> = sources()?
        .iter()
        .flat_map(|(name, text)| long_functions(name, text))
        .collect();
    ensure!(long.is_empty(), "over {LONGEST_FUNCTION} lines: {long:#?}");
    Ok(())
}

/// Uses the indentation that rustfmt keeps: a function ends at the first `}` with the indentation of its first line.
fn long_functions(name: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut long = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let head = line.trim_start();
        let is_function = [
            "fn ",
            "pub fn ",
            "async fn ",
            "pub async fn ",
            "pub(crate) fn ",
            "pub(super) fn ",
        ]
        .iter()
        .any(|word| head.starts_with(word));
        if !is_function || head.ends_with(';') {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - head.len()]);
        let length = lines[start..]
            .iter()
            .position(|line| **line == end)
            .unwrap_or(0);
        if length > LONGEST_FUNCTION {
            long.push(format!("{name}:{}: {length} lines", start + 1));
        }
    }
    long
}

#[test]
fn every_invariant_names_a_test_that_exists() -> anyhow::Result<()> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md"))?;
    let sources: String = sources()?.into_iter().map(|(_, text)| text).collect();
    let mut count = 0;
    for line in text.lines() {
        // "Test: `name`, `other`." closes each invariant.
        let Some((_, tests)) = line.split_once("Test: ") else {
            continue;
        };
        for name in tests.split('`').skip(1).step_by(2) {
            let function = name.rsplit("::").next().unwrap_or(name);
            ensure!(
                is_test(&sources, function),
                "ARCHITECTURE.md names {name}, which is no test that runs"
            );
            count += 1;
        }
    }
    ensure!(count > 0, "ARCHITECTURE.md names no test (`Test: `)");
    Ok(())
}

/// Whether that function is a test, plain or in `proptest!`, that is not ignored.
fn is_test(sources: &str, function: &str) -> bool {
    let head = format!("fn {function}(");
    sources.match_indices(&head).any(|(at, _)| {
        let line = sources[..at].rfind('\n').unwrap_or(0);
        let above = sources[..line].lines().rev();
        let mut attributes = above.take_while(|line| line.trim_start().starts_with("#["));
        let mut test = false;
        attributes.all(|line| {
            test |= line.trim_end().ends_with("test]") || line.contains("test(");
            !line.contains("#[ignore")
        }) && test
    })
}

/// A family of metrics as the guide shows it.
fn row(family: &knoc_kubelet::metrics::Family) -> String {
    let labels: Vec<String> = family
        .labels
        .split(',')
        .filter(|label| !label.is_empty())
        .map(|label| format!("`{label}`"))
        .collect();
    let (name, kind, help) = (family.name, family.kind, family.help);
    format!("| `{name}` | {kind} | {} | {help} |", labels.join(", "))
}

#[test]
fn the_guide_lists_every_metric_as_it_is() -> anyhow::Result<()> {
    use knoc_kubelet::metrics::{FAMILIES, PROBE_FAMILIES};
    let guide = fs::read_to_string(root().join("docs/guide/metrics.md"))?;
    let shown: Vec<&str> = guide
        .lines()
        .filter(|line| {
            ["| `knoc_", "| `process_", "| `prober_"]
                .iter()
                .any(|head| line.starts_with(head))
        })
        .collect();
    let listed: Vec<String> = FAMILIES.iter().chain(PROBE_FAMILIES).map(row).collect();
    ensure!(
        shown == listed,
        "docs/guide/metrics.md should have\n{}",
        listed.join("\n")
    );
    Ok(())
}
