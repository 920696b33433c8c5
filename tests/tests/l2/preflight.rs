//! Level 2: `knocctl doctor --preflight`, before anything is installed. `ssh`, Slurm, kubectl and helm are scripts.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use knoc_tests::{
    Run,
    doctor::{Finding, examine},
    ports::free_port,
    site::binary,
};

use super::install::Far;

/// The program is large without optimisation, and everything else runs at the same time.
const LIMIT: Duration = Duration::from_mins(6);

/// A login node with Slurm and Apptainer.
fn login_node() -> anyhow::Result<Far> {
    let far = Far::new()?;
    for name in ["sbatch", "squeue", "scancel", "sacct"] {
        far.tool(name, "")?;
    }
    let version = "[ \"$1\" = --version ] && echo 'slurm 24.11.5' || echo 'main (up, 1-00:00:00)'";
    far.tool("sinfo", version)?;
    far.tool("apptainer", "echo 'apptainer version 1.4.5'")?;
    // The job runs here, with what srun passes on.
    far.tool(
        "srun",
        "while [ \"$1\" != /bin/sh ]; do shift; done; exec \"$@\"",
    )?;
    Ok(far)
}

/// kubectl and helm on the user's machine. The user may not create ClusterRoles.
fn cluster(far: &Far) -> anyhow::Result<()> {
    let version = r#"{"clientVersion": {"gitVersion": "v1.36.1"}, "serverVersion": {"gitVersion": "v1.36.0"}}"#;
    far.program(
        "near/kubectl",
        &format!(
            "#!/bin/sh\ncase \"$*\" in\nversion*) echo '{version}' ;;\n*clusterroles*) echo no; exit 1 ;;\n*) echo yes ;;\nesac\n"
        ),
    )?;
    far.program("near/helm", "#!/bin/sh\necho v3.22.0\n")
}

fn preflight(far: &Far, further: &[&str]) -> anyhow::Result<Run> {
    // `ssh` needs it.
    far.program("near/env", "#!/bin/sh\nexec /usr/bin/env \"$@\"\n")?;
    // Neither the programs of this machine nor a configuration.
    let run = Run::new(binary("knocctl")?)
        .env("PATH", far.site.path("near"))
        .env("HOME", far.site.path("near"))
        .env("KNOCCTL_CONFIG", far.site.path("none.toml"))
        .deadline(LIMIT)
        .args(["doctor", "--preflight"])
        .args(further.iter().copied());
    Ok(run)
}

fn find<'a>(findings: &'a [Finding], check: &str) -> anyhow::Result<&'a Finding> {
    let mut all = findings.iter();
    let found = all.find(|finding| finding.check == check);
    found.with_context(|| format!("{check} is not in {findings:#?}"))
}

#[tokio::test]
async fn what_an_installation_needs_is_checked_before_it_and_nothing_is_left() -> anyhow::Result<()>
{
    let far = login_node()?;
    cluster(&far)?;
    let address = format!("127.0.0.1:{}", free_port()?);
    let options = [
        "--ssh",
        "ann@login",
        "--probe",
        "--address",
        &address,
        "-n",
        "team",
    ];
    let findings = examine(preflight(&far, &options)?).await?;
    for (check, detail) in [
        ("machine", "x86_64"),
        ("slurm: commands", "srun are in PATH"),
        ("slurm: version", "slurm 24.11.5"),
        ("slurm: controller", "main (up, 1-00:00:00)"),
        ("slurm: accounting", "sacct answers"),
        ("job", "ran on"),
        ("job: home directory", "sees files"),
        ("job: runtime", "apptainer version 1.4.5"),
        (&*format!("address {address}"), "nothing listens there yet"),
        ("cluster: version", "API server v1.36.0, kubectl v1.36.1"),
        ("cluster: rights to run pods in team", "all of them"),
        ("helm", "v3.22.0"),
    ] {
        let found = find(&findings, check)?;
        ensure!(found.ok && found.detail.contains(detail), "{found:#?}");
    }
    let rights = find(&findings, "cluster: rights to install")?;
    ensure!(
        !rights.ok && rights.detail.contains("create clusterroles"),
        "{rights:#?}"
    );
    ensure!(!rights.detail.contains("create secrets"), "{rights:#?}");
    ensure!(
        far.asked("srun").contains("--immediate=60"),
        "{}",
        far.asked("srun")
    );
    let left: Vec<_> = std::fs::read_dir(far.home())?.collect();
    ensure!(left.is_empty(), "left in the home directory: {left:?}");
    Ok(())
}

/// `kubectl auth can-i create clusterroles` says yes to a user who may not grant what the role grants.
#[tokio::test]
async fn who_may_not_grant_what_the_chart_grants_learns_it_before() -> anyhow::Result<()> {
    let far = login_node()?;
    cluster(&far)?;
    let version = r#"{"clientVersion": {"gitVersion": "v1.36.1"}, "serverVersion": {"gitVersion": "v1.36.0"}}"#;
    let refused = "Error from server (Forbidden): clusterroles.rbac.authorization.k8s.io is forbidden: user \"ann\" is \
                   attempting to grant RBAC permissions not currently held:\n{Resources:[\"nodes\"], Verbs:[\"create\"]}";
    let script = |answer: &str| {
        format!(
            "#!/bin/sh\ncase \"$*\" in\nversion*) echo '{version}' ;;\ncreate*--dry-run=server*) {answer} ;;\n*) echo yes ;;\nesac\n"
        )
    };
    let what = "cluster: rights to grant";
    let options = ["--ssh", "ann@login", "-n", "team"];
    far.program(
        "near/kubectl",
        &script(&format!("printf '%s\\n' '{refused}' >&2; exit 1")),
    )?;
    let findings = examine(preflight(&far, &options)?).await?;
    let rights = find(&findings, "cluster: rights to install")?;
    ensure!(rights.ok, "{rights:#?}");
    let grants = find(&findings, what)?;
    ensure!(
        !grants.ok && grants.detail.contains("you lack {Resources:[\"nodes\"]"),
        "{grants:#?}"
    );
    far.program("near/kubectl", &script("echo created"))?;
    let findings = examine(preflight(&far, &options)?).await?;
    let grants = find(&findings, what)?;
    ensure!(grants.ok, "{grants:#?}");
    Ok(())
}

