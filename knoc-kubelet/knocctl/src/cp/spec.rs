//! PURE: parses the two sides of a copy, which have the same forms as in `kubectl cp`.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::super::CtlError;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Side {
    /// A path of this machine.
    Local(PathBuf),
    /// `POD:PATH`.
    Remote(Remote),
}

/// A path in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) pod: String,
    pub(super) path: String,
}

impl FromStr for Side {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `./a:b` and `/a:b` are local files; `ns/pod:path` is not.
        let local = text.starts_with(['.', '/']);
        Ok(match text.split_once(':') {
            Some((pod, path)) if !local && !pod.is_empty() => Self::Remote(Remote {
                pod: pod.to_owned(),
                path: path.to_owned(),
            }),
            _ => Self::Local(text.into()),
        })
    }
}

/// The last name of a path in a pod.
pub(super) fn base(path: &str) -> Result<String, CtlError> {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or("");
    match name {
        "" | "." | ".." => Err(CtlError::CopyPath {
            path: path.to_owned(),
        }),
        name => Ok(name.to_owned()),
    }
}

/// The folder in which `tar` packs `path`, and the name that it packs there.
pub(super) fn member(path: &str) -> (String, String) {
    let path = path.trim_end_matches('/');
    match path.rsplit_once('/') {
        Some(("", name)) => ("/".to_owned(), name.to_owned()),
        Some((folder, name)) => (folder.to_owned(), name.to_owned()),
        None => (".".to_owned(), path.to_owned()),
    }
}

/// Where `from` is written in the container: the folder to unpack in, and the name. If `into` is set, `path` is an
/// existing folder, and `from` is copied into it.
pub(super) fn destination(
    path: &str,
    from: &Path,
    into: bool,
) -> Result<(String, PathBuf), CtlError> {
    if !into {
        base(path)?;
        let (folder, name) = member(path);
        return Ok((folder, name.into()));
    }
    // `.` has no name of its own: its contents are copied into the folder.
    let name = from.file_name().map_or_else(|| ".".into(), PathBuf::from);
    let folder = match path.trim_end_matches('/') {
        "" if path.starts_with('/') => "/",
        "" => ".",
        folder => folder,
    };
    Ok((folder.to_owned(), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_of_a_copy_are_parsed() {
        let side = |text: &str| text.parse::<Side>().unwrap_or_else(|never| match never {});
        let remote = |pod: &str, path: &str| {
            Side::Remote(Remote {
                pod: pod.into(),
                path: path.into(),
            })
        };
        assert_eq!(side("web:/tmp/x"), remote("web", "/tmp/x"));
        assert_eq!(side("ns/web:x:y"), remote("ns/web", "x:y"));
        for local in ["x", "./a:b", "/a:b", "../a:b", ":x", "."] {
            assert_eq!(side(local), Side::Local(local.into()));
        }
    }

    #[test]
    fn members_and_names() {
        let member = |path: &str| super::member(path);
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(member("/etc/hosts"), pair("/etc", "hosts"));
        assert_eq!(member("/etc/"), pair("/", "etc"));
        assert_eq!(member("a/b/"), pair("a", "b"));
        assert_eq!(member("a"), pair(".", "a"));
        assert_eq!(base("/a/b/").unwrap(), "b");
        for path in ["", "/", ".", "a/..", "/."] {
            base(path).unwrap_err();
        }
    }

    #[test]
    fn destinations() {
        let to = |path: &str, from: &str, into| {
            let (folder, name) = destination(path, Path::new(from), into).unwrap();
            format!("{folder} {}", name.display())
        };
        assert_eq!(to("/tmp/new", "a/file", false), "/tmp new");
        assert_eq!(to("new", "file", false), ". new");
        assert_eq!(to("/tmp", "a/file", true), "/tmp file");
        assert_eq!(to("/", "file", true), "/ file");
        assert_eq!(to("/tmp/", ".", true), "/tmp .");
        destination("..", Path::new("x"), false).unwrap_err();
    }
}
