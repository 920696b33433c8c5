//! Which agent to talk to: contexts in a TOML file, or the agent's own socket where there is no file.
//!
//! Parsing is pure; [`load`] reads the file. Mistakes are named with their line and the values allowed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use knoc_proto::link::{Carrier, InvalidCarrier};
use serde::Deserialize;

/// Why there is no usable context.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file that was asked for cannot be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// It is not what it should be; toml's words show the line.
    #[error("in {}: {words}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Line, column, what is allowed.
        words: String,
    },
    /// No context of this name.
    #[error("{} has no context {wanted:?}; it has {}", path.display(), listed(known))]
    NoContext {
        /// Which file.
        path: PathBuf,
        /// As given.
        wanted: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// Several contexts, and none chosen.
    #[error("{} has several contexts ({}) and no current-context", path.display(), listed(known))]
    NoneChosen {
        /// Which file.
        path: PathBuf,
        /// Those there are.
        known: Vec<String>,
    },
    /// `--context` without a file.
    #[error("there is no configuration file, so no context {wanted:?}")]
    NoFile {
        /// As given.
        wanted: String,
    },
    /// The address is none.
    #[error("in {}, context {context}: address", path.display())]
    Address {
        /// Which file.
        path: PathBuf,
        /// Which context.
        context: String,
        /// What is wrong with it.
        #[source]
        source: InvalidCarrier,
    },
    /// TCP needs all three, a socket none.
    #[error("in {}, context {context}: {words}", path.display())]
    Files {
        /// Which file.
        path: PathBuf,
        /// Which context.
        context: String,
        /// What is missing or too much.
        words: String,
    },
}

impl ConfigError {
    /// What to do next.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoneChosen { .. } => Some("choose one by --context".to_owned()),
            Self::Read { .. } | Self::NoFile { .. } => Some(
                "the file is ~/.config/knoc/knocctl.toml, --config FILE or $KNOCCTL_CONFIG"
                    .to_owned(),
            ),
            Self::Parse { .. }
            | Self::NoContext { .. }
            | Self::Address { .. }
            | Self::Files { .. } => None,
        }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    current_context: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, RawContext>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawContext {
    address: String,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    /// The site whose agent is expected; any where it is not given.
    site: Option<String>,
}

/// One agent and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Its name in the file; `local` for the agent's socket.
    pub name: String,
    /// The file it comes from.
    pub file: Option<PathBuf>,
    /// The way to the agent.
    pub carrier: Carrier,
    /// Over TCP.
    pub files: Option<PemFiles>,
    /// The site whose agent is expected.
    pub site: Option<String>,
}

/// CA, certificate, key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemFiles {
    /// The CA of the agent's certificate.
    pub ca: PathBuf,
    /// Ours.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// What of the environment decides.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `$HOME`
    pub home: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`
    pub config_home: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`
    pub runtime_dir: Option<PathBuf>,
    /// Our user.
    pub uid: u32,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn here() -> Self {
        let path = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        Self {
            home: path("HOME"),
            config_home: path("XDG_CONFIG_HOME"),
            runtime_dir: path("XDG_RUNTIME_DIR"),
            uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// Where the file is looked for if none is named.
    #[must_use]
    pub fn config_file(&self) -> Option<PathBuf> {
        let home = self.home.as_ref().map(|home| home.join(".config"));
        Some(self.config_home.clone().or(home)?.join("knoc/knocctl.toml"))
    }

    /// The agent's socket: the first place that has one, else the first place.
    #[must_use]
    pub fn sockets(&self) -> Vec<PathBuf> {
        let run = self
            .runtime_dir
            .as_ref()
            .map(|folder| folder.join("knoc/agent.sock"));
        let tmp = PathBuf::from(format!("/tmp/knoc-{}/agent.sock", self.uid));
        run.into_iter().chain([tmp]).collect()
    }
}

/// The context to use: the one asked for, else `current-context`, else the only one; without a file the agent's socket.
pub fn load(
    config: Option<&Path>,
    context: Option<&str>,
    here: &Surroundings,
) -> Result<Context, ConfigError> {
    let path = config.map(Path::to_owned).or_else(|| here.config_file());
    let Some(path) = path else {
        return without_file(context, here);
    };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if config.is_none() && error.kind() == io::ErrorKind::NotFound => {
            return without_file(context, here);
        }
        Err(source) => return Err(ConfigError::Read { path, source }),
    };
    parse(&text, &path, context, here)
}