#[tokio::test]
async fn what_a_login_node_lacks_is_named_with_its_cure() -> anyhow::Result<()> {
    let far = login_node()?;
    far.tool("sinfo", "[ \"$1\" != --version ] || echo 'slurm 19.05.2'")?;
    std::fs::remove_file(far.site.path("tools/scancel"))?;
    far.tool("srun", "echo 'srun: error: Invalid account' >&2; exit 1")?;
    let findings = examine(preflight(&far, &["--ssh", "ann@login", "--probe"])?).await?;
    for (check, part) in [
        ("slurm: commands", "scancel"),
        ("slurm: version", "19.05"),
        ("slurm: controller", "sees no partition"),
        ("job", "Invalid account"),
    ] {
        let found = find(&findings, check)?;
        ensure!(!found.ok && found.detail.contains(part), "{found:#?}");
    }
    let checks: Vec<_> = findings.iter().map(|finding| &finding.check).collect();
    ensure!(
        !checks.iter().any(|check| check.starts_with("cluster")),
        "there is no kubectl: {checks:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_relayed_pod_that_has_an_address_is_named() -> anyhow::Result<()> {
    let far = Far::new()?;
    let version = r#"{"clientVersion": {"gitVersion": "v1.36.1"}, "serverVersion": {"gitVersion": "v1.36.0"}}"#;
    far.program(
        "near/kubectl",
        &format!(
            "#!/bin/sh\ncase \"$*\" in\nversion*) echo '{version}' ;;\n*endpointslices*) echo knoc-a; echo knoc-b; echo knoc-a ;;\n\
             *spec.nodeName=knoc-a*) echo 'team/old 10.1.2.3' ;;\n*spec.nodeName=knoc-b*) echo 'team/web ' ;;\n*) echo yes ;;\nesac\n"
        ),
    )?;
    far.program("near/helm", "#!/bin/sh\necho v3.22.0\n")?;
    let findings = examine(preflight(&far, &[])?).await?;
    let twice = find(&findings, "cluster: relayed pods of knoc-a")?;
    ensure!(
        !twice.ok && twice.detail.contains("team/old") && twice.cure.contains("node.podIP"),
        "{twice:#?}"
    );
    let once = find(&findings, "cluster: relayed pods of knoc-b")?;
    ensure!(once.ok, "{once:#?}");
    Ok(())
}

#[tokio::test]
async fn a_certificate_of_the_api_server_that_lacks_a_name_is_named() -> anyhow::Result<()> {
    let far = Far::new()?;
    let version = r#"{"clientVersion": {"gitVersion": "v1.36.1"}, "serverVersion": {"gitVersion": "v1.36.0"}}"#;
    let nodes = r"printf 'knoc-a\tTrue\tit does not name 10.96.0.1\nknoc-b\tFalse\tit names all\nknoc-c\t\n'";
    far.program(
        "near/kubectl",
        &format!(
            "#!/bin/sh\ncase \"$*\" in\nversion*) echo '{version}' ;;\n*ApiServerCertificateMismatch*) {nodes} ;;\n*) echo yes ;;\nesac\n"
        ),
    )?;
    far.program("near/helm", "#!/bin/sh\necho v3.22.0\n")?;
    let findings = examine(preflight(&far, &[])?).await?;
    let of = |node| format!("cluster: API server's certificate, for pods of {node}");
    let lacks = find(&findings, &of("knoc-a"))?;
    ensure!(
        !lacks.ok && lacks.detail.contains("10.96.0.1") && lacks.cure.contains("networks.md"),
        "{lacks:#?}"
    );
    let names = find(&findings, &of("knoc-b"))?;
    ensure!(names.ok, "{names:#?}");
    let unknown = find(&findings, &of("knoc-c"));
    ensure!(unknown.is_err(), "{unknown:#?}");
    Ok(())
}

#[tokio::test]
async fn a_machine_with_nothing_to_check_says_where_to_go() -> anyhow::Result<()> {
    let far = Far::new()?;
    let findings = examine(preflight(&far, &[])?).await?;
    ensure!(findings.len() == 1, "{findings:#?}");
    let found = find(&findings, "preflight")?;
    ensure!(!found.ok && found.cure.contains("--ssh"), "{found:#?}");
    // Without SSH, on a login node: the agent's program beside knocctl looks.
    let far = login_node()?;
    let path = format!("{}:/usr/bin:/bin", far.site.path("tools").display());
    let here = preflight(&far, &[])?
        .env("PATH", path)
        .env("HOME", far.home());
    let findings = examine(here).await?;
    ensure!(find(&findings, "slurm: version")?.ok, "{findings:#?}");
    Ok(())
}
