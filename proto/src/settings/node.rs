//! The tree into which every format is parsed; each value knows its place in the file.

use super::Origin;

/// A value and the place where it was set.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

/// A key of a table with its value.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) origin: Origin,
    pub(super) node: Node,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Boolean(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    /// Text without a type, such as an environment variable. It is read as the type that is expected.
    Untyped(String),
    /// A value that no setting can have; the text says which kind of value it is.
    Unsupported(&'static str),
    List(Vec<Node>),
    Table(Vec<Entry>),
}

impl Node {
    pub(super) fn table(origin: Origin, entries: Vec<Entry>) -> Self {
        Self {
            origin,
            value: Value::Table(entries),
        }
    }

    /// The child with this index, with its key if `self` is a table.
    fn child(&self, index: usize) -> Option<(Option<&Entry>, &Self)> {
        match &self.value {
            Value::List(nodes) => nodes.get(index).map(|node| (None, node)),
            Value::Table(entries) => entries.get(index).map(|entry| (Some(entry), &entry.node)),
            Value::Boolean(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::Untyped(_)
            | Value::Unsupported(_) => None,
        }
    }

    /// The names of the keys on this path of indices, and where its last value was set. Elements of lists have no name:
    /// the line shows which one is meant.
    pub(super) fn describe(&self, path: &[usize], at_key: bool) -> (Vec<String>, Origin) {
        let mut names = Vec::new();
        let mut origin = self.origin.clone();
        let mut node = self;
        for index in path {
            let Some((entry, child)) = node.child(*index) else {
                break;
            };
            names.extend(entry.map(|entry| entry.name.clone()));
            origin = match entry {
                Some(entry) if at_key => entry.origin.clone(),
                Some(_) | None => child.origin.clone(),
            };
            node = child;
        }
        (names, origin)
    }

    /// Removes the value at the end of this path. Returns whether there was one.
    pub(super) fn remove(&mut self, path: &[usize]) -> bool {
        let Some((index, rest)) = path.split_first() else {
            return false;
        };
        match &mut self.value {
            Value::List(nodes) if *index < nodes.len() => {
                if rest.is_empty() {
                    nodes.remove(*index);
                    return true;
                }
                nodes[*index].remove(rest)
            }
            Value::Table(entries) if *index < entries.len() => {
                if rest.is_empty() {
                    entries.remove(*index);
                    return true;
                }
                entries[*index].node.remove(rest)
            }
            Value::List(_)
            | Value::Table(_)
            | Value::Boolean(_)
            | Value::Integer(_)
            | Value::Float(_)
            | Value::Text(_)
            | Value::Untyped(_)
            | Value::Unsupported(_) => false,
        }
    }

    /// Where this key was set, or the last table on the path to it that exists.
    pub(super) fn origin_of(&self, names: &[&str]) -> Option<&Origin> {
        let (first, rest) = names.split_first()?;
        let Value::Table(entries) = &self.value else {
            return None;
        };
        let entry = entries.iter().find(|entry| entry.name == *first)?;
        Some(entry.node.origin_of(rest).unwrap_or(&entry.origin))
    }

    /// Sets the value of this key, and creates the tables on the path to it. A value on the path that is not a table
    /// stays, and reading reports it.
    pub(super) fn set(&mut self, names: &[&str], origin: &Origin, value: Value) {
        let Value::Table(entries) = &mut self.value else {
            return;
        };
        let Some((first, rest)) = names.split_first() else {
            return;
        };
        let index = entries.iter().position(|entry| entry.name == *first);
        if rest.is_empty() {
            entries.retain(|entry| entry.name != *first);
            let node = Self {
                origin: origin.clone(),
                value,
            };
            entries.push(Entry {
                name: (*first).to_owned(),
                origin: origin.clone(),
                node,
            });
            return;
        }
        let index = index.unwrap_or_else(|| {
            entries.push(Entry {
                name: (*first).to_owned(),
                origin: origin.clone(),
                node: Self::table(origin.clone(), Vec::new()),
            });
            entries.len() - 1
        });
        entries[index].node.set(rest, origin, value);
    }

    /// Removes the value of this key, if there is one.
    pub(super) fn unset(&mut self, names: &[&str]) {
        let (Some((first, rest)), Value::Table(entries)) = (names.split_first(), &mut self.value)
        else {
            return;
        };
        if rest.is_empty() {
            entries.retain(|entry| entry.name != *first);
        } else if let Some(entry) = entries.iter_mut().find(|entry| entry.name == *first) {
            entry.node.unset(rest);
        }
    }
}
