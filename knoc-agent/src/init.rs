//! `knoc-agent init`: writes a CA, the agent's certificate, the kubelet's bundle, knocctl's files
//! and a commented site file.
//!
//! Blocking; run once, by hand. It never overwrites a file: existing files are kept and listed as
//! kept, and missing ones are created, so that a second run completes a first one. Of a pair, the
//! key is written last: a certificate that a killed run has left without its key is of no use and is
//! made again, and a key without its certificate is an error. Secret files have mode 0600 in a
//! directory with mode 0700. Of two that run at once, the second waits for the first, at most for half
//! a minute: otherwise each would sign with a CA of its own, and only one CA is kept.

mod detect;
mod text;

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

pub use detect::{Environment, Found};
use knoc_contract::jobdir::atomic::{self, FileError};
use knoc_link::{
    Identity, file_lock,
    pki::{Ca, CertifiedKey, PkiError},
};
use knoc_proto::{
    ids::{InvalidId, SiteName},
    names::{self, BadName},
};

use crate::config::{Config, ConfigError, Home, RuntimeKind, SchedulerKind};

/// The port for kubelets if an address names none.
const PORT: u16 = 10350;

/// The options of `init`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The name of the site, a DNS label of at most 58 characters; the node is called knoc-SITE
    #[arg(long, value_parser = site_name)]
    pub site: String,
    /// The address at which kubelets reach this login node; the first one is written to the bundle [default: this host's name]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub address: Vec<String>,
    /// A namespace of the cluster whose pods can run here as this account (--allow-namespace of knocctl agent install); can be
    /// repeated [default: every namespace]
    #[arg(long = "namespace", value_name = "NAMESPACE", value_parser = namespace)]
    pub namespaces: Vec<String>,
    /// The folder to write to [default: ~/.config/knoc]
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// The scheduler: slurm or local [default: slurm if sbatch is in PATH, else local]
    #[arg(long, value_name = "NAME", value_parser = scheduler)]
    pub scheduler: Option<SchedulerKind>,
    /// The container runtime: auto, apptainer, singularity or process [default: auto, or process if none is in PATH]
    #[arg(long, value_name = "NAME", value_parser = runtime)]
    pub runtime: Option<RuntimeKind>,
    /// Opens no port for kubelets: they connect over SSH only
    #[arg(long, conflicts_with = "address")]
    pub no_port: bool,
    /// Keeps the agent running in this way from now on: systemd, cron, scrontab, job, on-demand, or auto to choose one [default:
    /// nothing is set up, and what the site allows is listed]
    #[arg(long, value_name = "MODE", value_parser = crate::run_mode::cli::wanted)]
    pub run_mode: Option<crate::run_mode::cli::Wanted>,
    /// With --run-mode scrontab or job: the partition in which the agent runs
    #[arg(long, value_name = "NAME", requires = "run_mode")]
    pub partition: Option<String>,
}

pub(crate) fn site_name(text: &str) -> Result<String, InvalidId> {
    SiteName::try_from(text).map(String::from)
}

pub(crate) fn namespace(text: &str) -> Result<String, BadName> {
    names::dns_label(text).map(|()| text.to_owned())
}

pub(crate) fn scheduler(text: &str) -> Result<SchedulerKind, String> {
    let known = [SchedulerKind::Slurm, SchedulerKind::Local];
    let found = known.into_iter().find(|kind| kind.as_str() == text);
    found.ok_or_else(|| "slurm or local".to_owned())
}

pub(crate) fn runtime(text: &str) -> Result<RuntimeKind, String> {
    use RuntimeKind::{Apptainer, Auto, Process, Singularity};
    let found = [Auto, Apptainer, Singularity, Process]
        .into_iter()
        .find(|k| k.as_str() == text);
    found.ok_or_else(|| "auto, apptainer, singularity or process".to_owned())
}

/// Why nothing was written, or not everything.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A file cannot be read or written.
    #[error("write the agent's configuration")]
    File(#[from] FileError),
    /// A certificate cannot be created.
    #[error("make certificates")]
    Pki(#[from] PkiError),
    /// The CA's key was removed, and something must be signed.
    #[error(
        "{} is missing, so the CA next to it cannot sign anything: put the key back, or move {} away \
         and run init again (which creates a new CA; kubelets then need the new bundle)",
        key.display(), folder.display()
    )]
    NoCaKey {
        /// The expected path of the key.
        key: PathBuf,
        /// The directory of the certificates.
        folder: PathBuf,
    },
    /// A key is there without its certificate, and another certificate would not match it.
    #[error(
        "{} is there without {}, which belongs to it: put the certificate back, or move {} away and run init again",
        key.display(), cert.display(), away.display()
    )]
    NoCertificate {
        /// The key.
        key: PathBuf,
        /// The expected path of the certificate.
        cert: PathBuf,
        /// What keeps init from making a new pair.
        away: PathBuf,
    },
    /// An address cannot be parsed.
    #[error("{address:?} is not HOST or HOST:PORT")]
    Address {
        /// The address from the command line.
        address: String,
    },
    /// The options lead to a site file that would not be accepted.
    #[error("these options do not give a valid site file")]
    Invalid(#[from] ConfigError),
}

