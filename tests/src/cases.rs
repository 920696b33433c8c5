//! Cases of arguments and environment variables: what a pod says and what the process must receive,
//! byte for byte. Pure: a seed always gives the same cases, and the expectation comes from a model
//! of Kubernetes' `$(VAR)` rule that shares no line with the code under test.

mod check;
mod text;

use std::collections::BTreeSet;

pub use check::{Mismatch, check};
pub use text::{CLASSES, NAME_CLASSES, expand};
use text::{Random, Scalars};

/// Longest string that Linux takes as one argument or one `NAME=value`, its NUL left out.
pub const LONGEST: usize = 128 * 1024 - 1;

/// Every fifth case is a text with references; the others are literal and cover all scalars.
const REFERENCE_EVERY: usize = 5;

/// The cases of one container: half of each is an argument, half an environment variable.
#[derive(Debug, Clone, Default)]
pub struct Container {
    /// `args` as written in the pod.
    pub args: Vec<String>,
    /// `env` as written in the pod, in order.
    pub env: Vec<(String, String)>,
    /// The arguments that the process must receive after `argv[0]`.
    pub expected_args: Vec<String>,
    /// The variables that its environment must contain.
    pub expected_env: Vec<(String, String)>,
}

/// The number of pods, of containers per pod and of cases per container.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Pods of the plan.
    pub pods: usize,
    /// Containers of each pod.
    pub containers: usize,
    /// Cases of each container.
    pub cases: usize,
}

impl Size {
    fn total(self) -> usize {
        self.pods * self.containers * self.cases
    }
}

/// The plan that covers every Unicode scalar but NUL in the arguments, and again in the values,
/// and the longest strings in the first container of each pod.
#[must_use]
pub fn exhaustive(size: Size, seed: u64) -> Vec<Vec<Container>> {
    let literals = size.total() - size.total().div_ceil(REFERENCE_EVERY);
    let scalars = Scalars::cut(literals);
    let mut random = Random::new(seed);
    let mut number = 0;
    let mut literal = 0;
    let mut pods = Vec::new();
    for _ in 0..size.pods {
        let mut containers = Vec::new();
        for at in 0..size.containers {
            let mut builder = Builder::default();
            for _ in 0..size.cases {
                if number % REFERENCE_EVERY == 0 {
                    builder.reference(&mut random);
                } else {
                    let argument = random.decorate(scalars.piece(literal));
                    let value = random.decorate(scalars.piece((literal * 7 + 3) % literals));
                    builder.literal(argument, random.name(), value);
                    literal += 1;
                }
                number += 1;
            }
            if at == 0 {
                builder.longest(&mut random);
            }
            containers.push(builder.finish());
        }
        pods.push(containers);
    }
    pods
}

/// The plan of nasty classes: each case is one named class, combined with other text differently in each pod.
#[must_use]
pub fn nasty(size: Size, seed: u64) -> Vec<Vec<Container>> {
    let scalars = Scalars::cut(4000);
    let mut random = Random::new(seed);
    let mut number = 0;
    let mut pods = Vec::new();
    for _ in 0..size.pods {
        let mut containers = Vec::new();
        for _ in 0..size.containers {
            let mut builder = Builder::default();
            for at in 0..size.cases {
                let (_, class) = CLASSES[at % CLASSES.len()];
                let (_, name) = NAME_CLASSES[at % NAME_CLASSES.len()];
                // The first pod has the classes without other text.
                let dress = if number < size.containers * size.cases {
                    String::new()
                } else {
                    scalars.piece(random.below(4000)).chars().take(20).collect()
                };
                builder.literal(
                    format!("{class}{dress}"),
                    name.to_owned(),
                    if class.is_empty() {
                        dress
                    } else {
                        format!("{dress}{class}")
                    },
                );
                number += 1;
            }
            containers.push(builder.finish());
        }
        pods.push(containers);
    }
    pods
}

/// Collects the cases of one container. Expectations of references are computed at the end, when all variables are known.
#[derive(Default)]
struct Builder {
    container: Container,
    names: BTreeSet<String>,
}

