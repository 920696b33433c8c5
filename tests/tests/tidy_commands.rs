//! Rules of the commands in the documents: each block says whether a test runs it, and what it names exists.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, ensure};
use knoc_tests::guide::{documents, root, shell_blocks};

/// The sources of all tests.
fn tests() -> anyhow::Result<String> {
    let mut text = String::new();
    let mut folders = vec![root().join("tests/tests")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                text.push_str(&fs::read_to_string(path)?);
            }
        }
    }
    Ok(text)
}

#[test]
fn every_shell_block_is_run_by_a_test_or_says_why_not() -> anyhow::Result<()> {
    let tests = tests()?;
    let blocks = shell_blocks()?;
    ensure!(blocks.len() > 20, "only {} blocks were found", blocks.len());
    let mut wrong = Vec::new();
    let mut run = 0;
    for block in &blocks {
        let marker = block.marker.as_deref().unwrap_or_default();
        let good = match marker.split_once(": ") {
            Some(("run", test)) => {
                run += 1;
                tests.contains(&format!("fn {}(", test.trim()))
            }
            Some(("example", reason)) => reason.split_whitespace().count() >= 3,
            _ => false,
        };
        if !good {
            wrong.push(format!("{}: {marker:?}", block.place));
        }
    }
    ensure!(
        wrong.is_empty(),
        "write `<!-- run: TEST -->` or `<!-- example: REASON -->` before these blocks: {wrong:#?}"
    );
    ensure!(run > 4, "only {run} blocks are run");
    Ok(())
}

#[test]
fn every_target_of_make_that_a_document_names_exists() -> anyhow::Result<()> {
    let makefile = fs::read_to_string(root().join("Makefile"))?;
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(target, _)| target)
        .collect();
    let mut missing = Vec::new();
    let mut count = 0;
    for block in shell_blocks()? {
        for command in block.commands() {
            let Some(rest) = command.strip_prefix("make ") else {
                continue;
            };
            for word in rest.split_whitespace() {
                count += 1;
                if !word.contains('=') && !targets.contains(word) {
                    missing.push(format!("{}: {word}", block.place));
                }
            }
        }
    }
    ensure!(missing.is_empty(), "no such targets: {missing:#?}");
    ensure!(count >= 3, "only {count} targets were found");
    Ok(())
}

/// PURE: does the file of values have this name, such as `agent.ssh.secret`?
fn has_value(values: &str, name: &str) -> bool {
    let mut lines = values.lines();
    name.split('.').enumerate().all(|(depth, part)| {
        let indent = "  ".repeat(depth);
        let wanted = format!("{indent}{part}:");
        // A line with less indentation ends the part of the file in which the name must be.
        lines
            .by_ref()
            .take_while(|line| line.is_empty() || line.starts_with(&indent))
            .any(|line| line.starts_with(&wanted))
    })
}

#[test]
fn every_value_of_the_chart_that_a_document_sets_exists() -> anyhow::Result<()> {
    let values = fs::read_to_string(root().join("deploy/chart/knoc/values.yaml"))?;
    ensure!(has_value(&values, "agent.ssh.secret") && !has_value(&values, "node.secret"));
    let mut missing = Vec::new();
    let mut count = 0;
    for (file, text) in documents()? {
        for rest in text.split("--set ").skip(1) {
            let (name, _) = rest.split_once('=').context("--set without a value")?;
            // The shell needs quotes around the braces of a list.
            let name = name.trim_start_matches('\'');
            count += 1;
            if !has_value(&values, name) {
                missing.push(format!("{file}: {name}"));
            }
        }
    }
    ensure!(missing.is_empty(), "no such values: {missing:#?}");
    ensure!(count > 8, "only {count} values were found");
    Ok(())
}

/// Examples that no test of the bed can run.
const NOT_RUN: [&str; 1] = [
    // It needs a GPU, and the image of its vendor.
    "gpu.yaml",
];

#[test]
fn every_example_is_run_by_a_test() -> anyhow::Result<()> {
    let demo = fs::read_to_string(root().join("tests/demo.sh"))?;
    let runs = [tests()?, demo].concat();
    let mut missing = Vec::new();
    let mut count = 0;
    for folder in ["deploy/examples", "deploy/examples/argo"] {
        for entry in fs::read_dir(root().join(folder))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_example = path.extension().is_some_and(|ending| ending == "yaml");
            if is_example && !NOT_RUN.contains(&&*name) {
                count += 1;
                if !runs.contains(&*name) {
                    missing.push(format!("{folder}/{name}"));
                }
            }
        }
    }
    ensure!(missing.is_empty(), "no test runs {missing:#?}");
    ensure!(count > 10, "only {count} examples were found");
    Ok(())
}
