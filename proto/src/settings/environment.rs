//! Settings in environment variables, each named after its key: with the prefix `KNOC_`, `node.queueFactor` is
//! `KNOC_NODE_QUEUE_FACTOR`.

use super::{Document, Mistake, Origin, nearest::nearest, node::Value};

/// The name of the variable that holds the setting `key`.
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
    /// Takes settings from variables, which go before what is written in the file. A variable that is empty takes
    /// back what the file says, and one that is named after none of `keys` is a mistake.
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
            let way: Vec<_> = key.split('.').collect();
            if text.is_empty() {
                self.root.unset(&way);
            } else {
                let origin = Origin::Variable(name);
                self.root.set(&way, &origin, Value::Untyped(text));
            }
        }
    }
}
