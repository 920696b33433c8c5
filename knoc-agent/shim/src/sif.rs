//! Which partition of an image file has the image's files, which a runtime that mounts an image as a volume has to be told, and
//! how these are compressed.
//!
//! A SIF file begins with a header, which says where its descriptors are. All numbers are little-endian. A file without that
//! header is a file system as a whole.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

/// The header, and where in it the magic, the number of descriptors and their place are.
const HEADER: usize = 128;
const MAGIC: (usize, &[u8]) = (32, b"SIF_MAGIC\0");
const TOTAL: usize = 88;
const PLACE: usize = 96;

/// One descriptor: its kind, whether it is used, its id, and the kind of file system and of partition.
const DESCRIPTOR: usize = 585;
const KIND: usize = 0;
const USED: usize = 4;
const ID: usize = 5;
const OFFSET: usize = 17;
const FILE_SYSTEM: usize = 201;
const PARTITION: usize = 205;

const KIND_PARTITION: u32 = 0x4004;
const SQUASHFS: u32 = 1;
/// The system that an architecture starts with.
const PRIMARY: u32 = 2;

/// The beginning of a squashfs: its magic, and where the compression is.
const SUPERBLOCK: usize = 22;
const SQUASHFS_MAGIC: &[u8] = b"hsqs";
const COMPRESSION: usize = 20;

/// More descriptors than any image has.
const MOST: u64 = 4096;

/// The part of an image file that is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The id of the partition; `None`: the whole file.
    pub(crate) id: Option<u32>,
}

/// Why an image cannot be mounted as a volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SifError {
    #[error("read {path:?}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the image {0:?} has no partition with a squashfs of its files, so it cannot be a volume"
    )]
    NoPartition(PathBuf),
}

/// Finds the part of the image file. Blocks on file work.
pub(crate) fn part(path: &Path) -> Result<Part, SifError> {
    let failed = |source| SifError::Read {
        path: path.to_owned(),
        source,
    };
    let file = open(path).map_err(failed)?;
    match find(&file).map_err(failed)? {
        Place::Whole => Ok(Part { id: None }),
        Place::Partition { id, .. } => Ok(Part { id: Some(id) }),
        Place::Nowhere => Err(SifError::NoPartition(path.to_owned())),
    }
}

/// How the files of the image are compressed, if it is known and not gzip, which every runtime can read. Blocks on file work.
pub(crate) fn other_compression(path: &Path) -> Option<&'static str> {
    let file = open(path).ok()?;
    let at = match find(&file).ok()? {
        Place::Whole => 0,
        Place::Partition { offset, .. } => offset,
        Place::Nowhere => return None,
    };
    let mut superblock = [0; SUPERBLOCK];
    file.read_exact_at(&mut superblock, at).ok()?;
    compression(&superblock)
}

/// Where the image's files are.
enum Place {
    /// The file is not a SIF file.
    Whole,
    Partition {
        id: u32,
        offset: u64,
    },
    Nowhere,
}

/// Opens the image. The container gets the file that is checked later; if something else stands here now, it must not hold up
/// the pod.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty())?;
    Ok(File::from(opened))
}

fn find(file: &File) -> io::Result<Place> {
    let mut header = [0; HEADER];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Place::Whole),
        Err(error) => return Err(error),
    }
    let Some((total, place)) = descriptors(&header) else {
        return Ok(Place::Whole);
    };
    let mut descriptor = [0; DESCRIPTOR];
    let size = DESCRIPTOR as u64;
    for number in 0..total.min(MOST) {
        let at = place.saturating_add(number.saturating_mul(size));
        file.read_exact_at(&mut descriptor, at)?;
        if let Some((id, offset)) = system(&descriptor) {
            return Ok(Place::Partition { id, offset });
        }
    }
    Ok(Place::Nowhere)
}

/// PURE: the number of descriptors and where the first one is; `None` if it is no SIF file.
fn descriptors(header: &[u8]) -> Option<(u64, u64)> {
    let (at, magic) = MAGIC;
    if !header.get(at..)?.starts_with(magic) {
        return None;
    }
    let number = |at: usize| {
        let bytes = header.get(at..)?.first_chunk::<8>()?;
        Some(u64::from_le_bytes(*bytes))
    };
    Some((number(TOTAL)?, number(PLACE)?))
}

