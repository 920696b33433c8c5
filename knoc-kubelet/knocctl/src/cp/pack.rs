//! Packs a file or a folder into messages for the remote `tar`. Blocking.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read as _, Write},
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use knoc_proto::CHUNK;
use knoc_proto::pb::{ExecInput, exec_input::Input};
use tokio::sync::mpsc;

use super::{super::CtlError, LeftOut};

/// Checks that the file or folder exists before a command is started for it.
pub(super) fn look(from: &Path) -> Result<(), CtlError> {
    let found = std::fs::symlink_metadata(from);
    found
        .map(drop)
        .map_err(|source| failed("read", from, source))
}

/// Sends `from` as `name`, then the end of input. Returns what was left out (sockets, devices). If the receiver is gone,
/// that is not an error here: the exit of the remote `tar` gives the reason.
pub(super) fn send(
    from: &Path,
    name: &Path,
    sender: &mpsc::Sender<ExecInput>,
) -> Result<LeftOut, CtlError> {
    let mut left_out = LeftOut::default();
    let pipe = Pipe {
        sender,
        buffer: BytesMut::with_capacity(CHUNK),
    };
    let mut archive = tar::Builder::new(pipe);
    let packed = pack(&mut archive, from, name, &mut left_out);
    let closed = packed.and_then(|()| {
        let finished = archive.into_inner().and_then(|mut pipe| pipe.flush());
        finished.map_err(|source| failed("pack", from, source))
    });
    match closed {
        Err(CtlError::Copy { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    // If the receiver is gone, the command has ended already.
    drop(sender.blocking_send(message(Input::StdinClosed(true))));
    Ok(left_out)
}

fn failed(what: &str, path: &Path, source: io::Error) -> CtlError {
    CtlError::Copy {
        what: format!("{what} {}", path.display()),
        source,
    }
}

/// A folder whose entries are still to be packed, with its name in the archive.
struct Level {
    path: PathBuf,
    name: PathBuf,
    entries: std::vec::IntoIter<OsString>,
}

/// Packs a whole tree, entries in the order of their names. Its depth is not limited, because this does not recurse.
fn pack(
    archive: &mut tar::Builder<Pipe<'_>>,
    path: &Path,
    name: &Path,
    left_out: &mut LeftOut,
) -> Result<(), CtlError> {
    let mut levels = Vec::new();
    levels.extend(pack_one(
        archive,
        path.to_owned(),
        name.to_owned(),
        left_out,
    )?);
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.entries.next() else {
            levels.pop();
            continue;
        };
        let (path, name) = (level.path.join(&entry), level.name.join(&entry));
        levels.extend(pack_one(archive, path, name, left_out)?);
    }
    Ok(())
}

/// Packs one entry; returns the entries in it if it is a folder.
fn pack_one(
    archive: &mut tar::Builder<Pipe<'_>>,
    path: PathBuf,
    name: PathBuf,
    left_out: &mut LeftOut,
) -> Result<Option<Level>, CtlError> {
    let pack_failed = |source| failed("pack", &path, source);
    let read_failed = |source| failed("read", &path, source);
    let metadata = std::fs::symlink_metadata(&path).map_err(read_failed)?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&metadata);
    let kind = metadata.file_type();
    if kind.is_dir() {
        header.set_size(0);
        let entry = archive.append_data(&mut header, &name, io::empty());
        entry.map_err(pack_failed)?;
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(read_failed)? {
            entries.push(entry.map_err(read_failed)?.file_name());
        }
        entries.sort();
        let entries = entries.into_iter();
        return Ok(Some(Level {
            path,
            name,
            entries,
        }));
    }
    if kind.is_symlink() {
        let target = std::fs::read_link(&path).map_err(read_failed)?;
        header.set_size(0);
        let entry = archive.append_link(&mut header, &name, target);
        entry.map_err(pack_failed)?;
    } else if kind.is_file() {
        let file = File::open(&path).map_err(read_failed)?;
        let exact = Exact {
            file: file.take(metadata.len()),
        };
        let entry = archive.append_data(&mut header, &name, exact);
        entry.map_err(pack_failed)?;
    } else {
        left_out.add(path);
    }
    Ok(None)
}

/// A file that must have as many bytes as its header says. If it shrank while it was read, the archive would be corrupt.
struct Exact {
    file: io::Take<File>,
}

impl io::Read for Exact {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.file.read(buffer)? {
            0 if self.file.limit() > 0 && !buffer.is_empty() => {
                Err(io::Error::other("the file has become shorter meanwhile"))
            }
            count => Ok(count),
        }
    }
}

/// A writer that sends the bytes of the archive as exec messages.
struct Pipe<'a> {
    sender: &'a mpsc::Sender<ExecInput>,
    buffer: BytesMut,
}

fn message(input: Input) -> ExecInput {
    ExecInput { input: Some(input) }
}

impl Pipe<'_> {
    fn pass(&mut self, data: Bytes) -> io::Result<()> {
        let sent = self.sender.blocking_send(message(Input::Stdin(data)));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.buffer.len();
        let taken = data.get(..room.min(data.len())).unwrap_or_default();
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let data = std::mem::replace(&mut self.buffer, BytesMut::with_capacity(CHUNK));
        self.pass(data.freeze())
    }
}
