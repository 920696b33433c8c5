//! PURE: the settings of every program, read so that every mistake is reported at once, each with the place where it was
//! written and the values that are allowed.
//!
//! A [`Document`] is made of a TOML text, of a YAML text, or of nothing, and environment variables can be laid over it
//! ([`Document::overlay`]). [`Document::read`] reads a type from it with serde: what does not fit is noted, removed, and
//! the rest is read again, so that the first mistake hides no other. [`Document::wrong`] adds the mistakes that only
//! the reader of the values can see. Nothing starts until [`Document::finish`] has found that there are none.

mod environment;
mod from_toml;
mod from_yaml;
mod nearest;
mod node;
mod reader;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

use node::Node;

pub use environment::variable;

/// Where a value was written. Mistakes are reported in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nowhere: a value is missing.
    Nowhere,
    /// In the environment variable of this name.
    Variable(String),
    /// In this line of the file, counted from 1.
    Line(usize),
}

/// One mistake, and where it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Where the wrong value was written.
    pub origin: Origin,
    /// Dotted name of the value, what is wrong with it, and what is allowed.
    pub what: String,
}

/// All mistakes of a document: those in variables first, then those of the file in its order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Mistakes {
    /// The file.
    pub path: PathBuf,
    /// At least one.
    pub all: Vec<Mistake>,
}

impl fmt::Display for Mistakes {
    /// A line each: `FILE:LINE: what`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        for (index, Mistake { origin, what }) in self.all.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            match origin {
                Origin::Line(line) => write!(f, "{end}{path}:{line}: {what}")?,
                Origin::Variable(name) => write!(f, "{end}${name}: {what}")?,
                Origin::Nowhere => write!(f, "{end}{path}: {what}")?,
            }
        }
        Ok(())
    }
}

/// Settings that are being read.
#[derive(Debug)]
pub struct Document {
    path: PathBuf,
    root: Node,
    mistakes: Vec<Mistake>,
    /// Names of values that have been reported already: [`Document::wrong`] says nothing more about them.
    reported: Vec<Vec<String>>,
}

impl Document {
    /// The TOML text of the file at `path`.
    ///
    /// # Errors
    /// All mistakes of syntax: values are read only if all of them can be told apart.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Mistakes> {
        let root = from_toml::parse(text).map_err(|all| sorted(path, all))?;
        Ok(Self::new(path, root))
    }

    /// The YAML text of the file at `path`.
    ///
    /// # Errors
    /// The first mistake of syntax.
    pub fn parse_yaml(text: &str, path: &Path) -> Result<Self, Mistakes> {
        let root = from_yaml::parse(text).map_err(|mistake| sorted(path, vec![mistake]))?;
        Ok(Self::new(path, root))
    }

    /// A document without a file. What is missing in it is reported under `name`.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        Self::new(Path::new(name), Node::table(Origin::Nowhere, Vec::new()))
    }

    fn new(path: &Path, root: Node) -> Self {
        Self {
            path: path.to_owned(),
            root,
            mistakes: Vec::new(),
            reported: Vec::new(),
        }
    }

    /// Reads the whole document. What does not fit is noted, and the rest is read without it. `None`, and a mistake, if
    /// nothing is left that could be read.
    pub fn read<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut rest = self.root.clone();
        loop {
            let error = match T::deserialize(&rest) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let way = error.way();
            let (names, origin) = rest.describe(&way, error.at_key);
            self.report(&error.message, &names, origin);
            if !rest.remove(&way) {
                return None;
            }
            self.reported.push(names);
        }
    }

    fn report(&mut self, message: &str, names: &[String], origin: Origin) {
        // A table that lacks the value that has just been removed from it is not another mistake.
        let follows = self.reported.iter().any(|reported| {
            reported
                .split_last()
                .is_some_and(|(_, parent)| parent == names)
        });
        if !follows {
            let what = if names.is_empty() {
                message.to_owned()
            } else {
                format!("{}: {message}", names.join("."))
            };
            self.mistakes.push(Mistake { origin, what });
        }
    }

    /// Notes that the value of this name is wrong, or that it is missing.
    pub fn wrong(&mut self, names: &[&str], what: impl fmt::Display) {
        let covers = |reported: &Vec<String>| {
            reported.len() <= names.len() && reported.iter().zip(names).all(|(a, b)| a == b)
        };
        if !self.reported.iter().any(covers) {
            let origin = self.root.origin_of(names).cloned();
            self.mistakes.push(Mistake {
                origin: origin.unwrap_or(Origin::Nowhere),
                what: format!("{}: {what}", names.join(".")),
            });
        }
    }

    /// The value, if there was no mistake.
    ///
    /// # Errors
    /// All mistakes.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Mistakes> {
        match value {
            Some(value) if self.mistakes.is_empty() => Ok(value),
            Some(_) | None => Err(sorted(&self.path, self.mistakes)),
        }
    }
}

fn sorted(path: &Path, mut all: Vec<Mistake>) -> Mistakes {
    // Stable: those of one line, and those without, stay as they were found.
    all.sort_by(|a, b| a.origin.cmp(&b.origin));
    Mistakes {
        path: path.to_owned(),
        all,
    }
}

#[cfg(test)]
mod tests;
