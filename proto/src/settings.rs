//! PURE: settings in TOML, read so that every mistake is named at once, with its line and what is allowed.
//!
//! [`Document::read`] takes out what does not fit and reads again, so that the first mistake hides no other;
//! [`Document::wrong`] adds what only the reader of the values can tell. Nothing starts until
//! [`Document::finish`] has said that there is none.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue, Deserializer, Error},
};

/// One mistake, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Counted from 1; `None` for what is missing.
    pub line: Option<usize>,
    /// Dotted name of the value, what is wrong with it, and what is allowed.
    pub what: String,
}

/// All mistakes of a file, in its order.
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
        for (index, Mistake { line, what }) in self.all.iter().enumerate() {
            let end = if index == 0 { "" } else { "\n" };
            match line {
                Some(line) => write!(f, "{end}{path}:{line}: {what}")?,
                None => write!(f, "{end}{path}: {what}")?,
            }
        }
        Ok(())
    }
}

/// A file that is being read.
#[derive(Debug)]
pub struct Document<'t> {
    path: PathBuf,
    text: &'t str,
    root: Spanned<DeTable<'t>>,
    mistakes: Vec<Mistake>,
    /// What has been named already: [`Document::wrong`] says nothing more of it.
    named: Vec<Vec<String>>,
}

impl<'t> Document<'t> {
    /// The text of the file at `path`; all mistakes of syntax, or none.
    pub fn parse(text: &'t str, path: &Path) -> Result<Self, Mistakes> {
        let (root, errors) = DeTable::parse_recoverable(text);
        let mut document = Self {
            path: path.to_owned(),
            text,
            root,
            mistakes: Vec::new(),
            named: Vec::new(),
        };
        for error in errors {
            let words = error.span().and_then(|at| text.get(at));
            let word = words.and_then(|words| words.lines().next());
            let what = match word.filter(|word| !word.trim().is_empty()) {
                Some(word) => format!("{}: `{}`", error.message(), word.trim()),
                None => error.message().to_owned(),
            };
            document.note(error.span(), what);
        }
        // Values are read only where all of them could be told apart.
        if document.mistakes.is_empty() {
            Ok(document)
        } else {
            Err(document.into_mistakes())
        }
    }

    /// Reads the whole. Where something does not fit, it is noted and the rest is read without it; `None`, and a
    /// mistake, where nothing is left that could be.
    pub fn read<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut rest = self.root.clone();
        loop {
            let error = match T::deserialize(Deserializer::from(rest.clone())) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let mut path = Vec::new();
            let found = error
                .span()
                .is_some_and(|at| take(rest.get_mut(), &at, &mut path));
            self.refuse(&error, &path);
            if !found {
                return None;
            }
            self.named.push(path);
        }
    }

    fn refuse(&mut self, error: &Error, path: &[String]) {
        // A table that lacks what has just been taken out of it is no further mistake.
        let follows = self
            .named
            .iter()
            .any(|named| named.split_last().is_some_and(|(_, parent)| parent == path));
        if !follows {
            let what = error.message();
            let what = if path.is_empty() {
                what.to_owned()
            } else {
                format!("{}: {what}", path.join("."))
            };
            self.note(error.span(), what);
        }
    }

    /// Notes that the value of this name, or what is missing there, cannot be meant.
    pub fn wrong(&mut self, path: &[&str], what: impl fmt::Display) {
        let covers = |named: &Vec<String>| {
            named.len() <= path.len() && named.iter().zip(path).all(|(a, b)| a == b)
        };
        if !self.named.iter().any(covers) {
            let span = span_of(self.root.get_ref(), path);
            self.note(span, format!("{}: {what}", path.join(".")));
        }
    }

    fn note(&mut self, at: Option<Range<usize>>, what: String) {
        let before = at.and_then(|at| self.text.get(..at.start));
        let line = before.map(|before| before.matches('\n').count() + 1);
        self.mistakes.push(Mistake { line, what });
    }

    /// The value, where there was no mistake.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Mistakes> {
        match value {
            Some(value) if self.mistakes.is_empty() => Ok(value),
            Some(_) | None => Err(self.into_mistakes()),
        }
    }

    fn into_mistakes(mut self) -> Mistakes {
        // Stable: those of one line, and those without, stay as they were found.
        self.mistakes.sort_by_key(|mistake| mistake.line);
        Mistakes {
            path: self.path,
            all: self.mistakes,
        }
    }
}

/// Takes the innermost entry out that the error points at, and tells its name. Names of repeated tables have no
/// number: the line tells which.
fn take(table: &mut DeTable<'_>, at: &Range<usize>, path: &mut Vec<String>) -> bool {
    let Some(name) = table
        .iter()
        .find(|(key, value)| points_at(key.span(), at) || reaches(value, at))
        .map(|(key, _)| key.get_ref().to_string())
    else {
        return false;
    };
    path.push(name);
    let name = &path[path.len() - 1].clone();
    let inside = match table.get_mut(name.as_str()).map(Spanned::get_mut) {
        Some(DeValue::Table(inner)) => take(inner, at, path),
        Some(DeValue::Array(array)) => take_of_array(array, at, path),
        _ => false,
    };
    if !inside {
        table.remove(name.as_str());
    }
    true
}

fn take_of_array(array: &mut DeArray<'_>, at: &Range<usize>, path: &mut Vec<String>) -> bool {
    let Some(index) = array.iter().position(|element| reaches(element, at)) else {
        return false;
    };
    if let DeValue::Table(inner) = array.as_mut()[index].get_mut()
        && take(inner, at, path)
    {
        return true;
    }
    let mut others = DeArray::new();
    for (_, element) in array
        .iter()
        .enumerate()
        .filter(|(other, _)| *other != index)
    {
        others.push(element.clone());
    }
    *array = others;
    true
}

/// Is this, or something in it, what the error points at? The span of a table is its head alone.
fn reaches(value: &Spanned<DeValue<'_>>, at: &Range<usize>) -> bool {
    points_at(value.span(), at)
        || table_in(value).is_some_and(|table| {
            let mut entries = table.iter();
            entries.any(|(key, value)| points_at(key.span(), at) || reaches(value, at))
        })
        || array_in(value).is_some_and(|array| array.iter().any(|element| reaches(element, at)))
}

fn points_at(span: Range<usize>, at: &Range<usize>) -> bool {
    span.start <= at.start && at.end <= span.end
}

/// Where the name, or the last table on the way to it, stands.
fn span_of(table: &DeTable<'_>, path: &[&str]) -> Option<Range<usize>> {
    let (first, rest) = path.split_first()?;
    let (key, value) = table.get_key_value(*first)?;
    let deeper = table_in(value).and_then(|inner| span_of(inner, rest));
    Some(deeper.unwrap_or_else(|| key.span()))
}

fn table_in<'a, 't>(value: &'a Spanned<DeValue<'t>>) -> Option<&'a DeTable<'t>> {
    if let DeValue::Table(table) = value.get_ref() {
        return Some(table);
    }
    None
}

fn array_in<'a, 't>(value: &'a Spanned<DeValue<'t>>) -> Option<&'a DeArray<'t>> {
    if let DeValue::Array(array) = value.get_ref() {
        return Some(array);
    }
    None
}

#[cfg(test)]
mod tests;
