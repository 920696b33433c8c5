//! PURE: patterns of names, in which `*` stands for any characters, and lists of them in the settings.

use std::{fmt::Display, str::FromStr};

/// The longest part of a pattern: a name of a namespace or a Service has at most 63 characters.
pub(crate) const PART: usize = 63;

/// Is this a part of a pattern: a name of lower-case letters, digits, `-` and `*`?
pub(crate) fn is_part(part: &str) -> bool {
    let known =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-*".contains(&byte);
    !part.is_empty() && part.len() <= PART && part.bytes().all(known)
}

/// Does `text` match `pattern`, in which `*` stands for any characters? Takes at most the product of both lengths.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut at, mut seen) = (0, 0);
    // Where to go on if what follows the last `*` does not match: after that `*`, one byte later.
    let mut again = None;
    while let Some(byte) = text.get(seen) {
        match pattern.get(at) {
            Some(b'*') => {
                at += 1;
                again = Some((at, seen));
            }
            Some(wanted) if wanted == byte => {
                at += 1;
                seen += 1;
            }
            Some(_) | None => {
                let Some((star, from)) = again else {
                    return false;
                };
                at = star;
                seen = from + 1;
                again = Some((star, seen));
            }
        }
    }
    pattern.iter().skip(at).all(|byte| *byte == b'*')
}

/// Reads a list of at most `most` entries. Returns one sentence for each text that is wrong.
pub(crate) fn parse_list<P, T>(texts: &[T], most: usize) -> Result<Vec<P>, Vec<String>>
where
    P: FromStr<Err: Display>,
    T: AsRef<str>,
{
    let mut wrong = Vec::new();
    let mut list = Vec::new();
    if texts.len() > most {
        let length = texts.len();
        wrong.push(format!("has {length} entries; the limit is {most}"));
    }
    for text in texts.iter().take(most) {
        match text.as_ref().parse::<P>() {
            Ok(entry) => list.push(entry),
            Err(error) => wrong.push(error.to_string()),
        }
    }
    if wrong.is_empty() {
        Ok(list)
    } else {
        Err(wrong)
    }
}
