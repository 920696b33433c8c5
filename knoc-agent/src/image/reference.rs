//! PURE: parses what a pod may name as an image.

use std::path::PathBuf;

use super::{
    ImageError, ImageErrorKind, Name, NameError,
    digest::Digest,
    login::Login,
    name::{LIBRARY, prefix},
};
use crate::config::Registry;

/// A parsed image reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// An image in a registry.
    Registry(Name),
    /// The path of a SIF file or a sandbox directory; not checked yet.
    Path(PathBuf),
}

/// Apptainer's schemes that are not supported.
const UNSUPPORTED: &[&str] = &[
    "library",
    "shub",
    "oci",
    "oci-archive",
    "docker-archive",
    "docker-daemon",
    "http",
    "https",
    "instance",
    "file",
    "dhub",
];

/// Parses what a pod names: `busybox`, `quay.io/a/b:tag`, `docker://…`, `oras://…`, an absolute path, or `library://…`, if the site
/// has a library, whose host this is.
pub fn parse(image: &str, library: Option<&str>) -> Result<Reference, ImageError> {
    let invalid = |message: String| ImageError::new(image, ImageErrorKind::InvalidName, message);
    let unsupported = |why: String| ImageError::new(image, ImageErrorKind::Unsupported, why);
    if image.starts_with('/') {
        if image.contains('\0') {
            return Err(invalid("a path must not contain NUL".to_owned()));
        }
        return Ok(Reference::Path(PathBuf::from(image)));
    }
    if let (Some(host), Some(text)) = (library, image.strip_prefix(LIBRARY)) {
        let name = Name::of_library(text, host);
        return name.map(Reference::Registry).map_err(|error| {
            let why = error.to_string();
            if error == NameError::Library {
                unsupported(why)
            } else {
                invalid(why)
            }
        });
    }
    let schemes = ["docker://", "oras://"];
    let name = schemes
        .iter()
        .find_map(|scheme| image.strip_prefix(*scheme));
    if let Some((scheme, rest)) = name.unwrap_or(image).split_once(':')
        && (rest.starts_with("//")
            || (UNSUPPORTED.contains(&scheme) && rest.starts_with(['/', '.'])))
    {
        let message = if scheme == "library" {
            "needs the address of a library, images.library in the site file, and two slashes; or fetch it once with `apptainer pull`, \
             and name the SIF file by its path under the site's image_roots"
        } else if UNSUPPORTED.contains(&scheme) {
            "is not supported; fetch it once with `apptainer pull`, and name the SIF file by its path under the site's image_roots"
        } else {
            "is unknown; use docker://, oras://, or a path under the site's image_roots"
        };
        return Err(unsupported(format!("the source {scheme}: {message}")));
    }
    Name::of_pod(image)
        .map(Reference::Registry)
        .map_err(|err| invalid(format!("{err}")))
}

/// Where an image is fetched from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// The name at the mirror, or the name itself if there is no mirror.
    pub reference: Name,
    /// Whether plain HTTP is used.
    pub insecure: bool,
    /// The credentials for it.
    pub login: Option<Login>,
}

impl Source {
    /// The same image at that digest.
    #[must_use]
    pub fn at(&self, digest: &Digest) -> Self {
        Self {
            reference: self.reference.at(digest),
            ..self.clone()
        }
    }
}

/// Checks whether `policy.registries` lets pods name this image.
pub fn allowed(name: &Name, allowed: &[String]) -> Result<(), String> {
    let path = name.policy_path();
    let begins = |entry: &String| path.strip_prefix(&prefix(entry)).is_some_and(at_slash);
    if allowed.is_empty() || allowed.iter().any(begins) {
        return Ok(());
    }
    let (registry, all) = (name.registry(), allowed.join(", "));
    Err(format!(
        "{path} of the registry {registry} is not among policy.registries of the site file ({all})"
    ))
}

