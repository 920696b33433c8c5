//! Images that are paths: SIF files and sandboxes under the site's roots.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::cache::ImageFile;
use super::{ImageError, ImageErrorKind, Settings};

/// Where a SIF file says that it is one.
const MAGIC_AT: usize = 32;
const MAGIC: &[u8] = b"SIF_MAGIC";
/// More JSON objects than that no SIF of ours has.
const OBJECTS_LIMIT: usize = 16;

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Local {
    Sif(PathBuf),
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
    std::fs::File::open(&path)
        .and_then(|mut file| file.read_exact(&mut head))
        .map_err(absent)?;
    if head.ends_with(MAGIC) {
        return Ok(Local::Sif(path));
    }
    Err(invalid("it is neither a SIF file nor a sandbox".to_owned()))
}

/// The OCI config that a SIF carries, if it does.
pub(super) async fn config(settings: &Settings, sif: &Path) -> Option<ImageFile> {
    let list = settings
        .command()?
        .args(["sif", "list"])
        .arg(sif)
        .run()
        .await
        .ok()?;
    for id in json_objects(&list.text()).into_iter().take(OBJECTS_LIMIT) {
        let dump = settings
            .command()?
            .args(["sif", "dump", &id])
            .arg(sif)
            .run()
            .await
            .ok()?;
        if let Some(file) = ImageFile::of_sif(&dump.text()) {
            return Some(file);
        }
    }
    None
}

/// Ids of the JSON objects in `sif list`'s table.
fn json_objects(table: &str) -> Vec<String> {
    let rows = table
        .lines()
        .map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let json = rows.filter(|row| row.last().is_some_and(|kind| kind.starts_with("JSON")));
    let ids = json.filter_map(|row| row.first().map(|id| (*id).to_owned()));
    ids.filter(|id| id.bytes().all(|byte| byte.is_ascii_digit()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_apptainer() {
        let table = "\
------------------------------------------------------------------------------
ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE
------------------------------------------------------------------------------
1    |1       |NONE    |32176-32233               |Def.FILE
2    |1       |NONE    |32233-36211               |JSON.Generic
3    |1       |NONE    |36211-36323               |JSON.Generic
4    |1       |NONE    |36864-1118208             |FS (Squashfs/*System/amd64)
";
        assert_eq!(json_objects(table), ["2", "3"]);
    }

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
