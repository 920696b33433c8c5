//! PURE: checks the paths in a pod's specification by the rules of the API server and the kubelet.
//!
//! A path with a `..` component is rejected. Every other path is cleaned as by Go's `filepath.Clean`: repeated and
//! trailing slashes and `.` components are removed. Names that merely begin with two dots, or contain them, are
//! ordinary names. The kubelet uses this to build the request, the agent to check it, and the shim before it touches a
//! file.

/// Linux's limits (`PATH_MAX` and `NAME_MAX`): a path must be shorter than this, and a name not longer than
/// [`NAME_BYTES`].
const PATH_BYTES: usize = 4096;
const NAME_BYTES: usize = 255;

/// Why a path is rejected; `Display` says what is required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The path is empty.
    #[error("must not be empty")]
    Empty,
    /// A path within a volume begins with a slash.
    #[error("must be a relative path")]
    Absolute,
    /// A path in a container does not begin with a slash.
    #[error("must be an absolute path")]
    Relative,
    /// The path has a `..` component.
    #[error("must not contain '..'")]
    Backstep,
    /// The path of a file begins with two dots, which the writer of volumes reserves for its own names.
    #[error("must not start with '..'")]
    Reserved,
    /// The path of a file denotes the volume itself.
    #[error("must name a file below the volume")]
    Volume,
    /// The path contains a control character, such as a line break.
    #[error("must not contain control characters")]
    Control,
    /// The path or one of its names is longer than Linux allows.
    #[error("must be at most {} bytes long, and each of its names at most {}", PATH_BYTES - 1, NAME_BYTES)]
    TooLong,
}

/// Cleans the path of a folder or file within a volume, such as `subPath`: it must be relative, and `.` is the volume
/// itself.
pub fn in_volume(path: &str) -> Result<String, PathError> {
    if path.is_empty() {
        return Err(PathError::Empty);
    }
    if path.starts_with('/') {
        return Err(PathError::Absolute);
    }
    check(path)?;
    Ok(clean(path))
}

/// Cleans the path of a file that is written into a volume, such as `items[].path`: it must be relative and below the
/// volume.
pub fn of_file(path: &str) -> Result<String, PathError> {
    let clean = in_volume(path)?;
    if clean == "." {
        return Err(PathError::Volume);
    }
    if clean.starts_with("..") {
        return Err(PathError::Reserved);
    }
    Ok(clean)
}

/// Cleans a path in a container, such as `mountPath`: it must be absolute.
pub fn in_container(path: &str) -> Result<String, PathError> {
    if path.is_empty() {
        return Err(PathError::Empty);
    }
    if !path.starts_with('/') {
        return Err(PathError::Relative);
    }
    check(path)?;
    Ok(clean(path))
}

fn check(path: &str) -> Result<(), PathError> {
    if path.split('/').any(|name| name == "..") {
        return Err(PathError::Backstep);
    }
    if path.chars().any(char::is_control) {
        return Err(PathError::Control);
    }
    if path.len() >= PATH_BYTES || path.split('/').any(|name| name.len() > NAME_BYTES) {
        return Err(PathError::TooLong);
    }
    Ok(())
}

/// Cleans a path that has no `..` component.
fn clean(path: &str) -> String {
    let names = path
        .split('/')
        .filter(|name| !name.is_empty() && *name != ".");
    let names: Vec<&str> = names.collect();
    match (path.starts_with('/'), names.is_empty()) {
        (true, _) => format!("/{}", names.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => names.join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_as_go_cleans_them() {
        for (path, cleaned) in [
            ("a", "a"),
            ("./history", "history"),
            ("logs/", "logs"),
            ("a//b", "a/b"),
            ("./a/./b/", "a/b"),
            ("a/.", "a"),
            (".", "."),
            ("./", "."),
            (".//.", "."),
            (".hidden", ".hidden"),
            ("a..b", "a..b"),
            ("..foo", "..foo"),
            ("..data/x", "..data/x"),
            ("a/..b/...", "a/..b/..."),
            ("a b", "a b"),
        ] {
            assert_eq!(in_volume(path).as_deref(), Ok(cleaned), "{path:?}");
            let absolute = format!("/{path}");
            let cleaned = format!("/{}", if cleaned == "." { "" } else { cleaned });
            assert_eq!(
                in_container(&absolute).as_deref(),
                Ok(&*cleaned),
                "{path:?}"
            );
        }
        assert_eq!(in_container("//a///b//").as_deref(), Ok("/a/b"));
    }

    #[test]
    fn a_path_that_leads_out_is_rejected_before_it_is_cleaned() {
        for path in ["..", "../a", "a/..", "a/../b", "./..", "a/../../b", "a//.."] {
            assert_eq!(in_volume(path), Err(PathError::Backstep), "{path:?}");
            assert_eq!(of_file(path), Err(PathError::Backstep), "{path:?}");
            let path = format!("/{path}");
            assert_eq!(in_container(&path), Err(PathError::Backstep), "{path:?}");
        }
        assert_eq!(in_volume("/a"), Err(PathError::Absolute));
        assert_eq!(in_container("a"), Err(PathError::Relative));
        for check in [in_volume, of_file, in_container] {
            assert_eq!(check(""), Err(PathError::Empty));
        }
    }

    #[test]
    fn files_are_below_their_volume_and_avoid_the_writers_names() {
        assert_eq!(of_file("./conf//a.txt").as_deref(), Ok("conf/a.txt"));
        assert_eq!(of_file("a/..b").as_deref(), Ok("a/..b"));
        assert_eq!(of_file("./"), Err(PathError::Volume));
        for path in ["..data", "..foo/x", "./..data", ".//..tmp"] {
            assert_eq!(of_file(path), Err(PathError::Reserved), "{path:?}");
        }
    }

    #[test]
    fn paths_that_linux_does_not_accept_are_rejected() {
        assert_eq!(in_volume("a\nb"), Err(PathError::Control));
        assert_eq!(in_container("/a\0"), Err(PathError::Control));
        let name = "x".repeat(NAME_BYTES);
        assert_eq!(in_volume(&name).as_deref(), Ok(&*name));
        assert_eq!(in_volume(&format!("{name}x")), Err(PathError::TooLong));
        let path = vec!["x"; PATH_BYTES].join("/");
        assert_eq!(in_volume(&path), Err(PathError::TooLong));
    }
}
