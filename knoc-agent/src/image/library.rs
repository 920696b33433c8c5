//! The site's container library, from which names with `library://` are fetched: its address, what a request to it is, its token,
//! and (PURE) what it says about an image.
//!
//! ```text
//! GET /v1/images/PATH:TAG?arch=…      JSON with the hash and the size of the file
//! GET /v1/imagefile/PATH:TAG?arch=…   the file, often by a redirect
//! ```
//!
//! These are the requests of `apptainer pull`. The file is fetched by its tag, too, because not every library knows hashes; what has come
//! is checked against the hash.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use http::HeaderValue;
use nix::fcntl::OFlag;
use serde::Deserialize;

use super::{
    Name,
    auth::{self, MAX_TOKEN},
    blocking::blocking,
    digest::Digest,
    manifest::{ARCHITECTURE, Descriptor, Image},
    reference::Source,
};

/// The largest answer about an image.
pub(super) const MAX_ANSWER: usize = 1 << 20;

/// The library of `images.library` of the site file.
#[derive(Debug, Clone)]
pub(crate) struct Library {
    /// `http[s]://HOST[:PORT][/FOLDER]`
    pub(super) address: String,
    /// The host in lower case, with its port if the address has one.
    pub(super) host: String,
    /// The file with the token, which is the site's and not a pod's.
    token: Option<PathBuf>,
}

impl Library {
    /// The library at an address that the site file has, and was checked.
    pub(crate) fn new(address: &str, token: Option<PathBuf>) -> Self {
        let host = address.split('/').nth(2).unwrap_or_default();
        Self {
            address: address.to_owned(),
            host: host.to_ascii_lowercase(),
            token,
        }
    }

    /// Where one of its images is fetched from. The credentials of a pod are for registries, and mirrors are of registries.
    pub(super) fn source(&self, name: &Name) -> Source {
        Source {
            reference: name.clone(),
            insecure: self.address.starts_with("http://"),
            login: None,
        }
    }

    /// The URL for a request about an image: `images` for what it is, and `imagefile` for the file. For no request: that of the
    /// library itself.
    pub(super) fn url(&self, name: &Name, request: &str) -> String {
        let address = &self.address;
        if request.is_empty() {
            return format!("{address}/");
        }
        let (path, version) = (name.repository(), name.version().replace(':', "."));
        format!("{address}/v1/{request}/{path}:{version}?arch={ARCHITECTURE}")
    }

    /// The header with the token, if the site has one. The file is read each time, so that another token needs no restart.
    pub(super) async fn authorization(&self) -> Result<Option<HeaderValue>, String> {
        let Some(path) = self.token.clone() else {
            return Ok(None);
        };
        let read = blocking(move || token(&path)).await;
        read.map(Some)
            .map_err(|why| format!("images.library_token of the site file: {why}"))
    }
}

/// Reads the token from a file that nobody else can read. Blocking. No message contains it.
fn token(path: &Path) -> Result<HeaderValue, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    // It may be a pipe, for which nobody waits.
    let file = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    let own = about.uid() == nix::unistd::geteuid().as_raw();
    if !own || about.mode() & 0o077 != 0 {
        return Err(format!(
            "{} must belong to you, with mode 0600",
            path.display()
        ));
    }
    let mut text = String::new();
    let limit = u64::try_from(MAX_TOKEN).unwrap_or(u64::MAX);
    file.take(limit).read_to_string(&mut text).map_err(failed)?;
    let text = text.trim();
    if text.is_empty() {
        return Err(format!("{} is empty", path.display()));
    }
    auth::bearer(text).map_err(|why| format!("{}: {why}", path.display()))
}

/// What a library answers: data or an error.
#[derive(Deserialize)]
struct Answer {
    data: Option<About>,
    error: Option<About>,
}

/// What is said of an image, and in an error only the message.
#[derive(Default, Deserialize)]
#[serde(default)]
struct About {
    hash: String,
    size: u64,
    arch: Option<String>,
    message: String,
}

