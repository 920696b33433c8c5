//! PURE: reads the settings of every program, and reports every mistake at once with its place in the file and the
//! allowed values.
//!
//! A [`Document`] is created from a TOML text, a YAML text, or without a file; environment variables can override it
//! ([`Document::overlay`]). [`Document::read`] reads a type from it with serde: a value that does not fit is recorded
//! and removed and the rest is read again, so the first mistake hides no other. [`Document::wrong`] adds mistakes that
//! only the reader of the values can recognize. A program starts only if [`Document::finish`] finds no mistake.

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

/// Where a value was set. Mistakes are reported in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nowhere: the value is missing.
    Nowhere,
    /// In the environment variable of this name.
    Variable(String),
    /// In this line of the file, counted from 1.
    Line(usize),
}

/// One mistake and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Where the wrong value was set.
    pub origin: Origin,
    /// The dotted name of the value, what is wrong with it, and what is allowed.
    pub what: String,
}

/// All mistakes of a document: first those in variables, then those of the file in its order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Mistakes {
    /// The path of the file.
    pub path: PathBuf,
    /// The mistakes, at least one.
    pub all: Vec<Mistake>,
}

impl fmt::Display for Mistakes {
    /// One line for each mistake: `FILE:LINE: what`.
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
    /// The names of values that have been reported. [`Document::wrong`] does not report them again.
    reported: Vec<Vec<String>>,
}

impl Document {
    /// Parses the TOML text of the file at `path`.
    ///
    /// # Errors
    /// All syntax errors: values are read only if the whole text can be parsed.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Mistakes> {
        let root = from_toml::parse(text).map_err(|all| sorted(path, all))?;
        Ok(Self::new(path, root))
    }

    /// Parses the YAML text of the file at `path`.
    ///
    /// # Errors
    /// The first syntax error.
    pub fn parse_yaml(text: &str, path: &Path) -> Result<Self, Mistakes> {
        let root = from_yaml::parse(text).map_err(|mistake| sorted(path, vec![mistake]))?;
        Ok(Self::new(path, root))
    }

    /// A document without a file. Values that are missing in it are reported under `name`.
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

    /// Reads the whole document. A value that does not fit is recorded, and the rest is read without it. Returns
    /// `None`, and records a mistake, if nothing that can be read is left.
    pub fn read<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut rest = self.root.clone();
        loop {
            let error = match T::deserialize(&rest) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let path = error.path();
            let (names, origin) = rest.describe(&path, error.at_key);
            self.report(&error.message, &names, origin);
            if !rest.remove(&path) {
                return None;
            }
            self.reported.push(names);
        }
    }

    fn report(&mut self, message: &str, names: &[String], origin: Origin) {
        // If a table lacks only the value that has just been removed from it, that is not another mistake.
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

    /// Records that the value of this name is wrong or missing.
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

    /// Returns the value if there was no mistake.
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
    // The sort is stable: mistakes of one line, and those without a line, keep their order.
    all.sort_by(|a, b| a.origin.cmp(&b.origin));
    Mistakes {
        path: path.to_owned(),
        all,
    }
}

#[cfg(test)]
mod tests;