fn without_file(context: Option<&str>, here: &Surroundings) -> Result<Context, ConfigError> {
    if let Some(wanted) = context {
        return Err(ConfigError::NoFile {
            wanted: wanted.to_owned(),
        });
    }
    let sockets = here.sockets();
    let found = sockets
        .iter()
        .find(|path| path.exists())
        .or_else(|| sockets.first());
    let carrier = Carrier::Unix(found.cloned().unwrap_or_default());
    Ok(Context {
        name: "local".to_owned(),
        file: None,
        carrier,
        files: None,
        site: None,
    })
}

/// [`load`] without reading: `path` is what the text came from.
pub fn parse(
    text: &str,
    path: &Path,
    context: Option<&str>,
    here: &Surroundings,
) -> Result<Context, ConfigError> {
    let file: File = toml::from_str(text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        words: error.to_string().trim_end().to_owned(),
    })?;
    let known: Vec<String> = file.contexts.keys().cloned().collect();
    let wanted = match (
        context.map(str::to_owned).or(file.current_context),
        known.as_slice(),
    ) {
        (Some(wanted), _) => wanted,
        (None, [only]) => only.clone(),
        (None, _) => {
            return Err(ConfigError::NoneChosen {
                path: path.to_owned(),
                known,
            });
        }
    };
    let Some(raw) = file.contexts.get(&wanted) else {
        return Err(ConfigError::NoContext {
            path: path.to_owned(),
            wanted,
            known,
        });
    };
    resolve(&wanted, raw, path, here)
}

fn resolve(
    name: &str,
    raw: &RawContext,
    path: &Path,
    here: &Surroundings,
) -> Result<Context, ConfigError> {
    let carrier: Carrier = raw.address.parse().map_err(|source| ConfigError::Address {
        path: path.to_owned(),
        context: name.to_owned(),
        source,
    })?;
    let wrong = |words: String| ConfigError::Files {
        path: path.to_owned(),
        context: name.to_owned(),
        words,
    };
    let given = [("ca", &raw.ca), ("cert", &raw.cert), ("key", &raw.key)];
    let names = |there: bool| -> Vec<&str> {
        given
            .iter()
            .filter(|(_, file)| file.is_some() == there)
            .map(|(name, _)| *name)
            .collect()
    };
    let files = match (&carrier, &raw.ca, &raw.cert, &raw.key) {
        (Carrier::Tcp(_), Some(ca), Some(cert), Some(key)) => {
            let [ca, cert, key] = [ca, cert, key].map(|file| absolute(file, path, here));
            Some(PemFiles { ca, cert, key })
        }
        (Carrier::Tcp(_), ..) => {
            return Err(wrong(format!(
                "a TCP address needs {} too",
                names(false).join(", ")
            )));
        }
        (Carrier::Unix(_), None, None, None) => None,
        (Carrier::Unix(_), ..) => {
            return Err(wrong(format!(
                "a unix socket takes no {}",
                names(true).join(", ")
            )));
        }
    };
    if raw.site.is_some() && files.is_none() {
        return Err(wrong(
            "a unix socket takes no site: its peer is known by its user".to_owned(),
        ));
    }
    Ok(Context {
        name: name.to_owned(),
        file: Some(path.to_owned()),
        carrier,
        files,
        site: raw.site.clone(),
    })
}

/// `~/` is the home; relative paths start at the file's folder.
fn absolute(file: &Path, config: &Path, here: &Surroundings) -> PathBuf {
    match (file.strip_prefix("~"), &here.home) {
        (Ok(rest), Some(home)) => home.join(rest),
        (Ok(_) | Err(_), _) => config.parent().unwrap_or_else(|| Path::new("")).join(file),
    }
}

#[cfg(test)]
mod tests;