/// The image that a library describes: one file, whose digest is that of the image.
pub(super) fn image(body: &[u8]) -> Result<(Digest, Image), String> {
    let answer: Answer = serde_json::from_slice(body)
        .map_err(|error| format!("the library's answer cannot be read: {error}"))?;
    let about = answer.data.ok_or("the library's answer has no data")?;
    // A library of an early version does not know architectures, and has one image under each name.
    let other = about
        .arch
        .filter(|arch| !["", ARCHITECTURE].contains(&arch.as_str()));
    if let Some(arch) = other {
        return Err(format!(
            "the library has it for {arch} and not for {ARCHITECTURE}"
        ));
    }
    let digest: Result<Digest, _> = about.hash.replacen('.', ":", 1).parse();
    let digest = digest.map_err(|_| {
        format!(
            "the library names the hash {:?}, and not sha256.…",
            about.hash
        )
    })?;
    let (file, none) = (digest.clone(), digest.clone());
    let descriptor = |digest, size| Descriptor { digest, size };
    let image = Image {
        config: descriptor(none, 0),
        layers: vec![descriptor(file, about.size)],
        sif: true,
    };
    Ok((digest, image))
}

/// The reason of an error response, from its body.
pub(super) fn reason(body: &[u8]) -> Option<String> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let message = answer.error?.message;
    (!message.is_empty()).then_some(message)
}

#[cfg(test)]
mod tests {
    use knoc_contract::jobdir::atomic;

    use super::*;

    #[test]
    fn requests_are_those_of_apptainer() {
        let library = Library::new("https://Library.example.org:8443/folder", None);
        assert_eq!(library.host, "library.example.org:8443");
        let hex = "a".repeat(64);
        for (name, expected) in [
            ("a/b/c:1".to_owned(), "a/b/c:1".to_owned()),
            ("c".to_owned(), "c:latest".to_owned()),
            (format!("a/b/c@sha256:{hex}"), format!("a/b/c:sha256.{hex}")),
        ] {
            let name = Name::of_library(&name, &library.host).unwrap();
            let expected = format!(
                "https://Library.example.org:8443/folder/v1/images/{expected}?arch={ARCHITECTURE}"
            );
            assert_eq!(library.url(&name, "images"), expected);
            assert!(!library.source(&name).insecure);
        }
    }

    #[test]
    fn what_libraries_answer() {
        let hash = format!("sha256.{}", "a".repeat(64));
        let text = format!(
            r#"{{"data":{{"id":"1","hash":"{hash}","size":5,"arch":"{ARCHITECTURE}","uploaded":true}}}}"#
        );
        let (digest, found) = image(text.as_bytes()).unwrap();
        assert_eq!(digest.to_string(), hash.replace('.', ":"));
        assert_eq!((found.size(), found.layers.len(), found.sif), (5, 1, true));
        for (bad, part) in [
            ("{}", "has no data"),
            ("<html>", "cannot be read"),
            (r#"{"data":{"size":5}}"#, "the hash \"\""),
            (r#"{"data":{"hash":"sif.1234","size":5}}"#, "sif.1234"),
            (
                r#"{"data":{"hash":"sha256.1","size":-5}}"#,
                "cannot be read",
            ),
            (
                r#"{"data":{"hash":"","size":5,"arch":"riscv64"}}"#,
                "for riscv64",
            ),
        ] {
            let error = image(bad.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{bad}: {error}");
        }
        let refused = br#"{"error":{"code":404,"message":"image not found"}}"#;
        assert_eq!(reason(refused).as_deref(), Some("image not found"));
        assert_eq!(reason(b"{}"), None);
    }

    #[tokio::test]
    async fn the_token_is_read_from_a_file_that_nobody_else_can_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let library = Library::new("https://x", Some(path.clone()));
        let write = |text: &str, mode| atomic::write(&path, text.as_bytes(), mode).unwrap();
        let error = library.authorization().await.unwrap_err();
        assert!(error.contains("images.library_token"), "{error}");
        write("s3cr3t\n", 0o640);
        let error = library.authorization().await.unwrap_err();
        assert!(
            error.contains("mode 0600") && !error.contains("s3cr3t"),
            "{error}"
        );
        write("s3cr3t\n", 0o600);
        let header = library.authorization().await.unwrap().unwrap();
        assert_eq!(header, "Bearer s3cr3t");
        assert!(header.is_sensitive());
        for bad in ["", "two\nlines"] {
            write(bad, 0o600);
            library.authorization().await.unwrap_err();
        }
        // Nobody writes into it.
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let piped = Library::new("https://x", Some(pipe));
        let error = piped.authorization().await.unwrap_err();
        assert!(error.contains("is empty"), "{error}");
        let none = Library::new("https://x", None);
        assert!(none.authorization().await.unwrap().is_none());
    }
}