impl Builder {
    fn literal(&mut self, argument: String, name: String, value: String) {
        let name = self.unique(name);
        self.container.args.push(escape(&argument));
        self.container.env.push((name.clone(), escape(&value)));
        self.container.expected_args.push(argument);
        self.container.expected_env.push((name, value));
    }

    /// An argument and a value with references: to variables before and after, to unknown ones,
    /// escaped, unclosed.
    fn reference(&mut self, random: &mut Random) {
        let name = self.unique(random.name());
        let known: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let value = random.references(&known);
        let argument = random.references(&known);
        let expanded = expand(&value, |name| self.value(name));
        self.container.env.push((name.clone(), value));
        self.container.expected_env.push((name, expanded));
        // Arguments see the whole environment, so theirs is predicted at the end.
        self.container.args.push(argument.clone());
        self.container.expected_args.push(argument);
    }

    fn longest(&mut self, random: &mut Random) {
        let name = "LONGEST".to_owned();
        let value = random.long(LONGEST - name.len() - 1);
        self.literal(random.long(LONGEST), name, value);
    }

    fn finish(self) -> Container {
        let mut container = self.container.clone();
        for (written, expected) in container.args.iter().zip(&mut container.expected_args) {
            *expected = expand(written, |name| self.value(name));
        }
        container
    }

    fn value(&self, name: &str) -> Option<String> {
        let mut known = self.container.expected_env.iter();
        known
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    }

    fn unique(&mut self, mut name: String) -> String {
        while !self.names.insert(name.clone()) {
            name.push('_');
        }
        name
    }
}

/// The text that Kubernetes expands to `text`.
fn escape(text: &str) -> String {
    text.replace('$', "$$")
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, Size, exhaustive, nasty};

    const SIZE: Size = Size {
        pods: 10,
        containers: 50,
        cases: 10,
    };

    #[test]
    fn every_scalar_is_in_the_arguments_and_in_the_values() {
        let plan = exhaustive(SIZE, 1);
        let containers: Vec<_> = plan.iter().flatten().collect();
        assert_eq!(containers.len(), 500);
        let arguments = scalars(
            containers
                .iter()
                .flat_map(|container| &container.expected_args),
        );
        let values = containers
            .iter()
            .flat_map(|container| &container.expected_env);
        let values = scalars(values.map(|(_, value)| value));
        for scalar in '\u{1}'..=char::MAX {
            assert!(arguments[scalar as usize], "{scalar:?} in no argument");
            assert!(values[scalar as usize], "{scalar:?} in no value");
        }
        assert!(!arguments[0] && !values[0], "a NUL");
    }

    fn scalars<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<bool> {
        let mut seen = vec![false; char::MAX as usize + 1];
        for scalar in texts.flat_map(|text| text.chars()) {
            seen[scalar as usize] = true;
        }
        seen
    }

    #[test]
    fn the_longest_strings_are_there_and_no_longer_one() {
        let plan = exhaustive(SIZE, 1);
        let lengths = plan.iter().flatten().flat_map(|container| {
            let values = container
                .expected_env
                .iter()
                .map(|(name, value)| name.len() + value.len() + 1);
            container
                .expected_args
                .iter()
                .map(String::len)
                .chain(values)
        });
        let mut lengths: Vec<usize> = lengths.collect();
        lengths.sort_unstable();
        assert_eq!(lengths.last(), Some(&LONGEST));
        assert_eq!(
            lengths.iter().filter(|length| **length == LONGEST).count(),
            20
        );
    }

    #[test]
    fn a_seed_gives_the_same_plan() {
        let size = Size {
            pods: 2,
            containers: 3,
            cases: 20,
        };
        assert_eq!(
            format!("{:?}", nasty(size, 7)),
            format!("{:?}", nasty(size, 7))
        );
        assert_ne!(
            format!("{:?}", nasty(size, 7)),
            format!("{:?}", nasty(size, 8))
        );
    }
}
