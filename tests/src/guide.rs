//! The commands of the documents, for the tests that check and run them.
//!
//! The comment before a block of shell commands says what is tested of it: `<!-- run: TEST -->` (that test runs the block)
//! or `<!-- example: REASON -->` (nothing runs it, for this reason).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Programs by whose names a block of shell commands is known.
const PROGRAMS: [&str; 17] = [
    "./install.sh",
    "curl",
    "helm",
    "knoc-agent",
    "knocctl",
    "kubectl",
    "make",
    "openssl",
    "rm",
    "sacct",
    "scp",
    "skopeo",
    "squeue",
    "ssh",
    "ssh-keygen",
    "ssh-keyscan",
    "tar",
];

/// A block of code.
#[derive(Debug)]
pub struct Block {
    /// Where it is: the file and the number of its first line.
    pub place: String,
    /// The comment before it, without its brackets.
    pub marker: Option<String>,
    /// Its lines, without the indentation that makes them code.
    pub lines: Vec<String>,
    language: String,
}

impl Block {
    /// Are these commands for a shell?
    #[must_use]
    pub fn is_shell(&self) -> bool {
        let first = self.lines.first().map_or("", String::as_str);
        let word = first.split_whitespace().next().unwrap_or_default();
        match self.language.as_str() {
            "sh" => true,
            "" => PROGRAMS.contains(&word),
            _ => false,
        }
    }

    /// Its commands: lines that continue are joined, and what follows a pipe or `&&` is a command of its own. Comments are left out.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        let joined = self.lines.join("\n").replace("\\\n", " ");
        joined.lines().flat_map(parts).collect()
    }

    /// The block as a script.
    #[must_use]
    pub fn script(&self) -> String {
        self.lines.join("\n")
    }
}

/// PURE: the commands of one line.
#[must_use]
pub fn parts(line: &str) -> Vec<String> {
    let line = line.split(" #").next().unwrap_or_default();
    let parts = line.split("&&").flat_map(|part| part.split(" | "));
    parts
        .map(|part| part.trim().to_owned())
        .filter(|part| !part.is_empty() && !part.starts_with('#'))
        .collect()
}

/// The lines from this one on as long as they are inside.
fn take<'a>(lines: &[&'a str], from: usize, inside: impl Fn(&str) -> bool) -> Vec<&'a str> {
    let rest = lines.iter().skip(from);
    rest.take_while(|line| inside(line)).copied().collect()
}

/// PURE: the blocks of code of a document.
#[must_use]
pub fn blocks(file: &str, text: &str) -> Vec<Block> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut marker = None;
    let mut at = 0;
    // Whether the line before was blank or a comment: only then does indentation make code.
    let mut free = true;
    while let Some(line) = lines.get(at) {
        let trimmed = line.trim();
        let place = format!("{file}:{}", at + 1);
        if let Some(language) = trimmed.strip_prefix("```") {
            let inner = take(&lines, at + 1, |line| !line.trim_start().starts_with("```"));
            at += inner.len() + 2;
            found.push(Block {
                place,
                marker: marker.take(),
                lines: inner.iter().map(|line| (*line).to_owned()).collect(),
                language: language.to_owned(),
            });
            free = true;
        } else if free && line.starts_with("    ") && !trimmed.starts_with("- ") {
            let inner = take(&lines, at, |line| line.starts_with("    "));
            at += inner.len();
            let indent = line.len() - line.trim_start().len();
            let cut = |line: &&str| {
                line.get(indent..)
                    .unwrap_or_else(|| line.trim_start())
                    .to_owned()
            };
            found.push(Block {
                place,
                marker: marker.take(),
                lines: inner.iter().map(cut).collect(),
                language: String::new(),
            });
            free = true;
        } else {
            let comment = trimmed
                .strip_prefix("<!--")
                .and_then(|rest| rest.strip_suffix("-->"));
            if let Some(comment) = comment {
                marker = Some(comment.trim().to_owned());
            } else if !trimmed.is_empty() {
                marker = None;
            }
            free = trimmed.is_empty() || comment.is_some();
            at += 1;
        }
    }
    found
}

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The documents that users read, with their texts.
///
/// # Errors
/// Returns an error if one cannot be read.
pub fn documents() -> io::Result<Vec<(String, String)>> {
    let mut names = vec![
        "README.md".to_owned(),
        "packaging/agent/README.md".to_owned(),
    ];
    for entry in fs::read_dir(root().join("docs/guide"))? {
        names.push(format!(
            "docs/guide/{}",
            entry?.file_name().to_string_lossy()
        ));
    }
    names.sort();
    let read = |name: String| Ok((name.clone(), fs::read_to_string(root().join(name))?));
    names.into_iter().map(read).collect()
}

/// The blocks of shell commands in the documents that users read.
///
/// # Errors
/// Returns an error if a document cannot be read.
pub fn shell_blocks() -> io::Result<Vec<Block>> {
    let all = documents()?;
    let all = all.iter().flat_map(|(name, text)| blocks(name, text));
    Ok(all.filter(Block::is_shell).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# Title\n\n<!-- run: a_test -->\n\n    kubectl get pods   # all\n    make x && helm y \\\n        --set a=b\n\n\
        Text\n    continued\n\n   <!-- example: needs a site -->\n\n       ssh host\n\n```yaml\na: b\n```\n\n    [policy]\n";

    #[test]
    fn blocks_have_their_markers_and_their_commands() {
        let found = blocks("page.md", PAGE);
        let shell: Vec<_> = found.iter().filter(|block| block.is_shell()).collect();
        assert_eq!(found.len(), 4, "{found:?}");
        assert_eq!(shell.len(), 2, "{shell:?}");
        let [first, second] = shell[..] else { return };
        assert_eq!(first.place, "page.md:5");
        assert_eq!(first.marker.as_deref(), Some("run: a_test"));
        let commands = first.commands();
        assert_eq!(commands[..2], ["kubectl get pods", "make x"]);
        assert!(commands[2].starts_with("helm y") && commands[2].ends_with("--set a=b"));
        assert_eq!(second.marker.as_deref(), Some("example: needs a site"));
        assert_eq!(second.lines, ["ssh host"]);
    }
}
