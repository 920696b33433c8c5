//! Level 2: the commands of the documents are those of our programs.

use std::collections::BTreeMap;

use anyhow::ensure;
use knoc_tests::{
    Run,
    guide::{documents, parts, shell_blocks},
    site::binary,
};

/// The texts of `--help`, by the words before it.
#[derive(Default)]
struct Help(BTreeMap<Vec<String>, String>);

impl Help {
    async fn of(&mut self, path: &[String]) -> anyhow::Result<String> {
        if let Some(text) = self.0.get(path) {
            return Ok(text.clone());
        }
        let program = path.first().map_or("", String::as_str);
        let run = Run::new(binary(program)?)
            .args(path.iter().skip(1))
            .arg("--help");
        let text = run.ok().await?.text();
        self.0.insert(path.to_vec(), text.clone());
        Ok(text)
    }
}

/// PURE: does the help list this subcommand?
fn lists(help: &str, word: &str) -> bool {
    let commands = help.split_once("Commands:").map_or("", |(_, rest)| rest);
    commands.lines().any(|line| {
        let mut words = line.split_whitespace();
        line.starts_with("  ") && !line.starts_with("   ") && words.next() == Some(word)
    })
}

/// What is wrong with a command of one of our programs.
async fn problem(helps: &mut Help, command: &str) -> anyhow::Result<Option<String>> {
    let mut words = command.split_whitespace();
    let mut path = vec![words.next().unwrap_or_default().to_owned()];
    let mut help = helps.of(&path).await?;
    let mut texts = help.clone();
    // Whether the word before was an option, so that this one may be its value.
    let mut value = false;
    for word in words.take_while(|word| *word != "--") {
        let flag = word.split('=').next().unwrap_or(word);
        if let Some(name) = flag.strip_prefix("--") {
            if !texts.contains(&format!("--{name}")) {
                return Ok(Some(format!("no option --{name}")));
            }
        } else if flag.starts_with('-') {
            if !texts.contains(&format!("{flag},")) {
                return Ok(Some(format!("no option {flag}")));
            }
        } else if lists(&help, word) {
            path.push(word.to_owned());
            help = helps.of(&path).await?;
            texts.push_str(&help);
        } else if path.len() == 1 && !value {
            return Ok(Some(format!("no subcommand {word}")));
        }
        value = word.starts_with('-');
    }
    Ok(None)
}

#[tokio::test]
async fn every_command_of_ours_in_a_document_exists_with_its_options() -> anyhow::Result<()> {
    let mut commands = Vec::new();
    for block in shell_blocks()? {
        for command in block.commands() {
            commands.push((block.place.clone(), command));
        }
    }
    for (file, text) in documents()? {
        let spans = text
            .lines()
            .flat_map(|line| line.split('`').skip(1).step_by(2));
        for command in spans.flat_map(parts) {
            commands.push((file.clone(), command));
        }
    }
    let ours = |command: &str| {
        let mut words = command.split_whitespace();
        matches!(words.next(), Some("knocctl" | "knoc-agent")) && words.next().is_some()
    };
    commands.retain(|(_, command)| ours(command));
    ensure!(commands.len() > 30, "only {} were found", commands.len());
    let mut helps = Help::default();
    let mut wrong = Vec::new();
    for (place, command) in commands {
        if let Some(problem) = problem(&mut helps, &command).await? {
            wrong.push(format!("{place}: `{command}`: {problem}"));
        }
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}
