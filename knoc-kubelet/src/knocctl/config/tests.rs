use super::*;

const GOOD: &str = r#"
current-context = "hpc"

[contexts.hpc]
address = "login.example:10350"
ca = "ca.crt"
cert = "~/me.crt"
key = "/etc/me.key"
site = "trixie"

[contexts.here]
address = "unix:/run/knoc/agent.sock"
"#;

fn here() -> Surroundings {
    Surroundings {
        home: Some("/home/ann".into()),
        uid: 1000,
        ..Surroundings::default()
    }
}

fn parsed(text: &str, context: Option<&str>) -> Result<Context, ConfigError> {
    parse(text, Path::new("/c/knocctl.toml"), context, &here())
}

fn refusal(text: &str) -> String {
    knoc_proto::error::chain(&parsed(text, None).unwrap_err())
}

#[test]
fn the_current_context_with_its_paths() {
    let context = parsed(GOOD, None).unwrap();
    assert_eq!(context.name, "hpc");
    let files = context.files.unwrap();
    assert_eq!(files.ca, Path::new("/c/ca.crt"));
    assert_eq!(files.cert, Path::new("/home/ann/me.crt"));
    assert_eq!(files.key, Path::new("/etc/me.key"));
    let context = parsed(GOOD, Some("here")).unwrap();
    assert_eq!(context.carrier.to_string(), "unix:/run/knoc/agent.sock");
}

#[test]
fn mistakes_are_named_with_line_and_allowed_values() {
    let words = refusal("[contexts.a]\nadress = \"x:1\"\n");
    assert!(words.contains("line 2"), "{words}");
    assert!(words.contains("unknown field `adress`"), "{words}");
    assert!(words.contains("`address`"), "{words}");
    let words = refusal("current-contxt = \"a\"\n");
    assert!(
        words.contains("line 1") && words.contains("`current-context`"),
        "{words}"
    );
    let words = refusal("[contexts.a]\naddress = 7\n");
    assert!(
        words.contains("line 2") && words.contains("string"),
        "{words}"
    );
}

#[test]
fn wrong_contexts_are_named_with_those_there_are() {
    let error = parsed(GOOD, Some("hcp")).unwrap_err().to_string();
    assert_eq!(
        error,
        "/c/knocctl.toml has no context \"hcp\"; it has here, hpc"
    );
    let two = GOOD.replace("current-context = \"hpc\"", "");
    let error = parsed(&two, None).unwrap_err();
    assert!(matches!(error, ConfigError::NoneChosen { .. }));
    assert_eq!(error.hint().unwrap(), "choose one by --context");
}

#[test]
fn files_go_with_tcp_and_only_with_tcp() {
    let words = refusal("[contexts.a]\naddress = \"x:1\"\nca = \"ca\"\n");
    assert!(
        words.ends_with("a TCP address needs cert, key too"),
        "{words}"
    );
    let words = refusal("[contexts.a]\naddress = \"unix:/x\"\nkey = \"k\"\n");
    assert!(words.ends_with("a unix socket takes no key"), "{words}");
    let words = refusal("[contexts.a]\naddress = \"x\"\n");
    assert!(
        words.ends_with("\"x\" is not HOST:PORT (an IPv6 address stands in brackets)"),
        "{words}"
    );
}

#[test]
fn without_a_file_the_socket() {
    let context = load(None, None, &here()).unwrap();
    assert_eq!(
        context.carrier.to_string(),
        "unix:/tmp/knoc-1000/agent.sock"
    );
    let run = Surroundings {
        runtime_dir: Some("/run/user/1000".into()),
        ..here()
    };
    assert_eq!(
        run.sockets()[0],
        Path::new("/run/user/1000/knoc/agent.sock")
    );
    let error = load(None, Some("x"), &here()).unwrap_err();
    assert!(matches!(error, ConfigError::NoFile { .. }));
}

#[test]
fn a_file_that_was_asked_for_has_to_be_there() {
    let error = load(Some(Path::new("/nowhere/k.toml")), None, &here()).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
}
