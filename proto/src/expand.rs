//! PURE: expands `$(VAR)` in environment values, commands and arguments by Kubernetes' rules.
//!
//! It works on bytes, because values need not be UTF-8. The rules (`third_party/forked/golang/expansion` of
//! Kubernetes): `$(NAME)` becomes the value, or stays as it is if no variable has that name; `$$` is a literal `$`, so
//! `$$(NAME)` becomes `$(NAME)`; a reference without `)` and a `$` before any other character stay as they are. The
//! inserted value is not expanded again. A variable can refer only to the pod's variables before it, never to the
//! image's own environment, as on a real node.
//!
//! What is inserted is bounded, because a few variables that each refer twice to the one before would fill any memory: a
//! reference whose value has no room stays as it is. No program starts with as much as that.
use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
};

use crate::{
    paths::{self, PathError},
    pb::{self, RuntimeField, env_var},
    text,
};

/// How many bytes the references in all variables of a container, or in one command, are replaced by. Linux starts no program
/// whose arguments and variables together have more than 6 MiB.
const MOST_INSERTED: usize = 8 << 20;

/// The same in a path, which must be shorter than this.
const MOST_IN_PATH: usize = 4096;

/// How much of a template is shown whose path is too long.
const SHOWN: usize = 200;

/// The name and value of a variable.
pub type Variable = (Vec<u8>, Vec<u8>);

/// The values of the pod's status fields that are known only on the compute node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeFields {
    /// `status.hostIP`: the address of the compute node.
    pub host_ip: String,
    /// `status.podIP`; empty if the pod has none.
    pub pod_ip: String,
}

impl RuntimeFields {
    fn get(&self, field: RuntimeField) -> &str {
        match field {
            RuntimeField::HostIp => &self.host_ip,
            RuntimeField::PodIp => &self.pod_ip,
            RuntimeField::Unspecified => "",
        }
    }
}

/// The environment of a container: that of the image, overridden and extended by the pod's variables. Each name occurs
/// once.
#[must_use]
pub fn environment(
    image_env: &[String],
    vars: &[pb::EnvVar],
    runtime: &RuntimeFields,
) -> Vec<Variable> {
    let mut merged = Ordered::default();
    for entry in image_env {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        merged.set(name.as_bytes().to_vec(), value.as_bytes().to_vec());
    }
    for (name, value) in pod_environment(vars, runtime) {
        merged.set(name, value);
    }
    merged.list
}

/// The pod's own part of [`environment`], with which `command` and `args` are expanded.
#[must_use]
pub fn pod_environment(vars: &[pb::EnvVar], runtime: &RuntimeFields) -> Vec<Variable> {
    let mut known = Ordered::default();
    let mut room = MOST_INSERTED;
    for var in vars {
        let value = match &var.value {
            Some(env_var::Value::Literal(bytes)) => bytes.to_vec(),
            Some(env_var::Value::Template(text)) => {
                expand(text.as_bytes(), &mut room, |name| known.get(name))
            }
            Some(env_var::Value::Runtime(field)) => {
                let field = RuntimeField::try_from(*field).unwrap_or(RuntimeField::Unspecified);
                runtime.get(field).as_bytes().to_vec()
            }
            // The shim has put a value in its place, unless it is optional and missing.
            Some(env_var::Value::File(_)) => continue,
            None => Vec::new(),
        };
        known.set(var.name.as_bytes().to_vec(), value);
    }
    known.list
}

/// Expands the references in `command` or `args`. `env` is the result of [`pod_environment`].
#[must_use]
pub fn argv(templates: &[String], env: &[Variable]) -> Vec<Vec<u8>> {
    let known = Known::of(env);
    let mut room = MOST_INSERTED;
    let one = |template: &String| expand(template.as_bytes(), &mut room, |name| known.get(name));
    templates.iter().map(one).collect()
}

/// The variables of a container by name, for [`sub_path`].
pub struct Known<'e>(HashMap<&'e [u8], &'e [u8]>);

/// Values may be secret.
impl std::fmt::Debug for Known<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Known").finish_non_exhaustive()
    }
}

