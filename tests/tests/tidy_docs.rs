//! Rules of the documents: links, paths and tests that they name exist.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// Folders of the repository that hold documents or that documents refer to.
const FOLDERS: [&str; 7] = [
    "deploy",
    "docs",
    "knoc-agent",
    "knoc-kubelet",
    "packaging",
    "proto",
    "tests",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files in the repository's root and in its folders whose names have this ending.
fn files(ending: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut folders: Vec<PathBuf> = FOLDERS.map(|name| root().join(name)).into();
    let mut found = Vec::new();
    for entry in fs::read_dir(root())? {
        found.push(entry?.path());
    }
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let skipped = path
                .file_name()
                .is_some_and(|name| name == "target" || name == "node_modules");
            if path.is_dir() && !skipped {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.retain(|path| path.is_file() && path.to_string_lossy().ends_with(ending));
    found.sort();
    Ok(found)
}

/// The documents and their texts, without blocks of code.
fn documents() -> anyhow::Result<Vec<(PathBuf, String)>> {
    let documents = files(".md")?;
    ensure!(documents.len() > 20, "the documents were not found");
    let text = |path: PathBuf| {
        let all = fs::read_to_string(&path)?;
        let plain: String = all.split("```").step_by(2).collect();
        Ok((path, plain))
    };
    documents.into_iter().map(text).collect()
}

/// The texts between two marks.
fn between<'a>(text: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(open)
        .skip(1)
        .filter_map(move |rest| rest.split_once(close).map(|(inner, _)| inner))
}

/// The code spans of a text, which never cross a line here.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// The text without the section on where future code goes, which names files that do not exist yet.
fn without_plans(text: &str) -> String {
    let Some((before, after)) = text.split_once("## Where things go\n") else {
        return text.to_owned();
    };
    let rest = after.split_once("\n## ").map_or("", |(_, rest)| rest);
    format!("{before}{rest}")
}

/// The anchors of a document's headings, as the repository's host makes them.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let title = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = title
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_of_a_document_leads_to_a_file_and_a_heading_that_exist() -> anyhow::Result<()> {
    let mut broken = Vec::new();
    let mut count = 0;
    for (path, text) in documents()? {
        let folder = path.parent().context("a document without a folder")?;
        let links = between(&text, "](", ")").filter(|link| !link.contains("://"));
        for link in links {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                folder.join(file)
            };
            let missing = !target.exists()
                || (!anchor.is_empty() && !anchors(&fs::read_to_string(&target)?).contains(anchor));
            if missing {
                broken.push(format!("{}: {link}", path.display()));
            }
            count += 1;
        }
    }
    ensure!(broken.is_empty(), "broken links: {broken:#?}");
    ensure!(count > 30, "only {count} links were found");
    Ok(())
}

#[test]
fn every_path_that_a_document_names_exists() -> anyhow::Result<()> {
    let mut missing = Vec::new();
    let mut count = 0;
    for (path, text) in documents()? {
        // Entries of the change log keep the paths of their time.
        if path.ends_with("CHANGELOG.md") {
            continue;
        }
        let in_repository = |span: &&str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_');
            let first = span.split('/').next().unwrap_or_default();
            span.contains('/') && span.chars().all(plain) && FOLDERS.contains(&first)
        };
        for span in code(&without_plans(&text)).filter(in_repository) {
            let named = root().join(span);
            // A decision record may be named by its number.
            let by_number = named.parent().is_some_and(|folder| {
                let number = named
                    .file_name()
                    .map(|name| format!("{}-", name.to_string_lossy()));
                let entries = fs::read_dir(folder).into_iter().flatten().flatten();
                let mut files = entries.map(|entry| entry.file_name());
                number.is_some_and(|number| {
                    files.any(|name| name.to_string_lossy().starts_with(&number))
                })
            });
            // `tests/README.md` names paths inside of `tests`.
            let inside_tests = root().join("tests").join(span).exists();
            if !named.exists() && !by_number && !inside_tests {
                missing.push(format!("{}: {span}", path.display()));
            }
            count += 1;
        }
    }
    ensure!(missing.is_empty(), "missing: {missing:#?}");
    ensure!(count > 20, "only {count} paths were found");
    Ok(())
}

#[test]
fn every_test_that_a_document_names_exists() -> anyhow::Result<()> {
    let mut sources = String::new();
    for path in files(".rs")? {
        sources.push_str(&fs::read_to_string(path)?);
    }
    let mut missing = Vec::new();
    let mut count = 0;
    for (path, text) in documents()? {
        // A test's name is a sentence: several words, all of them lower-case.
        let is_sentence = |span: &&str| {
            let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            let metric = ["_total", "_bytes", "_seconds"]
                .iter()
                .any(|unit| span.ends_with(unit));
            span.chars().all(lower) && span.split('_').count() >= 5 && !metric
        };
        let names = code(&text).map(|span| span.rsplit("::").next().unwrap_or(span));
        for name in names.filter(is_sentence) {
            if !sources.contains(&format!("fn {name}(")) {
                missing.push(format!("{}: {name}", path.display()));
            }
            count += 1;
        }
    }
    ensure!(missing.is_empty(), "missing tests: {missing:#?}");
    ensure!(count > 100, "only {count} names of tests were found");
    Ok(())
}
