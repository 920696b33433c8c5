//! The installed versions and the link to the one that is used.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use knoc_contract::jobdir::atomic::FileError;

use super::{Account, Failed};
use crate::run_mode::text::UNIT;

/// What every upload begins with; a token follows.
const UPLOAD: &str = "upload.";
/// An upload that is older was left by a transfer that was cut.
const LEFT: Duration = Duration::from_hours(1);
const SPACE: &str = "check free space, quota and permissions of ~/.local";

/// What [`Account::put_program`] has done.
#[derive(Debug)]
pub(super) struct Put {
    /// For the user.
    pub(super) done: String,
    /// Whether the next start runs another program than before.
    pub(super) renewed: bool,
}

/// Whether both files have the same contents.
fn same(one: &Path, other: &Path) -> bool {
    let open = |path| fs::File::open(path).map(BufReader::new);
    let (Ok(mut one), Ok(mut other)) = (open(one), open(other)) else {
        return false;
    };
    loop {
        let (Ok(left), Ok(right)) = (one.fill_buf(), other.fill_buf()) else {
            return false;
        };
        let count = left.len().min(right.len());
        if count == 0 {
            return left.len() == right.len();
        }
        if left.get(..count) != right.get(..count) {
            return false;
        }
        one.consume(count);
        other.consume(count);
    }
}

impl Account {
    /// The program that is installed by this request.
    pub(super) fn target(&self) -> PathBuf {
        let version = env!("CARGO_PKG_VERSION");
        self.store().join(version).join("knoc-agent")
    }

    /// Moves the program that runs to its version's folder and makes it the one in PATH. One that is there already stays as
    /// it is, since an agent may run from it.
    pub(super) fn put_program(&self, length: u64) -> Result<Put, Failed> {
        let version = env!("CARGO_PKG_VERSION");
        let own = std::env::current_exe().map_err(Failed::of(SPACE))?;
        let name = own.file_name().and_then(|name| name.to_str());
        let uploaded = name.is_some_and(|name| name.starts_with(UPLOAD));
        let there = fs::metadata(&own).map_err(Failed::of(SPACE))?.len();
        if uploaded && there != length {
            fs::remove_file(&own).ok();
            return Err(Failed::new(
                format!("{there} of {length} bytes of the program have arrived"),
                "run the command again; is the quota used up?",
            ));
        }
        let (folder, target) = (self.store().join(version), self.target());
        if !uploaded && own != target {
            return Err(Failed::new(
                format!(
                    "{} is not a program that was sent to be installed",
                    own.display()
                ),
                "run `knocctl agent install` or `knocctl agent upgrade`",
            ));
        }
        let known = uploaded && same(&own, &target);
        let moved = || {
            fs::create_dir_all(&folder).map_err(FileError::on("create", &folder))?;
            if known {
                fs::remove_file(&own).map_err(FileError::on("remove", &own))?;
            } else if uploaded {
                let mode = fs::Permissions::from_mode(0o755);
                fs::set_permissions(&own, mode).map_err(FileError::on("change", &own))?;
                fs::rename(&own, &target).map_err(FileError::on("write", &target))?;
            }
            self.sweep();
            Ok::<_, FileError>(())
        };
        moved().map_err(Failed::of(SPACE))?;
        let before = self.put_link(version)?;
        let other = before.as_deref().filter(|before| *before != version);
        Ok(Put {
            renewed: other.is_some() || (uploaded && !known),
            done: match other {
                Some(before) => format!("knoc-agent {version} is installed beside {before}"),
                None => format!("knoc-agent {version} is installed in {}", folder.display()),
            },
        })
    }

    /// Removes the program that runs if it was sent for one request only, and the folders that were created for it.
    pub(super) fn forget_upload(&self) {
        let Ok((own, store)) =
            std::env::current_exe().and_then(|own| Ok((own, self.store().canonicalize()?)))
        else {
            return;
        };
        if own.parent() != Some(store.as_path()) {
            return;
        }
        let name = own.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(UPLOAD)) {
            fs::remove_file(&own).ok();
            // A folder with something in it stays.
            for folder in store.ancestors().take(3) {
                if fs::remove_dir(folder).is_err() {
                    return;
                }
            }
        }
    }

    /// The version of which the link is, if it is one of ours.
    pub(super) fn linked(&self) -> Option<String> {
        let target = fs::read_link(self.link()).ok()?;
        let version = target.parent()?;
        let ours = version.parent()?.ends_with("lib/knoc");
        let name = version.file_name()?.to_str()?;
        ours.then(|| name.to_owned())
    }

    fn put_link(&self, version: &str) -> Result<Option<String>, Failed> {
        let link = self.link();
        let before = self.linked();
        if before.is_none() && fs::symlink_metadata(&link).is_ok() {
            return Err(Failed::new(
                format!("{} is there and was not installed by KNoC", link.display()),
                "move it away and run the command again",
            ));
        }
        let put = || {
            let folder = link.parent().unwrap_or_else(|| Path::new("/"));
            fs::create_dir_all(folder).map_err(FileError::on("create", folder))?;
            let new = link.with_extension(format!("new.{}", std::process::id()));
            let target = format!("../lib/knoc/{version}/knoc-agent");
            symlink(target, &new).map_err(FileError::on("create", &new))?;
            fs::rename(&new, &link).map_err(FileError::on("write", &link))
        };
        put().map_err(Failed::of(SPACE))?;
        Ok(before)
    }

    /// Keeps the unit of this version, by which a later one sees whether the user has changed it.
    pub(super) fn keep_unit(&self, unit: &str) -> Result<(), FileError> {
        let path = self.store().join(env!("CARGO_PKG_VERSION")).join(UNIT);
        knoc_contract::jobdir::atomic::write(&path, unit.as_bytes(), 0o644)
    }

    /// Removes what transfers that were cut have left.
    fn sweep(&self) {
        let now = SystemTime::from(jiff::Timestamp::now());
        let old = |path: &Path| {
            let changed = fs::metadata(path).and_then(|meta| meta.modified());
            changed.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > LEFT))
        };
        for entry in fs::read_dir(self.store()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(UPLOAD) && old(&entry.path()) {
                fs::remove_file(entry.path()).ok();
            }
        }
    }

    /// Removes the versions, and the links to them.
    pub(super) fn remove_programs(&self) -> Result<String, FileError> {
        let mut gone = Vec::new();
        for name in ["knoc-agent", "knocctl"] {
            let link = self.link().with_file_name(name);
            let ours = fs::read_link(&link).is_ok_and(|to| to.starts_with("../lib/knoc"));
            if ours {
                fs::remove_file(&link).map_err(FileError::on("remove", &link))?;
                gone.push(link.display().to_string());
            }
        }
        let store = self.store();
        if store.exists() {
            fs::remove_dir_all(&store).map_err(FileError::on("remove", &store))?;
            gone.push(store.display().to_string());
        }
        Ok(if gone.is_empty() {
            "there were none".to_owned()
        } else {
            format!("removed {}", gone.join(", "))
        })
    }
}
