//! Tests that the programs accept what `init` writes, and that existing files are never
//! overwritten.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

use knoc_link::Credentials;

use super::*;

fn options(folder: &Path) -> Options {
    Options {
        namespaces: Vec::new(),
        site: "trixie".to_owned(),
        address: vec!["login.example.org".to_owned(), "10.0.0.1:4444".to_owned()],
        dir: Some(folder.to_owned()),
        scheduler: None,
        runtime: None,
        no_port: false,
        run_mode: None,
        partition: None,
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
fn of_many_that_run_at_once_one_makes_the_ca_and_all_it_signs() {
    const RUNS: usize = 8;
    for _ in 0..4 {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("knoc");
        let (barrier, wanted) = (std::sync::Barrier::new(RUNS), options(&folder));
        let start = || {
            let found = found();
            barrier.wait();
            run(&wanted, root.path(), &found).unwrap()
        };
        let said: Vec<String> = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..RUNS).map(|_| scope.spawn(start)).collect();
            let said = runs.into_iter().map(|run| run.join().unwrap());
            said.collect()
        });
        let wrote = said.iter().filter(|said| said.starts_with("Written:"));
        assert_eq!(wrote.count(), 1, "{said:?}");
        let tls = |name: &str| folder.join("tls").join(name);
        let text = |name: &str| fs::read_to_string(tls(name)).unwrap();
        knoc_link::pki::Ca::from_bundle(&text("ca.crt"), &text("ca.key")).unwrap();
        for name in ["agent", "knocctl"] {
            let part = |end: &str| tls(&format!("{name}.{end}"));
            Credentials::from_files(tls("ca.crt"), part("crt"), part("key")).unwrap();
        }
    }
}

#[test]
fn init_says_whose_pods_the_bundle_admits_before_it_is_handed_over() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    let said = run(&options(&folder), root.path(), &found()).unwrap();
    let (warning, bundle) = (
        said.find(
            "everybody who can create a pod in any namespace of the cluster runs programs as you",
        ),
        said.find("kubectl apply"),
    );
    assert!(warning.is_some() && warning < bundle, "{said}");
    let folder = root.path().join("named");
    let named = Options {
        namespaces: vec!["team-a".to_owned(), "team-b".to_owned()],
        ..options(&folder)
    };
    // On the second run the site file exists already, whatever the options say.
    for options in [named, options(&folder)] {
        let said = run(&options, root.path(), &found()).unwrap();
        assert!(
            said.contains("runs programs as you: team-a, team-b."),
            "{said}"
        );
        assert!(!said.contains("any namespace"), "{said}");
        let home = Home {
            home: root.path().to_owned(),
        };
        let config = Config::load(&folder.join("agent.toml"), &home).unwrap();
        assert_eq!(config.policy.namespaces, ["team-a", "team-b"]);
    }
    assert!(namespace("team-a").is_ok() && namespace("Team").is_err());
}

/// The commented-out settings of the template: line number, section, setting, and how the line
/// marks it.
fn commented(text: &str) -> Vec<(usize, String, String, String)> {
    let mut section = String::new();
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        if bare.starts_with('[') {
            section = bare.to_owned();
        }
        let is_setting = bare.split_once(" = ").is_some_and(|(key, _)| {
            key.chars().all(|c| c.is_ascii_lowercase() || c == '_') || key.starts_with('"')
        });
        if bare != line && is_setting {
            let (setting, mark) = bare.split_once("  # ").unwrap_or((bare, ""));
            found.push((number, section.clone(), setting.to_owned(), mark.to_owned()));
        }
    }
    found
}

/// The settings in effect, with the defaults that the programs fill in.
fn in_force(text: &str) -> String {
    let home = Home {
        home: "/home/user".into(),
    };
    let mut config = Config::parse(text, Path::new("agent.toml"), &home)
        .unwrap_or_else(|error| panic!("{}\n{text}", knoc_proto::error::chain(&error)));
    config.job.scratch.get_or_insert_with(|| "/tmp".to_owned());
    format!("{config:?}")
}

#[test]
fn a_line_marked_default_changes_nothing_and_an_example_does() {
    let template =
        super::text::site_file(&options(Path::new("/x")), Path::new("/x"), &[], &found());
    let before = in_force(&template);
    let settings = commented(&template);
    assert!(settings.len() > 20, "{settings:?}");
    for (number, section, setting, mark) in settings {
        let uncommented: Vec<_> = template
            .lines()
            .enumerate()
            .map(|(at, line)| {
                // A token is for the library above it.
                let needed =
                    setting.starts_with("library_token") && line.starts_with("# library = ");
                if at == number || needed {
                    line.trim_start_matches("# ")
                } else {
                    line
                }
            })
            .collect();
        // A table of an array is given as a whole or not at all, which is tested below.
        let same = if section.starts_with("[[") {
            mark == "default"
        } else {
            in_force(&uncommented.join("\n")) == before
        };
        match mark.as_str() {
            "default" => assert!(same, "{section} {setting} is not the default"),
            "example" => assert!(!same, "{section} {setting} is the default"),
            _ => panic!("{section} {setting} is marked neither as default nor as example"),
        }
    }
    let with_registry = template
        .replace("# [[registry]]", "[[registry]]")
        .replace("# prefix = ", "prefix = ");
    let plain_http = with_registry.replace("# insecure = false", "insecure = false");
    assert_eq!(in_force(&with_registry), in_force(&plain_http));
    for table in ["[[dial_out]]", "[[bind]]"] {
        let mut section = "";
        let with_table: Vec<_> = template
            .lines()
            .map(|line| {
                let bare = line.trim_start_matches("# ");
                if bare.starts_with('[') {
                    section = bare;
                }
                let whole = section == table && (bare == section || bare.contains("# example"));
                if whole { bare } else { line }
            })
            .collect();
        assert_ne!(in_force(&with_table.join("\n")), before, "{table}");
    }
}