impl<'e> Known<'e> {
    /// Those of a [`pod_environment`]. The last variable of a name wins.
    #[must_use]
    pub fn of(env: &'e [Variable]) -> Self {
        let pairs = env.iter();
        Self(pairs.map(|(name, value)| (&name[..], &value[..])).collect())
    }

    fn get(&self, name: &[u8]) -> Option<&'e [u8]> {
        self.0.get(name).copied()
    }
}

/// Why a `subPathExpr` does not expand to a path in a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubPathError {
    /// Variables are not set, or empty.
    #[error("missing value for {0}")]
    Missing(String),
    /// The value of a variable is not UTF-8.
    #[error("the expanded subPath is not UTF-8")]
    Encoding,
    /// The expanded text is not a path in a volume.
    #[error("unable to provision SubPath `{path}`")]
    Path {
        /// The expanded path.
        path: String,
        /// What is wrong with it.
        #[source]
        source: PathError,
    },
}

/// Expands a `subPathExpr` to a clean path in a volume, as `ExpandContainerVolumeMounts` of the kubelet does.
pub fn sub_path(template: &str, known: &Known<'_>) -> Result<String, SubPathError> {
    let missing = RefCell::new(BTreeSet::new());
    let mut room = MOST_IN_PATH;
    let expanded = expand(template.as_bytes(), &mut room, |name| {
        let value = known.get(name).filter(|value| !value.is_empty());
        if value.is_none() {
            let name = String::from_utf8_lossy(name).into_owned();
            missing.borrow_mut().insert(name);
        }
        value
    });
    let missing: Vec<_> = missing.into_inner().into_iter().collect();
    if !missing.is_empty() {
        return Err(SubPathError::Missing(missing.join(", ")));
    }
    if room == 0 {
        return Err(SubPathError::Path {
            path: text::shorten(template, SHOWN).into_owned(),
            source: PathError::TooLong,
        });
    }
    let path = String::from_utf8(expanded).map_err(|_| SubPathError::Encoding)?;
    paths::in_volume(&path).map_err(|source| SubPathError::Path { path, source })
}

/// Expands the references in one string. `room` is for the values; once one of them does not fit, there is none left.
fn expand<'v>(
    input: &[u8],
    room: &mut usize,
    value_of: impl Fn(&[u8]) -> Option<&'v [u8]>,
) -> Vec<u8> {
    let mut output = Vec::with_capacity(input.len());
    let mut rest = input;
    // Whether there may be a `)` in `rest`.
    let mut closes = true;
    while let Some(dollar) = rest.iter().position(|byte| *byte == b'$') {
        output.extend_from_slice(&rest[..dollar]);
        let after = &rest[dollar + 1..];
        rest = match after.first() {
            Some(b'$') => {
                output.push(b'$');
                &after[1..]
            }
            Some(b'(') => {
                let close = Some(after).filter(|_| closes);
                let close = close.and_then(|after| after.iter().position(|byte| *byte == b')'));
                closes = close.is_some();
                if let Some(close) = close {
                    let value = value_of(&after[1..close]);
                    let left = value.map_or(Some(*room), |value| room.checked_sub(value.len()));
                    *room = left.unwrap_or_default();
                    match value.filter(|_| left.is_some()) {
                        Some(value) => output.extend_from_slice(value),
                        None => output.extend_from_slice(&rest[dollar..=dollar + 1 + close]),
                    }
                    &after[close + 1..]
                } else {
                    output.extend_from_slice(b"$(");
                    &after[1..]
                }
            }
            Some(other) => {
                output.extend_from_slice(&[b'$', *other]);
                &after[1..]
            }
            None => {
                output.push(b'$');
                after
            }
        };
    }
    output.extend_from_slice(rest);
    output
}

/// Variables in the order in which their names first appeared, each with its last value.
#[derive(Default)]
struct Ordered {
    list: Vec<Variable>,
    places: HashMap<Vec<u8>, usize>,
}

impl Ordered {
    fn set(&mut self, name: Vec<u8>, value: Vec<u8>) {
        if let Some(place) = self.places.get(&name) {
            self.list[*place].1 = value;
        } else {
            self.places.insert(name.clone(), self.list.len());
            self.list.push((name, value));
        }
    }

    fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.places
            .get(name)
            .map(|place| self.list[*place].1.as_slice())
    }
}

#[cfg(test)]
mod tests;
