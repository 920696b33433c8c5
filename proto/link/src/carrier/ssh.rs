//! The carrier `ssh:[USER@]HOST[:PORT]`: OpenSSH to the login node, and `knoc-agent connect` there.
//!
//! A convenient form of [`exec`](mod@super::exec). Keys, host keys and the jump host come from a folder ([`secret`]), usually a
//! Secret that is mounted, or, without one, from the user's own OpenSSH configuration. In both cases the host key must be
//! known already: nothing is accepted at first use, and nothing is asked.
use std::{fmt, path::PathBuf, str::FromStr};

use super::{
    Carrier, Dial, InvalidCarrier, Unverified,
    exec::{self, Argv, CommandIo, Held, marker::Speaks},
};
use crate::LinkError;

mod run;
mod secret;

pub use run::Script;
use secret::Secret;
pub use secret::SecretError;

/// Where to look for `knoc-agent` if no path is configured. Every login shell passes a single-quoted text on as it is.
const SEARCH: &str = "sh -c 'PATH=$PATH:$HOME/.local/bin:$HOME/bin; export PATH; exec knoc-agent";

/// The login node and how to log in there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Ssh {
    /// The user; unset: that of the folder, or OpenSSH's default.
    pub user: Option<String>,
    /// The host; unset: that of the folder.
    pub host: Option<String>,
    /// The port; unset: that of the folder, or OpenSSH's default.
    pub port: Option<u16>,
    /// How to log in.
    pub login: Login,
}

/// How to log in, and what to run there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Login {
    /// A folder with key and host keys; unset: the user's own OpenSSH configuration.
    pub folder: Option<PathBuf>,
    /// The path of `knoc-agent` on the login node; unset: it is looked up in PATH, `~/.local/bin` and `~/bin`.
    pub program: Option<String>,
    /// Starts an agent if none runs.
    pub on_demand: bool,
}

/// PURE: whether every login shell reads this text as one word that is not an option.
#[must_use]
pub fn is_program(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./+-".contains(c);
    let rest = text.strip_prefix("~/").unwrap_or(text);
    !rest.is_empty() && !rest.starts_with('-') && rest.chars().all(plain)
}

/// PURE: whether this can be the name or address of a host in an argument of ssh.
fn is_host(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    !text.is_empty() && text.len() <= 255 && !text.starts_with('-') && text.chars().all(plain)
}

/// PURE: whether this can be a user's name in an argument of ssh.
fn is_user(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._@+-".contains(c);
    !text.is_empty() && text.len() <= 255 && !text.starts_with('-') && text.chars().all(plain)
}

impl FromStr for Ssh {
    type Err = InvalidCarrier;

    fn from_str(text: &str) -> Result<Self, InvalidCarrier> {
        let wrong = || InvalidCarrier::Login {
            login: text.to_owned(),
        };
        if text.is_empty() {
            return Ok(Self::default());
        }
        let (user, rest) = match text.rsplit_once('@') {
            Some((user, rest)) => (Some(user), rest),
            None => (None, text),
        };
        let (host, port) = match rest.strip_prefix('[') {
            Some(inner) => match inner.split_once(']').ok_or_else(wrong)? {
                (host, "") => (host, None),
                (host, port) => (host, Some(port.strip_prefix(':').ok_or_else(wrong)?)),
            },
            None => match rest.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        let port = port.map(str::parse).transpose().map_err(|_| wrong())?;
        let right = is_host(host) && user.is_none_or(is_user) && port != Some(0);
        right.then_some(()).ok_or_else(wrong)?;
        Ok(Self {
            user: user.map(str::to_owned),
            host: Some(host.to_owned()),
            port,
            login: Login::default(),
        })
    }
}

impl fmt::Display for Ssh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match &self.host {
            Some(host) if host.contains(':') => write!(f, "[{host}]")?,
            Some(host) => f.write_str(host)?,
            None => {}
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

/// The carrier that the text after `ssh:` names.
pub(super) fn parse(text: &str) -> Result<Carrier, InvalidCarrier> {
    text.parse().map(|ssh| Carrier::Ssh(Box::new(ssh)))
}

impl Ssh {
    /// Checks what can be checked before anything starts: the folder has what it needs, and a host is named.
    pub fn check(&self) -> Result<(), SecretError> {
        let secret = self.login.folder.as_deref().map(Secret::read).transpose()?;
        self.host_of(secret.as_ref()).map(|_| ())
    }

