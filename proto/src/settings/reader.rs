//! Reads a type from a [`Node`]. An error has the path from the root to the wrong value, so that the value can be
//! removed and the rest be read again.

use std::fmt;

use serde::{
    Deserializer,
    de::{
        self, DeserializeSeed, Error as _, IntoDeserializer as _, MapAccess, SeqAccess, Unexpected,
        Visitor, value::StrDeserializer,
    },
    forward_to_deserialize_any,
};

use super::{
    Origin,
    nearest::nearest,
    node::{Entry, Node, Value},
};

/// What does not fit, and the path to it.
#[derive(Debug)]
pub(super) struct Error {
    pub(super) message: String,
    /// The indices of the children, innermost first.
    path: Vec<usize>,
    /// Whether the key is wrong, not its value.
    pub(super) at_key: bool,
}

impl Error {
    fn within(mut self, index: usize) -> Self {
        self.path.push(index);
        self
    }

    /// The indices of the children, from the root.
    pub(super) fn path(&self) -> Vec<usize> {
        self.path.iter().rev().copied().collect()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            message: message.to_string(),
            path: Vec::new(),
            at_key: false,
        }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(unknown("field", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::custom(unknown("variant", variant, expected))
    }
}

fn unknown(kind: &str, found: &str, known: &[&str]) -> String {
    let quoted: Vec<_> = known.iter().map(|name| format!("`{name}`")).collect();
    let expected = match &*quoted {
        [] => "there are none".to_owned(),
        [only] => format!("expected {only}"),
        [first, second] => format!("expected {first} or {second}"),
        all => format!("expected one of {}", all.join(", ")),
    };
    let hint =
        nearest(found, known).map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
    format!("unknown {kind} `{found}`, {expected}{hint}")
}

/// Parses text as the type that is expected.
macro_rules! deserialize_number {
    ($($method:ident $number:ty => $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            if let Value::Untyped(text) = &self.value
                && let Ok(number) = text.parse::<$number>()
            {
                return visitor.$visit(number);
            }
            self.deserialize_any(visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for &Node {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.value {
            Value::Boolean(value) => visitor.visit_bool(*value),
            Value::Integer(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) | Value::Untyped(text) => visitor.visit_str(text),
            Value::Unsupported(kind) => Err(Error::invalid_type(Unexpected::Other(kind), &visitor)),
            Value::List(nodes) => visitor.visit_seq(Elements { nodes, next: 0 }),
            Value::Table(entries) => visitor.visit_map(Entries { entries, next: 0 }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Value::Untyped(text) = &self.value else {
            return self.deserialize_any(visitor);
        };
        match text.parse() {
            Ok(value) => visitor.visit_bool(value),
            Err(_) => Err(Error::unknown_variant(text, &["true", "false"])),
        }
    }

    deserialize_number! {
        deserialize_i8 i64 => visit_i64
        deserialize_i16 i64 => visit_i64
        deserialize_i32 i64 => visit_i64
        deserialize_i64 i64 => visit_i64
        deserialize_u8 u64 => visit_u64
        deserialize_u16 u64 => visit_u64
        deserialize_u32 u64 => visit_u64
        deserialize_u64 u64 => visit_u64
        deserialize_f32 f64 => visit_f64
        deserialize_f64 f64 => visit_f64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let (Value::Text(text) | Value::Untyped(text)) = &self.value else {
            let expected: &dyn de::Expected = &"a string";
            return Err(Error::invalid_type(self.unexpected(), expected));
        };
        let text: StrDeserializer<'_, Error> = text.as_str().into_deserializer();
        visitor.visit_enum(text)
    }

    forward_to_deserialize_any! {
        char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl Node {
    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Boolean(value) => Unexpected::Bool(*value),
            Value::Integer(value) => Unexpected::Signed(*value),
            Value::Float(value) => Unexpected::Float(*value),
            Value::Text(text) | Value::Untyped(text) => Unexpected::Str(text),
            Value::Unsupported(kind) => Unexpected::Other(kind),
            Value::List(_) => Unexpected::Seq,
            Value::Table(_) => Unexpected::Map,
        }
    }
}

struct Elements<'a> {
    nodes: &'a [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let index = self.next;
        let Some(node) = self.nodes.get(index) else {
            return Ok(None);
        };
        self.next += 1;
        let value = seed.deserialize(node);
        value.map(Some).map_err(|error| error.within(index))
    }
}

struct Entries<'a> {
    entries: &'a [Entry],
    /// The index of the entry whose key is read next.
    next: usize,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let index = self.next;
        let Some(entry) = self.entries.get(index) else {
            return Ok(None);
        };
        self.next += 1;
        let name: StrDeserializer<'_, Error> = entry.name.as_str().into_deserializer();
        let key = seed.deserialize(name).map(Some);
        key.map_err(|error| Error {
            at_key: true,
            ..error.within(index)
        })
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        // serde asks for a value only after its key.
        let index = self.next.saturating_sub(1);
        let value = match self.entries.get(index) {
            Some(entry) => seed.deserialize(&entry.node),
            None => seed.deserialize(&Node::table(Origin::Nowhere, Vec::new())),
        };
        value.map_err(|error| error.within(index))
    }
}
