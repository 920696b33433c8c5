use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn literal(name: &str, value: &str) -> pb::EnvVar {
    let value = env_var::Value::Literal(Bytes::copy_from_slice(value.as_bytes()));
    pb::EnvVar {
        name: name.into(),
        value: Some(value),
    }
}

fn template(name: &str, value: &str) -> pb::EnvVar {
    pb::EnvVar {
        name: name.into(),
        value: Some(env_var::Value::Template(value.into())),
    }
}

fn text(list: &[Variable]) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    list.iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect()
}

fn one(input: &str) -> String {
    let env = vec![
        (b"VAR_A".to_vec(), b"A".to_vec()),
        (b"VAR_B".to_vec(), b"B".to_vec()),
        (b"VAR_REF".to_vec(), b"$(VAR_A)".to_vec()),
        (b"EMPTY".to_vec(), Vec::new()),
    ];
    String::from_utf8(argv(&[input.to_owned()], &env).remove(0)).unwrap()
}

/// The table of Kubernetes' own `expand_test.go`.
#[test]
fn kubernetes_cases() {
    for (input, wanted) in [
        ("$(VAR_A)", "A"),
        ("___$(VAR_B)___", "___B___"),
        ("$(VAR_REF)", "$(VAR_A)"),
        ("$(EMPTY)", ""),
        ("foo--$(VAR_A)", "foo--A"),
        ("$(VAR_A)$(VAR_B)", "AB"),
        ("$(VAR_A)-$(VAR_B)", "A-B"),
        ("$$(VAR_A)", "$(VAR_A)"),
        ("$$$(VAR_A)", "$A"),
        ("$$$$(VAR_A)", "$$(VAR_A)"),
        ("$$$$$(VAR_A)", "$$A"),
        ("$VAR_A", "$VAR_A"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(VAR_A)$(VAR_B)", "$(VAR_A)B"),
        ("f$(VAR_A", "f$(VAR_A"),
        ("$()", "$()"),
        ("$", "$"),
        ("$$", "$"),
        ("a$", "a$"),
        ("$(VAR_A", "$(VAR_A"),
        ("$$(", "$("),
        ("$(VAR_A))", "A)"),
        ("$((VAR_A))", "$((VAR_A))"),
        ("\n\t$(VAR_B)ü", "\n\tBü"),
        ("$ü$(VAR_A)", "$üA"),
    ] {
        assert_eq!(one(input), wanted, "{input}");
    }
}

#[test]
fn a_variable_can_refer_only_to_those_before_it() {
    let vars = [
        template("EARLY", "$(LATE)"),
        literal("LATE", "$(EARLY)"),
        template("BOTH", "$(LATE)/$(EARLY)"),
    ];
    let got = text(&pod_environment(&vars, &RuntimeFields::default()));
    let wanted = [
        ("EARLY", "$(LATE)"),
        ("LATE", "$(EARLY)"),
        ("BOTH", "$(EARLY)/$(LATE)"),
    ];
    assert_eq!(got, wanted.map(|(n, v)| (n.to_owned(), v.to_owned())));
}

#[test]
fn variables_override_those_of_the_image_and_cannot_refer_to_them() {
    let image = [
        "PATH=/bin".to_owned(),
        "A=image".to_owned(),
        "BARE".to_owned(),
    ];
    let vars = [
        template("A", "x$(PATH)"),
        literal("B", "1"),
        template("B", "$(B)2"),
    ];
    let got = text(&environment(&image, &vars, &RuntimeFields::default()));
    let wanted = [
        ("PATH", "/bin"),
        ("A", "x$(PATH)"),
        ("BARE", ""),
        ("B", "12"),
    ];
    assert_eq!(got, wanted.map(|(n, v)| (n.to_owned(), v.to_owned())));
}

#[test]
fn runtime_fields_are_inserted_and_values_are_bytes() {
    let runtime = RuntimeFields {
        host_ip: "10.0.0.9".into(),
        pod_ip: String::new(),
    };
    let host = env_var::Value::Runtime(RuntimeField::HostIp.into());
    let vars = [
        pb::EnvVar {
            name: "HOST".into(),
            value: Some(host),
        },
        pb::EnvVar {
            name: "RAW".into(),
            value: Some(env_var::Value::Literal(Bytes::from_static(b"\xff\x01"))),
        },
        template("URL", "http://$(HOST):80"),
        template("RAW2", "<$(RAW)>"),
    ];
    let got = pod_environment(&vars, &runtime);
    assert_eq!(got[2].1, b"http://10.0.0.9:80");
    assert_eq!(got[3].1, b"<\xff\x01>");
}

proptest! {
    #[test]
    fn text_without_dollar_is_untouched(input in "[^$]{0,40}") {
        prop_assert_eq!(one(&input), input);
    }

    #[test]
    fn doubled_dollars_give_the_original(input in "[$()A-Z_ü]{0,40}") {
        prop_assert_eq!(one(&input.replace('$', "$$")), input);
    }

    #[test]
    fn without_variables_only_escapes_change(input in "[$()a-z]{0,40}") {
        let got = argv(std::slice::from_ref(&input), &[]).remove(0);
        prop_assert!(got.len() <= input.len());
        if !input.contains("$$") {
            prop_assert_eq!(got, input.into_bytes());
        }
    }

    #[test]
    fn every_name_occurs_once(names in proptest::collection::vec("[A-C]", 0..12)) {
        let vars: Vec<_> = names.iter().map(|name| literal(name, "v")).collect();
        let mut got: Vec<_> =
            pod_environment(&vars, &RuntimeFields::default()).into_iter().map(|v| v.0).collect();
        let all = got.len();
        got.sort();
        got.dedup();
        prop_assert_eq!(all, got.len());
    }
}

#[test]
fn a_sub_path_is_expanded_and_never_leads_out() {
    let env = [
        ("NAME", "foo"),
        ("UP", ".."),
        ("ROOT", "/tmp"),
        ("EMPTY", ""),
    ]
    .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    let known = Known::of(&env);
    let expanded =
        |template: &str| sub_path(template, &known).map_err(|error| crate::error::chain(&error));
    assert_eq!(expanded("$(NAME)"), Ok("foo".to_owned()));
    assert_eq!(
        expanded("a//$(NAME)/./$$(NAME)/"),
        Ok("a/foo/$(NAME)".to_owned())
    );
    let refused = |template: &str, words: &str| {
        let error = expanded(template).unwrap_err();
        assert!(error.contains(words), "{template}: {error}");
    };
    refused("$(B)/$(A)/$(EMPTY)", "missing value for A, B, EMPTY");
    refused(
        "$(UP)",
        "unable to provision SubPath `..`: must not contain '..'",
    );
    refused("$(NAME)/$(UP)", "must not contain '..'");
    refused("$(ROOT)", "must be a relative path");
    let binary = [(b"NAME".to_vec(), b"\xff".to_vec())];
    let binary = Known::of(&binary);
    assert_eq!(sub_path("$(NAME)", &binary), Err(SubPathError::Encoding));
}

#[test]
fn variables_that_double_each_time_fill_no_memory() {
    let mut vars = vec![template("V0", &"x".repeat(1000))];
    // Thirty times the double of a thousand bytes would be a terabyte.
    for n in 1..=30 {
        let before = format!("$(V{})", n - 1);
        vars.push(template(&format!("V{n}"), &before.repeat(2)));
    }
    let env = pod_environment(&vars, &RuntimeFields::default());
    let total: usize = env.iter().map(|(_, value)| value.len()).sum();
    assert!((6 << 20..=MOST_INSERTED + 2000).contains(&total), "{total}");
    assert_eq!(env[1].1.len(), 2000);
    assert_eq!(env[30].1, b"$(V29)$(V29)");
    let words = argv(&vec!["$(V10)".to_owned(); 100], &env);
    let total: usize = words.iter().map(Vec::len).sum();
    assert!(total <= MOST_INSERTED + 600, "{total}");
}

#[test]
fn a_sub_path_that_expands_to_too_much_is_rejected_in_few_words() {
    let env = [
        (b"NAME".to_vec(), vec![b'x'; 200]),
        (b"NO".to_vec(), Vec::new()),
    ];
    let known = Known::of(&env);
    let of = |template: &str| sub_path(template, &known);
    assert_eq!(of(&"$(NAME)/".repeat(20)).map(|path| path.len()), Ok(4019));
    let error = of(&"$(NAME)/".repeat(100_000)).unwrap_err();
    let is_short = |path: &str| path.starts_with("$(NAME)/") && path.len() <= SHOWN;
    assert!(
        matches!(&error, SubPathError::Path { path, source: PathError::TooLong } if is_short(path)),
        "{error}"
    );
    // A path of names that are too long is judged as any other.
    let error = of("$(NAME)$(NAME)").unwrap_err();
    assert!(matches!(error, SubPathError::Path { .. }), "{error}");
    assert_eq!(of("$(NO)"), Err(SubPathError::Missing("NO".to_owned())));
}

#[test]
fn references_that_nothing_closes_are_read_once() {
    let open = "$(".repeat(1 << 20);
    assert_eq!(one(&open), open);
    // What is closed at the very end is one reference to a name that nobody has.
    let closed = format!("{open})");
    assert_eq!(one(&closed), closed);
}
