//! The agent's program, and its way to the login node.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    path::PathBuf,
};

use knoc_link::carrier::ssh::{Script, Ssh};
use knoc_proto::manage::{Answer, Request};

use super::{ManageError, UPLOAD_LIMIT, ask};
use crate::CtlError;

/// What a program for Linux begins with.
const ELF: &[u8] = b"\x7fELF";

/// A program that was opened and looked at.
#[derive(Debug)]
pub(crate) struct Program {
    file: File,
    length: u64,
}

impl Program {
    /// Opens the file, or `knoc-agent` beside this program.
    pub(crate) fn open(named: Option<PathBuf>) -> Result<Self, ManageError> {
        let path = Self::path(named)?;
        let read = || {
            let mut file = File::open(&path)?;
            let mut begin = Vec::new();
            (&mut file).take(4).read_to_end(&mut begin)?;
            file.rewind()?;
            let length = file.metadata()?.len();
            io::Result::Ok((file, length, begin))
        };
        let (file, length, begin) = read().map_err(|source| ManageError::Program {
            path: path.clone(),
            source,
        })?;
        if begin != ELF {
            return Err(ManageError::NotElf { path });
        }
        Ok(Self { file, length })
    }

    /// The path of the file, or of `knoc-agent` beside this program.
    pub(crate) fn path(named: Option<PathBuf>) -> Result<PathBuf, ManageError> {
        named
            .map_or_else(beside, Ok)
            .map_err(|source| ManageError::Program {
                path: "knoc-agent".into(),
                source,
            })
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Sends the program, which then answers the request.
    pub(crate) async fn run(self, ssh: &Ssh, request: &Request) -> Result<Answer, CtlError> {
        // Of this process, not of the user: hexadecimal digits only.
        let token = format!("{:016x}", rand::random::<u64>());
        let [put, run] = scripts(&token);
        let put = Script::new(&put).ok_or(ManageError::Script)?;
        let file = tokio::fs::File::from_std(self.file);
        let sent = ssh.run(&put, file, super::MAX_ANSWER, UPLOAD_LIMIT).await;
        sent.map_err(|source| ManageError::Ssh {
            doing: "send the agent's program over SSH",
            source,
        })?;
        ask(ssh, &run, request).await
    }
}

/// PURE: the script that receives the program, and the one that runs it.
pub(super) fn scripts(token: &str) -> [String; 2] {
    let folder = "\"$HOME/.local/lib/knoc\"";
    let upload = format!("\"$HOME/.local/lib/knoc/upload.{token}\"");
    [
        format!(
            "umask 022; mkdir -p {folder} && cat >{upload} && chmod 700 {upload} || {{ rm -f {upload}; exit 1; }}"
        ),
        format!("exec {upload} manage"),
    ]
}

fn beside() -> io::Result<PathBuf> {
    // Where it lies itself, not the link to it.
    let own = std::env::current_exe()?.canonicalize()?;
    Ok(own.with_file_name("knoc-agent"))
}
