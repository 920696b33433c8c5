//! Parses YAML, and keeps the line of each key and value. A scalar is read as the type that is expected for it; an
//! empty scalar counts as absent.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::{
    Mistake, Origin,
    node::{Entry, Node, Value},
};

/// Parses a text into a tree, or returns the first syntax error, since the text after it cannot be interpreted.
pub(super) fn parse(text: &str) -> Result<Node, Mistake> {
    let says_nothing = |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if text.lines().all(says_nothing) {
        return Ok(Node::table(Origin::Nowhere, Vec::new()));
    }
    match serde_saphyr::from_str::<Spanned<Yaml>>(text) {
        Ok(root) => Ok(node(root).unwrap_or_else(|| Node::table(Origin::Nowhere, Vec::new()))),
        Err(error) => {
            let location = error.location();
            let origin = location.map_or(Origin::Nowhere, |location| line(location.line()));
            let what = error.to_string();
            let what = what.lines().next().unwrap_or_default().to_owned();
            Err(Mistake { origin, what })
        }
    }
}

fn line(line: u64) -> Origin {
    usize::try_from(line).map_or(Origin::Nowhere, Origin::Line)
}

/// Converts a value; `None` for an empty scalar.
fn node(yaml: Spanned<Yaml>) -> Option<Node> {
    let origin = line(yaml.referenced.line());
    let value = match yaml.value {
        Yaml::Scalar(text) if text.is_empty() => return None,
        Yaml::Scalar(text) => Value::Untyped(text),
        Yaml::List(elements) => Value::List(elements.into_iter().filter_map(node).collect()),
        Yaml::Map(entries) => {
            let entry = |(key, value): (Spanned<String>, _)| {
                Some(Entry {
                    origin: line(key.referenced.line()),
                    name: key.value,
                    node: node(value)?,
                })
            };
            Value::Table(entries.into_iter().filter_map(entry).collect())
        }
    };
    Some(Node { origin, value })
}

#[derive(Debug)]
enum Yaml {
    Scalar(String),
    List(Vec<Spanned<Yaml>>),
    Map(Vec<(Spanned<String>, Spanned<Yaml>)>),
}

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(YamlVisitor)
    }
}

struct YamlVisitor;

impl<'de> Visitor<'de> for YamlVisitor {
    type Value = Yaml;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(value.to_string()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(value.to_string()))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(value.to_owned()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(String::new()))
    }

    fn visit_none<E: de::Error>(self) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(String::new()))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Yaml, D::Error> {
        Yaml::deserialize(deserializer)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Yaml, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Yaml::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Yaml, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element()? {
            elements.push(element);
        }
        Ok(Yaml::List(elements))
    }
}
