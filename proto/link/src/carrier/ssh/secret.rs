//! A folder with what a login needs, in the form of a Secret: `ssh-privatekey` and `known_hosts`, and optionally
//! `ssh-certificate`, `remote_user`, `host`, `port` and `proxy_jump`.
//!
//! It is read for each connection, so a replaced Secret counts at once. ssh refuses a key that others can read, as they can
//! in a mounted Secret, so key and host keys are copied into a private folder in memory, which is removed once the login has succeeded.
//! The options stand in a configuration file there, because only that also counts for the hop to a jump host.
use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, Permissions},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{is_host, is_user};

/// The most bytes of a file other than `known_hosts`.
const MAX_FILE: u64 = 64 << 10;
/// The most bytes of `known_hosts`.
const MAX_KNOWN_HOSTS: u64 = 1 << 20;
/// The files of the folder.
const FILES: [&str; 7] = [
    "ssh-privatekey",
    "known_hosts",
    "ssh-certificate",
    "remote_user",
    "host",
    "port",
    "proxy_jump",
];

/// Why a folder cannot be used to log in.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Nothing names the host.
    #[error("no host is named: write ssh:USER@HOST, or put the file `host` into the folder")]
    NoHost,
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// `read` or `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's message.
        #[source]
        source: io::Error,
    },
    /// The host keys are missing.
    #[error(
        "{} is missing or empty, and no host key is accepted unseen. Obtain it by `ssh-keyscan -p PORT HOST > known_hosts` (for \
         a jump host too), compare the fingerprints that `ssh-keygen -lf known_hosts` prints with those that the site \
         publishes, and add the file to the Secret: kubectl create secret generic NAME --from-file=known_hosts \
         --from-file=ssh-privatekey --from-literal=remote_user=USER --from-literal=host=HOST", path.display()
    )]
    NoKnownHosts {
        /// Where it is looked for.
        path: PathBuf,
    },
    /// The private key is missing.
    #[error("{} is missing: the private key that the login node accepts", path.display())]
    NoKey {
        /// Where it is looked for.
        path: PathBuf,
    },
    /// A file has no usable value.
    #[error("{} has the value {value:?}, which is not {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// What it contains.
        value: String,
        /// What it should contain.
        expected: &'static str,
    },
}

/// What the folder contains.
pub(super) struct Secret {
    key: Vec<u8>,
    known_hosts: Vec<u8>,
    certificate: Option<Vec<u8>>,
    pub(super) user: Option<String>,
    pub(super) host: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) jump: Option<String>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").finish_non_exhaustive()
    }
}

impl Secret {
    /// Reads the folder. Blocking, but its files are small and local.
    pub(super) fn read(folder: &Path) -> Result<Self, SecretError> {
        let path = |name: &str| folder.join(name);
        let key = read(&path("ssh-privatekey"), MAX_FILE)?;
        let key = key.filter(|key| !key.is_empty());
        let key = key.ok_or_else(|| SecretError::NoKey {
            path: path("ssh-privatekey"),
        })?;
        let known_hosts = read(&path("known_hosts"), MAX_KNOWN_HOSTS)?;
        let known_hosts = known_hosts.filter(|text| names_a_host(text));
        let known_hosts = known_hosts.ok_or_else(|| SecretError::NoKnownHosts {
            path: path("known_hosts"),
        })?;
        Ok(Self {
            key,
            known_hosts,
            certificate: read(&path("ssh-certificate"), MAX_FILE)?,
            user: value(&path("remote_user"), "a user's name", |text| {
                is_user(text).then(|| text.to_owned())
            })?,
            host: value(&path("host"), "a host's name or address", |text| {
                is_host(text).then(|| text.to_owned())
            })?,
            port: value(&path("port"), "a port", |text| {
                text.parse().ok().filter(|port| *port != 0)
            })?,
            jump: value(
                &path("proxy_jump"),
                "[USER@]HOST[:PORT], or several of them separated by commas",
                |text| text.split(',').all(is_jump).then(|| text.to_owned()),
            )?,
        })
    }

    /// Writes what ssh reads into a private folder.
    pub(super) fn write(&self) -> Result<Private, SecretError> {
        let private = Private::new()?;
        private.put("key", &unix_lines(&self.key))?;
        private.put("known_hosts", &unix_lines(&self.known_hosts))?;
        if let Some(certificate) = &self.certificate {
            private.put("certificate", &unix_lines(certificate))?;
        }
        let config = self.config(private.0.path());
        private.put("config", config.as_bytes())?;
        Ok(private)
    }