/// The source of an image: the first mirror whose prefix matches up to a `/`, or the registry
/// itself. A pod's credentials are for the registry that it names, so a mirror gets them only if the
/// site file says so.
pub fn source(
    name: &Name,
    registries: &[Registry],
    login: Option<&Login>,
) -> Result<Source, String> {
    let full = name.repository_path();
    for entry in registries {
        let prefix = prefix(&entry.prefix);
        let Some(rest) = full.strip_prefix(&prefix).filter(|rest| at_slash(rest)) else {
            continue;
        };
        let mirror = entry.mirror.as_deref().unwrap_or(&prefix);
        let mirror = mirror.trim_end_matches('/');
        let plain = mirror.strip_prefix("http://");
        let mirror = plain
            .or_else(|| mirror.strip_prefix("https://"))
            .unwrap_or(mirror);
        let reference = rename(name, &format!("{mirror}{rest}"))?;
        let trusted = entry.credentials || reference.registry() == name.registry();
        return Ok(Source {
            reference,
            insecure: entry.insecure || plain.is_some(),
            login: login.filter(|_| trusted).cloned(),
        });
    }
    Ok(Source {
        reference: name.clone(),
        insecure: false,
        login: login.cloned(),
    })
}

fn at_slash(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('/')
}

/// The same tag and digest under another name.
fn rename(name: &Name, full: &str) -> Result<Name, String> {
    let (tag, digest) = (name.tag(), name.digest());
    let tag = tag.map(|tag| format!(":{tag}")).unwrap_or_default();
    let digest = digest
        .map(|digest| format!("@{digest}"))
        .unwrap_or_default();
    let text = format!("{}{full}{tag}{digest}", name.scheme());
    Name::of_pod(&text).map_err(|err| format!("the mirror's name {text:?}: {err}"))
}

