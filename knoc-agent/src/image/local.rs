//! Images that are paths: SIF files and sandboxes under the site's image roots.

use std::{
    fs::File,
    io::Read as _,
    os::{fd::AsRawFd as _, unix::fs::FileExt as _},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use knoc_contract::{
    image_file,
    walk::{self, Found, WalkError},
};
use knoc_proto::error::chain;

use super::{ImageError, ImageErrorKind, sif::FileId};

/// The offset of the magic bytes of a SIF file.
const MAGIC_AT: usize = 32;
const MAGIC: &[u8] = b"SIF_MAGIC";
/// Where the header has the number of descriptors, and where it has the places of the descriptors and of the data, each with its
/// length behind it. All numbers are little-endian, with eight bytes.
const TOTAL_AT: u64 = 88;
const PLACES_AT: [u64; 2] = [96, 112];
/// More descriptors than any image has. A runtime that opens the file has memory for as many as the header says.
const MOST: u64 = 4096;

/// An image at a path: opened once, and identified by its device and inode.
#[derive(Debug)]
pub(super) struct Local {
    /// The path with all links resolved.
    pub(super) path: PathBuf,
    /// Written to the job file: a container starts only from this file.
    pub(super) id: image_file::FileId,
    /// The open SIF file; `None` for a sandbox.
    pub(super) sif: Option<(FileId, Arc<File>)>,
}

/// The directories under which pods may name images.
#[derive(Debug, Clone)]
pub(super) struct Roots {
    pub(super) folders: Vec<PathBuf>,
    /// Whether other users may own and write the files there.
    pub(super) shared: bool,
}

/// Finds the image under one of the roots. Blocking.
pub(super) fn find(image: &str, path: &Path, roots: &Roots) -> Result<Local, ImageError> {
    let invalid = |message: String| ImageError::new(image, ImageErrorKind::InvalidName, message);
    let absent = |message: String| ImageError::new(image, ImageErrorKind::Pull, message);
    if roots.folders.is_empty() {
        return Err(invalid(
            "this site allows no paths as images (image_roots)".to_owned(),
        ));
    }
    // The path's text is checked first: a pod must not learn whether a file outside the roots
    // exists.
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(
            "the path of an image must not contain `..`".to_owned(),
        ));
    }
    let named: Vec<PathBuf> = roots.folders.iter().map(|root| root.join("")).collect();
    let canonical: Vec<PathBuf> = roots
        .folders
        .iter()
        .filter_map(|root| resolved(root, roots.shared))
        .collect();
    let under = |path: &Path, roots: &[PathBuf]| roots.iter().any(|root| path.starts_with(root));
    let outside = || {
        let roots: Vec<String> = roots
            .folders
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
    let found = walk::owned(path, roots.shared).map_err(|error| absent(message(&error)))?;
    if !under(&found.path, &canonical) {
        return Err(outside());
    }
    let id = image_file::FileId::of(&found);
    if found.is_folder() {
        let path = found.path;
        let sif = None;
        return Ok(Local { path, id, sif });
    }
    let Some(sif) = open_sif(&found).map_err(|error| absent(error.to_string()))? else {
        return Err(invalid("it is neither a SIF file nor a sandbox".to_owned()));
    };
    Ok(Local {
        path: found.path,
        id,
        sif: Some(sif),
    })
}

/// The root without links. A root that others could make lead elsewhere leads nowhere.
fn resolved(root: &Path, shared: bool) -> Option<PathBuf> {
    let found = if shared {
        walk::owned(root, true)
    } else {
        walk::owned_way(root)
    };
    found.ok().map(|found| found.path)
}

/// Why the path of an image is not followed, and what to do about it.
fn message(error: &WalkError) -> String {
    match error {
        WalkError::Untrusted { .. } => format!(
            "{error}, so others could replace the image: make sure that it and its directories belong to root or to the agent's \
             user and that nobody else can write to them, or set trust_shared_roots in the site file"
        ),
        WalkError::Io { source, .. } => source.to_string(),
        WalkError::Leaves(_)
        | WalkError::TooLong(_)
        | WalkError::Guarded(_)
        | WalkError::Refused(_) => chain(error),
    }
}

/// Opens the file for reading if it is a SIF file.
fn open_sif(found: &Found) -> std::io::Result<Option<(FileId, Arc<File>)>> {
    let kind = rustix::fs::FileType::from_raw_mode(found.stat.st_mode);
    if kind != rustix::fs::FileType::RegularFile {
        return Ok(None);
    }
    let again = format!("/proc/self/fd/{}", found.fd.as_raw_fd());
    open(Path::new(&again))
}

/// Opens a file for reading if it is a SIF file. Blocking.
pub(super) fn open(path: &Path) -> std::io::Result<Option<(FileId, Arc<File>)>> {
    let mut file = File::open(path)?;
    let mut head = [0_u8; MAGIC_AT + MAGIC.len()];
    file.read_exact(&mut head)?;
    if !head.ends_with(MAGIC) || number(&file, TOTAL_AT).is_some_and(|total| total > MOST) {
        return Ok(None);
    }
    let id = FileId::of(&file.metadata()?);
    Ok(Some((id, Arc::new(file))))
}

