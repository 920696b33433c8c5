//! Images that are paths: SIF files and sandboxes under the site's roots.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::sif::FileId;
use super::{ImageError, ImageErrorKind};

/// Where a SIF file says that it is one.
const MAGIC_AT: usize = 32;
const MAGIC: &[u8] = b"SIF_MAGIC";

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Local {
    Sif(PathBuf, FileId),
    Sandbox(PathBuf),
}

/// The canonical path of an image under one of the roots. Blocking.
pub(super) fn find(image: &str, path: &Path, roots: &[PathBuf]) -> Result<Local, ImageError> {
    let invalid = |words: String| ImageError::new(image, ImageErrorKind::InvalidName, words);
    if roots.is_empty() {
        return Err(invalid(
            "this site allows no paths as images (image_roots)".to_owned(),
        ));
    }
    // The text first: whether a file outside the roots exists is nobody's business.
    let named: Vec<PathBuf> = roots.iter().map(|root| root.join("")).collect();
    let canonical: Vec<PathBuf> = roots
        .iter()
        .filter_map(|root| root.canonicalize().ok())
        .collect();
    let under = |path: &Path, roots: &[PathBuf]| roots.iter().any(|root| path.starts_with(root));
    let outside = || {
        let roots: Vec<String> = roots
            .iter()
            .map(|root| root.display().to_string())
            .collect();
        invalid(format!(
            "it is not under an allowed root ({})",
            roots.join(", ")
        ))
    };
    if !under(path, &named) && !under(path, &canonical) {
        return Err(outside());
    }
    let absent =
        |err: std::io::Error| ImageError::new(image, ImageErrorKind::Pull, err.to_string());
    let path = path.canonicalize().map_err(absent)?;
    if !under(&path, &canonical) {
        return Err(outside());
    }
    if path.is_dir() {
        return Ok(Local::Sandbox(path));
    }
    let mut head = [0_u8; MAGIC_AT + MAGIC.len()];
    let id = std::fs::File::open(&path)
        .and_then(|mut file| {
            file.read_exact(&mut head)?;
            file.metadata()
        })
        .map_err(absent)?;
    if head.ends_with(MAGIC) {
        return Ok(Local::Sif(path, FileId::of(&id)));
    }
    Err(invalid("it is neither a SIF file nor a sandbox".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_under_a_root() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("root"), dir.path().join("other"));
        std::fs::create_dir_all(root.join("box")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::os::unix::fs::symlink(&other, root.join("out")).unwrap();
        std::os::unix::fs::symlink("box", root.join("in")).unwrap();
        let roots = [root.clone()];
        let find = |path: PathBuf| find("i", &path, &roots).map_err(|err| err.kind);
        assert_eq!(find(root.join("box")), Ok(Local::Sandbox(root.join("box"))));
        assert_eq!(find(root.join("in")), Ok(Local::Sandbox(root.join("box"))));
        assert_eq!(find(root.join("out")), Err(ImageErrorKind::InvalidName));
        assert_eq!(
            find(root.join("../other")),
            Err(ImageErrorKind::InvalidName)
        );
        assert_eq!(find(other), Err(ImageErrorKind::InvalidName));
        assert_eq!(find(root.join("nothing")), Err(ImageErrorKind::Pull));
        assert!(super::find("i", &root, &[]).is_err());
    }
}