#[test]
fn without_the_ca_key_nothing_new_is_signed() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    run(&options(&folder), root.path(), &found()).unwrap();
    fs::remove_file(folder.join("tls/ca.key")).unwrap();
    run(&options(&folder), root.path(), &found()).unwrap();
    fs::remove_file(folder.join("tls/agent.key")).unwrap();
    let error = run(&options(&folder), root.path(), &found()).unwrap_err();
    assert!(matches!(error, InitError::NoCaKey { .. }), "{error}");
}

/// What a killed run has left, or somebody has moved away.
#[test]
fn half_a_pair_is_made_again_or_named_and_never_completed_by_another_half() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("knoc");
    let tls = |name: &str| folder.join("tls").join(name);
    let again = || run(&options(&folder), root.path(), &found());
    again().unwrap();
    fs::remove_file(tls("agent.key")).unwrap();
    let said = again().unwrap();
    let (written, kept) = said.split_once("Already there").unwrap();
    assert!(
        written.contains("agent.crt") && written.contains("agent.key"),
        "{said}"
    );
    assert!(!kept.contains("agent.crt"), "{said}");
    Credentials::from_files(tls("ca.crt"), tls("agent.crt"), tls("agent.key")).unwrap();
    for (half, away) in [("knocctl", tls("knocctl.key")), ("ca", folder.join("tls"))] {
        let (cert, key) = (format!("{half}.crt"), format!("{half}.key"));
        let before = fs::read(tls(&key)).unwrap();
        let hidden = root.path().join(&cert);
        fs::rename(tls(&cert), &hidden).unwrap();
        let error = again().unwrap_err().to_string();
        let cure = format!("move {} away and run init again", away.display());
        assert!(error.contains(&cure), "{error}");
        assert!(!tls(&cert).exists());
        assert_eq!(fs::read(tls(&key)).unwrap(), before);
        fs::rename(&hidden, tls(&cert)).unwrap();
        again().unwrap();
    }
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

/// The names between backticks after `expected` in serde's message about an unknown key.
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
    // `tools` holds what `init` found; `env` and `gres` accept any names.
    let named = [
        "listen", "tls", "registry", "policy", "job", "images", "limits", "logs", "backoff",
        "values",
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

/// The settings of the template, as `table.name`, each with its default if the line shows it. Tables whose names the site chooses are
/// left out.
fn settings(template: &str) -> BTreeMap<String, Option<&str>> {
    let mut table = "";
    let mut found = BTreeMap::new();
    for line in template.lines() {
        let line = line.strip_prefix("# ").unwrap_or(line);
        if line.starts_with('[') {
            table = line.trim_matches(['[', ']']);
        }
        let Some((name, value)) = line.split_once(" = ") else {
            continue;
        };
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if name.chars().all(plain) && !["tools", "env"].contains(&table) {
            let name = format!("{table}.{name}");
            let default = value.strip_suffix("  # default");
            found.insert(name.trim_start_matches('.').to_owned(), default);
        }
    }
    found
}

#[test]
fn the_guide_has_every_setting_of_the_site_file_with_its_default() {
    let template =
        super::text::site_file(&options(Path::new("/x")), Path::new("/x"), &[], &found());
    let guide = include_str!("../../../docs/guide/configuration.md");
    let (_, section) = guide.split_once("\n## knoc-agent\n").unwrap();
    let (section, _) = section.split_once("\n## knocctl\n").unwrap();
    let row = |line: &'static str| line.strip_prefix("| `")?.split_once("` | ");
    let rows = section.lines().filter_map(row);
    // The rows of the first table are about tables.
    let rows: BTreeMap<&str, &str> = rows.filter(|(name, _)| !name.starts_with('[')).collect();
    let settings = settings(&template);
    assert!(settings.len() > 80, "{settings:?}");
    for (name, default) in &settings {
        let row = rows.get(name.as_str());
        let row = row.unwrap_or_else(|| panic!("the guide has no row for {name}"));
        if let Some(default) = default {
            assert!(row.starts_with(&format!("`{default}` | ")), "{name}: {row}");
        }
    }
    let unknown: Vec<_> = rows
        .keys()
        .filter(|name| !settings.contains_key(**name))
        .collect();
    assert!(unknown.is_empty(), "no such settings: {unknown:?}");
}
