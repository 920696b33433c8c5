//! Which agent to talk to: contexts in a TOML file, or the agent's own socket.
//!
//! Parsing is pure; [`load`] reads the file. All mistakes are named at once, with their line and the values allowed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use knoc_link::{
    Addresses, Carrier, Route,
    carrier::ssh::{self, Login},
    proxy::{self, InvalidProxy, Via},
    socket::{SiteFile, SocketLocations},
};
use knoc_proto::settings::{Document, Mistakes};
use serde::Deserialize;

/// Why no context can be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("read the configuration {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Every mistake in the file, one per line.
    #[error(transparent)]
    Mistakes(#[from] Mistakes),
    #[error("{} has no context {wanted:?}; it has {}", path.display(), listed(known))]
    NoContext {
        path: PathBuf,
        wanted: String,
        known: Vec<String>,
    },
    #[error("{} has several contexts ({}) and no current-context", path.display(), listed(known))]
    NoneChosen { path: PathBuf, known: Vec<String> },
    #[error("there is no configuration file, so no context {wanted:?}")]
    NoFile { wanted: String },
}

impl ConfigError {
    /// What to do next.
    #[must_use]
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::NoneChosen { .. } => Some("choose one by --context".to_owned()),
            Self::Read { .. } | Self::NoFile { .. } => Some(
                "the file is ~/.config/knoc/knocctl.toml, --config FILE or $KNOCCTL_CONFIG"
                    .to_owned(),
            ),
            Self::Mistakes(_) | Self::NoContext { .. } => None,
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

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    current_context: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, RawContext>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawContext {
    /// It has no default.
    address: Option<Addresses>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    /// The site whose agent is expected. If it is missing, any agent that the CA has signed is accepted.
    site: Option<String>,
    /// A folder with key and host keys for `ssh:` addresses; unset: the user's own OpenSSH configuration.
    ssh_folder: Option<PathBuf>,
    /// The path of `knoc-agent` at the far side of an `ssh:` address.
    ssh_program: Option<String>,
    /// Whether an `ssh:` address starts an agent if none runs.
    ssh_on_demand: Option<bool>,
    /// `http://HOST:PORT` of the proxy to a TCP address, or `none`; unset: that of the environment.
    proxy: Option<String>,
    /// A file with `user:password` for that proxy.
    proxy_credentials: Option<PathBuf>,
}

/// One agent and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Context {
    /// Its name in the file; `local` for the agent's socket.
    pub name: String,
    /// The file that defines it; `None` for the agent's socket.
    pub file: Option<PathBuf>,
    /// The addresses of the agent, in the order in which they are tried.
    pub route: Route,
    /// Over TCP, and over SSH if there are any.
    pub files: Option<PemFiles>,
    /// The site whose agent is expected.
    pub site: Option<String>,
}

/// The PEM files with which knocctl and the agent authenticate each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PemFiles {
    /// The CA of the agent's certificate.
    pub ca: PathBuf,
    /// knocctl's own certificate.
    pub cert: PathBuf,
    /// The private key of `cert`.
    pub key: PathBuf,
}

/// The part of the environment that the choice of a context depends on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Surroundings {
    /// `$HOME`
    pub home: Option<PathBuf>,
    /// `$XDG_CONFIG_HOME`
    pub config_home: Option<PathBuf>,
    /// The variables that decide about proxies.
    pub proxies: BTreeMap<String, String>,
    /// Where this user's agent may have its socket.
    pub places: SocketLocations,
}

impl Surroundings {
    /// Reads the environment of this process, and the agent's site file if it is on this host: it names the agent's state
    /// directory and socket.
    #[must_use]
    pub(crate) fn here() -> Self {
        let path = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let home = path("HOME");
        let in_home = home.clone().unwrap_or_default();
        let usual = || in_home.join(".config/knoc/agent.toml");
        let site_file = path("KNOC_AGENT_CONFIG").unwrap_or_else(usual);
        let places = SiteFile::load(&site_file).socket_locations(&in_home, path("XDG_RUNTIME_DIR"));
        let proxies = proxy::VARIABLES.into_iter().filter_map(|name| {
            let value = std::env::var(name).ok()?;
            Some((name.to_owned(), value))
        });
        Self {
            home,
            config_home: path("XDG_CONFIG_HOME"),
            proxies: proxies.collect(),
            places,
        }
    }

    /// The default path of the configuration file.
    #[must_use]
    pub(crate) fn config_file(&self) -> Option<PathBuf> {
        let home = self.home.as_ref().map(|home| home.join(".config"));
        Some(self.config_home.clone().or(home)?.join("knoc/knocctl.toml"))
    }
}

