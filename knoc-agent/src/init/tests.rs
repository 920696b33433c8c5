//! What `init` writes is accepted by those who read it, and what is there is never overwritten.

use std::os::unix::fs::PermissionsExt as _;

use knoc_proto::link::Credentials;

use super::*;

fn options(folder: &Path) -> Options {
    Options {
        site: "trixie".to_owned(),
        address: vec!["login.example.org".to_owned(), "10.0.0.1:4444".to_owned()],
        dir: Some(folder.to_owned()),
        scheduler: None,
        runtime: None,
    }
}

fn found() -> Found {
    let environment = Environment {
        path: "/opt/slurm/bin:/usr/bin".to_owned(),
        slurm_conf: Some("/etc/slurm.conf".to_owned()),
        extra: Vec::new(),
    };
    let tools = vec![("sbatch", PathBuf::from("/opt/slurm/bin/sbatch"))];
    Found {
        environment,
        hostname: "login1".to_owned(),
        tools,
    }
}

#[test]
fn all_is_written_once_and_secret() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    let said = run(&options(&folder), root.path(), &found()).unwrap();
    assert!(
        said.contains("agent.address=login.example.org:10350"),
        "{said}"
    );
    let tls = folder.join("tls");
    for name in [
        "ca.crt",
        "ca.key",
        "agent.crt",
        "agent.key",
        "knocctl.crt",
        "knocctl.key",
    ] {
        let mode = fs::metadata(tls.join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    for name in ["agent", "knocctl"] {
        let part = |end: &str| tls.join(format!("{name}.{end}"));
        Credentials::from_files(tls.join("ca.crt"), part("crt"), part("key")).unwrap();
    }
    let home = Home {
        home: root.path().to_owned(),
    };
    let config = Config::load(&folder.join("agent.toml"), &home).unwrap();
    assert_eq!(config.scheduler, SchedulerKind::Slurm);
    assert_eq!(config.runtime, RuntimeKind::Process);
    assert_eq!(
        config.tools.sbatch.unwrap(),
        Path::new("/opt/slurm/bin/sbatch")
    );
    assert_eq!(config.env["SLURM_CONF"], "/etc/slurm.conf");
    let before = fs::read(tls.join("agent.crt")).unwrap();
    fs::remove_file(folder.join("kubelet-bundle.yaml")).unwrap();
    let said = run(&options(&folder), root.path(), &found()).unwrap();
    assert!(said.contains("Already there"), "{said}");
    assert_eq!(fs::read(tls.join("agent.crt")).unwrap(), before);
    assert!(folder.join("kubelet-bundle.yaml").exists());
}

#[test]
fn without_the_ca_key_nothing_new_is_signed() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    run(&options(&folder), root.path(), &found()).unwrap();
    fs::remove_file(folder.join("tls/ca.key")).unwrap();
    run(&options(&folder), root.path(), &found()).unwrap();
    fs::remove_file(folder.join("tls/agent.crt")).unwrap();
    let error = run(&options(&folder), root.path(), &found()).unwrap_err();
    assert!(matches!(error, InitError::NoCaKey { .. }), "{error}");
}

#[test]
fn mistakes_cost_nothing() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    let bad = Options {
        site: "a b".to_owned(),
        ..options(&folder)
    };
    assert!(matches!(
        run(&bad, root.path(), &found()),
        Err(InitError::Invalid(_))
    ));
    let bad = Options {
        address: vec!["a:b".to_owned()],
        ..options(&folder)
    };
    assert!(matches!(
        run(&bad, root.path(), &found()),
        Err(InitError::Address { .. })
    ));
    assert!(!folder.exists());
    assert_eq!(parse_address("[::1]:7").unwrap(), ("::1".to_owned(), 7));
    assert_eq!(
        parse_address("fe80::1").unwrap(),
        ("fe80::1".to_owned(), PORT)
    );
}

/// The names between backticks after `expected` in serde's words on a key that is none.
fn keys(section: &str) -> Vec<String> {
    let head = match section {
        "" => String::new(),
        "registry" => "[[registry]]\nprefix = 'x'\n".to_owned(),
        other => format!("[{other}]\n"),
    };
    let text = format!("{head}zzz = 1\n");
    let home = Home { home: "/".into() };
    let error = Config::parse(&text, Path::new("x"), &home).unwrap_err();
    let error = knoc_proto::error::chain(&error);
    let line = error.lines().find(|line| line.contains("`zzz`")).unwrap();
    let (_, expected) = line.split_once("expected").unwrap();
    expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_setting_is_explained() {
    let text = super::text::site_file(&options(Path::new("/x")), Path::new("/x"), &[], &found());
    let mut section = String::new();
    let mut explained = std::collections::BTreeSet::new();
    for line in text.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
            explained.insert(section.clone());
        } else if let Some((key, _)) = line.split_once(" = ") {
            explained.insert(
                format!("{section}.{key}")
                    .trim_start_matches('.')
                    .to_owned(),
            );
        }
    }
    // What `init` found stands in `tools`; `env` and `gres` have any names.
    let named = [
        "listen", "tls", "registry", "policy", "job", "limits", "logs", "backoff", "values",
    ];
    for section in std::iter::once("").chain(named) {
        for key in keys(section) {
            let key = format!("{section}.{key}")
                .trim_start_matches('.')
                .to_owned();
            assert!(explained.contains(&key), "{key} is not in the template");
        }
    }
}
