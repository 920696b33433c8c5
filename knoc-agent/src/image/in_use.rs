//! The cached images that job directories name, so that a running or queued job may open them, on
//! any host.

use std::{collections::HashSet, ffi::OsString};

use knoc_contract::jobdir::{JobDirError, StateDir, read_json};

use crate::pod::record::Record;

/// The file names of the images of all pods that have not finished. Blocking.
///
/// Read from disk, because jobs outlive the agent that submitted them. A directory that cannot be
/// read is an error: it may name any image, so nothing may be removed.
pub(super) fn names(state: &StateDir) -> Result<HashSet<OsString>, JobDirError> {
    let mut names = HashSet::new();
    for dir in state.list()? {
        let record: Option<Record> = read_json(&dir.record_path())?;
        if record.is_some_and(|record| record.is_over()) {
            continue;
        }
        let job = match dir.spec() {
            Err(JobDirError::File(error)) if error.is_not_found() => continue,
            job => job?,
        };
        let paths = job
            .images
            .iter()
            .map(|image| std::path::Path::new(&image.path));
        names.extend(paths.filter_map(|path| Some(path.file_name()?.to_owned())));
    }
    Ok(names)
}
