//! Parses TOML, and keeps the line of each key and value.

use std::ops::Range;

use toml::{
    Spanned,
    de::{DeInteger, DeTable, DeValue},
};

use super::{
    Mistake, Origin,
    node::{Entry, Node, Value},
};

/// Parses a text into a tree, or returns every syntax error.
pub(super) fn parse(text: &str) -> Result<Node, Vec<Mistake>> {
    let (root, errors) = DeTable::parse_recoverable(text);
    let lines = Lines(text);
    if errors.is_empty() {
        return Ok(lines.table(Origin::Nowhere, root.get_ref()));
    }
    let mistake = |error: toml::de::Error| {
        let written = error.span().and_then(|at| text.get(at));
        let written = written.and_then(|written| written.lines().next());
        let what = match written.filter(|written| !written.trim().is_empty()) {
            Some(written) => format!("{}: `{}`", error.message(), written.trim()),
            None => error.message().to_owned(),
        };
        let origin = error.span().map_or(Origin::Nowhere, |at| lines.origin(&at));
        Mistake { origin, what }
    };
    Err(errors.into_iter().map(mistake).collect())
}

/// The text to which the spans of the parser refer.
struct Lines<'t>(&'t str);

impl Lines<'_> {
    fn origin(&self, at: &Range<usize>) -> Origin {
        let before = self.0.get(..at.start);
        before.map_or(Origin::Nowhere, |before| {
            Origin::Line(before.matches('\n').count() + 1)
        })
    }

    fn node(&self, value: &Spanned<DeValue<'_>>) -> Node {
        let origin = self.origin(&value.span());
        let value = match value.get_ref() {
            DeValue::String(text) => Value::Text(text.clone().into_owned()),
            DeValue::Integer(integer) => number(integer),
            DeValue::Float(float) => float.as_str().parse().map_or(
                Value::Unsupported("a number that is too long"),
                Value::Float,
            ),
            DeValue::Boolean(value) => Value::Boolean(*value),
            DeValue::Datetime(_) => Value::Unsupported("a date or time"),
            DeValue::Array(array) => {
                Value::List(array.iter().map(|element| self.node(element)).collect())
            }
            DeValue::Table(table) => return self.table(origin, table),
        };
        Node { origin, value }
    }

    /// Entries keep the order of the file as far as the parser keeps it.
    fn table(&self, origin: Origin, table: &DeTable<'_>) -> Node {
        let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
            let key: &Spanned<std::borrow::Cow<'_, str>> = key;
            Entry {
                name: key.get_ref().to_string(),
                origin: self.origin(&key.span()),
                node: self.node(value),
            }
        };
        Node::table(origin, table.iter().map(entry).collect())
    }
}

fn number(integer: &DeInteger<'_>) -> Value {
    i64::from_str_radix(integer.as_str(), integer.radix()).map_or(
        Value::Unsupported("a number that is too large"),
        Value::Integer,
    )
}