    /// Changes whenever a file of the folder does.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.login.folder.as_deref().map_or(0, secret::fingerprint)
    }

    fn host_of<'a>(&'a self, secret: Option<&'a Secret>) -> Result<&'a str, SecretError> {
        let named = self.host.as_deref();
        let named = named.or_else(|| secret?.host.as_deref());
        named.ok_or(SecretError::NoHost)
    }

    /// ssh with the options of the folder if there is one, and what the login shell is to run.
    fn argv(&self, secret: Option<&Secret>, remote: String) -> Result<(Argv, Held), SecretError> {
        let mut words: Vec<String> = vec!["ssh".into()];
        let mut held = Held::default();
        if let Some(secret) = secret {
            let private = secret.write()?;
            words.extend(["-F".into(), private.config().display().to_string()]);
            held = Held::new(private);
        } else {
            let options = [
                "BatchMode=yes",
                "StrictHostKeyChecking=yes",
                "ServerAliveInterval=15",
                "ServerAliveCountMax=2",
                "ConnectTimeout=10",
                "ClearAllForwardings=yes",
                "ForwardAgent=no",
                "ForwardX11=no",
                "ControlMaster=no",
            ];
            for option in options {
                words.extend(["-o".into(), option.into()]);
            }
        }
        words.push("-T".into());
        let user = self.user.as_ref();
        if let Some(user) = user.or_else(|| secret?.user.as_ref()) {
            words.extend(["-l".into(), user.clone()]);
        }
        if let Some(port) = self.port.or_else(|| secret?.port) {
            words.extend(["-p".into(), port.to_string()]);
        }
        if let Some(jump) = secret.and_then(|secret| secret.jump.as_ref()) {
            words.extend(["-J".into(), jump.clone()]);
        }
        let host = self.host_of(secret)?.to_owned();
        words.extend(["--".into(), host, remote]);
        let argv = Argv::new(words).map_err(|_| SecretError::NoHost)?;
        Ok((argv, held))
    }

    /// PURE: the command for the login shell, whichever shell that is.
    fn remote(&self, speaks: Speaks) -> String {
        let verb = if self.login.on_demand {
            "serve --stdio"
        } else {
            "connect"
        };
        let plain = match speaks {
            Speaks::Tls => "",
            Speaks::Plain => " --plain",
        };
        match &self.login.program {
            Some(program) => format!("{program} {verb}{plain}"),
            None => format!("{SEARCH} {verb}{plain}'"),
        }
    }
}

/// Logs in for each connection.
#[derive(Debug)]
pub(crate) struct Dialler<'a> {
    /// Where and how.
    pub ssh: &'a Ssh,
    /// What it is called in errors.
    pub carrier: &'a Carrier,
    /// What the far side has to speak.
    pub speaks: Speaks,
}

impl Dial for Dialler<'_> {
    type Io = CommandIo;

    async fn dial(&self) -> Result<Unverified<CommandIo>, LinkError> {
        let made = || {
            let folder = self.ssh.login.folder.as_deref();
            let secret = folder.map(Secret::read).transpose()?;
            self.ssh.argv(secret.as_ref(), self.ssh.remote(self.speaks))
        };
        let (argv, held) = made().map_err(|source| LinkError::Secret {
            carrier: self.carrier.clone(),
            source: Box::new(source),
        })?;
        // ssh starts the hop to a jump host through this shell, which may be anything, or not be in an image.
        let variables: &[_] = match &self.ssh.login.folder {
            Some(_) => &[("SHELL", "/bin/sh")],
            None => &[],
        };
        exec::start(&argv, self.carrier, self.speaks, held, variables).await
    }
}

#[cfg(test)]
mod tests;
