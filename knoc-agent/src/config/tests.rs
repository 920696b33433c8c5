//! Mistakes in a site file are named with their line and what is allowed.

use super::*;

fn parse(text: &str) -> Result<Config, String> {
    let home = Home {
        home: PathBuf::from("/home/u"),
    };
    Config::parse(text, Path::new("agent.toml"), &home)
        .map_err(|error| knoc_proto::error::chain(&error))
}

#[test]
fn a_site_name_is_enough() {
    let config = parse("site = 'trixie'").unwrap();
    assert_eq!(config.state_dir, Path::new("/home/u/.local/state/knoc"));
    assert_eq!(config.limits.report_grace, Duration::from_secs(90));
    assert_eq!(config.listen.kubelet.port(), 10350);
    assert_eq!(config.scheduler, SchedulerKind::Slurm);
}

#[test]
fn mistakes_name_line_and_allowed_values() {
    for (text, wanted) in [
        (
            "site = 'x'\nscheduler = 'pbs'",
            &["line 2", "`slurm` or `local`"][..],
        ),
        (
            "site = 'x'\n[limits]\nsbatch_rat = 1",
            &["line 3", "sbatch_rat", "sbatch_rate"],
        ),
        (
            "site = 'x'\n[limits]\npoll_min = '5 bananas'",
            &["line 3", "90s"],
        ),
        ("site = 'a b'", &["`site`", "DNS label", "' '"]),
        ("site = 'My-Site'", &["`site`", "DNS label", "'M'"]),
        (
            "site = 'x'\n[limits]\npoll_min = '60s'",
            &["limits.poll_min", "poll_max"],
        ),
        (
            "site = 'x'\n[policy]\nflags = ['mail']",
            &["policy.flags", "--"],
        ),
        ("state_dir = '/x'", &["site"]),
    ] {
        let error = parse(text).unwrap_err();
        for part in wanted {
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}

#[test]
fn sections_are_read() {
    let config = parse(
        "site = 'x'\n[env]\nPATH = '/opt/slurm/bin'\n[[registry]]\nprefix = 'docker.io'\n\
         mirror = 'mirror:5000'\ninsecure = true\n[tls]\nca = '~/ca.crt'\ncert = '/c'\nkey = '/k'\n\
         [values]\nat_rest = 'none'",
    )
    .unwrap();
    assert_eq!(config.env["PATH"], "/opt/slurm/bin");
    assert!(config.registries[0].insecure);
    assert_eq!(config.tls.unwrap().ca, Path::new("/home/u/ca.crt"));
    assert_eq!(config.values.at_rest, AtRest::None);
}