/// Chooses the context: the one that `context` names, else `current-context` of the file. If neither is given, it is the
/// agent's socket if that exists, because it needs no certificate, else the file's only context. If the user named the
/// file (`config`), the socket is not considered.
pub(crate) fn load(
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
    let socket = here.places.find().filter(|_| config.is_none());
    parse(&text, &path, context, here, socket)
}

fn without_file(context: Option<&str>, here: &Surroundings) -> Result<Context, ConfigError> {
    if let Some(wanted) = context {
        return Err(ConfigError::NoFile {
            wanted: wanted.to_owned(),
        });
    }
    let first = || here.places.choose().0;
    Ok(local(here.places.find().unwrap_or_else(first)))
}

/// The context of this host's agent, through its socket.
fn local(socket: PathBuf) -> Context {
    Context {
        name: "local".to_owned(),
        file: None,
        route: Carrier::Unix(socket).into(),
        files: None,
        site: None,
    }
}

/// PURE: [`load`] after the file was read. `path` is the file of the text; `socket` is used if no context was chosen.
pub(crate) fn parse(
    text: &str,
    path: &Path,
    context: Option<&str>,
    here: &Surroundings,
    socket: Option<PathBuf>,
) -> Result<Context, ConfigError> {
    let mut document = Document::parse(text, path)?;
    let file = document.read().map(|file: File| {
        let mut contexts = BTreeMap::new();
        for (name, raw) in &file.contexts {
            contexts.extend(resolve(name, raw, path, here, &mut document));
        }
        let known: Vec<String> = file.contexts.into_keys().collect();
        if let (None, Some(current)) = (context, &file.current_context)
            && !known.contains(current)
        {
            let what = format!(
                "there is no context {current:?}; there are: {}",
                listed(&known)
            );
            document.wrong(&["current-context"], what);
        }
        (contexts, known, file.current_context)
    });
    let (mut contexts, known, current) = document.finish(file)?;
    let wanted = match (context.map(str::to_owned).or(current), socket, &*known) {
        (Some(wanted), ..) => wanted,
        (None, Some(socket), _) => return Ok(local(socket)),
        (None, None, [only]) => only.clone(),
        (None, None, _) => {
            let path = path.to_owned();
            return Err(ConfigError::NoneChosen { path, known });
        }
    };
    contexts
        .remove(&wanted)
        .ok_or_else(|| ConfigError::NoContext {
            path: path.to_owned(),
            wanted,
            known,
        })
}

/// Checks one context of the file; returns it with its name, or notes each mistake in the document and returns `None`.
fn resolve(
    name: &str,
    raw: &RawContext,
    path: &Path,
    here: &Surroundings,
    document: &mut Document,
) -> Option<(String, Context)> {
    let mut mistakes = Faults::default();
    let carriers = carriers(raw, path, here, &mut mistakes);
    let files = carriers
        .as_deref()
        .and_then(|carriers| files(carriers, raw, path, here, &mut mistakes));
    for (key, what) in &mistakes.0 {
        document.wrong(&["contexts", name, key], what);
    }
    let context = Context {
        name: name.to_owned(),
        file: Some(path.to_owned()),
        route: carriers.and_then(Route::new)?,
        files,
        site: raw.site.clone(),
    };
    mistakes.0.is_empty().then(|| (name.to_owned(), context))
}

