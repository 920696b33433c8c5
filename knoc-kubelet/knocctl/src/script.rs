//! `knocctl script`: prints the batch script that `run` would submit. Nothing is submitted or written.

use std::{path::PathBuf, process::ExitCode};

use knoc_proto::pb;
use serde_json::json;

use super::{
    CtlError, Global, output,
    run::manifest,
    session::{Session, asked},
};

#[derive(Debug, clap::Args)]
pub(super) struct Script {
    /// The pod's manifest; `-` reads standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
}

impl Script {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let manifest = manifest(&self.file, global.namespace.as_deref(), None, None)?;
        let mut session = Session::open(global)?;
        let request = pb::RenderScriptRequest {
            spec: Some(manifest.spec),
        };
        let render = session.client.render_script(request);
        let answer = asked("render the batch script", render).await?;
        let value = || json!({"argv": answer.argv, "script": answer.script});
        output::show(global.output, value, |_| {
            let end = if answer.script.ends_with('\n') {
                ""
            } else {
                "\n"
            };
            format!("{}{end}", answer.script)
        })?;
        if matches!(global.output, output::Format::Table | output::Format::Wide) {
            output::complain(&format!("submitted as: {}", quoted(&answer.argv)));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Quotes the arguments for a shell.
fn quoted(argv: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    let word = |argument: &String| {
        if !argument.is_empty() && argument.chars().all(plain) {
            argument.clone()
        } else {
            format!("'{}'", argument.replace('\'', r"'\''"))
        }
    };
    argv.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_as_a_shell_takes_them() {
        let argv = ["sbatch", "--mem=64M", "--comment=a b", "it's", ""].map(str::to_owned);
        assert_eq!(
            quoted(&argv),
            r"sbatch --mem=64M '--comment=a b' 'it'\''s' ''"
        );
    }
}