/// What is written, and what was done so far.
#[derive(Debug)]
struct Init<'a> {
    options: &'a Options,
    folder: PathBuf,
    addresses: Vec<(String, u16)>,
    /// The namespaces of the site file that is on disk now; empty means all.
    namespaces: Vec<String>,
    written: Vec<PathBuf>,
    kept: Vec<PathBuf>,
}

/// Writes the files that do not exist yet. Returns the summary for the user.
pub fn run(options: &Options, home: &Path, found: &Found) -> Result<String, InitError> {
    let folder = options
        .dir
        .clone()
        .unwrap_or_else(|| home.join(".config/knoc"));
    let given = options.address.iter().map(|address| parse_address(address));
    let mut addresses = given.collect::<Result<Vec<_>, _>>()?;
    if addresses.is_empty() {
        addresses.push((found.hostname.clone(), PORT));
    }
    let site_file = text::site_file(options, &folder, &addresses, found);
    let path = folder.join("agent.toml");
    let home = Home {
        home: home.to_owned(),
    };
    // Checked before anything is written, so that a mistake in the options leaves no files behind.
    Config::parse(&site_file, &path, &home)?;
    let mut init = Init {
        options,
        folder,
        addresses,
        namespaces: options.namespaces.clone(),
        written: Vec::new(),
        kept: Vec::new(),
    };
    atomic::create_dir(&init.folder.join("tls"))?;
    let _one = lock(&init.tls(".lock"))?;
    init.certificates()?;
    init.write(&path, &site_file)?;
    // A site file that existed before need not match these options.
    if let Ok(config) = Config::load(&path, &home) {
        init.namespaces = config.policy.namespaces;
    }
    Ok(init.summary())
}

/// Waits until no other process holds the lock on this file, which is created if it is missing, but not for ever. `None` if there is
/// no lock to be had, as on a file system without locks.
fn lock(path: &Path) -> Result<Option<fs::File>, FileError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let Ok(file) = options.open(path) else {
        return Ok(None);
    };
    let locked = file_lock::wait(path, &|| file.try_lock()).map_err(FileError::on("lock", path))?;
    Ok(locked.then_some(file))
}

fn parse_address(address: &str) -> Result<(String, u16), InitError> {
    let wrong = || InitError::Address {
        address: address.to_owned(),
    };
    let (host, port) = match address.rsplit_once(':') {
        // An IPv6 address without a port contains colons itself.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().map_err(|_| wrong())?)
        }
        Some(_) | None => (address, PORT),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '_');
    if host.is_empty() || !host.chars().all(plain) {
        return Err(wrong());
    }
    Ok((host.to_owned(), port))
}