/// PURE: the id of the partition and where it begins, if the descriptor is that of the primary system.
fn system(descriptor: &[u8]) -> Option<(u32, u64)> {
    let number = |at: usize| {
        let bytes = descriptor.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let used = *descriptor.get(USED)? != 0;
    let kinds = [number(KIND)?, number(FILE_SYSTEM)?, number(PARTITION)?];
    if !used || kinds != [KIND_PARTITION, SQUASHFS, PRIMARY] {
        return None;
    }
    let offset = descriptor.get(OFFSET..)?.first_chunk::<8>()?;
    Some((number(ID)?, u64::from_le_bytes(*offset)))
}

/// PURE: the compression that the superblock names, if it is known and not gzip.
fn compression(superblock: &[u8]) -> Option<&'static str> {
    if !superblock.starts_with(SQUASHFS_MAGIC) {
        return None;
    }
    let kind = superblock.get(COMPRESSION..)?.first_chunk::<2>()?;
    match u16::from_le_bytes(*kind) {
        2 => Some("lzma"),
        3 => Some("lzo"),
        4 => Some("xz"),
        5 => Some("lz4"),
        6 => Some("zstd"),
        _ => None,
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests {
    use super::*;

    fn header(total: u64, place: u64) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[MAGIC.0..MAGIC.0 + MAGIC.1.len()].copy_from_slice(MAGIC.1);
        bytes[TOTAL..TOTAL + 8].copy_from_slice(&total.to_le_bytes());
        bytes[PLACE..PLACE + 8].copy_from_slice(&place.to_le_bytes());
        bytes
    }

    fn descriptor(kind: u32, id: u32, file_system: u32, partition: u32) -> Vec<u8> {
        let mut bytes = vec![0; DESCRIPTOR];
        bytes[USED] = 1;
        for (at, value) in [
            (KIND, kind),
            (ID, id),
            (FILE_SYSTEM, file_system),
            (PARTITION, partition),
        ] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_partition_with_the_files_is_found_and_a_hostile_header_ends_the_search() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sif");
        let found = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            part(&path)
        };
        let image = |descriptors: &[Vec<u8>]| {
            let total = u64::try_from(descriptors.len()).unwrap();
            let mut bytes = header(total, 4096);
            bytes.resize(4096, 0);
            for one in descriptors {
                bytes.extend(one);
            }
            bytes
        };
        let definition = descriptor(0x4001, 1, 0, 0);
        let overlay = descriptor(KIND_PARTITION, 2, 2, 4);
        let system = descriptor(KIND_PARTITION, 4, SQUASHFS, PRIMARY);
        let whole = image(&[definition.clone(), overlay.clone(), system]);
        assert_eq!(found(&whole).unwrap(), Part { id: Some(4) });
        let none = found(&image(&[definition, overlay]));
        assert!(matches!(none, Err(SifError::NoPartition(_))), "{none:?}");
        assert_eq!(found(b"hsqs").unwrap(), Part { id: None });
        assert_eq!(found(&[0; 4096]).unwrap(), Part { id: None });
        for header in [
            header(u64::MAX, 0),
            header(u64::MAX, u64::MAX),
            header(9, 1 << 40),
        ] {
            assert!(found(&header).is_err());
        }
    }

    fn superblock(kind: u16) -> Vec<u8> {
        let mut bytes = vec![0; SUPERBLOCK];
        bytes[..4].copy_from_slice(SQUASHFS_MAGIC);
        bytes[COMPRESSION..].copy_from_slice(&kind.to_le_bytes());
        bytes
    }

    #[test]
    fn the_compression_is_that_of_the_partition_with_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sif");
        let found = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            other_compression(&path)
        };
        let image = |offset: u64, block: &[u8]| {
            let mut system = descriptor(KIND_PARTITION, 4, SQUASHFS, PRIMARY);
            system[OFFSET..OFFSET + 8].copy_from_slice(&offset.to_le_bytes());
            let mut bytes = header(1, 4096);
            bytes.resize(4096, 0);
            bytes.extend(system);
            bytes.resize(8192, 0);
            bytes.extend(block);
            bytes
        };
        assert_eq!(found(&image(8192, &superblock(6))), Some("zstd"));
        assert_eq!(found(&image(8192, &superblock(5))), Some("lz4"));
        assert_eq!(found(&image(8192, &superblock(1))), None, "gzip");
        assert_eq!(found(&image(8192, &superblock(77))), None);
        // A bare squashfs, which has no header.
        let mut bare = superblock(4);
        bare.resize(4096, 0);
        assert_eq!(found(&bare), Some("xz"));
        // Whatever the numbers are, nothing is read beyond the file.
        assert_eq!(found(&image(u64::MAX, &superblock(6))), None);
        assert_eq!(found(&image(0, &superblock(6))), None);
        assert_eq!(found(b"hsqs"), None);
        assert_eq!(other_compression(folder.path()), None, "a sandbox");
        assert_eq!(other_compression(Path::new("none")), None);
    }
}
