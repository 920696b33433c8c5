use super::*;

/// The boundaries of each rule: names that are accepted, and names that are not. `<n>` repeats the letter before it n
/// times.
struct Rule {
    name: &'static str,
    check: fn(&str) -> Result<(), BadName>,
    good: &'static [&'static str],
    bad: &'static [&'static str],
}

const RULES: &[Rule] = &[
    Rule {
        name: "dns_label",
        check: dns_label,
        good: &["a", "0", "9a", "a-b", "a--b", "a<63>", "1<63>"],
        bad: &[
            "", "-", "-a", "a-", "A", "aB", "a.b", "a_b", "a b", "ä", "a\n", "a<64>", "a/b",
        ],
    },
    Rule {
        name: "dns_subdomain",
        check: dns_subdomain,
        good: &[
            "a",
            "0",
            "1.2.3.4",
            "a.b-c",
            "a--b",
            // One label of more than 63 characters, and the longest name.
            "a<64>",
            "a<253>",
            "a<126>.b<126>",
            "sample-webhook-deployment-5f8b6c9d7c-with-a-name-of-more-than-63-characters",
        ],
        bad: &[
            "", ".", "a.", ".a", "a..b", "a.-b", "a-.b", "-a", "a-", "A", "a_b", "a/b", "a b", "é",
            "a\n", "a<254>",
        ],
    },
    Rule {
        name: "config_map_key",
        check: config_map_key,
        good: &[
            "a", "A", "0", "_", "-", "a.b", ".a", ".hidden", "a..b", "-a-", "a.", "K<253>",
        ],
        bad: &[
            "", ".", "..", "..a", "..data", "...", "a/b", "a b", "ä", "a\n", "a:", "K<254>",
        ],
    },
    Rule {
        name: "environment_variable",
        check: environment_variable,
        good: &[
            "A", "_", "9", "a.b", "-", "..", "a b", " ", "~", "a<4000>", "/", "$(X)", "\"", "a:b",
        ],
        bad: &["", "=", "A=", "=A", "é", "a\n", "a\t", "\u{7f}", "\0"],
    },
    Rule {
        name: "port_name",
        check: port_name,
        good: &["a", "http", "8a", "a-b", "p<15>", "1-a-2"],
        bad: &[
            "", "80", "-a", "a-", "a--b", "HTTP", "a.b", "a_b", "p<16>", "ä", "-",
        ],
    },
    Rule {
        name: "qualified_name",
        check: qualified_name,
        good: &[
            "a",
            "A",
            "1",
            "a.b_c-d",
            "a<63>",
            "example.com/A",
            "e<253>/a<63>",
            "1.2/3",
        ],
        bad: &[
            "",
            "/",
            "/a",
            "a/",
            "a/b/c",
            "-a",
            "a-",
            ".a",
            "_a",
            "a b",
            "a<64>",
            "e<254>/a",
            "Example.com/a",
            "e_x/a",
            "a//b",
            "ä",
        ],
    },
    Rule {
        name: "annotation_key",
        check: annotation_key,
        good: &["a", "Example.com/A", "e<253>/a<63>"],
        bad: &["", "/a", "a/b/c", "a<64>", "e_x/a"],
    },
    Rule {
        name: "label_value",
        check: label_value,
        good: &["", "a", "A.b_c-D", "1", "a<63>"],
        bad: &[
            "-", "a-", "-a", ".a", "_", "a b", "a/b", "a<64>", "é", "a\n",
        ],
    },
    Rule {
        name: "ip_address",
        check: ip_address,
        good: &["10.0.0.1", "::1", "2001:db8::ffff"],
        bad: &[
            "",
            "10.0.0",
            "10.0.0.256",
            "[::1]",
            "localhost",
            " 10.0.0.1",
            "10.0.0.1/8",
        ],
    },
    Rule {
        name: "is_host_name",
        check: is_host_name,
        good: &["a", "a.b", "a<63>"],
        bad: &["", "a.", "a-", "a<64>", "A"],
    },
];

/// Expands repetitions: `x<3>` becomes `xxx`.
fn expand(text: &str) -> String {
    let mut rest = text;
    let mut out = String::new();
    while let Some((before, after)) = rest.split_once('<') {
        let (count, after) = after.split_once('>').unwrap();
        let last = before.chars().last().unwrap();
        out.push_str(before);
        out.extend(std::iter::repeat_n(
            last,
            count.parse::<usize>().unwrap() - 1,
        ));
        rest = after;
    }
    out + rest
}

#[test]
fn every_rule_has_the_boundaries_of_kubernetes() {
    for rule in RULES {
        for good in rule.good {
            let checked = (rule.check)(&expand(good));
            assert_eq!(checked, Ok(()), "{} {good:?}", rule.name);
        }
        for bad in rule.bad {
            let checked = (rule.check)(&expand(bad));
            assert!(checked.is_err(), "{} accepts {bad:?}", rule.name);
        }
    }
}

#[test]
fn leading_zeros_of_an_address_are_left_out_and_nothing_else_changes() {
    for (text, expected) in [
        ("127.000.0.1", "127.0.0.1"),
        ("010.09.008.000", "10.9.8.0"),
        ("0000000001.2.3.4", "1.2.3.4"),
        ("::ffff:127.000.0.01", "::ffff:127.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:0DB8::0001", "2001:0DB8::0001"),
        ("::", "::"),
    ] {
        let short = without_leading_zeros(text);
        assert_eq!(short, expected);
        ip_address(&short).unwrap();
    }
    for none in [
        "",
        "0",
        "1..2.3",
        "10.0.0.0256",
        " 01.2.3.4",
        "01.2.3",
        "0x1.2.3.4",
        "é.01.2.3",
    ] {
        assert_eq!(without_leading_zeros(none), none);
    }
}

#[test]
fn an_error_states_the_rule() {
    let long = dns_subdomain(&"a".repeat(254)).unwrap_err();
    assert_eq!(long.to_string(), "must be no more than 253 characters");
    let upper = dns_subdomain("A").unwrap_err().to_string();
    assert!(
        upper.starts_with("a lowercase RFC 1123 subdomain must consist of"),
        "{upper}"
    );
}

#[test]
fn the_host_name_of_a_long_name_is_cut_as_by_a_kubelet() {
    for (pod, expected) in [
        ("web-0", "web-0"),
        ("a.b", "a.b"),
        ("a<63>", "a<63>"),
        ("a<253>", "a<63>"),
        ("a<62>-b", "a<62>"),
        ("a<60>.-.b", "a<60>"),
        ("a<61>--<40>b", "a<61>"),
    ] {
        let pod = expand(pod);
        let host = host_name(&pod);
        assert_eq!(host, expand(expected));
        is_host_name(host).unwrap();
    }
}