/// `docker.io/library/busybox@sha256:…`: the image ID that Kubernetes shows, whichever mirror was
/// used.
#[must_use]
pub fn image_id(name: &Name, digest: &str) -> String {
    format!("{}{}@{digest}", name.scheme(), name.repository_path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIBRARY_HOST: &str = "Library.example.org:8443";

    fn whole(image: &str) -> String {
        shown(parse(image, None))
    }

    fn shown(parsed: Result<Reference, ImageError>) -> String {
        match parsed {
            Ok(Reference::Registry(name)) => name.whole(),
            Ok(Reference::Path(path)) => format!("path {}", path.display()),
            Err(err) => format!("{}: {}", err.reason(), err.message),
        }
    }

    /// Webhooks that verify images write both.
    #[test]
    fn of_a_tag_and_a_digest_the_digest_decides_and_the_tag_is_shown() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let both = format!("ghcr.io/a/b:v1@{digest}");
        assert_eq!(whole(&both), both);
        let version = both.parse::<Name>().map(|name| name.version());
        assert_eq!(version.as_ref(), Ok(&digest));
    }

    #[test]
    fn names_of_pods() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let cases = [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("docker://busybox", "docker.io/library/busybox:latest"),
            ("argoproj/argoexec:v3", "docker.io/argoproj/argoexec:v3"),
            (
                "ctl:5000/library/busybox",
                "ctl:5000/library/busybox:latest",
            ),
            ("localhost/x", "localhost/x:latest"),
            ("quay.io/a/b/c:t", "quay.io/a/b/c:t"),
            ("/images/x.sif", "path /images/x.sif"),
            ("oras://ghcr.io/a/b:1", "oras://ghcr.io/a/b:1"),
            ("oras://ctl:5000/a", "oras://ctl:5000/a:latest"),
            // The case of a host means nothing; that of a tag does.
            ("Quay.IO/a/b:T", "quay.io/a/b:T"),
            (
                "INDEX.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("LocalHost/x", "localhost/x:latest"),
        ];
        for (image, expected) in cases {
            assert_eq!(whole(image), expected, "{image}");
        }
        assert_eq!(
            whole(&format!("busybox@{digest}")),
            format!("docker.io/library/busybox@{digest}")
        );
        for bad in [
            "",
            " ",
            "Busybox",
            "quay.io/A/b",
            "busybox:",
            "a b",
            "oras://",
            "oras://docker://x",
            "oras:/x/y",
            "library://a/b:c",
            "shub://x",
            "docker-archive:/x.tar",
            "oci:/dir",
            "busybox@sha256:1",
            "foo://bar",
            "../x",
            "./x.sif",
            "docker://",
            "docker-daemon://x",
        ] {
            assert!(
                whole(bad).starts_with("InvalidImageName: "),
                "{bad}: {}",
                whole(bad)
            );
        }
    }

    #[test]
    fn without_the_setting_the_message_names_it() {
        let library = whole("library://a/b");
        for part in [
            "the source library: needs",
            "images.library",
            "`apptainer pull`",
        ] {
            assert!(library.contains(part), "{library}");
        }
    }

    fn in_library(image: &str) -> String {
        shown(parse(image, Some("library.example.org:8443")))
    }

    #[test]
    fn names_in_the_library_of_the_site() {
        let hex = "a".repeat(64);
        let host = "library://library.example.org:8443";
        let hash = format!("a/b/c:sha256.{hex}");
        let digest = format!("a/b/c@sha256:{hex}");
        let both = format!("a/b/c:1@sha256:{hex}");
        let cases = [
            ("a/b/c:1", format!("{host}/a/b/c:1")),
            ("a/b/c", format!("{host}/a/b/c:latest")),
            ("b/c:V-1.2", format!("{host}/b/c:V-1.2")),
            ("c", format!("{host}/c:latest")),
            (
                "Library.Example.org:8443/a/b/c:1",
                format!("{host}/a/b/c:1"),
            ),
            ("library.example.org:8443/c:1", format!("{host}/c:1")),
            (hash.as_str(), format!("{host}/a/b/c@sha256:{hex}")),
            (digest.as_str(), format!("{host}/a/b/c@sha256:{hex}")),
            (both.as_str(), format!("{host}/a/b/c:1@sha256:{hex}")),
            // Not a digest, so it is a tag.
            ("c:sha256.abc", format!("{host}/c:sha256.abc")),
        ];
        for (name, expected) in cases {
            assert_eq!(in_library(&format!("library://{name}")), expected, "{name}");
            assert_eq!(in_library(&expected), expected);
        }
        for (bad, part) in [
            ("library://", "at least one component"),
            ("library:///c", "lower-case letters"),
            ("library://a//c", "lower-case letters"),
            ("library://A/b/c", "lower-case letters"),
            ("library://a/b/c:", "a tag"),
            ("library://a/b/c:1,2", "a tag"),
            ("library://a/b/c:1:2", "a tag"),
            ("library://a/b/c@sha256:1", "a digest"),
            ("library://user@a/b/c", "a digest"),
            ("library://a/b/c?arch=x", "lower-case letters"),
            ("library://a/b/c#x", "lower-case letters"),
            ("library://a/../c", "lower-case letters"),
            ("library://other.example.org/a/b/c", "HOST that of"),
            ("library://library.example.org/a/b/c", "HOST that of"),
            ("library://library.example.org:8443/a/b/c/d", "HOST that of"),
            ("library:/a/b", "two slashes"),
            ("docker://library://a", "two slashes"),
        ] {
            let error = in_library(bad);
            assert!(error.starts_with("InvalidImageName: "), "{bad}: {error}");
            assert!(error.contains(part), "{bad}: {error}");
        }
        // What is no name in a library is read as before.
        assert_eq!(in_library("library:1"), "docker.io/library/library:1");
    }

    #[test]
    fn the_policy_is_compared_with_full_names_in_a_library() {
        let list = ["library.example.org:8443/a/b".to_owned()];
        let all = [LIBRARY_HOST.to_owned()];
        for (image, expected) in [
            ("library://a/b/c", true),
            ("library://a/bb/c", false),
            ("library://b/c", false),
            // The library puts its own entity before it.
            ("library://a/b", false),
            ("library://c", false),
        ] {
            let Ok(Reference::Registry(name)) = parse(image, Some("library.example.org:8443"))
            else {
                unreachable!("{image}")
            };
            assert_eq!(allowed(&name, &list).is_ok(), expected, "{image}");
            assert!(allowed(&name, &all).is_ok(), "{image}");
            // What it gives is not what the registry on the same host has for a pod's credentials.
            let registry: Name = name.repository_path().parse().unwrap();
            assert_ne!(name.owner(), registry.owner(), "{image}");
        }
    }

    fn registry(prefix: &str, mirror: Option<&str>, insecure: bool) -> Registry {
        Registry {
            prefix: prefix.to_owned(),
            mirror: mirror.map(str::to_owned),
            insecure,
            credentials: false,
        }
    }

    #[test]
    fn mirrors_replace_whole_path_parts() {
        let registries = [
            registry("docker.io/library", Some("ctl:5000/lib"), true),
            registry("docker.io", Some("https://mirror.example.org/hub/"), false),
            registry("Plain.example.org", Some("http://Plain:80"), false),
            registry("CTL:5000/", None, true),
        ];
        let cases = [
            ("busybox", "ctl:5000/lib/busybox:latest", true),
            ("a/b:c", "mirror.example.org/hub/a/b:c", false),
            (
                "docker.io/libraryx/b",
                "mirror.example.org/hub/libraryx/b:latest",
                false,
            ),
            ("plain.example.org/x", "plain:80/x:latest", true),
            ("ctl:5000/x/y", "ctl:5000/x/y:latest", true),
            ("Ctl:5000/x/y", "ctl:5000/x/y:latest", true),
            (
                "DOCKER.io/library/busybox",
                "ctl:5000/lib/busybox:latest",
                true,
            ),
            ("ctl:50001/x/y", "ctl:50001/x/y:latest", false),
            ("quay.io/x/y", "quay.io/x/y:latest", false),
            ("oras://ctl:5000/x:1", "oras://ctl:5000/x:1", true),
            (
                "oras://docker.io/a/b",
                "oras://mirror.example.org/hub/a/b:latest",
                false,
            ),
        ];
        for (image, expected, insecure) in cases {
            let Ok(Reference::Registry(name)) = parse(image, None) else {
                unreachable!("{image}")
            };
            let source = source(&name, &registries, None).unwrap();
            assert_eq!(
                (source.reference.whole().as_str(), source.insecure),
                (expected, insecure)
            );
        }
    }

    #[test]
    fn a_mirror_gets_credentials_only_if_the_site_says_so() {
        let login = Login::new("ann", "password");
        let mut registries = [
            registry("docker.io", Some("ctl:5000"), true),
            registry("quay.io/x", Some("Quay.io/y"), false),
        ];
        let of = |registries: &[Registry], image: &str| {
            let name: Name = image.parse().unwrap();
            source(&name, registries, login.as_ref()).unwrap().login
        };
        assert_eq!(of(&registries, "busybox"), None);
        assert_eq!(of(&registries, "quay.io/x/a"), login, "the same registry");
        assert_eq!(of(&registries, "ghcr.io/x/a"), login);
        registries[0].credentials = true;
        assert_eq!(of(&registries, "busybox"), login);
    }

    #[test]
    fn registries_are_allowed_at_whole_path_parts() {
        let list = ["quay.io", "Index.Docker.io/library/", "CTL:5000"].map(str::to_owned);
        for (image, expected) in [
            ("busybox", true),
            ("docker.io/library/busybox@sha256:", false),
            ("a/b", false),
            ("quay.io/x/y", true),
            ("QUAY.io/x/y", true),
            ("quay.io:443/x/y", false),
            ("quay.io.evil.org/x/y", false),
            ("ctl:5000/x", true),
            ("ctl:50001/x", false),
            ("Ctl:5000/x", true),
        ] {
            let Ok(Reference::Registry(name)) = parse(image, None) else {
                assert!(!expected, "{image}");
                continue;
            };
            assert_eq!(allowed(&name, &list).is_ok(), expected, "{image}");
            assert!(allowed(&name, &[]).is_ok());
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(image in ".*") {
            if let Ok(Reference::Registry(name)) = parse(&image, Some("library.example.org")) {
                let registries = [registry("docker.io", Some("ctl:5000"), true)];
                source(&name, &registries, None).ok();
            }
        }
    }
}
