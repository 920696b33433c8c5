//! Where settings come from: a YAML file, the environment.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::{Problem, SETTINGS};

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file.
    File(PathBuf, u64),
    /// An environment variable.
    Variable(String),
    /// In no source.
    Nowhere,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "${name}"),
            Self::Nowhere => f.write_str("configuration"),
        }
    }
}

/// A value and where it stands. Maps come as `a=b,c=d`.
#[derive(Clone, Debug)]
pub struct Found {
    /// The value.
    pub text: String,
    /// Where it stands.
    pub origin: Origin,
}

/// A source of settings.
pub trait Source {
    /// The value of a key of [`SETTINGS`].
    fn get(&self, key: &str) -> Option<Found>;
    /// What is wrong with the source itself: unknown keys, bad syntax.
    fn problems(&self) -> Vec<Problem>;
}

/// A YAML file, read whole at construction.
#[derive(Debug, Default)]
pub struct YamlFile {
    values: BTreeMap<String, Found>,
    problems: Vec<Problem>,
}

impl YamlFile {
    /// Reads the text of the file at `path`.
    #[must_use]
    pub fn parse(path: &Path, text: &str) -> Self {
        let mut file = Self::default();
        if text
            .lines()
            .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
        {
            return file;
        }
        match serde_saphyr::from_str::<Spanned<Node>>(text) {
            Ok(root) => file.flatten(path, "", &root),
            Err(error) => {
                let line = error.location().map_or(0, |location| location.line());
                let what = error.to_string();
                let what = what.lines().next().unwrap_or_default().to_owned();
                file.problems.push(Problem {
                    origin: Origin::File(path.to_owned(), line),
                    what,
                });
            }
        }
        file
    }

    fn flatten(&mut self, path: &Path, prefix: &str, node: &Spanned<Node>) {
        let origin = Origin::File(path.to_owned(), node.referenced.line());
        let known = SETTINGS.iter().any(|setting| setting.key == prefix);
        let inside =
            prefix.is_empty() || SETTINGS.iter().any(|setting| within(setting.key, prefix));
        match &node.value {
            Node::Scalar(text) if known => {
                self.values.insert(
                    prefix.to_owned(),
                    Found {
                        text: text.clone(),
                        origin,
                    },
                );
            }
            Node::Map(entries) if known => {
                let pairs: Option<Vec<_>> = entries
                    .iter()
                    .map(|(key, value)| match &value.value {
                        Node::Scalar(text) => Some(format!("{}={text}", key.value)),
                        Node::Map(_) | Node::List => None,
                    })
                    .collect();
                match pairs {
                    Some(pairs) => {
                        let text = pairs.join(",");
                        self.values
                            .insert(prefix.to_owned(), Found { text, origin });
                    }
                    None => self.problem(
                        origin,
                        format!("{prefix}: the values of the map must be plain"),
                    ),
                }
            }
            Node::Map(entries) if inside => {
                for (key, value) in entries {
                    let path_of_key = if prefix.is_empty() {
                        key.value.clone()
                    } else {
                        format!("{prefix}.{}", key.value)
                    };
                    let line = key.referenced.line();
                    if self.is_unknown(path, prefix, &path_of_key, line) {
                        continue;
                    }
                    self.flatten(path, &path_of_key, value);
                }
            }
            Node::Scalar(text) if text.is_empty() => {}
            Node::Scalar(_) | Node::Map(_) | Node::List => {
                self.problem(
                    origin,
                    format!("{prefix}: a value of another form is expected here"),
                );
            }
        }
    }

    fn is_unknown(&mut self, path: &Path, prefix: &str, key: &str, line: u64) -> bool {
        if SETTINGS
            .iter()
            .any(|setting| setting.key == key || within(setting.key, key))
        {
            return false;
        }
        let mut allowed: Vec<&str> = SETTINGS
            .iter()
            .filter_map(|setting| {
                let rest = if prefix.is_empty() {
                    setting.key
                } else {
                    setting.key.strip_prefix(prefix)?.strip_prefix('.')?
                };
                rest.split('.').next()
            })
            .collect();
        allowed.dedup();
        self.problem(
            Origin::File(path.to_owned(), line),
            format!("unknown key `{key}`; known here: {}", allowed.join(", ")),
        );
        true
    }

    fn problem(&mut self, origin: Origin, what: String) {
        self.problems.push(Problem { origin, what });
    }
}

/// Does the setting `key` lie below `prefix`?
fn within(key: &str, prefix: &str) -> bool {
    key.strip_prefix(prefix)
        .is_some_and(|rest| rest.starts_with('.'))
}

impl Source for YamlFile {
    fn get(&self, key: &str) -> Option<Found> {
        self.values.get(key).cloned()
    }

    fn problems(&self) -> Vec<Problem> {
        self.problems.clone()
    }
}

/// The environment: `KNOC_*`.
#[derive(Debug, Default)]
pub struct Environment {
    values: BTreeMap<String, String>,
    problems: Vec<Problem>,
}

/// Variables of ours that are no settings.
const NOT_SETTINGS: &[&str] = &["KNOC_CONFIG", "KNOC_CRASH_AT"];

impl Environment {
    /// Takes the variables whose names begin with `KNOC_`.
    pub fn new(variables: impl Iterator<Item = (String, String)>) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables.filter(|(name, _)| name.starts_with("KNOC_")) {
            if let Some(setting) = SETTINGS.iter().find(|setting| setting.variable == name) {
                environment.values.insert(setting.key.to_owned(), value);
            } else if !NOT_SETTINGS.contains(&name.as_str()) && !is_service_link(&name) {
                let allowed: Vec<_> = SETTINGS.iter().map(|setting| setting.variable).collect();
                environment.problems.push(Problem {
                    origin: Origin::Variable(name),
                    what: format!("unknown variable; known: {}", allowed.join(", ")),
                });
            }
        }
        environment
    }
}

/// Variables that Kubernetes adds for a Service named `knoc-…`.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

impl Source for Environment {
    fn get(&self, key: &str) -> Option<Found> {
        let text = self.values.get(key)?.clone();
        let variable = SETTINGS.iter().find(|setting| setting.key == key)?.variable;
        Some(Found {
            text,
            origin: Origin::Variable(variable.to_owned()),
        })
    }

    fn problems(&self) -> Vec<Problem> {
        self.problems.clone()
    }
}

/// YAML with the place of each node.
#[derive(Debug)]
enum Node {
    Scalar(String),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
    /// No setting is a list.
    List,
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_owned()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar(String::new()))
    }

    fn visit_none<E: de::Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar(String::new()))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        while seq.next_element::<Node>()?.is_some() {}
        Ok(Node::List)
    }
}