/// What is wrong with a context, by key.
#[derive(Debug, Default)]
struct Faults(Vec<(&'static str, String)>);

impl Faults {
    fn add(&mut self, key: &'static str, what: impl Into<String>) {
        self.0.push((key, what.into()));
    }
}

/// The carriers, with what the context says about logins.
fn carriers(
    raw: &RawContext,
    path: &Path,
    here: &Surroundings,
    mistakes: &mut Faults,
) -> Option<Vec<Carrier>> {
    let Some(addresses) = &raw.address else {
        mistakes.add(
            "address",
            "is missing: HOST:PORT, ssh:[USER@]HOST[:PORT], exec:COMMAND or unix:/PATH",
        );
        return None;
    };
    let carriers = match addresses.carriers() {
        Ok(carriers) => carriers,
        Err(error) => {
            mistakes.add("address", error.to_string());
            return None;
        }
    };
    let over_ssh = carriers.iter().any(|one| matches!(one, Carrier::Ssh(_)));
    let given = [
        ("ssh-folder", raw.ssh_folder.is_some()),
        ("ssh-program", raw.ssh_program.is_some()),
        ("ssh-on-demand", raw.ssh_on_demand.is_some()),
    ];
    for (key, _) in given.iter().filter(|(_, given)| *given && !over_ssh) {
        mistakes.add(key, "belongs to an ssh: address, and there is none");
    }
    let program = raw.ssh_program.clone();
    if program
        .as_deref()
        .is_some_and(|text| !ssh::is_program(text))
    {
        mistakes.add(
            "ssh-program",
            "must be a path of letters, digits and `_./+-`, which may begin with `~/`",
        );
    }
    let login = Login {
        folder: raw
            .ssh_folder
            .as_ref()
            .map(|folder| absolute(folder, path, here)),
        program,
        on_demand: raw.ssh_on_demand.unwrap_or_default(),
    };
    let with_login = carriers
        .into_iter()
        .map(|one| one.with_login(login.clone()));
    match via(with_login.collect(), raw, path, here) {
        Ok(carriers) => Some(carriers),
        Err((key, what)) => {
            mistakes.add(key, what);
            None
        }
    }
}

/// The certificates that these carriers need, or may have.
fn files(
    carriers: &[Carrier],
    raw: &RawContext,
    path: &Path,
    here: &Surroundings,
    mistakes: &mut Faults,
) -> Option<PemFiles> {
    let any = |kind: fn(&Carrier) -> bool| carriers.iter().any(kind);
    let (tcp, unix) = (
        any(|one| one.address().is_some()),
        any(|one| matches!(one, Carrier::Unix(_))),
    );
    if unix && carriers.len() > 1 {
        mistakes.add(
            "address",
            "a unix socket is the only address of its context",
        );
        return None;
    }
    let with_certificate = raw.ca.is_some() || raw.cert.is_some() || raw.key.is_some();
    let given = [
        ("ca", raw.ca.is_some()),
        ("cert", raw.cert.is_some()),
        ("key", raw.key.is_some()),
        ("site", raw.site.is_some()),
    ];
    for (key, given) in given {
        if unix && given {
            mistakes.add(
                key,
                "a unix socket takes none: its peer is known by its user",
            );
        } else if tcp && !given && key != "site" {
            mistakes.add(key, "is missing: a TCP address needs it");
        } else if with_certificate && !given && key != "site" {
            mistakes.add(key, "is missing: ca, cert and key, all or none");
        } else if !unix && !tcp && !with_certificate && given {
            mistakes.add(
                key,
                "is of no use without ca, cert and key, which prove the site",
            );
        }
    }
    let (Some(ca), Some(cert), Some(key)) = (&raw.ca, &raw.cert, &raw.key) else {
        return None;
    };
    let [ca, cert, key] = [ca, cert, key].map(|file| absolute(file, path, here));
    Some(PemFiles { ca, cert, key })
}

/// The carriers through the proxy that the context or the environment names. Otherwise the key of the wrong setting, and what
/// is wrong.
fn via(
    carriers: Vec<Carrier>,
    raw: &RawContext,
    path: &Path,
    here: &Surroundings,
) -> Result<Vec<Carrier>, (&'static str, String)> {
    let credentials = raw.proxy_credentials.as_ref();
    let credentials = credentials.map(|file| absolute(file, path, here));
    let via = Via::of_settings(raw.proxy.as_deref(), credentials.as_deref());
    let via = via.map_err(|error| {
        let credentials = matches!(error, InvalidProxy::NeedlessCredentials);
        let setting = if credentials {
            "proxy-credentials"
        } else {
            "proxy"
        };
        (setting, error.to_string())
    })?;
    if raw.proxy.is_some() && carriers.iter().all(|one| one.address().is_none()) {
        return Err(("proxy", "does not lead to any of the addresses".to_owned()));
    }
    let through = carriers.into_iter().map(|carrier| {
        let carrier = carrier.via(&via, |name| here.proxies.get(name).cloned());
        carrier.map_err(|error| ("address", error.to_string()))
    });
    through.collect()
}

/// Expands `~/` to the home directory; other relative paths start at the configuration file's folder.
fn absolute(file: &Path, config: &Path, here: &Surroundings) -> PathBuf {
    match (file.strip_prefix("~"), &here.home) {
        (Ok(rest), Some(home)) => home.join(rest),
        (Ok(_) | Err(_), _) => config.parent().unwrap_or_else(|| Path::new("")).join(file),
    }
}

#[cfg(test)]
mod tests;
