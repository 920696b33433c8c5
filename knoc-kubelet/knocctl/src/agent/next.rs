//! What follows an installation: the bundle's file, and the commands for the cluster.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use knoc_link::carrier::ssh::Ssh;
use knoc_proto::manage::{Installed, RunMode};

use super::ManageError;

/// The kubelet's image in a registry.
const IMAGE: &str = "knoc-kubelet";

/// Writes the bundle with mode 0600. A file with the same contents is kept, one with the first part of them is what a killed
/// command has left, and one with others is never replaced.
pub(super) fn write_bundle(path: &Path, bundle: &str) -> Result<String, ManageError> {
    let failed = |source| ManageError::Bundle {
        path: path.to_owned(),
        source,
    };
    match create(path, bundle) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let present = fs::read(path).map_err(failed)?;
            if present == bundle.as_bytes() {
                return Ok(format!("{} is there already", path.display()));
            }
            // Not through a link, and no device.
            let is_file = fs::symlink_metadata(path).map_err(failed)?.is_file();
            if !is_file || !bundle.as_bytes().starts_with(&present) {
                return Err(ManageError::OtherBundle {
                    path: path.to_owned(),
                });
            }
            fs::remove_file(path).map_err(failed)?;
            create(path, bundle).map_err(failed)?;
        }
        written => written.map_err(failed)?,
    }
    Ok(format!(
        "{} has the kubelet's certificate and its private key: keep it secret",
        path.display()
    ))
}

/// Fails if the file exists.
fn create(path: &Path, bundle: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bundle.as_bytes())?;
    file.sync_all()
}

/// PURE: the commands that follow. `address` is where kubelets reach the login node over TCP, if they do.
pub(super) fn commands(
    site: &str,
    ssh: &Ssh,
    address: Option<&str>,
    bundle: &Path,
    installed: &Installed,
) -> String {
    let bundle = bundle.display();
    let access = if installed.namespaces.is_empty() {
        "\nEverybody who can create a pod in ANY namespace of the cluster runs programs as this account: name the allowed\n\
         namespaces in [policy] of ~/.config/knoc/agent.toml on the login node before you apply the bundle.\n"
            .to_owned()
    } else {
        let names = installed.namespaces.join(", ");
        format!(
            "\nEverybody who can create a pod in one of these namespaces runs programs as this account: {names}\n"
        )
    };
    let variant = if address.is_none() { "-ssh" } else { "" };
    let begin = format!(
        "{access}\nIn the cluster. The kubelet's image is not published yet: in place of REGISTRY, name the registry to which you pushed it as\n\
         {IMAGE}:{version}{variant} (docs/guide/install.md, \"The chart\").\n\n    \
         kubectl create namespace knoc-system\n    kubectl -n knoc-system apply -f {bundle}\n",
        version = env!("CARGO_PKG_VERSION"),
    );
    let install = format!(
        "    helm install knoc deploy/chart/knoc --namespace knoc-system --set image.repository=REGISTRY/{IMAGE}"
    );
    if let Some(address) = address {
        let port = if address.contains(':') { "" } else { ":10350" };
        format!(
            "{begin}{install} \\\n        --set agent.site={site} --set agent.address={address}{port}\n"
        )
    } else {
        let key = over_ssh(ssh, installed);
        let further = if installed.run_mode == Some(RunMode::OnDemand) {
            " --set agent.ssh.onDemand=true"
        } else {
            ""
        };
        format!(
            "{key}{begin}    kubectl -n knoc-system create secret generic knoc-ssh --from-file=ssh-privatekey=knoc-ssh \\\n        \
             --from-file=known_hosts{literals}\n{install} \\\n        --set agent.site={site} --set agent.address=ssh: \
             --set agent.ssh.secret=knoc-ssh{further}\n",
            literals = literals(ssh),
        )
    }
}

/// The kubelet's own key, which may do nothing but this.
fn over_ssh(ssh: &Ssh, installed: &Installed) -> String {
    let verb = if installed.run_mode == Some(RunMode::OnDemand) {
        "serve --stdio"
    } else {
        "connect"
    };
    let host = ssh.host.as_deref().unwrap_or_default();
    let port = ssh
        .port
        .map_or_else(String::new, |port| format!("-p {port} "));
    format!(
        "\nA key for the kubelet, which may do nothing but the link. Append the line that `echo` prints to ~/.ssh/authorized_keys on\n\
         the login node:\n\n    ssh-keygen -t ed25519 -N '' -C knoc-kubelet -f knoc-ssh\n    \
         echo \"restrict,command=\\\"{program} {verb}\\\" $(cat knoc-ssh.pub)\"\n\n\
         The host's key; compare the fingerprint with the one that the site publishes:\n\n    \
         ssh-keyscan {port}{host} > known_hosts\n    ssh-keygen -lf known_hosts\n",
        program = installed.program,
    )
}

fn literals(ssh: &Ssh) -> String {
    let host = ssh.host.as_deref().unwrap_or_default();
    let user = ssh.user.as_deref().unwrap_or("USER");
    let port = ssh
        .port
        .map_or_else(String::new, |port| format!(" --from-literal=port={port}"));
    format!(" \\\n        --from-literal=host={host} --from-literal=remote_user={user}{port}")
}
