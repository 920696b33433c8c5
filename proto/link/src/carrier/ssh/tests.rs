use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use super::*;

fn words(argv: &Argv) -> String {
    argv.to_string()
}

#[test]
fn forms_of_a_login() {
    for text in [
        "",
        "login",
        "u@login",
        "u@login:2222",
        "[::1]:22",
        "u@[fe80::1]",
        "a@b@login",
    ] {
        let ssh: Ssh = text.parse().unwrap();
        assert_eq!(ssh.to_string(), text);
    }
    for text in [
        "-oProxyCommand=x",
        "u@-o",
        "-l@login",
        "login:",
        "login:0",
        "login:http",
        "::1",
        "a b",
        "u@",
        "log$in",
        "[::1",
        "[::1]22",
        "login;x",
    ] {
        let error = text.parse::<Ssh>().unwrap_err().to_string();
        assert!(error.contains("[USER@]HOST[:PORT]"), "{text}: {error}");
    }
    assert!(is_program("~/.local/bin/knoc-agent") && is_program("/opt/knoc-agent"));
    for text in ["", "~/", "-x", "a b", "$HOME/x", "x;y", "a'b"] {
        assert!(!is_program(text), "{text}");
    }
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        put(folder.path(), name, text);
    }
    folder
}

#[expect(clippy::disallowed_methods, reason = "a file of the test")]
fn put(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).unwrap();
    fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o644)).unwrap();
}

fn with(folder: &Path, text: &str) -> Ssh {
    let mut ssh: Ssh = text.parse().unwrap();
    ssh.login.folder = Some(folder.to_owned());
    ssh
}

const GOOD: [(&str, &str); 5] = [
    ("ssh-privatekey", "KEY\r\nline"),
    ("known_hosts", "# comment\nlogin ssh-ed25519 AAAA\n"),
    ("remote_user", "ann\n"),
    ("host", "login.example\n"),
    ("port", "2222"),
];

#[test]
fn a_secret_becomes_a_private_copy_that_ends_with_the_connection() {
    let folder = folder(&GOOD);
    put(folder.path(), "proxy_jump", "bob@jump:22,second");
    put(folder.path(), "ssh-certificate", "CERT");
    let ssh = with(folder.path(), "");
    ssh.check().unwrap();
    let secret = Secret::read(folder.path()).unwrap();
    let (argv, held) = ssh.argv(Some(&secret), ssh.remote(Speaks::Tls)).unwrap();
    let shown = words(&argv);
    assert!(
        shown.contains(
            r#""-l","ann","-p","2222","-J","bob@jump:22,second","--","login.example","sh -c '"#
        ),
        "{shown}"
    );
    let list: Vec<String> = serde_json::from_str(&shown).unwrap();
    let config = Path::new(&list[2]);
    let private = config.parent().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(private), mode(&private.join("key"))), (0o700, 0o600));
    assert_eq!(fs::read(private.join("key")).unwrap(), b"KEY\nline\n");
    let text = fs::read_to_string(config).unwrap();
    for line in [
        "StrictHostKeyChecking yes",
        "BatchMode yes",
        "IdentitiesOnly yes",
        "CertificateFile",
        "User ann",
    ] {
        assert!(
            text.lines().any(|found| found.starts_with(line)),
            "{line}: {text}"
        );
    }
    assert!(!text.contains("accept-new") && !text.contains("StrictHostKeyChecking no"));
    drop(held);
    assert!(!private.exists());
}

#[test]
fn the_address_goes_before_the_secret() {
    let folder = folder(&GOOD);
    let secret = Secret::read(folder.path()).unwrap();
    let ssh = with(folder.path(), "eve@other:2");
    let (argv, _held) = ssh.argv(Some(&secret), ssh.remote(Speaks::Tls)).unwrap();
    let shown = words(&argv);
    assert!(
        shown.contains(r#""-l","eve","-p","2","--","other""#),
        "{shown}"
    );
}

#[test]
fn what_a_secret_lacks_is_named_with_what_to_do() {
    let check = |change: &dyn Fn(&Path)| {
        let folder = folder(&GOOD);
        change(folder.path());
        with(folder.path(), "").check().unwrap_err().to_string()
    };
    let remove =
        |name: &'static str| move |folder: &Path| fs::remove_file(folder.join(name)).unwrap();
    let error = check(&remove("known_hosts"));
    assert!(
        error.contains("ssh-keyscan") && error.contains("ssh-keygen -lf"),
        "{error}"
    );
    for empty in ["", "\n", "# nothing\n"] {
        let error = check(&|folder| put(folder, "known_hosts", empty));
        assert!(error.contains("missing or empty"), "{error}");
    }
    assert!(check(&remove("ssh-privatekey")).contains("ssh-privatekey is missing"));
    assert!(check(&remove("host")).contains("ssh:USER@HOST"));
    for (name, text, said) in [
        ("host", "-oProxyCommand=evil", "a host's name"),
        ("remote_user", "a b", "a user's name"),
        ("port", "ssh", "not a port"),
        ("proxy_jump", "jump,-oX", "separated by commas"),
    ] {
        let error = check(&|folder| put(folder, name, text));
        assert!(error.contains(said) && error.contains(name), "{error}");
    }
}

#[test]
fn a_replaced_file_changes_the_fingerprint() {
    let folder = folder(&GOOD);
    let ssh = with(folder.path(), "");
    let before = ssh.fingerprint();
    assert_eq!(before, ssh.fingerprint());
    put(folder.path(), "ssh-privatekey", "ANOTHER");
    assert_ne!(before, ssh.fingerprint());
}

#[test]
fn every_login_shell_reads_the_remote_command_alike() {
    let ssh = |program: Option<&str>, on_demand| Ssh {
        login: Login {
            program: program.map(str::to_owned),
            on_demand,
            ..Login::default()
        },
        ..Ssh::default()
    };
    assert_eq!(
        ssh(Some("~/x"), false).remote(Speaks::Plain),
        "~/x connect --plain"
    );
    assert_eq!(
        ssh(Some("/x"), true).remote(Speaks::Tls),
        "/x serve --stdio"
    );
    let found = ssh(None, false).remote(Speaks::Tls);
    // One pair of single quotes, within which csh and fish change nothing either.
    assert_eq!(found.matches('\'').count(), 2);
    let inside = found.split('\'').nth(1).unwrap();
    assert!(
        inside.ends_with("exec knoc-agent connect") && !inside.contains(['!', '\\']),
        "{inside}"
    );
}

#[test]
fn without_a_folder_the_users_own_configuration_counts_and_nothing_is_asked() {
    let ssh: Ssh = "login".parse().unwrap();
    let (argv, _held) = ssh.argv(None, ssh.remote(Speaks::Plain)).unwrap();
    let shown = words(&argv);
    assert!(
        shown.contains("BatchMode=yes") && shown.contains("StrictHostKeyChecking=yes"),
        "{shown}"
    );
    assert!(
        !shown.contains("\"-F\"") && shown.contains("connect --plain"),
        "{shown}"
    );
}