/// Whether the SIF file has everything that its header promises: whoever wrote it was not stopped, and nothing was cut off. Blocking.
pub(super) fn is_whole(sif: &File) -> bool {
    let size = sif.metadata().map_or(0, |about| about.len());
    let end = |at| number(sif, at)?.checked_add(number(sif, at + 8)?);
    PLACES_AT
        .iter()
        .all(|&at| end(at).is_some_and(|end| end <= size))
}

/// A number of the header; `None` if the file ends before it.
fn number(sif: &File, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    sif.read_exact_at(&mut bytes, at).ok()?;
    Some(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_under_a_root_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("root"), dir.path().join("other"));
        std::fs::create_dir_all(root.join("box")).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::os::unix::fs::symlink(&other, root.join("out")).unwrap();
        std::os::unix::fs::symlink("box", root.join("in")).unwrap();
        std::fs::File::create(root.join("text")).unwrap();
        let roots = Roots {
            folders: vec![root.clone()],
            shared: false,
        };
        let find = |path: PathBuf| {
            let found = find("i", &path, &roots);
            found.map(|local| local.path).map_err(|err| err.kind)
        };
        assert_eq!(find(root.join("box")), Ok(root.join("box")));
        assert_eq!(find(root.join("in")), Ok(root.join("box")));
        assert_eq!(find(root.join("out")), Err(ImageErrorKind::InvalidName));
        assert_eq!(
            find(root.join("../other")),
            Err(ImageErrorKind::InvalidName)
        );
        assert_eq!(find(other), Err(ImageErrorKind::InvalidName));
        // Whether it exists, is not said.
        assert_eq!(
            find(root.join("../nothing")),
            Err(ImageErrorKind::InvalidName)
        );
        assert_eq!(find(root.join("nothing")), Err(ImageErrorKind::Pull));
        assert_eq!(find(root.join("text")), Err(ImageErrorKind::Pull));
        let none = Roots {
            folders: Vec::new(),
            shared: false,
        };
        assert!(super::find("i", &root, &none).is_err());
    }

    #[test]
    fn a_sif_file_is_whole_if_nothing_of_what_its_header_promises_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sif");
        // As Apptainer writes it: 48 descriptors of 585 bytes, and the data behind them.
        let mut bytes = vec![0; 40_000];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(MAGIC_AT, MAGIC);
        for (at, number) in [
            (88, 48_u64),
            (96, 4096),
            (104, 28_080),
            (112, 32_176),
            (120, 7824),
        ] {
            put(at, &number.to_le_bytes());
        }
        let check = |bytes: &[u8]| {
            knoc_contract::jobdir::atomic::write(&path, bytes, 0o600).unwrap();
            let (_, sif) = open(&path).unwrap()?;
            Some(is_whole(&sif))
        };
        assert_eq!(check(&bytes), Some(true));
        for length in [39_999, 32_176, 4096, 128, 127, 41] {
            assert_eq!(check(&bytes[..length]), Some(false), "{length}");
        }
        // No number overflows.
        for at in [96, 104, 112, 120] {
            let mut other = bytes.clone();
            other[at..at + 8].fill(0xff);
            assert_eq!(check(&other), Some(false), "{at}");
        }
        let mut hungry = bytes;
        hungry[88..96].copy_from_slice(&(1_u64 << 26).to_le_bytes());
        assert_eq!(check(&hungry), None);
    }

    #[test]
    fn a_root_that_others_can_write_is_rejected_unless_the_site_trusts_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap().join("root");
        std::fs::create_dir_all(root.join("box")).unwrap();
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&root, open).unwrap();
        let find = |shared| {
            let folders = vec![root.clone()];
            find("i", &root.join("box"), &Roots { folders, shared })
        };
        let message = find(false).unwrap_err().message;
        assert!(
            message.starts_with(&format!("{root:?} ")) && message.contains("trust_shared_roots"),
            "{message}"
        );
        assert_eq!(find(true).unwrap().path, root.join("box"));
    }

    /// A root that is a link is as safe as the folder that the link is in.
    #[test]
    fn a_root_that_others_can_make_lead_elsewhere_leads_to_no_image() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (open, private) = (dir.join("open"), dir.join("private"));
        std::fs::create_dir_all(private.join("box")).unwrap();
        std::fs::create_dir_all(&open).unwrap();
        std::os::unix::fs::symlink(&private, open.join("root")).unwrap();
        let mode = std::fs::Permissions::from_mode;
        let find = |path: PathBuf, shared| {
            let folders = vec![open.join("root")];
            let found = find("i", &path, &Roots { folders, shared });
            found.map(|local| local.path).map_err(|err| err.kind)
        };
        std::fs::set_permissions(&open, mode(0o755)).unwrap();
        assert_eq!(find(private.join("box"), false), Ok(private.join("box")));
        std::fs::set_permissions(&open, mode(0o777)).unwrap();
        assert_eq!(
            find(private.join("box"), false),
            Err(ImageErrorKind::InvalidName)
        );
        assert_eq!(
            find(open.join("root/box"), false),
            Err(ImageErrorKind::Pull)
        );
        assert_eq!(find(private.join("box"), true), Ok(private.join("box")));
    }
}
