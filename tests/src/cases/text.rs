//! The texts of the cases, their random source, and the model of Kubernetes' expansion.

use std::fmt::Write as _;

/// Nasty texts by name. Each is an argument and a value of its own in the suites on real parts.
pub const CLASSES: [(&str, &str); 20] = [
    ("newline", "one\ntwo\n"),
    ("comma", "a,b=c,d:e,"),
    ("double quote", "say \"hi\" \""),
    ("single quote", "it's ''"),
    ("command substitution", "$(id -u)"),
    ("backtick", "`id -u`"),
    ("variable", "$HOME ${PATH} $$ $1 $?"),
    ("backslash", "\\ \\n \\\\ \\$ a\\"),
    ("leading dash", "--bind=/etc:/mnt"),
    ("single dash", "-"),
    ("double dash", "--"),
    ("empty", ""),
    ("spaces", "  two  spaces  "),
    ("tab and return", "\ta\r\nb\r"),
    ("glob", "* ? [a-z] {a,b} ~root"),
    ("shell words", "; exit 1 | cat & # !! <<EOF"),
    (
        "control characters",
        "\u{1}\u{7}\u{1b}[31m\u{7f}\u{80}\u{9f}",
    ),
    ("percent and equals", "%s%n=a==b"),
    (
        "beyond the basic plane",
        "😀\u{10ffff}\u{feff}\u{202e}ẞé\u{301}",
    ),
    ("brackets", "(()) [[ ]] <> {{ }} %{x}"),
];

/// Nasty names of environment variables, as Kubernetes 1.34 and later accepts them.
pub const NAME_CLASSES: [(&str, &str); 20] = [
    ("APPTAINERENV_", "APPTAINERENV_KNOC"),
    ("SINGULARITYENV_", "SINGULARITYENV_KNOC"),
    ("an option of Apptainer", "APPTAINER_BIND"),
    ("an option of Singularity", "SINGULARITY_BIND"),
    ("comma", "a,b"),
    ("double quote", "a\"b\""),
    ("single quote", "a'b'"),
    ("command substitution", "$(id -u)"),
    ("backtick", "`id`"),
    ("backslash", "a\\b"),
    ("leading dash", "-a"),
    ("leading digit", "1a"),
    ("space", "a b "),
    ("dot", "."),
    ("glob", "a*?"),
    ("shell words", "a;b|c&d#"),
    ("percent", "%s"),
    ("a function of bash", "BASH_FUNC_ls%%"),
    ("brackets", "a[0]{}()<>"),
    ("tilde", "~!@^:/+"),
];

/// Expands references by Kubernetes' rule: `$(NAME)` becomes the value of the variable, or stays if there is no such
/// variable; `$$` becomes `$`; any other `$` stays. Inserted values are not expanded again.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let reference = after
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'));
        match reference.map(|(name, after)| (name, lookup(name), after)) {
            Some((_, Some(value), after)) => {
                out.push_str(&value);
                rest = after;
            }
            Some((name, None, after)) => {
                // Writing to a String cannot fail.
                let _written = write!(out, "$({name})");
                rest = after;
            }
            None => {
                out.push('$');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

/// All Unicode scalars except NUL, in order, divided into a number of pieces.
pub(super) struct Scalars {
    pieces: Vec<String>,
}

impl Scalars {
    pub(super) fn cut(pieces: usize) -> Self {
        let all: Vec<char> = ('\u{1}'..=char::MAX).collect();
        let pieces = all.chunks(all.len().div_ceil(pieces.max(1)));
        Self {
            pieces: pieces.map(|piece| piece.iter().collect()).collect(),
        }
    }

    /// The piece of that number, which may be empty for the last numbers because of rounding.
    pub(super) fn piece(&self, number: usize) -> &str {
        self.pieces.get(number).map_or("", String::as_str)
    }
}

/// The random generator `SplitMix64`, which is small and reproducible.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).unwrap_or(1);
        usize::try_from(self.next() % bound).unwrap_or(0)
    }

    fn class(&mut self) -> &'static str {
        CLASSES[self.below(CLASSES.len())].1
    }

    /// Puts a nasty class before or after the text, or returns the text unchanged.
    pub(super) fn decorate(&mut self, text: &str) -> String {
        match self.below(4) {
            0 => format!("{}{text}", self.class()),
            1 => format!("{text}{}", self.class()),
            _ => text.to_owned(),
        }
    }

    /// A random name of printable ASCII characters without `=`.
    pub(super) fn name(&mut self) -> String {
        if self.below(10) == 0 {
            return NAME_CLASSES[self.below(NAME_CLASSES.len())].1.to_owned();
        }
        let length = 1 + self.below(40);
        let mut name = String::new();
        while name.len() < length {
            let offset = u8::try_from(self.below(0x5f)).unwrap_or(0);
            let character = char::from(b' ' + offset);
            if character != '=' {
                name.push(character);
            }
        }
        name
    }

    /// A random text with references of every kind.
    pub(super) fn references(&mut self, known: &[&str]) -> String {
        let mut text = String::new();
        for _ in 0..=self.below(6) {
            let name = known
                .get(self.below(known.len()))
                .copied()
                .unwrap_or("NONE");
            let piece = match self.below(9) {
                0..=2 => format!("$({name})"),
                3 => "$(UNKNOWN_OF_ALL)".to_owned(),
                4 => format!("$$({name})"),
                5 => format!("$$$({name})"),
                6 => "$($(X)".to_owned(),
                7 => "a$b$$c$".to_owned(),
                _ => self.class().to_owned(),
            };
            text.push_str(&piece);
        }
        text
    }

    /// A random text of `bytes` bytes.
    pub(super) fn long(&mut self, bytes: usize) -> String {
        let mut text = String::with_capacity(bytes);
        while text.len() < bytes {
            let class = self.class();
            if text.len() + class.len() + 8 > bytes {
                text.push('x');
            } else {
                text.push_str(class);
                text.push('é');
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Random, expand};

    /// The table of Kubernetes' own documentation and tests.
    #[test]
    fn the_model_expands_as_kubernetes_documents_it() {
        let table = [
            ("$(A)", "a"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$a"),
            ("$(A)$(B)", "a$(A)"),
            ("$(NONE)", "$(NONE)"),
            ("$(A", "$(A"),
            ("$((A)", "$((A)"),
            ("$A $", "$A $"),
            ("$$", "$"),
            ("$$$$", "$$"),
            ("$()", "$()"),
            ("foo$", "foo$"),
            ("", ""),
        ];
        for (text, expected) in table {
            let expanded = expand(text, |name| match name {
                "A" => Some("a".to_owned()),
                "B" => Some("$(A)".to_owned()),
                _ => None,
            });
            assert_eq!(expanded, expected, "of {text:?}");
        }
    }

    #[test]
    fn long_texts_have_the_length_asked_for() {
        let mut random = Random::new(3);
        for bytes in [1, 100, 131_071] {
            assert_eq!(random.long(bytes).len(), bytes);
        }
    }
}
