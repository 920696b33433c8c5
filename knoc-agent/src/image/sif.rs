//! Reads the OCI configs of SIF files under the site's image roots, once per file.
//!
//! Reading a config takes two or three processes of the runtime, with tens of milliseconds each on
//! a busy login node, and a hundred pods may name one file. So configs are kept in memory by the
//! file's identity; a file that was replaced or written to has another identity. After a restart
//! each file is read again. A file that cannot be read is not recorded.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Settings, file::ImageFile, flight::Flights, untrusted::why};
use crate::command::CommandError;

/// No SIF that a runtime writes has more JSON objects.
const OBJECTS_LIMIT: usize = 16;
/// How many configs are kept, of a few hundred bytes each; if there are more, all are dropped and
/// read again.
const KEPT: usize = 1024;

/// The open and checked file as standard input of the runtime's process. Its path could lead to
/// another file by now.
const INPUT: &str = "/proc/self/fd/0";

/// The identity of a file's content: device, inode, size, and the times of the last change of its
/// bytes and of its inode, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FileId([u64; 3], [i64; 4]);

impl FileId {
    pub(super) fn of(file: &std::fs::Metadata) -> Self {
        let times = [
            file.mtime(),
            file.mtime_nsec(),
            file.ctime(),
            file.ctime_nsec(),
        ];
        Self([file.dev(), file.ino(), file.size()], times)
    }
}

/// The configs of this site's SIF files.
#[derive(Debug, Default)]
pub(super) struct Sifs {
    known: Mutex<HashMap<FileId, ImageFile>>,
    reading: Flights<FileId, Result<ImageFile, String>>,
}

impl Sifs {
    /// The config of the open SIF file `sif`; empty if it contains none. The error is the runtime's
    /// message.
    ///
    /// Cancel safety: a dropped call leaves nothing behind; a read that others wait for continues.
    pub(super) async fn config(
        &self,
        settings: &Arc<Settings>,
        id: FileId,
        sif: Arc<File>,
    ) -> Result<ImageFile, String> {
        let known = self.known().get(&id).cloned();
        if let Some(file) = known {
            return Ok(file);
        }
        let settings = Arc::clone(settings);
        let read = || async move { read(&settings, sif).await.map_err(|error| why(&error)) };
        let file = self.reading.join(id, read).await?;
        let mut known = self.known();
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(id, file.clone());
        Ok(file)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<FileId, ImageFile>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The config in the open SIF file `sif`; empty if it contains none.
pub(super) async fn read(settings: &Settings, sif: Arc<File>) -> Result<ImageFile, CommandError> {
    let Some(list) = settings.command() else {
        return Ok(ImageFile::default());
    };
    let list = list
        .args(["sif", "list", INPUT])
        .stdin_file(&sif)
        .run()
        .await?;
    for id in json_objects(&list.text()).into_iter().take(OBJECTS_LIMIT) {
        let Some(dump) = settings.command() else {
            break;
        };
        let dump = dump
            .args(["sif", "dump", &id, INPUT])
            .stdin_file(&sif)
            .run()
            .await?;
        if let Some(file) = ImageFile::of_sif(&dump.text()) {
            return Ok(file);
        }
    }
    Ok(ImageFile::default())
}

/// The IDs of the JSON objects in `sif list`'s table.
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
}
