use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    colour: Option<Colour>,
    tables: BTreeMap<String, Inner>,
    list: Vec<Inner>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Colour {
    Red,
    Blue,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only whether it can be read is of interest")]
struct Inner {
    name: String,
    #[serde(default)]
    size: u8,
}

/// The mistakes of a text, with those that `check` adds.
fn mistakes(text: &str, check: impl FnOnce(&mut Document)) -> String {
    let read = Document::parse(text, Path::new("f.toml")).and_then(|mut document| {
        let read: Option<Settings> = document.read();
        check(&mut document);
        document.finish(read)
    });
    read.map_or_else(|mistakes| mistakes.to_string(), |_| String::new())
}

#[test]
fn all_mistakes_are_named_at_once_with_line_and_allowed_values() {
    let text = "\
colour = 'green'

[tables.a]
name = 'a'
size = 300
weight = 1

[tables.b]
size = 'big'

[[list]]
name = 'x'

[[list]]
name = 7
siez = 2

[colours]
";
    let found = mistakes(text, |_| {});
    let expected = [
        "f.toml:1: colour: unknown variant `green`, expected `red` or `blue`",
        "f.toml:5: tables.a.size: invalid value: integer `300`, expected u8",
        "f.toml:6: tables.a.weight: unknown field `weight`, expected `name` or `size`",
        "f.toml:9: tables.b.size: invalid type: string \"big\", expected u8",
        "f.toml:15: list.name: invalid type: integer `7`, expected a string",
        "f.toml:16: list.siez: unknown field `siez`, expected `name` or `size`; did you mean `size`?",
        "f.toml:18: colours: unknown field `colours`, expected one of `colour`, `tables`, `list`; did you mean `colour`?",
    ];
    for line in expected {
        assert!(
            found.lines().any(|found| found == line),
            "{line}\nis not in\n{found}"
        );
    }
    // Only once its size is right, it is reported that [tables.b] has no name: a value that was removed may be the
    // missing one.
    assert_eq!(found.lines().count(), expected.len(), "{found}");
}

#[test]
fn a_missing_value_is_named_with_its_table() {
    let found = mistakes(
        "[tables.b]\nsize = 1\n\n[[list]]\nname = 'x'\n[[list]]\n",
        |_| {},
    );
    let expected = "f.toml:1: tables.b: missing field `name`\nf.toml:6: list: missing field `name`";
    assert_eq!(found, expected);
    let found = mistakes("tables = { b = { size = 1 } }", |_| {});
    assert_eq!(found, "f.toml:1: tables.b: missing field `name`");
}

#[test]
fn every_syntax_error_is_reported() {
    let found = mistakes("a = 'x\n[tables.b]\nname = = 1\n", |_| {});
    assert!(found.starts_with("f.toml:1: "), "{found}");
    assert!(found.contains("\nf.toml:3: "), "{found}");
    let found = mistakes("[tables.b]\nname = 'a'\nname = 'b'\n", |_| {});
    assert_eq!(found, "f.toml:3: duplicate key: `name`");
}

#[test]
fn mistakes_of_the_reader_have_their_line_and_are_reported_once() {
    let text = "[tables]\n\n[tables.a]\nname = 'a'\nsize = 'x'\n\n[tables.b]\nname = 'b'\n";
    let found = mistakes(text, |document| {
        document.wrong(&["tables", "b", "name"], "must be longer");
        document.wrong(&["tables", "a", "size"], "must be even");
        document.wrong(&["tables", "b", "size"], "must be even");
        document.wrong(&["colour"], "must be there");
        document.wrong(&["nothing", "of", "it"], "is there");
    });
    let expected = [
        "f.toml: colour: must be there",
        "f.toml: nothing.of.it: is there",
        "f.toml:5: tables.a.size: invalid type: string \"x\", expected u8",
        "f.toml:7: tables.b.size: must be even",
        "f.toml:8: tables.b.name: must be longer",
    ];
    assert_eq!(found, expected.join("\n"));
    assert_eq!(mistakes("", |_| {}), "");
}

proptest::proptest! {
    /// Every text leads to a value or to mistakes, each of them with a line that exists.
    #[test]
    fn every_text_leads_to_a_value_or_to_mistakes(text in "(\\[{1,2}(tables|list|x)(\\.[ab])?\\]{1,2}\n|(name|size|colour|y) = ('red'|7|x|\\{size = 'a'\\})\n){0,12}") {
        let read = Document::parse(&text, Path::new("f.toml")).and_then(|mut document| {
            let read: Option<Settings> = document.read();
            document.finish(read)
        });
        if let Err(mistakes) = read {
            assert!(!mistakes.all.is_empty());
            let lines = text.lines().count() + 1;
            let there = |origin: &Origin| match origin {
                Origin::Line(line) => (1..=lines).contains(line),
                Origin::Nowhere => true,
                Origin::Variable(_) => false,
            };
            assert!(mistakes.all.iter().all(|mistake| there(&mistake.origin)), "{mistakes}");
        }
    }
}
