//! `knocctl attach`: shows the output of a container's program from now on, and passes input to it if it reads any.

use std::process::ExitCode;

use knoc_proto::pb::{AttachStart, exec_input::Input};

use super::{
    CtlError, Global,
    converse::{self, Local},
    find, logs, output,
    session::{Session, asked},
    terminal,
};

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(super) struct Attach {
    /// Name, NAMESPACE/NAME or uid of the pod
    pod: String,
    /// The container, if the pod has several
    #[arg(short, long)]
    container: Option<String>,
    /// Passes standard input to the program (the container needs `stdin: true`)
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Uses the program's terminal (the container needs `tty: true`)
    #[arg(short = 't', long)]
    tty: bool,
}

const HELP: &str = "\
Earlier output of the program is in its log: `knocctl logs`. Without -t, ^C detaches and the program continues; with -t, \
^C is sent to the program. When the program ends, knocctl exits with its exit code.";

impl Attach {
    pub(super) async fn run(self, global: &Global) -> Result<ExitCode, CtlError> {
        let mut session = Session::open(global)?;
        let pod = find::one(&mut session, global.namespace.as_deref(), &self.pod).await?;
        let container = logs::container(&pod, self.container.as_deref());
        let start = self.start(pod.uid, container);
        let (sender, input) = converse::input(Input::Attach(start));
        let what = format!("attach to {}", self.pod);
        let stream = asked(&what, session.client.attach(input)).await?;
        if self.stdin && terminal::is_one() {
            output::complain("attached; if there is no prompt, press Enter");
        }
        let local = Local {
            stdin: self.stdin,
            tty: self.tty,
        };
        let exit = converse::run(stream, sender, local, &what).await?;
        Ok(converse::exit_code(exit, |message| CtlError::Detached {
            message,
        }))
    }

    fn start(&self, uid: String, container: String) -> AttachStart {
        AttachStart {
            uid,
            container,
            stdin: self.stdin,
            stdout: true,
            // A terminal has only one output stream.
            stderr: !self.tty,
            tty: self.tty,
            size: if self.tty { terminal::size() } else { None },
        }
    }
}
