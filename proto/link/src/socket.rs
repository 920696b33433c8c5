//! Where the agent creates its unix socket, and where clients look for it. The carrier [`super::carrier::unix`] binds
//! it and connects to it.
use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{carrier::unix::is_ours, own_uid};

/// The file name of the socket that knocctl uses.
const NAME: &str = "agent.sock";
/// How the name of the socket that speaks TLS begins; the rest is that of the other one, so the two always differ.
const TLS: &str = "tls-";

/// The settings that decide where the agent's socket is.
#[derive(Debug, Clone, Default)]
pub struct SocketLocations {
    /// `listen.socket` of the site file: the only location if it is set.
    pub configured: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`, the user's runtime folder (XDG Base Directory Specification).
    pub runtime_dir: Option<PathBuf>,
    /// `state_dir` of the site file, which is always usable.
    pub state_dir: PathBuf,
}

impl SocketLocations {
    /// Where the agent creates its socket: at the configured path; otherwise in the user's runtime folder, if that is
    /// safe; otherwise in the state directory. The text says why the runtime folder that was set cannot be used.
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

    /// The paths at which a client looks for the socket, in order. The agent may have been started with another
    /// environment, for example by cron, so the other paths that it may have chosen are tried too. If a runtime folder
    /// is set, the default one is not tried: another agent of the same user may listen there.
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
        for path in runtime
            .into_iter()
            .chain([self.state_dir.join("socket").join(NAME)])
        {
            if !all.contains(&path) {
                all.push(path);
            }
        }
        all
    }

    /// Where the sockets that speak TLS lie, for the relay between a command and the agent.
    #[must_use]
    pub fn tls_candidates(&self) -> Vec<PathBuf> {
        let candidates = self.candidates();
        candidates.iter().map(|path| tls_beside(path)).collect()
    }

    /// The first candidate at which there is a socket of our own user in a folder of our own user.
    #[must_use]
    pub fn find(&self) -> Option<PathBuf> {
        self.candidates().into_iter().find(|path| is_ours(path))
    }

    /// The host on which the agent of this state directory runs according to its lease file, if that is not this host.
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

/// The socket that speaks TLS, beside the one at `path`.
#[must_use]
pub fn tls_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_else(|| OsStr::new(NAME));
    let mut tls = OsString::from(TLS);
    tls.push(name);
    path.with_file_name(tls)
}

/// The settings of the agent's site file that a client needs. All others are ignored here.
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
    /// Reads the file. If it is absent or invalid, the defaults apply: the agent itself reports its mistakes.
    #[must_use]
    pub fn load(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        toml::from_str(&text).unwrap_or_default()
    }

    /// The locations that follow from the file. A path that begins with `~/` is relative to `home`.
    #[must_use]
    pub fn socket_locations(self, home: &Path, runtime_dir: Option<PathBuf>) -> SocketLocations {
        let expand = |path: PathBuf| match path.strip_prefix("~") {
            Ok(rest) => home.join(rest),
            Err(_) => path,
        };
        let default = || PathBuf::from(DEFAULT_STATE_DIR);
        SocketLocations {
            configured: self.listen.socket.map(expand),
            runtime_dir,
            state_dir: expand(self.state_dir.unwrap_or_else(default)),
        }
    }
}

/// The state directory if the site file names none.
pub const DEFAULT_STATE_DIR: &str = "~/.local/state/knoc";

/// Why a folder cannot be the user's runtime folder: it must exist, belong to our own user, and be writable by nobody
/// else.
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

#[cfg(test)]
mod tests;
