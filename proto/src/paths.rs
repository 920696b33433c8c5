//! PURE: the paths of a pod's specification, by the rules of the API server and the kubelet.
//!
//! A path with a `..` component is refused. Every other path is cleaned as Go's `filepath.Clean` does it: repeated and
//! trailing slashes and `.` components go. Names that only begin with two dots, or contain them, are ordinary names.
//! Both sides use it: the kubelet to build the request, the agent to check it, the shim before it touches a file.

/// Linux takes paths that are shorter than this, and names that are not longer.
const PATH_BYTES: usize = 4096;
const NAME_BYTES: usize = 255;

/// Why a path is refused; Display says what would be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Nothing where a path is required.
    #[error("must not be empty")]
    Empty,
    /// A path in a volume that begins with a slash.
    #[error("must be a relative path")]
    Absolute,
    /// A path in a container that does not begin with a slash.
    #[error("must be an absolute path")]
    Relative,
    /// A `..` component.
    #[error("must not contain '..'")]
    Backstep,
    /// The path of a file that begins with two dots: such names are the writer's own.
    #[error("must not start with '..'")]
    Reserved,
    /// The path of a file that is the volume itself.
    #[error("must name a file below the volume")]
    Volume,
    /// A control character, such as a line break.
    #[error("must not contain control characters")]
    Control,
    /// Longer than Linux allows.
    #[error("must be at most {} bytes long, and each of its names at most {}", PATH_BYTES - 1, NAME_BYTES)]
    TooLong,
}

/// A folder or file of a volume, such as `subPath`: relative and clean. `.` is the volume itself.
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

/// A file that is written into a volume, such as `items[].path`: relative, clean and below the volume.
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

/// A place in a container, such as `mountPath`: absolute and clean.
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

/// Of a path without `..` components.
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
    fn what_leads_out_is_refused_before_it_is_cleaned() {
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
    fn files_are_below_their_volume_and_leave_the_writers_names_alone() {
        assert_eq!(of_file("./conf//a.txt").as_deref(), Ok("conf/a.txt"));
        assert_eq!(of_file("a/..b").as_deref(), Ok("a/..b"));
        assert_eq!(of_file("./"), Err(PathError::Volume));
        for path in ["..data", "..foo/x", "./..data", ".//..tmp"] {
            assert_eq!(of_file(path), Err(PathError::Reserved), "{path:?}");
        }
    }

    #[test]
    fn what_linux_does_not_take_is_refused() {
        assert_eq!(in_volume("a\nb"), Err(PathError::Control));
        assert_eq!(in_container("/a\0"), Err(PathError::Control));
        let name = "x".repeat(NAME_BYTES);
        assert_eq!(in_volume(&name).as_deref(), Ok(&*name));
        assert_eq!(in_volume(&format!("{name}x")), Err(PathError::TooLong));
        let path = vec!["x"; PATH_BYTES].join("/");
        assert_eq!(in_volume(&path), Err(PathError::TooLong));
    }
}
