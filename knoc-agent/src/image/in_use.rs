//! Which images of the cache job directories name: those that a running or queued job opens, on whatever host.

use std::collections::HashSet;
use std::ffi::OsString;

use knoc_contract::jobdir::{JobDirError, StateDir, read_json};

use crate::pod::record::Record;

/// File names of the images of all pods that have not finished. Blocking.
///
/// On disk, since it outlives the agent that submitted a job. A directory that cannot be read is an error: what it
/// names is not known, so nothing may be removed.
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
