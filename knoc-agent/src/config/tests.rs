//! Tests that each mistake in a site file is reported with its line and the allowed values.

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
    assert_eq!(config.listen.kubelet.unwrap().port(), 10350);
    assert_eq!(config.scheduler, SchedulerKind::Slurm);
    assert_eq!(config.images.compression, Compression::Auto);
    let config = parse("site = 'trixie'\n[images]\ncompression = 'lz4'").unwrap();
    assert_eq!(config.images.compression, Compression::Lz4);
    assert_eq!(config.images.convert, Convert::Login);
    assert_eq!(config.images.library, None);
    let library =
        "site = 'trixie'\n[images]\nlibrary = 'http://ctl:8080/l'\nlibrary_token = '~/.token'";
    let images = parse(library).unwrap().images;
    assert_eq!(images.library.as_deref(), Some("http://ctl:8080/l"));
    assert_eq!(
        images.library_token.as_deref(),
        Some(Path::new("/home/u/.token"))
    );
    let config = parse(
        "site = 'trixie'\n[images]\nconvert = 'job'\nconvert_memory = '1GiB'\nconvert_time = '90s'",
    )
    .unwrap();
    let images = config.images;
    assert_eq!(
        (images.convert, images.convert_cpus, images.convert_memory),
        (Convert::Job, 2, 1 << 30)
    );
}

#[test]
fn mistakes_name_line_and_allowed_values() {
    for (text, wanted) in [
        (
            "site = 'x'\nscheduler = 'pbs'",
            &["agent.toml:2: scheduler", "`slurm` or `local`"][..],
        ),
        (
            "site = 'x'\n[limits]\nsbatch_rat = 1",
            &["agent.toml:3: limits.sbatch_rat", "sbatch_rate"],
        ),
        (
            "site = 'x'\n[limits]\npoll_min = '5 bananas'",
            &["agent.toml:3: limits.poll_min", "90s"],
        ),
        (
            "site = 'x'\n[listen]\nkubelet = 'login'",
            &["agent.toml:3: listen.kubelet", "\"0.0.0.0:10350\""],
        ),
        (
            "site = 'x'\n[limits]\nthreads = 0",
            &["agent.toml:3: limits.threads", "between 1 and 256"],
        ),
        (
            "site = 'x'\n[limits]\nthreads = 257",
            &["agent.toml:3: limits.threads", "between 1 and 256"],
        ),
        (
            "site = 'x'\n[policy]\negress = ['default/*', 'kubernetes']",
            &[
                "agent.toml:3: policy.egress",
                "\"kubernetes\" is not `NAMESPACE/SERVICE`",
            ],
        ),
        (
            "site = 'x'\n[images]\ncompression = 'xz'",
            &[
                "agent.toml:3: images.compression",
                "`auto`, `gzip`, `zstd`, `lz4`",
            ],
        ),
        (
            "site = 'x'\nscheduler = 'local'\n[images]\nconvert = 'job'",
            &[
                "agent.toml:4: images.convert",
                "`job` needs the scheduler slurm",
            ],
        ),
        (
            "site = 'x'\n[images]\nlibrary = 'library.example.org'",
            &[
                "agent.toml:3: images.library",
                "`https://HOST[:PORT][/FOLDER]`",
            ],
        ),
        (
            "site = 'x'\n[images]\nlibrary = 'https://library.example.org/?a=b'",
            &["agent.toml:3: images.library", "HOST"],
        ),
        // It is an entity, too.
        (
            "site = 'x'\n[images]\nlibrary = 'https://library/folder.d'",
            &["agent.toml:3: images.library", "a dot or a port"],
        ),
        (
            "site = 'x'\n[images]\nlibrary_token = '/t'",
            &["agent.toml:3: images.library_token", "images.library"],
        ),
        (
            "site = 'x'\n[images]\nlibrary = 'https://a.b'\nlibrary_token = 't'",
            &["agent.toml:4: images.library_token", "must be absolute"],
        ),
        (
            "site = 'x'\n[images]\nconvert_cpus = 0",
            &["agent.toml:3: images.convert_cpus", "above 0"],
        ),
        (
            "site = 'x'\n[job]\nnode_dns_suffixes = ['lan', '.Lan']",
            &[
                "agent.toml:3: job.node_dns_suffixes",
                "\".Lan\" is not the end of a DNS name",
            ],
        ),
        ("site = 'a b'", &["agent.toml:1: site", "DNS label", "' '"]),
        ("site = 'My-Site'", &["site", "DNS label", "'M'"]),
        ("state_dir = '/x'", &["agent.toml: site: is missing"]),
        ("site = 7", &["agent.toml:1: site", "expected a string"]),
        ("site = 'x", &["agent.toml:1: "]),
    ] {
        let error = parse(text).unwrap_err();
        for part in wanted {
            assert!(error.contains(part), "{text:?}: {error}");
        }
        assert_eq!(error.lines().count(), 1, "{text:?}: {error}");
    }
}

