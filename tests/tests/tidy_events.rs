//! A rule of the guide: its page of Events has every reason that the code can send, and no other.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::ensure;
use knoc_tests::guide::root;

/// The crates that send Events, or tell the kubelet what to send.
const SOURCES: [&str; 4] = [
    "knoc-agent/contract/src",
    "knoc-agent/shim/src",
    "knoc-agent/src",
    "knoc-kubelet/src",
];

/// What a file has that sends Events.
const SENDS: [&str; 11] = [
    ".note(",
    ".note_again(",
    ".note_of(",
    ".record(",
    ".record_once(",
    "-> Note ",
    "Note {",
    "Note::warning(",
    "PodNote {",
    "Rejection::new(",
    "Told {",
];

/// Words in such files that are no reasons of Events: kinds and types, reasons of containers, pods and conditions, names of calls.
const OTHERS: [&str; 33] = [
    "Authority",
    "Clock",
    "Completed",
    "ContainerCannotRun",
    "ContainerCreating",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "DaemonSet",
    "DeletePod",
    "Deleted",
    "EnsurePod",
    "ErrImagePull",
    "Error",
    "Exists",
    "ForgetPod",
    "NoSchedule",
    "Node",
    "Normal",
    "Pod",
    "PodInitializing",
    "Pushed",
    "Rejected",
    "RunContainerError",
    "Running",
    "SelfSigned",
    "SlurmTimeLimit",
    "StagingFailed",
    "StartError",
    "UpdateValues",
    "ValuesExpired",
    "ValuesMissing",
    "Warning",
];

/// The Rust files below `folder` that are no tests.
fn sources(folder: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut folders = vec![root().join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_stem().unwrap_or_default();
            if name == "tests" {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// The code of a file, without its comments and its tests.
fn code(file: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(file)?;
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Whether the word is written like the reason of an Event, as in `FailedMount`.
fn is_reason(word: &str) -> bool {
    let mut letters = word.chars();
    letters.next().is_some_and(|c| c.is_ascii_uppercase())
        && letters.next().is_some_and(|c| c.is_ascii_lowercase())
        && letters.all(|c| c.is_ascii_alphabetic())
}

/// The reasons in the first column of the tables of the page.
fn documented() -> anyhow::Result<BTreeSet<String>> {
    let page = fs::read_to_string(root().join("docs/guide/events.md"))?;
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let first = rows.filter_map(|row| row.split('|').nth(1));
    let spans = first.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    Ok(spans.map(str::to_owned).collect())
}

#[test]
fn every_reason_of_an_event_is_in_the_guide_and_no_other() -> anyhow::Result<()> {
    let documented = documented()?;
    ensure!(documented.len() > 40, "only {documented:?} were found");
    let mut written = String::new();
    let mut missing = BTreeSet::new();
    for folder in SOURCES {
        for file in sources(folder)? {
            let code = code(&file)?;
            if SENDS.iter().any(|mark| code.contains(mark)) {
                // Texts between quotation marks; what is between two of them is no single word.
                let words = code.split('"').filter(|word| is_reason(word));
                let others = words.filter(|word| !OTHERS.contains(word));
                let new = others.filter(|word| !documented.contains(*word));
                missing.extend(new.map(|word| format!("{word} in {}", file.display())));
            }
            written.push_str(&code);
        }
    }
    ensure!(
        missing.is_empty(),
        "add these to docs/guide/events.md, or to OTHERS if they are no reasons of Events: {missing:#?}"
    );
    let is_written = |reason: &&String| {
        // The name of the resource is added to this one.
        reason.starts_with("OutOf") || written.contains(&format!("\"{reason}\""))
    };
    let unknown: Vec<_> = documented
        .iter()
        .filter(|reason| !is_written(reason))
        .collect();
    ensure!(unknown.is_empty(), "no code sends {unknown:?}");
    Ok(())
}
