//! The carrier `unix:/PATH`: a socket that is bound and connected to without trusting anybody else.
//!
//! The socket may carry no TLS, and then whoever answers on it is believed. Therefore each of its users, on either side,
//! opens the folder first, checks that it is a folder of its own user with mode 0700 and not a link, and then uses the
//! socket *within the folder it has opened* (`/proc/self/fd/N/agent.sock`): what was checked is what is used, and the
//! length of the folder's path does not count against the 107 bytes that a socket's address may have. After that the
//! kernel says whose process is at the other end ([`identify`]).
//!
//! A socket belongs to one host even if its folder is on a file system that several hosts share. On the others, and after
//! an agent was killed, connections to it are refused.
use std::{
    ffi::OsStr,
    fs, io,
    net::SocketAddr,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    task::{Context, Poll, ready},
};

use rustix::fs::{FileType, Mode, OFlags};
use tokio::net::{UnixListener, UnixStream};

use super::{Carrier, Dial, InvalidCarrier, Unverified};
use crate::{LinkError, Peer, origin::Origin, own_uid};

/// The carrier that `/PATH` names.
pub(super) fn parse(path: &str) -> Result<Carrier, InvalidCarrier> {
    if path.starts_with('/') {
        return Ok(Carrier::Unix(path.into()));
    }
    Err(InvalidCarrier::Relative {
        path: path.to_owned(),
    })
}

/// Connects to the socket at a path, whose folder has to be ours.
#[derive(Debug)]
pub struct Dialler<'a> {
    /// Where the socket is.
    pub path: &'a Path,
}

impl Dial for Dialler<'_> {
    type Io = UnixStream;

    async fn dial(&self) -> Result<Unverified<UnixStream>, LinkError> {
        let carrier = Carrier::Unix(self.path.to_owned());
        let folder = match Folder::open_parent(self.path) {
            // Nothing is there: there is no agent, which is the same as without its socket.
            Err(LinkError::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(LinkError::Connect { carrier, source });
            }
            opened => opened?,
        };
        let connected = UnixStream::connect(folder.within(self.path)).await;
        let io = connected.map_err(|source| {
            if source.kind() == io::ErrorKind::ConnectionRefused {
                LinkError::NotServed { carrier, source }
            } else {
                LinkError::Connect { carrier, source }
            }
        })?;
        let origin = Origin::ThisHost;
        Ok(Unverified { io, origin })
    }
}

/// Connects to the socket at `path`, whose folder and whose process have to be ours.
pub async fn connect(path: &Path) -> Result<(UnixStream, Peer), LinkError> {
    let Unverified { io, .. } = Dialler { path }.dial().await?;
    let peer = identify(&io, path)?;
    Ok((io, peer))
}

/// Listens on a socket in a folder of ours, and removes the socket in the end.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    _file: SocketFile,
}

impl Listener {
    /// Listens on the socket at `path`. Its folder is created with mode 0700, or has to have it; a socket that no process of
    /// this host serves is replaced. Has to be called inside a runtime.
    pub fn bind(path: &Path) -> Result<Self, LinkError> {
        let carrier = Carrier::Unix(path.to_owned());
        let failed = |source| LinkError::Listen {
            carrier: carrier.clone(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent(path))
            .map_err(failed)?;
        let folder = Folder::open_parent(path)?;
        let short = folder.within(path);
        match std::os::unix::net::UnixStream::connect(&short) {
            Ok(_) => return Err(LinkError::InUse { carrier }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(&short).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixListener::bind(&short).map_err(failed)?;
        fs::set_permissions(&short, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let file = SocketFile {
            inode: inode(&short),
            path: short,
            _folder: folder,
        };
        Ok(Self {
            listener,
            _file: file,
        })
    }
}

impl super::Listener for Listener {
    type Io = UnixStream;

    /// The folder lets nobody else in.
    const STRANGERS: bool = false;

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Unverified<UnixStream>>> {
        let (io, _) = ready!(self.listener.poll_accept(cx))?;
        let origin = Origin::ThisHost;
        Poll::Ready(Ok(Unverified { io, origin }))
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        None
    }
}

/// Removes the socket when nobody listens any more, unless another process has put its own there.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: Option<u64>,
    /// What the path begins with.
    _folder: Folder,
}

fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|meta| meta.ino())
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.inode.is_some()
            && inode(&self.path) == self.inode
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "remove the socket");
        }
    }
}

/// Is there a socket of ours at `path`, in a folder of ours?
pub(crate) fn is_ours(path: &Path) -> bool {
    let Ok(folder) = Folder::open_parent(path) else {
        return false;
    };
    fs::metadata(folder.within(path))
        .is_ok_and(|found| found.file_type().is_socket() && found.uid() == own_uid())
}

/// A folder that was checked, and that is used through its descriptor from then on.
#[derive(Debug)]
struct Folder(OwnedFd);

impl Folder {
    /// Opens the folder of the socket at `path`.
    fn open_parent(path: &Path) -> Result<Self, LinkError> {
        let folder = parent(path);
        let named = || folder.display().to_string();
        let failed = |error: rustix::io::Errno| LinkError::Folder {
            path: named(),
            source: error.into(),
        };
        // O_PATH opens a link itself if it must not be followed, so that it can be told from a folder.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(folder, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&opened).map_err(failed)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind != FileType::Directory {
            let found = if kind == FileType::Symlink {
                "a symbolic link"
            } else {
                "not a folder"
            };
            return Err(LinkError::NoFolder {
                path: named(),
                found,
            });
        }
        let mode = stat.st_mode & 0o7777;
        if stat.st_uid != own_uid() || mode & 0o077 != 0 {
            return Err(LinkError::OpenFolder {
                path: named(),
                uid: own_uid(),
                found_uid: stat.st_uid,
                mode,
            });
        }
        Ok(Self(opened))
    }

    /// A short path to the file of the same name as `path` in this very folder.
    fn within(&self, path: &Path) -> PathBuf {
        let name = path.file_name().unwrap_or_else(|| OsStr::new("agent.sock"));
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name)
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or_else(|| Path::new("/"))
}

/// The user and process at the other end of a connection over the socket at `path`; an error if the user is not ours.
pub fn identify(stream: &UnixStream, path: &Path) -> Result<Peer, LinkError> {
    let name = Carrier::Unix(path.to_owned()).to_string();
    let failed = |source| LinkError::Handshake {
        peer: name.clone(),
        claimed: None,
        source,
    };
    let credentials = stream.peer_cred().map_err(failed)?;
    check_user(credentials.uid(), own_uid(), &name)?;
    Ok(Peer::Unix {
        uid: credentials.uid(),
        pid: credentials.pid(),
    })
}

fn check_user(found: u32, expected: u32, name: &str) -> Result<(), LinkError> {
    if found == expected {
        return Ok(());
    }
    Err(LinkError::WrongUser {
        peer: name.to_owned(),
        found,
        expected,
    })
}

#[cfg(test)]
mod tests;
