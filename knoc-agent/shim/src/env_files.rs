//! The variables of a container that come from files which other containers have written (`fileKeyRef`).
//!
//! A file is read when the container starts, below its volume: a link never leads out, and no pipe or device blocks the shim.
//! Its format is that of a kubelet (KEP-3721): lines `NAME='value'`, in which everything between the quotes counts as it is,
//! also line breaks; comments begin with `#`.

mod format;

use std::{io, os::fd::BorrowedFd, path::Path};

use knoc_contract::walk::{self, Found, WalkError};
use knoc_proto::{paths, pb, pb::env_var::Value};
use rustix::{fs::fstat, io::Errno};

#[cfg(any(test, feature = "fuzzed"))]
pub(crate) use self::format::find;

use self::format::Malformed;
use super::{network::Network, nofollow, volumes::Volumes};

/// The largest file. The kernel gives a program no larger environment by default.
const LARGEST: usize = 1 << 20;

/// What the values of one container may have together. The kernel gives no program more than this (execve(2)), and many
/// variables may name one large value.
const TOGETHER: usize = 6 << 20;

/// Why a variable cannot be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvFileError {
    #[error("cannot find the emptyDir volume {0:?} referenced by fileKeyRef")]
    Volume(String),
    #[error("couldn't parse env file {path:?} of volume {volume:?}")]
    File {
        volume: String,
        path: String,
        #[source]
        source: ReadError,
    },
    #[error("environment variable key {key:?} not found in file {path:?} of volume {volume:?}")]
    Missing {
        volume: String,
        path: String,
        key: String,
    },
    #[error(
        "the variables from files have more than {TOGETHER} bytes together; no program can be started with them"
    )]
    TooMuch,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the path is not valid")]
    Path(#[from] paths::PathError),
    #[error("open it")]
    Open(#[from] WalkError),
    #[error("read it")]
    Read(#[from] io::Error),
    #[error("it is larger than {LARGEST} bytes")]
    Large,
    #[error("it is malformed")]
    Malformed(#[from] Malformed),
}

impl ReadError {
    fn is_missing(&self) -> bool {
        match self {
            Self::Open(error) => error.errno() == Errno::NOENT.raw_os_error(),
            Self::Path(_) | Self::Read(_) | Self::Large | Self::Malformed(_) => false,
        }
    }
}

/// Where the files are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    pub(crate) volumes: &'a Volumes,
    /// It knows which volumes are mounted where only containers see them.
    pub(crate) network: &'a Network,
}

/// The environment of this container alone, in which the variables that come from files have their values. Blocks on file work.
pub(crate) fn resolve(
    container: &pb::Container,
    values: &pb::PodValues,
    places: Places<'_>,
) -> Result<pb::PodValues, EnvFileError> {
    let mut all = values.env.iter().chain(&values.ephemeral_env);
    let own = all.find(|env| env.container == container.name);
    let (mut vars, mut together) = (Vec::new(), 0_usize);
    for var in own.map_or(&[][..], |env| &env.vars) {
        let Some(Value::File(file)) = &var.value else {
            vars.push(var.clone());
            continue;
        };
        if let Some(value) = value_of(file, places)? {
            together = together.saturating_add(value.len());
            if together > TOGETHER {
                return Err(EnvFileError::TooMuch);
            }
            vars.push(pb::EnvVar {
                name: var.name.clone(),
                value: Some(Value::Literal(value.into())),
            });
        }
    }
    Ok(pb::PodValues {
        env: vec![pb::ContainerEnv {
            container: container.name.clone(),
            vars,
        }],
        ..pb::PodValues::default()
    })
}

/// The value; `None` if it is optional and missing.
fn value_of(file: &pb::FileKey, places: Places<'_>) -> Result<Option<Vec<u8>>, EnvFileError> {
    let (volume, path) = (|| file.volume.clone(), || file.path.clone());
    let found = match read(file, places) {
        Ok(text) => format::find(&text, file.key.as_bytes()).map_err(ReadError::from),
        Err(Unread::Volume) => return Err(EnvFileError::Volume(volume())),
        Err(Unread::File(error)) if error.is_missing() => Ok(None),
        Err(Unread::File(error)) => Err(error),
    };
    let found = found.map_err(|source| EnvFileError::File {
        volume: volume(),
        path: path(),
        source,
    })?;
    if found.is_none() && !file.optional {
        return Err(EnvFileError::Missing {
            volume: volume(),
            path: path(),
            key: file.key.clone(),
        });
    }
    Ok(found)
}

/// Why a file was not read.
enum Unread {
    /// The pod has no such volume.
    Volume,
    File(ReadError),
}

fn read(file: &pb::FileKey, places: Places<'_>) -> Result<Vec<u8>, Unread> {
    let root = places.volumes.folder(&file.volume).ok_or(Unread::Volume)?;
    let mounted = places.network.mounted_at(root);
    read_below(root, mounted, &file.path).map_err(Unread::File)
}

fn read_below(
    root: &Path,
    mounted: Option<BorrowedFd<'_>>,
    path: &str,
) -> Result<Vec<u8>, ReadError> {
    let path = paths::of_file(path)?;
    let path = Path::new(&path);
    let found = match mounted {
        None => walk::inside(root, path, false)?,
        Some(fd) => {
            let root = Found {
                fd: fd.try_clone_to_owned()?,
                stat: fstat(fd).map_err(io::Error::from)?,
                path: root.to_owned(),
            };
            walk::below(&root, path, None, &[])?
        }
    };
    // One byte more than allowed tells that a file is too large, also if it grows meanwhile.
    let text = nofollow::read_end_in(&found.fd, Path::new(""), LARGEST + 1)?;
    if text.len() > LARGEST {
        return Err(ReadError::Large);
    }
    Ok(text)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of the test's own")]
mod tests;
