//! A real sshd on loopback, run by the user of the tests, in front of a site's agent.

use std::{
    net::SocketAddr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    Run,
    ports::free_port,
    site::{Daemon, Site, binary, loopback},
    wait_for,
};

/// Debian's openssh-server; it must be started by this path.
const PROGRAM: &str = "/usr/sbin/sshd";

/// An sshd whose log and keys are in a folder of the site.
#[derive(Debug)]
pub struct Sshd {
    address: SocketAddr,
    folder: PathBuf,
    user: String,
    _daemon: Daemon,
}

impl Sshd {
    /// Starts an sshd that accepts one key, whose command is `forced` if there is one. `knoc-agent` is in its PATH, with the
    /// site's site file.
    pub async fn start(site: &Site, name: &str, forced: Option<&str>) -> anyhow::Result<Self> {
        Self::with(site, name, forced, "").await
    }

    /// The same with further lines of its configuration.
    pub async fn with(
        site: &Site,
        name: &str,
        forced: Option<&str>,
        further: &str,
    ) -> anyhow::Result<Self> {
        ensure!(
            Path::new(PROGRAM).is_file(),
            "{PROGRAM} is missing: install openssh-server"
        );
        let folder = site.path(name);
        std::fs::create_dir_all(folder.join("bin"))?;
        symlink(binary("knoc-agent")?, folder.join("bin/knoc-agent"))?;
        for key in ["host", "login"] {
            keygen(&folder.join(key)).await?;
        }
        let key = std::fs::read_to_string(folder.join("login.pub"))?;
        let options = forced.map_or_else(String::new, |command| {
            format!("restrict,command=\"{}\" ", command.replace('"', "\\\""))
        });
        site.put(
            &format!("{name}/authorized_keys"),
            &format!("{options}{key}"),
        )?;
        let port = free_port()?;
        let shown = folder.display();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {shown}/host\nPidFile none\n\
             AuthorizedKeysFile {shown}/authorized_keys\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel VERBOSE\n\
             SetEnv KNOC_AGENT_CONFIG={} PATH={shown}/bin:/usr/bin:/bin HOME={}\n{further}\n",
            site.path("agent.toml").display(),
            site.path("").display(),
        );
        site.put(&format!("{name}/sshd_config"), &config)?;
        let user = user()?;
        if user == "root" {
            // Where sshd keeps its unprivileged child.
            std::fs::create_dir_all("/run/sshd")?;
        }
        let argv = [
            PathBuf::from(PROGRAM),
            "-D".into(),
            "-e".into(),
            "-f".into(),
            folder.join("sshd_config"),
        ];
        let log = folder.join("sshd.log");
        let mut daemon = Daemon::start(&argv, &[], &folder, &log)?;
        let address = loopback(port);
        wait_for("sshd listens", Duration::from_mins(1), async || {
            daemon.still_runs().map_err(anyhow::Error::msg)?;
            tokio::net::TcpStream::connect(address).await?;
            anyhow::Ok(())
        })
        .await
        .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        let sshd = Self {
            address,
            folder,
            user,
            _daemon: daemon,
        };
        sshd.secret(site)?;
        Ok(sshd)
    }

    /// Writes the folder `NAME/secret` as a Secret would be mounted: readable by everybody.
    fn secret(&self, site: &Site) -> anyhow::Result<()> {
        let host_key = std::fs::read_to_string(self.folder.join("host.pub"))?;
        let known = format!("[127.0.0.1]:{} {host_key}", self.address.port());
        let key = std::fs::read_to_string(self.folder.join("login"))?;
        std::fs::create_dir_all(self.folder.join("secret"))?;
        for (name, text) in [
            ("known_hosts", known.as_str()),
            ("ssh-privatekey", &key),
            ("remote_user", &self.user),
            ("host", "127.0.0.1"),
            ("port", &self.address.port().to_string()),
        ] {
            self.put_secret(site, name, text)?;
        }
        Ok(())
    }

    /// Replaces a file of the Secret.
    pub fn put_secret(&self, site: &Site, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.secret_folder().join(name);
        let relative = path.strip_prefix(site.path(""))?;
        site.put(&relative.display().to_string(), text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))?;
        Ok(())
    }

    /// The folder of the Secret.
    #[must_use]
    pub fn secret_folder(&self) -> PathBuf {
        self.folder.join("secret")
    }

    /// `HOST:PORT`
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How often a login was accepted, and how often a key was refused.
    pub fn logins(&self) -> anyhow::Result<(usize, usize)> {
        let log = std::fs::read_to_string(self.folder.join("sshd.log"))?;
        let count = |text| log.matches(text).count();
        Ok((count("Accepted publickey"), count("Failed publickey")))
    }

    /// A context of knocctl over this sshd, with or without the site's certificate.
    pub fn knocctl(&self, site: &Site, certificate: bool, further: &str) -> anyhow::Result<Run> {
        self.knocctl_at(site, "\"ssh:\"", certificate, further)
    }

    /// The same with another address, as TOML.
    pub fn knocctl_at(
        &self,
        site: &Site,
        address: &str,
        certificate: bool,
        further: &str,
    ) -> anyhow::Result<Run> {
        let dir = site.path("");
        let dir = dir.display();
        let files = if certificate {
            format!("ca = \"{dir}/ca.crt\"\ncert = \"{dir}/ctl.crt\"\nkey = \"{dir}/ctl.key\"\n")
        } else {
            String::new()
        };
        let text = format!(
            "[contexts.ssh]\naddress = {address}\nssh-folder = \"{}\"\n{files}{further}\n",
            self.secret_folder().display()
        );
        let name = format!("knocctl-{}.toml", rand::random::<u64>());
        site.put(&name, &text)?;
        let run = Run::new(binary("knocctl")?).env("KNOCCTL_CONFIG", site.path(&name));
        Ok(run.env("HOME", site.path("")))
    }
}

/// A key pair of the form that sshd and ssh read.
pub async fn keygen(path: &Path) -> anyhow::Result<()> {
    let run = Run::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]);
    run.arg(path).ok().await?;
    Ok(())
}

/// The user of this process.
fn user() -> anyhow::Result<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    for line in std::fs::read_to_string("/etc/passwd")?.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [name, _, of, _, _, _, shell] = fields.as_slice()
            && *of == uid
        {
            ensure!(
                !shell.ends_with("nologin") && !shell.ends_with("false"),
                "{name} has the login shell {shell}, through which sshd runs no command"
            );
            return Ok((*name).to_owned());
        }
    }
    bail!("/etc/passwd does not name uid {uid}")
}