#[test]
fn a_pair_that_names_no_two_namespaces_is_a_mistake() {
    let error = parse("site = 'x'\n[policy]\npod_traffic = ['a:*', 'a/b']").unwrap_err();
    let wanted = "\"a/b\" is not `NAMESPACE:NAMESPACE`";
    assert!(
        error.contains("agent.toml:3: policy.pod_traffic") && error.contains(wanted),
        "{error}"
    );
}

#[test]
fn all_mistakes_of_a_site_file_are_named_at_once() {
    let text = "\
site = 'My-Site'
scheduler = 'pbs'
state_dir = 'state'
image_roots = ['/images', 'more']

[limits]
sbatch_rate = 0
sbatch_burst = 0
poll_min = '60s'
poll_mix = '1s'

[listen]
shim_addresses = ['login1']

[tls]
ca = '/ca'
cert = '/cert'

[tools]
sbatch = 'sbatch'

[logs]
max_bytes = 1

[policy]
flags = ['mail', '--hint']
host_paths = [{path = '/data/..'}]

[[registry]]
prefix = ''

[gres]
gpu = 'gpu'

[job]
scratch = 'tmp'
";
    let error = parse(text).unwrap_err();
    let expected = [
        "agent.toml:1: site: must be a DNS label of at most 58 characters: ",
        "agent.toml:2: scheduler: unknown variant `pbs`, expected `slurm` or `local`",
        "agent.toml:3: state_dir: must be absolute or begin with `~/`: [\"state\"]",
        "agent.toml:4: image_roots: must be absolute or begin with `~/`: [\"more\"]",
        "agent.toml:7: limits.sbatch_rate: must be above 0",
        "agent.toml:8: limits.sbatch_burst: must be above 0",
        "agent.toml:9: limits.poll_min: must be at most `poll_max`, 30s",
        "agent.toml:10: limits.poll_mix: unknown field `poll_mix`, expected one of `sbatch_rate`",
        "agent.toml:13: listen.shim_addresses: \"login1\" is not HOST:PORT",
        "agent.toml:15: tls: missing field `key`",
        "agent.toml:20: tools.sbatch: must be absolute",
        "agent.toml:23: logs.max_bytes: must be at least 4096",
        "agent.toml:26: policy.flags: names begin with `--`: [\"mail\"]",
        "agent.toml:27: policy.host_paths: \"/data/..\" must not contain '..'",
        "agent.toml:29: registry.prefix: must be the name of a registry",
        "agent.toml:32: gres: must be like `\"nvidia.com/gpu\" = \"gpu\"`: \"gpu\" = \"gpu\"",
        "agent.toml:36: job.scratch: must be absolute or begin with `~/`: [\"tmp\"]",
    ];
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{error}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{expected}\nis not\n{line}");
    }
}

#[test]
fn mirrors_are_hosts_with_an_optional_path() {
    let mirror = |mirror: &str| {
        parse(&format!(
            "site = 'x'\n[[registry]]\nprefix = 'docker.io'\nmirror = '{mirror}'"
        ))
    };
    for right in ["mirror", "mirror:5000", "[::1]:5000/hub", "a.b/c/d"] {
        assert!(mirror(right).is_ok(), "{right}");
    }
    for wrong in ["", "https://mirror", "mirror/", "a b", "/hub"] {
        let error = mirror(wrong).unwrap_err();
        assert!(error.contains("registry.mirror: must be like"), "{error}");
    }
}

#[test]
fn tools_that_earlier_versions_named_are_accepted() {
    let config = parse("site = 'x'\n[tools]\nsacctmgr = '/usr/bin/sacctmgr'").unwrap();
    assert_eq!(config.tools.unused().collect::<Vec<_>>(), ["sacctmgr"]);
}

#[test]
fn sections_are_read() {
    let config = parse(
        "site = 'x'\n[env]\nPATH = '/opt/slurm/bin'\n[[registry]]\nprefix = 'docker.io'\n\
         mirror = 'mirror:5000'\ninsecure = true\n[tls]\nca = '~/ca.crt'\ncert = '/c'\nkey = '/k'\n\
         [values]\nat_rest = 'none'\n[job]\nscratch = '~/s'",
    )
    .unwrap();
    assert_eq!(config.env["PATH"], "/opt/slurm/bin");
    assert!(config.registries[0].insecure);
    assert_eq!(config.tls.unwrap().ca, Path::new("/home/u/ca.crt"));
    assert_eq!(config.values.at_rest, AtRest::None);
    assert_eq!(config.job.scratch.unwrap(), "/home/u/s");
}

#[test]
fn programs_see_themselves_as_whom_the_pod_asks_for_unless_the_site_does_not_want_it() {
    let config = parse("site = 'x'").unwrap();
    assert_eq!(config.job.user_ids, UserIds::Requested);
    let config = parse("site = 'x'\n[job]\nuser_ids = 'own'").unwrap();
    assert_eq!(config.job.user_ids, UserIds::Own);
    let error = parse("site = 'x'\n[job]\nuser_ids = 'any'").unwrap_err();
    assert!(error.contains("expected `requested` or `own`"), "{error}");
}

