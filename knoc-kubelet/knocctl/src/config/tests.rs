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
        places: SocketLocations {
            state_dir: "/home/ann/.local/state/knoc".into(),
            ..SocketLocations::default()
        },
        ..Surroundings::default()
    }
}

fn parsed(text: &str, context: Option<&str>) -> Result<Context, ConfigError> {
    parse(text, Path::new("/c/knocctl.toml"), context, &here(), None)
}

fn mistakes_of(text: &str) -> String {
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
    assert_eq!(context.route.to_string(), "unix:/run/knoc/agent.sock");
}

#[test]
fn mistakes_are_named_with_line_and_allowed_values() {
    let mistakes = mistakes_of(
        "current-contxt = 'a'\n\n[contexts.a]\nadress = 'x:1'\n\n[contexts.b]\naddress = 7\n\n\
         [contexts.c]\naddress = 'x'\n",
    );
    let expected = [
        "/c/knocctl.toml:1: current-contxt: unknown field `current-contxt`, expected `current-context` or `contexts`; did you mean `current-context`?",
        "/c/knocctl.toml:3: contexts.a.address: is missing: HOST:PORT, ssh:[USER@]HOST[:PORT], exec:COMMAND or unix:/PATH",
        "/c/knocctl.toml:4: contexts.a.adress: unknown field `adress`, expected one of `address`, `ca`, `cert`, `key`, `site`; did you mean `address`?",
        "/c/knocctl.toml:7: contexts.b.address: invalid type: integer `7`, expected a string",
        "/c/knocctl.toml:10: contexts.c.address: \"x\" is not HOST:PORT (write an IPv6 address in brackets)",
    ];
    assert_eq!(mistakes.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn wrong_contexts_are_named_with_those_there_are() {
    let error = parsed(GOOD, Some("hcp")).unwrap_err().to_string();
    assert_eq!(
        error,
        "/c/knocctl.toml has no context \"hcp\"; it has here, hpc"
    );
    let mistakes = mistakes_of(&GOOD.replace("\"hpc\"", "\"hcp\""));
    let expected =
        "/c/knocctl.toml:2: current-context: there is no context \"hcp\"; there are: here, hpc";
    assert_eq!(mistakes, expected);
    let two = GOOD.replace("current-context = \"hpc\"", "");
    let error = parsed(&two, None).unwrap_err();
    assert!(matches!(error, ConfigError::NoneChosen { .. }));
    assert_eq!(error.hint().unwrap(), "choose one by --context");
}

#[test]
fn files_go_with_tcp_and_only_with_tcp() {
    let mistakes = mistakes_of("[contexts.a]\naddress = \"x:1\"\nca = \"ca\"\n");
    let expected = "/c/knocctl.toml:1: contexts.a.cert: is missing: a TCP address needs it\n\
                    /c/knocctl.toml:1: contexts.a.key: is missing: a TCP address needs it";
    assert_eq!(mistakes, expected);
    let mistakes = mistakes_of("[contexts.a]\naddress = \"unix:/x\"\nkey = \"k\"\nsite = \"s\"\n");
    let expected = "/c/knocctl.toml:3: contexts.a.key: a unix socket takes none: its peer is known by its user\n\
                    /c/knocctl.toml:4: contexts.a.site: a unix socket takes none: its peer is known by its user";
    assert_eq!(mistakes, expected);
}

#[test]
fn the_socket_takes_precedence_over_a_context_that_was_not_chosen() {
    let socket = || Some(PathBuf::from("/run/knoc/agent.sock"));
    let name = |text: &str, context: Option<&str>, socket: Option<PathBuf>| {
        let path = Path::new("/c/knocctl.toml");
        parse(text, path, context, &here(), socket).unwrap().name
    };
    let one = "[contexts.only]\naddress = 'x:1'\nca = 'a'\ncert = 'b'\nkey = 'c'\n";
    assert_eq!(name(one, None, socket()), "local");
    assert_eq!(name(one, None, None), "only");
    assert_eq!(name(one, Some("only"), socket()), "only");
    assert_eq!(name(GOOD, None, socket()), "hpc", "current-context");
    let two = GOOD.replace("current-context = \"hpc\"", "");
    assert_eq!(name(&two, None, socket()), "local");
}

#[test]
fn without_a_file_the_socket_is_used() {
    let context = load(None, None, &here()).unwrap();
    assert_eq!(
        context.route.to_string(),
        "unix:/home/ann/.local/state/knoc/socket/agent.sock"
    );
    let folder = tempfile::tempdir().unwrap();
    let mut run = here();
    run.places.runtime_dir = Some(folder.path().to_owned());
    let context = load(None, None, &run).unwrap();
    let place = folder.path().join("knoc/agent.sock");
    assert_eq!(context.route, Carrier::Unix(place).into());
    let error = load(None, Some("x"), &here()).unwrap_err();
    assert!(matches!(error, ConfigError::NoFile { .. }));
}

#[test]
fn a_file_that_was_asked_for_has_to_be_there() {
    let error = load(Some(Path::new("/nowhere/k.toml")), None, &here()).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
}
