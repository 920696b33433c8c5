//! Which partition of an image file has the image's files: a runtime that mounts an image as a volume has to be told.
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
const FILE_SYSTEM: usize = 201;
const PARTITION: usize = 205;

const KIND_PARTITION: u32 = 0x4004;
const SQUASHFS: u32 = 1;
/// The system that an architecture starts with.
const PRIMARY: u32 = 2;

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
    // The container gets the file that is checked later. If something else stands here now, it must not hold up the pod.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from);
    let file = opened.map(File::from).map_err(failed)?;
    let mut header = [0; HEADER];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Part { id: None }),
        Err(error) => return Err(failed(error)),
    }
    let Some((total, place)) = descriptors(&header) else {
        return Ok(Part { id: None });
    };
    let mut descriptor = [0; DESCRIPTOR];
    let size = DESCRIPTOR as u64;
    for number in 0..total.min(MOST) {
        let at = place.saturating_add(number.saturating_mul(size));
        file.read_exact_at(&mut descriptor, at).map_err(failed)?;
        if let Some(id) = system(&descriptor) {
            return Ok(Part { id: Some(id) });
        }
    }
    Err(SifError::NoPartition(path.to_owned()))
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

/// PURE: the id of the partition, if the descriptor is that of the primary system.
fn system(descriptor: &[u8]) -> Option<u32> {
    let number = |at: usize| {
        let bytes = descriptor.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let used = *descriptor.get(USED)? != 0;
    let kinds = [number(KIND)?, number(FILE_SYSTEM)?, number(PARTITION)?];
    let is = used && kinds == [KIND_PARTITION, SQUASHFS, PRIMARY];
    is.then(|| number(ID)).flatten()
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
}
