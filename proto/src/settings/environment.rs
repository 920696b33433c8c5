//! Settings in environment variables. Each variable is named after its key: with the prefix `KNOC_`, `node.queueFactor`
//! is `KNOC_NODE_QUEUE_FACTOR`.

use super::{Document, Mistake, Origin, nearest::nearest, node::Value};

/// The name of the environment variable for the setting `key`.
#[must_use]
pub fn variable(prefix: &str, key: &str) -> String {
    let mut name = prefix.to_owned();
    let mut before = '.';
    for letter in key.chars() {
        if letter.is_ascii_uppercase() && before.is_ascii_lowercase() {
            name.push('_');
        }
        name.push(if letter == '.' {
            '_'
        } else {
            letter.to_ascii_uppercase()
        });
        before = letter;
    }
    name
}

impl Document {
    /// Reads settings from environment variables, which override the file. An empty variable unsets the file's value,
    /// and a variable that belongs to none of `keys` is a mistake.
    pub fn overlay(
        &mut self,
        prefix: &str,
        keys: &[String],
        variables: impl IntoIterator<Item = (String, String)>,
    ) {
        let known: Vec<_> = keys
            .iter()
            .map(|key| (variable(prefix, key), key))
            .collect();
        for (name, text) in variables {
            let Some((_, key)) = known.iter().find(|(known, _)| *known == name) else {
                let names: Vec<_> = known.iter().map(|(name, _)| name.as_str()).collect();
                let hint = nearest(&name, &names)
                    .map_or_else(String::new, |near| format!("; did you mean {near}?"));
                let what = format!("unknown variable; known: {}{hint}", names.join(", "));
                let origin = Origin::Variable(name);
                self.mistakes.push(Mistake { origin, what });
                continue;
            };
            let names: Vec<_> = key.split('.').collect();
            if text.is_empty() {
                self.root.unset(&names);
            } else {
                let origin = Origin::Variable(name);
                self.root.set(&names, &origin, Value::Untyped(text));
            }
        }
    }
}
