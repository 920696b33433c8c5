//! The carrier `unix:/PATH`: a unix socket in a folder that only its user can enter.
//!
//! If the socket carries no TLS, each side believes whoever is at its other end. Therefore both sides first open the
//! socket's folder, check that it is a folder (not a link) of their own user with mode 0700, and then use the socket
//! *within the opened folder* (`/proc/self/fd/N/agent.sock`): the folder that was checked is the one that is used, and
//! the length of its path does not count against the 107 bytes of a socket address (unix(7)). Then the kernel tells
//! which user's process is at the other end ([`identify`]).
//!
//! A socket works only on the host that created it, even if its folder is on a shared file system. On other hosts, and
//! after the agent was killed, connections to it are refused.
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
use crate::{LinkError, Peer, file_lock, origin::Origin, own_uid};

/// Parses `/PATH`.
pub(super) fn parse(path: &str) -> Result<Carrier, InvalidCarrier> {
    if path.starts_with('/') {
        return Ok(Carrier::Unix(path.into()));
    }
    Err(InvalidCarrier::Relative {
        path: path.to_owned(),
    })
}

/// Connects to the socket at a path, whose folder must be ours.
#[derive(Debug)]
pub struct Dialler<'a> {
    /// The path of the socket.
    pub path: &'a Path,
}

impl Dial for Dialler<'_> {
    type Io = UnixStream;

    async fn dial(&self) -> Result<Unverified<UnixStream>, LinkError> {
        let carrier = Carrier::Unix(self.path.to_owned());
        let folder = match Folder::open_parent(self.path) {
            // Without the folder there is no agent, which is the same as without its socket.
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

/// Connects to the socket at `path`. Its folder and the process that serves it must belong to our own user. Cancel
/// safe.
pub async fn connect(path: &Path) -> Result<(UnixStream, Peer), LinkError> {
    let Unverified { io, .. } = Dialler { path }.dial().await?;
    let peer = identify(&io, path)?;
    Ok((io, peer))
}

/// A listener on a socket in a folder of our own user. It removes the socket when it is dropped.
#[derive(Debug)]
pub struct Listener {
    /// Dropped before the socket is closed: until then no other process finds it dead, and none gets its inode number.
    _file: SocketFile,
    listener: UnixListener,
}

impl Listener {
    /// Listens on the socket at `path`. Its folder is created with mode 0700, or must have that mode; a socket that no
    /// process of this host serves is replaced. Must be called within a tokio runtime.
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
        // Otherwise one of two processes that have found a dead socket would remove the other one's, which is alive.
        let _one = folder.lock(parent(path)).map_err(failed)?;
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
            _file: file,
            listener,
        })
    }
}

impl super::Listener for Listener {
    type Io = UnixStream;

    /// Nobody else can enter the folder.
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

/// Removes the socket when it is dropped, unless another process has replaced it by its own.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: Option<u64>,
    /// Keeps open the descriptor that `path` refers to.
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

/// Whether there is a socket of our own user at `path`, in a folder of our own user.
pub(crate) fn is_ours(path: &Path) -> bool {
    let Ok(folder) = Folder::open_parent(path) else {
        return false;
    };
    fs::metadata(folder.within(path))
        .is_ok_and(|found| found.file_type().is_socket() && found.uid() == own_uid())
}

/// A folder that has passed the checks, and is used only through this descriptor.
#[derive(Debug)]
struct Folder(OwnedFd);

impl Folder {
    /// Opens and checks the folder of the socket at `path`.
    fn open_parent(path: &Path) -> Result<Self, LinkError> {
        let folder = parent(path);
        let named = || folder.display().to_string();
        let failed = |error: rustix::io::Errno| LinkError::Folder {
            path: named(),
            source: error.into(),
        };
        // With O_NOFOLLOW, O_PATH opens a link itself, so that the error can say that it is a link.
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
            return Err(LinkError::NotAFolder {
                path: named(),
                found,
            });
        }
        let mode = stat.st_mode & 0o7777;
        if stat.st_uid != own_uid() || mode & 0o077 != 0 {
            return Err(LinkError::UnsafeFolder {
                path: named(),
                uid: own_uid(),
                found_uid: stat.st_uid,
                mode,
            });
        }
        Ok(Self(opened))
    }

    /// Waits until no other process replaces a socket in this folder, whose path is `named`, but not for ever. `None` if it has no
    /// locks for folders, as some file systems do not: on a shared one, the lease tells agents apart before they bind.
    fn lock(&self, named: &Path) -> io::Result<Option<fs::File>> {
        let Ok(folder) = fs::File::open(format!("/proc/self/fd/{}", self.0.as_raw_fd())) else {
            return Ok(None);
        };
        let locked = file_lock::wait(named, &|| folder.try_lock())?;
        Ok(locked.then_some(folder))
    }

    /// A short path to the file with the name of `path` in this folder, valid while `self` lives.
    fn within(&self, path: &Path) -> PathBuf {
        let name = path.file_name().unwrap_or_else(|| OsStr::new("agent.sock"));
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name)
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or_else(|| Path::new("/"))
}

/// The user and process at the other end of a connection over the socket at `path` (`SO_PEERCRED`, unix(7)). Fails if
/// the user is not our own.
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
