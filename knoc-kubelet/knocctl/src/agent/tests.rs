use std::os::unix::fs::PermissionsExt as _;

use knoc_proto::manage::Installed;

use super::*;

#[test]
fn the_scripts_are_read_alike_by_every_login_shell() {
    let [put, run] = program::scripts("0123456789abcdef");
    assert!(Script::new(&put).is_some(), "{put}");
    assert!(Script::new(&run).is_some(), "{run}");
    assert!(Script::new("exec \"$HOME/.local/bin/knoc-agent\" manage").is_some());
}

#[test]
fn a_login_without_a_host_or_with_an_option_in_it_is_refused() {
    assert!(login("u@login:2222").is_ok());
    for bad in ["", "-oProxyCommand=x", "login;x"] {
        assert!(login(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn the_bundle_is_secret_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bundle.yaml");
    next::write_bundle(&path, "a key").unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = next::write_bundle(&path, "a key").unwrap();
    assert!(again.contains("there already"), "{again}");
    let error = next::write_bundle(&path, "another").unwrap_err();
    assert!(matches!(error, ManageError::OtherBundle { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a key");
}

#[test]
fn half_a_bundle_of_a_killed_command_is_replaced_and_nothing_through_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bundle.yaml");
    next::write_bundle(&path, "a k").unwrap();
    let done = next::write_bundle(&path, "a key").unwrap();
    assert!(done.contains("keep it secret"), "{done}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a key");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let error = next::write_bundle(&link, "a key and more").unwrap_err();
    assert!(matches!(error, ManageError::OtherBundle { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a key");
}

#[test]
fn the_commands_that_follow_name_the_way_and_not_the_key() {
    let installed = |run_mode| Installed {
        bundle: "SECRET".into(),
        run_mode: Some(run_mode),
        program: "/home/ann/.local/bin/knoc-agent".into(),
        namespaces: vec!["team-a".into()],
        listens: false,
    };
    let ssh: Ssh = "ann@login:2222".parse().unwrap();
    let file = PathBuf::from("bundle.yaml");
    let over = |address, mode| next::commands("hpc", &ssh, address, &file, &installed(mode));
    let text = over(None, RunMode::Systemd);
    for part in [
        "command=\\\"/home/ann/.local/bin/knoc-agent connect\\\"",
        "ssh-keyscan -p 2222 login",
        "--from-literal=port=2222",
        "--set agent.site=hpc --set agent.address=ssh:",
        "--set image.repository=REGISTRY/knoc-kubelet",
        concat!("knoc-kubelet:", env!("CARGO_PKG_VERSION"), "-ssh (docs"),
        "team-a",
        "apply -f bundle.yaml",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("SECRET") && !text.contains("onDemand"));
    let text = over(None, RunMode::OnDemand);
    assert!(text.contains("serve --stdio") && text.contains("agent.ssh.onDemand=true"));
    let text = over(Some("login.example.org"), RunMode::Cron);
    assert!(
        text.contains("agent.address=login.example.org:10350") && !text.contains("ssh"),
        "{text}"
    );
}

#[test]
fn what_is_no_program_is_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("knoc-agent");
    let missing = Program::open(Some(path.clone())).unwrap_err();
    assert!(matches!(missing, ManageError::Program { .. }));
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    let text = Program::open(Some(path)).unwrap_err();
    assert!(text.to_string().contains("ELF"), "{text}");
    assert!(text.hint().unwrap().contains("--binary"));
}

#[test]
fn the_end_of_an_output_is_cut_between_characters() {
    assert_eq!(last_of(b" hello \n"), "hello");
    let long = "ä".repeat(300);
    assert!(last_of(long.as_bytes()).len() <= 200);
}
