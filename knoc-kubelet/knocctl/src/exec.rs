//! `knocctl exec`: runs a command in a container and passes on its input, output, terminal and exit code.

use std::process::ExitCode;

use knoc_proto::{
    capability,
    pb::{ExecStart, exec_input::Input},
};

use super::{
    CtlError, Global,
    converse::{self, Local},
    find, logs, output,
    session::{Session, asked},
    terminal,
};

#[derive(Debug, clap::Args)]
pub(super) struct Exec {
    /// Name, NAMESPACE/NAME or uid of the pod
    pod: String,
    /// The container, if the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Passes standard input to the command
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Allocates a terminal for the command
    #[arg(short = 't', long)]
    tty: bool,
    /// Runs the command beside the program of this rank of an MPI program, on the rank's node; 0 if not given
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t,
        hide_default_value = true
    )]
    rank: u32,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Exec {
    pub(super) async fn run(mut self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        if self.rank > 0 {
            // An older agent would run the command in rank 0.
            let can = session.info().await?.capabilities;
            if !can.iter().any(|name| name == capability::MPI) {
                return Err(CtlError::NotStarted {
                    message: "this agent is of a version that knows no ranks; leave --rank out"
                        .to_owned(),
                });
            }
        }
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        let container = logs::container(&pod, self.container.as_deref());
        if self.tty && !(self.stdin && terminal::is_one()) {
            if self.stdin {
                output::complain(
                    "note: standard input is not a terminal, so the command does not get one",
                );
                self.tty = false;
            } else if !terminal::is_one() {
                self.tty = false;
            }
        }
        let start = self.start(pod.uid, container);
        let (sender, input) = converse::input(Input::Start(start));
        let what = format!("run {:?} in {}", self.command.join(" "), self.pod);
        let stream = asked(&what, session.client.exec(input)).await?;
        let local = Local {
            stdin: self.stdin,
            tty: self.tty,
        };
        let exit = converse::run(stream, sender, local, &what).await?;
        Ok(converse::exit_code(exit, |message| CtlError::NotStarted {
            message,
        }))
    }

    fn start(&self, uid: String, container: String) -> ExecStart {
        ExecStart {
            uid,
            container,
            command: self.command.clone(),
            stdin: self.stdin,
            stdout: true,
            // A terminal has only one output stream.
            stderr: !self.tty,
            tty: self.tty,
            size: if self.tty { terminal::size() } else { None },
            rank: self.rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn parsed(arguments: &[&str]) -> Result<Exec, String> {
        let line = Line::try_parse_from(["exec"].iter().chain(arguments));
        line.map(|line| line.exec)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_stands_after_two_dashes() {
        let exec = parsed(&["web", "-it", "-c", "main", "--", "sh", "-c", "echo -i"]).unwrap();
        assert!(exec.stdin && exec.tty);
        assert_eq!(exec.command, ["sh", "-c", "echo -i"]);
        let start = exec.start("u".into(), "main".into());
        assert!(start.tty && start.stdout && !start.stderr && start.rank == 0);
        let exec = parsed(&["mpi", "--rank", "3", "--", "hostname"]).unwrap();
        assert_eq!(exec.start("u".into(), "main".into()).rank, 3);
        parsed(&["mpi", "--rank", "-1", "--", "hostname"]).unwrap_err();
        parsed(&["web", "sh"]).unwrap_err();
        parsed(&["web"]).unwrap_err();
    }
}