#[test]
fn without_shm_secrets_are_an_error_unless_the_site_allows_disk() {
    let config = parse("site = 'x'").unwrap();
    assert_eq!(config.values.memory_fallback, MemoryFallback::Error);
    let config = parse("site = 'x'\n[values]\nmemory_fallback = 'disk'").unwrap();
    assert_eq!(config.values.memory_fallback, MemoryFallback::Disk);
    let error = parse("site = 'x'\n[values]\nmemory_fallback = 'swap'").unwrap_err();
    let expected =
        "agent.toml:3: values.memory_fallback: unknown variant `swap`, expected `error` or `disk`";
    assert_eq!(error, expected);
    let error = parse("site = 'x'\n[logs]\nmax_pod_bytes = 100").unwrap_err();
    assert!(
        error.starts_with("agent.toml:3: logs.max_pod_bytes: must be at least 1048576"),
        "{error}"
    );
}

#[test]
fn host_paths_leave_keys_and_what_a_login_executes_alone() {
    let config = parse(
        "site = 'x'\n[policy]\nhost_paths = [{path = '/data'}, {path = '~/data', writable = true}, {path = '/home'}]\n\
         [images]\nlibrary = 'https://a.b'\nlibrary_token = '/data/token'",
    )
    .unwrap();
    let paths = config.host_paths(&config.policy, &["/run/user/7/knoc/agent.sock".into()]);
    assert_eq!(paths.prefixes[1].path, Path::new("/home/u/data"));
    assert!(paths.prefixes[1].writable && !paths.prefixes[0].writable);
    let guarded = |path: &str| paths.guarded.iter().any(|known| known == Path::new(path));
    assert!(guarded("/home/u/.local/state/knoc") && guarded("/run/user/7/knoc/agent.sock"));
    assert!(guarded("/data/token"));
    // The shims' own folders lie in these.
    for folder in ["/tmp", "/dev/shm", "/dev"] {
        let config = parse(&format!(
            "site = 'x'\n[policy]\nhost_paths = [{{path = '{folder}'}}]"
        ));
        let paths = config
            .map(|config| config.host_paths(&config.policy, &[]))
            .unwrap();
        paths.judge(Path::new(folder), false).unwrap_err();
        paths.judge(&Path::new(folder).join("data"), false).unwrap();
    }
    for (entries, wanted) in [
        ("{path = 'data'}", "\"data\" must be an absolute path"),
        (
            "{path = '/a'}, {path = '/a', writable = true}",
            "listed twice",
        ),
        (
            "{path = '~/', writable = true}",
            "contains the home directory /home/u",
        ),
        (
            "{path = '/home', writable = true}",
            "contains the home directory /home/u",
        ),
        ("{path = '~/.ssh'}", "lies in /home/u/.ssh"),
        ("{path = '/proc/self'}", "lies in /proc"),
        (
            "{path = '~/.local/state/knoc/images'}",
            "lies in /home/u/.local/state/knoc",
        ),
        ("{path = '/a', write = true}", "unknown field `write`"),
        ("'/a'", "policy.host_paths"),
    ] {
        let error = parse(&format!("site = 'x'\n[policy]\nhost_paths = [{entries}]")).unwrap_err();
        assert!(error.contains(wanted), "{entries}: {error}");
        assert!(error.contains("agent.toml:3: policy.host_paths"), "{error}");
    }
}

#[test]
fn binds_of_the_site_are_checked_as_host_paths_are() {
    let binds =
        |entries: &str| parse(&format!("site = 'x'\n{entries}")).map(|config| config.site_binds());
    let right = "[[bind]]\npath = '~/tools'\ntarget = '/opt/tools'\n[[bind]]\npath = '/etc/slurm'\npartitions = ['a']\n\
                 [[bind]]\npath = '/gpu/slurm'\ntarget = '/etc/slurm'\npartitions = ['b']\nwritable = true";
    let binds_of = binds(right).unwrap();
    assert_eq!(
        (&*binds_of[0].path, &*binds_of[0].target),
        ("/home/u/tools", "/opt/tools")
    );
    assert_eq!(
        (&*binds_of[1].target, binds_of[2].writable),
        ("/etc/slurm", true)
    );
    for (entry, wanted) in [
        ("path = 'x'", "bind.path: \"x\" must be an absolute path"),
        (
            "path = '/x'\ntarget = '/'",
            "bind.target: \"/\" is the container's root",
        ),
        ("path = '/x'\ntarget = '/proc/x'", "lies in /proc"),
        ("path = '/x'\ntarget = '/.knoc/x'", "lies in /.knoc"),
        ("path = '/home/u'", "bind.path: \"/home/u\" contains"),
        ("path = '~/.ssh'", "bind.path: \"/home/u/.ssh\" is"),
        (
            "path = '/x'\n[[bind]]\npath = '/y'\ntarget = '/x'\npartitions = ['a']",
            "listed twice",
        ),
        ("source = '/x'", "unknown field `source`"),
    ] {
        let error = binds(&format!("[[bind]]\n{entry}")).unwrap_err();
        assert!(error.contains(wanted), "{entry}: {error}");
    }
}
