//! The agent's unix socket: where it lies, and how it is bound and connected to without trusting anybody else.
//!
//! The socket carries no TLS, so whoever answers on it is believed. Therefore each of its users, on either side, opens the
//! folder first, checks that it is a folder of its own user with mode 0700 and not a link, and then uses the socket
//! *within the folder it has opened* (`/proc/self/fd/N/agent.sock`): what was checked is what is used, and the length of
//! the folder's path does not count against the 107 bytes that a socket's address may have. After that the kernel says
//! whose process is at the other end.
//!
//! A socket belongs to one host even if its folder is on a file system that several hosts share. On the others, and after
//! an agent was killed, connections to it are refused.
use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags};
use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};

use super::{Carrier, LinkError, Peer, own_uid};

/// The file name of the socket that knocctl uses.
const NAME: &str = "agent.sock";

/// What decides where the socket lies.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// `listen.socket` of the site file.
    pub configured: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `state_dir` of the site file.
    pub state_dir: PathBuf,
}

impl Places {
    /// Where the agent puts its socket: as configured, else in the user's runtime folder if there is a proper one, else
    /// in the state directory. The text says why a runtime folder that was named is not used.
    #[must_use]
    pub fn choose(&self) -> (PathBuf, Option<String>) {
        if let Some(configured) = &self.configured {
            return (configured.clone(), None);
        }
        let fallback = self.state_dir.join("socket").join(NAME);
        let Some(dir) = &self.runtime_dir else {
            return (fallback, None);
        };
        match runtime_dir_fault(dir) {
            None => (dir.join("knoc").join(NAME), None),
            Some(fault) => (fallback, Some(fault)),
        }
    }

    /// Where a client looks for it, in this order. The agent may have been started with another environment than ours, such
    /// as by cron, so the other places that it can have chosen are looked at too. A runtime folder that is named is the only
    /// one: in the usual one another agent of ours may listen.
    #[must_use]
    pub fn candidates(&self) -> Vec<PathBuf> {
        let (first, _) = self.choose();
        if self.configured.is_some() {
            return vec![first];
        }
        let usual = PathBuf::from(format!("/run/user/{}", own_uid()));
        let guessed = self.runtime_dir.is_none() && runtime_dir_fault(&usual).is_none();
        let runtime = guessed.then(|| usual.join("knoc").join(NAME));
        let mut all = vec![first];
        for place in runtime
            .into_iter()
            .chain([self.state_dir.join("socket").join(NAME)])
        {
            if !all.contains(&place) {
                all.push(place);
            }
        }
        all
    }

    /// The first candidate that is a socket of ours in a folder of ours.
    #[must_use]
    pub fn find(&self) -> Option<PathBuf> {
        self.candidates().into_iter().find(|path| is_ours(path))
    }

    /// The host that an agent of this state directory says it runs on, unless it is this one.
    #[must_use]
    pub fn other_host(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Lease {
            host: String,
        }
        let text = fs::read(self.state_dir.join("agent.lease")).ok()?;
        let lease: Lease = serde_json::from_slice(&text).ok()?;
        let here = rustix::system::uname();
        (lease.host != here.nodename().to_string_lossy()).then_some(lease.host)
    }
}

/// What a client needs of the agent's site file. Everything else in it is the agent's business.
#[derive(Debug, Default, Deserialize)]
pub struct SiteFile {
    state_dir: Option<PathBuf>,
    #[serde(default)]
    listen: ListenSection,
}

#[derive(Debug, Default, Deserialize)]
struct ListenSection {
    socket: Option<PathBuf>,
}

impl SiteFile {
    /// Reads the file; without one, or with one that cannot be read, the defaults count.
    #[must_use]
    pub fn load(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        toml::from_str(&text).unwrap_or_default()
    }

    /// The places that follow from it. `~/` is `home`.
    #[must_use]
    pub fn places(self, home: &Path, runtime_dir: Option<PathBuf>) -> Places {
        let expand = |path: PathBuf| match path.strip_prefix("~") {
            Ok(rest) => home.join(rest),
            Err(_) => path,
        };
        let default = || PathBuf::from(DEFAULT_STATE_DIR);
        Places {
            configured: self.listen.socket.map(expand),
            runtime_dir,
            state_dir: expand(self.state_dir.unwrap_or_else(default)),
        }
    }
}

/// The state directory of a site file that names none.
pub const DEFAULT_STATE_DIR: &str = "~/.local/state/knoc";

/// Why a folder is not the user's runtime folder: it has to exist, to be ours, and to be writable by nobody else.
fn runtime_dir_fault(dir: &Path) -> Option<String> {
    let named = dir.display();
    if !dir.is_absolute() {
        return Some(format!("XDG_RUNTIME_DIR={named} is not an absolute path"));
    }
    let meta = match fs::metadata(dir) {
        Ok(meta) => meta,
        Err(error) => return Some(format!("XDG_RUNTIME_DIR={named} cannot be used: {error}")),
    };
    let (uid, own, mode) = (meta.uid(), own_uid(), meta.mode() & 0o7777);
    if !meta.is_dir() {
        Some(format!("XDG_RUNTIME_DIR={named} is not a folder"))
    } else if uid != own {
        Some(format!(
            "XDG_RUNTIME_DIR={named} belongs to uid {uid}, not to uid {own}"
        ))
    } else if mode & 0o022 != 0 {
        Some(format!(
            "XDG_RUNTIME_DIR={named} is writable by others (mode {mode:04o})"
        ))
    } else {
        None
    }
}

fn is_ours(path: &Path) -> bool {
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
        let name = path.file_name().unwrap_or_else(|| OsStr::new(NAME));
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name)
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or_else(|| Path::new("/"))
}

/// Connects to the socket at `path`, whose folder and whose process have to be ours.
pub async fn connect(path: &Path) -> Result<(UnixStream, Peer), LinkError> {
    let carrier = Carrier::Unix(path.to_owned());
    let folder = match Folder::open_parent(path) {
        // Nothing is there: there is no agent, which is the same as without its socket.
        Err(LinkError::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(LinkError::Connect { carrier, source });
        }
        opened => opened?,
    };
    let stream = UnixStream::connect(folder.within(path)).await;
    let stream = stream.map_err(|source| {
        let carrier = carrier.clone();
        if source.kind() == io::ErrorKind::ConnectionRefused {
            LinkError::NotServed { carrier, source }
        } else {
            LinkError::Connect { carrier, source }
        }
    })?;
    let peer = peer(&stream, &carrier.to_string())?;
    Ok((stream, peer))
}

/// Listens on the socket at `path`. Its folder is created with mode 0700, or has to have it; a socket that no process of
/// this host serves is replaced. Has to be called inside a runtime.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), LinkError> {
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
    let socket = SocketFile {
        inode: inode(&short),
        path: short,
        _folder: folder,
    };
    Ok((listener, socket))
}

/// Removes the socket when nobody listens any more, unless another process has put its own there.
#[derive(Debug)]
pub struct SocketFile {
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

/// The user and process behind a unix socket; an error if the user is not ours.
pub(super) fn peer(stream: &UnixStream, name: &str) -> Result<Peer, LinkError> {
    let failed = |source| LinkError::Handshake {
        peer: name.to_owned(),
        claimed: None,
        source,
    };
    let credentials = stream.peer_cred().map_err(failed)?;
    check_user(credentials.uid(), own_uid(), name)?;
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