    /// PURE: ssh's configuration, for the login node and for a jump host.
    fn config(&self, folder: &Path) -> String {
        let quoted = |name: &str| {
            let path = folder.join(name).display().to_string();
            format!("\"{}\"", path.replace('%', "%%"))
        };
        let mut text = format!(
            "UserKnownHostsFile {}\nIdentityFile {}\n{OPTIONS}",
            quoted("known_hosts"),
            quoted("key")
        );
        if self.certificate.is_some() {
            writeln!(text, "CertificateFile {}", quoted("certificate")).ok();
        }
        // After what the command line says; a jump host without a user of its own has the same one.
        if let Some(user) = &self.user {
            writeln!(text, "User {user}").ok();
        }
        text
    }
}

/// For the login node and for a jump host alike. A host key must be known, nothing is asked, and nothing is forwarded.
const OPTIONS: &str = "\
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
UpdateHostKeys no
VerifyHostKeyDNS no
CheckHostIP no
BatchMode yes
IdentitiesOnly yes
IdentityAgent none
PreferredAuthentications publickey
ServerAliveInterval 15
ServerAliveCountMax 2
ConnectTimeout 10
ConnectionAttempts 1
ClearAllForwardings yes
ForwardAgent no
ForwardX11 no
PermitLocalCommand no
Tunnel no
ControlMaster no
ControlPath none
EscapeChar none
RequestTTY no
Compression no
";

/// A folder that only this user can read; it is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Private(TempDir);

impl Private {
    /// In memory if possible. The name has no characters that ssh's configuration would read.
    fn new() -> Result<Self, SecretError> {
        let mut builder = tempfile::Builder::new();
        let builder = builder
            .prefix("knoc-ssh-")
            .permissions(Permissions::from_mode(0o700));
        let in_memory = builder.tempdir_in("/dev/shm");
        let made = in_memory.or_else(|_| builder.tempdir());
        let made = made.map_err(|source| SecretError::File {
            what: "make a private folder in",
            path: std::env::temp_dir(),
            source,
        })?;
        Ok(Self(made))
    }

    /// The configuration file for ssh.
    pub(super) fn config(&self) -> PathBuf {
        self.0.path().join("config")
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), SecretError> {
        let path = self.0.path().join(name);
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(true).mode(0o600);
        let written = options
            .open(&path)
            .and_then(|mut file| file.write_all(bytes));
        written.map_err(|source| SecretError::File {
            what: "write",
            path,
            source,
        })
    }
}

/// A file's bytes; `None` if there is no such file.
fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, SecretError> {
    let failed = |source| SecretError::File {
        what: "read",
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    let read = file.take(most + 1).read_to_end(&mut bytes);
    let read = read.map_err(failed)?;
    if u64::try_from(read).unwrap_or(u64::MAX) > most {
        let text = format!("it is larger than {most} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, text)));
    }
    Ok(Some(bytes))
}

/// The value of a file of one line.
fn value<T>(
    path: &Path,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, SecretError> {
    let Some(bytes) = read(path, MAX_FILE)? else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = parse(text).ok_or_else(|| SecretError::Value {
        path: path.to_owned(),
        value: text.chars().take(80).collect(),
        expected,
    })?;
    Ok(Some(parsed))
}

/// PURE: one hop of ssh's option -J.
fn is_jump(text: &str) -> bool {
    text.parse::<super::Ssh>()
        .is_ok_and(|ssh| ssh.host.is_some())
}

/// PURE: does any line name a host?
fn names_a_host(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines().map(str::trim);
    lines.any(|line| !line.is_empty() && !line.starts_with('#'))
}

/// PURE: the text with line ends as ssh wants them; editors and `--from-literal` lose the last one.
fn unix_lines(text: &[u8]) -> Vec<u8> {
    let mut text: Vec<u8> = text.iter().copied().filter(|byte| *byte != b'\r').collect();
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    text
}

/// Changes whenever a file of the folder does.
pub(super) fn fingerprint(folder: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    for name in FILES {
        let meta = fs::metadata(folder.join(name)).ok();
        let seen = meta.map(|meta| (meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.len()));
        seen.hash(&mut hasher);
    }
    hasher.finish()
}
