//! A real nginx on loopback, run by the user of the tests, as an Ingress or a load balancer in front of a kubelet.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

use crate::{
    site::{Daemon, Site},
    wait_for,
};

/// Debian's nginx.
const PROGRAM: &str = "/usr/sbin/nginx";
/// Debian's libnginx-mod-stream: servers that do not look into HTTP.
const STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
/// The folder of its files within the site's folder.
const FOLDER: &str = "nginx";

/// The name in the certificate that [`certificate`] makes: that of ingress-nginx, if nobody has given it another one.
pub const SUBJECT: &str = "Kubernetes Ingress Controller Fake Certificate";

/// An nginx of one process, whose files are in a folder of the site. Dropping it kills it.
#[derive(Debug)]
pub struct Nginx(Daemon);

impl Nginx {
    /// Starts an nginx with these servers, in the block `http` and in the block `stream` of its configuration, and waits until it
    /// listens at `address`.
    pub async fn start(
        site: &Site,
        http: &str,
        stream: &str,
        address: SocketAddr,
    ) -> anyhow::Result<Self> {
        for (file, package) in [(PROGRAM, "nginx"), (STREAM, "libnginx-mod-stream")] {
            ensure!(
                Path::new(file).is_file(),
                "{file} is missing: install {package}"
            );
        }
        let folder = site.path(FOLDER);
        std::fs::create_dir_all(&folder)?;
        site.put(
            &format!("{FOLDER}/nginx.conf"),
            &configuration(&folder, http, stream),
        )?;
        let argv = [
            PathBuf::from(PROGRAM),
            "-e".into(),
            "stderr".into(),
            "-p".into(),
            folder.clone(),
            "-c".into(),
            folder.join("nginx.conf"),
        ];
        let log = folder.join("nginx.log");
        let mut daemon = Daemon::start(&argv, &[], &folder, &log)?;
        wait_for("nginx listens", Duration::from_mins(1), async || {
            daemon.still_runs().map_err(anyhow::Error::msg)?;
            tokio::net::TcpStream::connect(address).await?;
            anyhow::Ok(())
        })
        .await
        .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        Ok(Self(daemon))
    }

    /// Kills it with all its connections.
    pub async fn kill(self) -> anyhow::Result<()> {
        self.0.kill().await
    }
}

/// The whole configuration. Nothing outside of the folder is written, and there is one process, so that none is left when it is killed.
fn configuration(folder: &Path, http: &str, stream: &str) -> String {
    let folder = folder.display();
    format!(
        "load_module {STREAM};\n\
         daemon off;\n\
         master_process off;\n\
         pid {folder}/pid;\n\
         error_log stderr info;\n\
         events {{ worker_connections 512; }}\n\
         http {{\n\
         access_log off;\n\
         client_body_temp_path {folder}/body;\n\
         proxy_temp_path {folder}/proxy;\n\
         fastcgi_temp_path {folder}/fastcgi;\n\
         uwsgi_temp_path {folder}/uwsgi;\n\
         scgi_temp_path {folder}/scgi;\n\
         {http}\n\
         }}\n\
         stream {{\n\
         {stream}\n\
         }}\n"
    )
}

/// Makes a certificate as an Ingress has one, and returns the settings that name it, for a server of nginx that terminates TLS.
pub fn certificate(site: &Site) -> anyhow::Result<String> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["knoc.example.org".to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, SUBJECT);
    let certificate = params.self_signed(&key)?;
    site.put("ingress.crt", &certificate.pem())?;
    site.put("ingress.key", &key.serialize_pem())?;
    let dir = site.path("");
    let dir = dir.display();
    Ok(format!(
        "ssl_certificate {dir}/ingress.crt; ssl_certificate_key {dir}/ingress.key;"
    ))
}
