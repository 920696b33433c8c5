//! The standard streams of a container's program.

use std::{io, os::fd::OwnedFd, sync::Arc};

use knoc_contract::logs::cri;
use knoc_proto::pb;

use super::super::{
    fdio::{self, Stream},
    output::Source,
};

/// The ends of the standard streams that are not read for the log.
pub(super) struct Stdio {
    pub(super) theirs: Vec<OwnedFd>,
    /// The writing end of the standard input, for attached clients.
    pub(super) ours: Option<Stream>,
}

/// Pipes for the program; none if it has a terminal.
pub(super) fn pipes(container: &pb::Container) -> io::Result<(Stdio, Vec<Source>)> {
    if container.tty {
        return Ok((
            Stdio {
                theirs: Vec::new(),
                ours: None,
            },
            Vec::new(),
        ));
    }
    let (stdin, ours) = if container.stdin {
        let (theirs, ours) = fdio::input_pipe()?;
        (theirs, Some(ours))
    } else {
        (std::fs::File::open("/dev/null")?.into(), None)
    };
    let (ours_out, stdout) = fdio::output_pipe()?;
    let (ours_err, stderr) = fdio::output_pipe()?;
    let sources = vec![
        Source::new(ours_out, cri::Stream::Stdout),
        Source::new(ours_err, cri::Stream::Stderr),
    ];
    Ok((
        Stdio {
            theirs: vec![stdin, stdout, stderr],
            ours,
        },
        sources,
    ))
}

/// If there is a terminal, all output comes from it.
pub(super) fn from_terminal(terminal: Option<&Arc<Stream>>) -> Option<Vec<Source>> {
    terminal.map(|terminal| vec![Source::new(Arc::clone(terminal), cri::Stream::Stdout)])
}
