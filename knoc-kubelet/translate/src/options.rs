//! PURE: options of programs that a pod gives as one text.

/// Splits a text at blanks; single and double quotes and backslashes protect them. No shell is involved: the parts
/// become elements of an argv. `None` if a quote is not closed.
pub(super) fn split(text: &str) -> Option<Vec<String>> {
    let mut options = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().push(chars.next()?),
            (None, c) if c.is_whitespace() => options.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    options.extend(word);
    quote.is_none().then_some(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_options_are_split_as_written() {
        let joined = |text: &str| split(text).map(|options| options.join("|"));
        assert_eq!(joined("--a=1  --b='x y'").as_deref(), Some("--a=1|--b=x y"));
        assert_eq!(
            joined(r#"--c="q \" r" \ z"#).as_deref(),
            Some(r#"--c=q " r| z"#)
        );
        assert_eq!(joined("''").as_deref(), Some(""));
        assert_eq!(split("  "), Some(vec![]));
        assert_eq!(split("'open"), None);
        assert_eq!(split("end\\"), None);
    }
}