impl Init<'_> {
    fn tls(&self, name: &str) -> PathBuf {
        self.folder.join("tls").join(name)
    }

    /// Creates the CA and the certificates that it signs, unless they exist.
    fn certificates(&mut self) -> Result<(), InitError> {
        let site = &self.options.site;
        let agent = Identity::Agent { site: site.clone() };
        let names: Vec<_> = self
            .addresses
            .iter()
            .map(|(host, _)| host.clone())
            .collect();
        let kubelet = Identity::Kubelet {
            name: format!("knoc-{site}"),
        };
        let ctl = Identity::Ctl {
            name: "admin".to_owned(),
        };
        let ca = self.ca()?;
        self.pair(ca.as_ref(), "agent", &agent, &names)?;
        self.pair(ca.as_ref(), "knocctl", &ctl, &[])?;
        let bundle = self.folder.join("kubelet-bundle.yaml");
        if self.is_missing(&bundle)? {
            let ca = ca.as_ref().ok_or_else(|| self.no_key())?;
            let pair = ca.issue(&kubelet, &[])?;
            let manifest = text::bundle(site, &self.addresses[0], ca.cert_pem(), &pair);
            self.write(&bundle, &manifest)?;
        }
        let context = text::knocctl(site, &self.folder, &self.addresses[0]);
        let path = self.folder.join("knocctl.toml");
        self.write(&path, &context)
    }

    /// Loads the CA, or creates it if there is none; `None` if its key was removed.
    fn ca(&mut self) -> Result<Option<Ca>, InitError> {
        let (cert, key) = (self.tls("ca.crt"), self.tls("ca.key"));
        if !self.is_missing(&cert)? {
            let cert_pem = atomic::read(&cert)?;
            return match atomic::read_optional(&key)? {
                Some(key_pem) => {
                    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                    Ok(Some(Ca::from_pem(&text(cert_pem), &text(key_pem))?))
                }
                None => Ok(None),
            };
        }
        if !self.is_missing(&key)? {
            let away = self.folder.join("tls");
            return Err(InitError::NoCertificate { key, cert, away });
        }
        let ca = Ca::generate(&format!("KNoC {}", self.options.site))?;
        self.create(&cert, ca.cert_pem())?;
        self.create(&key, &ca.key_pem())?;
        Ok(Some(ca))
    }

    fn pair(
        &mut self,
        ca: Option<&Ca>,
        name: &str,
        identity: &Identity,
        names: &[String],
    ) -> Result<(), InitError> {
        let (cert, key) = (
            self.tls(&format!("{name}.crt")),
            self.tls(&format!("{name}.key")),
        );
        // A certificate without its key is useless.
        let no_cert = self.is_missing(&cert)?;
        if !self.is_missing(&key)? {
            if !no_cert {
                return Ok(());
            }
            let away = key.clone();
            return Err(InitError::NoCertificate { key, cert, away });
        }
        let CertifiedKey { cert_pem, key_pem } =
            ca.ok_or_else(|| self.no_key())?.issue(identity, names)?;
        self.create(&cert, &cert_pem)?;
        self.create(&key, &key_pem)
    }

    fn no_key(&self) -> InitError {
        InitError::NoCaKey {
            key: self.tls("ca.key"),
            folder: self.folder.join("tls"),
        }
    }

    /// Whether `path` is still to be written. If it exists, it is listed as kept.
    fn is_missing(&mut self, path: &Path) -> Result<bool, FileError> {
        match fs::symlink_metadata(path) {
            Ok(_) => {
                if !self
                    .kept
                    .iter()
                    .chain(&self.written)
                    .any(|known| known == path)
                {
                    self.kept.push(path.to_owned());
                }
                Ok(false)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(FileError::on("look for", path)(error)),
        }
    }

    fn write(&mut self, path: &Path, text: &str) -> Result<(), InitError> {
        if self.is_missing(path)? {
            self.create(path, text)?;
        }
        Ok(())
    }

    fn create(&mut self, path: &Path, text: &str) -> Result<(), InitError> {
        atomic::write(path, text.as_bytes(), 0o600)?;
        self.kept.retain(|known| known != path);
        self.written.push(path.to_owned());
        Ok(())
    }

    fn summary(&self) -> String {
        let list = |title: &str, paths: &[PathBuf]| {
            let lines = paths.iter().map(|path| format!("  {}\n", path.display()));
            let lines: String = lines.collect();
            if lines.is_empty() {
                lines
            } else {
                format!("{title}:\n{lines}")
            }
        };
        let written = list("Written", &self.written);
        let kept = "Already there and left unchanged (to recreate a file, move it away, a certificate with its key, and run init again)";
        let kept = list(kept, &self.kept);
        let folder = self.folder.display();
        let (host, port) = &self.addresses[0];
        let site = &self.options.site;
        let access = if self.namespaces.is_empty() {
            format!(
                "Before you hand over the bundle: [policy] namespaces in {folder}/agent.toml is empty, so everybody who can create a \
                 pod in any namespace of the cluster runs programs as you. Name the allowed namespaces there.\n\n"
            )
        } else {
            format!(
                "Everybody who can create a pod in one of these namespaces of the cluster runs programs as you: {}.\n\n",
                self.namespaces.join(", ")
            )
        };
        format!(
            "{written}{kept}\n{access}Next:\n  1. Read {folder}/agent.toml and adapt it.\n  2. Start the agent in \
             the background: knoc-agent serve --detach\n  3. Check it: knocctl doctor\n  4. In the cluster: kubectl apply -n \
             knoc-system -f {folder}/kubelet-bundle.yaml\n     and install the chart with \
             agent.site={site}, agent.address={host}:{port}\n\n{folder}/tls/ca.key is used to \
             renew the certificates before they expire after a year: leave it there, readable only by you. Without it \
             they cannot be renewed, and the link ends after that year.\n",
        )
    }
}

#[cfg(test)]
mod tests;
