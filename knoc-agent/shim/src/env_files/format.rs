//! PURE: the format of a file with variables, as a kubelet reads it: a subset of what a shell reads.

/// A line that is not in the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub(crate) struct Malformed {
    line: usize,
    what: &'static str,
}

/// The value of the first variable of this name; `None` if there is none or it is empty. What follows that variable is not
/// looked at.
pub(crate) fn find(text: &[u8], key: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
    let lines = text.split(|byte| *byte == b'\n');
    let mut lines = lines.map(without_return).zip(1_usize..);
    while let Some((line, number)) = lines.next() {
        let line = trimmed(line);
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let malformed = |what| Malformed { line: number, what };
        let equals = line.iter().position(|byte| *byte == b'=');
        let equals = equals.ok_or_else(|| malformed("there is no `=`"))?;
        let (name, value) = line.split_at(equals);
        let value = value.get(1..).unwrap_or_default();
        match name.last() {
            None => return Err(malformed("there is no name before `=`")),
            Some(last) if is_blank(*last) => {
                return Err(malformed("there is a blank before `=`"));
            }
            Some(_) => {}
        }
        if value.first().is_some_and(|first| is_blank(*first)) {
            // As in a shell, the variable is empty.
            if name == key {
                return Ok(None);
            }
            continue;
        }
        let quoted = value.strip_prefix(b"'");
        let quoted = quoted.ok_or_else(|| malformed("the value is not in single quotes"))?;
        let value = up_to_the_quote((quoted, number), &mut lines)?;
        if name == key {
            return nul_free(value, number);
        }
    }
    Ok(None)
}

/// The text up to the closing quote, which may be on a later line.
fn up_to_the_quote<'a>(
    (mut rest, begin): (&'a [u8], usize),
    lines: &mut impl Iterator<Item = (&'a [u8], usize)>,
) -> Result<Vec<u8>, Malformed> {
    let mut value = Vec::new();
    let mut line = begin;
    loop {
        if let Some(end) = rest.iter().position(|byte| *byte == b'\'') {
            let (inside, after) = rest.split_at(end);
            value.extend_from_slice(inside);
            let after = trimmed(after.get(1..).unwrap_or_default());
            if after.is_empty() || after.starts_with(b"#") {
                return Ok(value);
            }
            let what = "something follows the closing quote";
            return Err(Malformed { line, what });
        }
        value.extend_from_slice(rest);
        value.push(b'\n');
        let next = lines.next().ok_or(Malformed {
            line: begin,
            what: "the quote is not closed",
        });
        (rest, line) = next?;
    }
}

fn nul_free(value: Vec<u8>, line: usize) -> Result<Option<Vec<u8>>, Malformed> {
    if value.contains(&0) {
        let what = "the value contains a NUL byte";
        return Err(Malformed { line, what });
    }
    Ok(Some(value).filter(|value| !value.is_empty()))
}

fn without_return(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

fn trimmed(mut text: &[u8]) -> &[u8] {
    while let [first, rest @ ..] = text
        && is_blank(*first)
    {
        text = rest;
    }
    text
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, key: &str) -> Result<Option<String>, String> {
        let found = find(text.as_bytes(), key.as_bytes());
        let text = |value: Vec<u8>| String::from_utf8(value).unwrap();
        found
            .map(|found| found.map(text))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn values_are_what_is_between_the_quotes() {
        let text = "# comment\n\n \tA='1'\nB='a b=$C \\n \"#'  # why\r\nMORE='one\n two'\nA='2'\nE=''\nF= 'x'\nLAST='y'";
        let of = |key: &str| value(text, key).unwrap();
        assert_eq!(of("A").as_deref(), Some("1"), "the first one counts");
        assert_eq!(of("B").as_deref(), Some("a b=$C \\n \"#"));
        assert_eq!(of("MORE").as_deref(), Some("one\n two"));
        assert_eq!(of("LAST").as_deref(), Some("y"));
        for missing in ["E", "F", "C", "a", ""] {
            assert_eq!(of(missing), None, "{missing}");
        }
        assert_eq!(value("", "A"), Ok(None));
    }

    #[test]
    fn a_line_that_is_not_in_the_format_is_named() {
        for (text, expected) in [
            ("B='1'\nA", "line 2: there is no `=`"),
            ("='1'", "line 1: there is no name before `=`"),
            ("A ='1'", "line 1: there is a blank before `=`"),
            ("A=1", "line 1: the value is not in single quotes"),
            ("A=\"1\"", "line 1: the value is not in single quotes"),
            ("A=", "line 1: the value is not in single quotes"),
            ("\nA='1\n2\n", "line 2: the quote is not closed"),
            (
                "B='1\n2' x\nA='1'",
                "line 2: something follows the closing quote",
            ),
            ("A='1'B='2'", "line 1: something follows the closing quote"),
            ("A='\0'", "line 1: the value contains a NUL byte"),
        ] {
            assert_eq!(value(text, "A"), Err(expected.to_owned()), "{text:?}");
        }
        // As a kubelet, it reads no further than to the variable.
        assert_eq!(value("A='1'\nrubbish", "A"), Ok(Some("1".to_owned())));
    }
}
