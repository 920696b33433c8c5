//! Where the agent's unix socket lies, and where a client looks for it. How it is bound and connected to is its
//! carrier's part ([`super::carrier::unix`]).
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

    /// Where the sockets that speak TLS lie, for the relay between a command and the agent.
    #[must_use]
    pub fn tls_candidates(&self) -> Vec<PathBuf> {
        let candidates = self.candidates();
        candidates.iter().map(|path| tls_beside(path)).collect()
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

/// The socket that speaks TLS, beside the one at `path`.
#[must_use]
pub fn tls_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_else(|| OsStr::new(NAME));
    let mut tls = OsString::from(TLS);
    tls.push(name);
    path.with_file_name(tls)
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

#[cfg(test)]
mod tests;
