//! Level 2: `knocctl agent`. `ssh` is a script that runs what the login shell would be given, as the same user in another
//! home; one test goes through a real sshd. The crontab is a file.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use knoc_tests::{
    Output, Run,
    ports::free_port,
    site::{Options, Site, binary},
    sshd::Sshd,
    wait_for,
};

const SOON: Duration = Duration::from_mins(2);
/// The program is large without optimisation, and everything else runs at the same time.
const LIMIT: Duration = Duration::from_mins(6);

/// A login node with a home of its own.
pub(super) struct Far {
    pub(super) site: Site,
}

impl Far {
    pub(super) fn new() -> anyhow::Result<Self> {
        let far = Self {
            site: Site::new(Options::default())?,
        };
        for folder in ["login", "near", "tools"] {
            fs::create_dir_all(far.site.path(folder))?;
        }
        far.ssh("")?;
        Ok(far)
    }

    pub(super) fn home(&self) -> PathBuf {
        self.site.path("login")
    }

    /// Writes `ssh`, which runs these lines first.
    pub(super) fn ssh(&self, first: &str) -> anyhow::Result<()> {
        let (home, tools) = (self.home(), self.site.path("tools"));
        let text = format!(
            "#!/bin/sh\nwhile [ \"$1\" != -- ]; do shift; done\nshift 2\necho 'Welcome to the login node'\n{first}\n\
             exec env -i HOME='{}' PATH='{}:/usr/bin:/bin' LC_ALL=C /bin/sh -c \"$1\"\n",
            home.display(),
            tools.display()
        );
        self.program("near/ssh", &text)
    }

    pub(super) fn program(&self, name: &str, text: &str) -> anyhow::Result<()> {
        self.site.put(name, text)?;
        fs::set_permissions(self.site.path(name), fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// A program of the site that appends its arguments to `tools/NAME.log` and then runs these lines.
    pub(super) fn tool(&self, name: &str, lines: &str) -> anyhow::Result<()> {
        let log = self.site.path("tools").join(format!("{name}.log"));
        self.program(
            &format!("tools/{name}"),
            &format!("#!/bin/sh\necho \"$*\" >>'{}'\n{lines}\n", log.display()),
        )
    }

    /// What a tool was asked.
    pub(super) fn asked(&self, name: &str) -> String {
        fs::read_to_string(self.site.path("tools").join(format!("{name}.log"))).unwrap_or_default()
    }

    /// A crontab that is a file.
    pub(super) fn crontab(&self, name: &str) -> anyhow::Result<PathBuf> {
        let file = self.site.path("tools").join(format!("{name}.table"));
        let shown = file.display();
        self.tool(
            name,
            &format!(
                "case $1 in\n-l) [ -e '{shown}' ] || {{ echo \"no {name} for ann\" >&2; exit 1; }}; cat '{shown}' ;;\n\
                 -) cat >'{shown}' ;;\nesac"
            ),
        )?;
        Ok(file)
    }

    /// `knocctl agent VERB --ssh ann@login …`
    pub(super) async fn ctl(&self, verb: &str, further: &[&str]) -> anyhow::Result<Output> {
        let path = format!("{}:/usr/bin:/bin", self.site.path("near").display());
        let run = Run::new(binary("knocctl")?)
            .env("PATH", path)
            .env("HOME", self.site.path("near"))
            .deadline(LIMIT)
            .args(["agent", verb, "--ssh", "ann@login"])
            .args(further.iter().copied());
        run.output().await
    }

    /// The same, which must succeed.
    pub(super) async fn ok(&self, verb: &str, further: &[&str]) -> anyhow::Result<String> {
        let output = self.ctl(verb, further).await?;
        ensure!(output.code == 0, "{verb}: {output}\n{}", self.log());
        Ok(output.text())
    }

    pub(super) async fn install(&self, further: &[&str]) -> anyhow::Result<Output> {
        let bundle = self.site.path("bundle.yaml").display().to_string();
        let fixed = [
            "--site",
            "hpc",
            "--scheduler",
            "local",
            "--runtime",
            "process",
        ];
        let mut all = fixed.to_vec();
        all.extend(["--bundle", &bundle, "--allow-namespace", "default"]);
        all.extend(further);
        self.ctl("install", &all).await
    }

    pub(super) fn state(&self) -> PathBuf {
        self.home().join(".local/state/knoc")
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.state().join("agent.log")).unwrap_or_default()
    }

    /// The process that holds the lease.
    pub(super) fn pid(&self) -> anyhow::Result<i64> {
        let lease = fs::read_to_string(self.state().join("agent.lease"))?;
        let lease: serde_json::Value = serde_json::from_str(&lease)?;
        lease["pid"].as_i64().context("no pid")
    }

    /// A program of the login node, run there.
    pub(super) fn there(&self, program: impl AsRef<std::ffi::OsStr>) -> Run {
        let path = format!("{}:/usr/bin:/bin", self.site.path("tools").display());
        Run::new(program)
            .env_clear()
            .env("HOME", self.home())
            .env("PATH", path)
            .deadline(LIMIT)
    }

    pub(super) fn installed(&self) -> PathBuf {
        self.home().join(".local/bin/knoc-agent")
    }

    /// Ports of its own: the tests run at the same time.
    pub(super) fn own_ports(&self) -> anyhow::Result<()> {
        let path = self.home().join(".config/knoc/agent.toml");
        let text = fs::read_to_string(&path)?;
        let shim = format!("shim = \"127.0.0.1:{}\"", free_port()?);
        let changed = text.replace("# shim = \"0.0.0.0:10351\"  # default", &shim);
        ensure!(changed != text, "{text}");
        self.site.put("login/.config/knoc/agent.toml", &changed)
    }
}

fn mode_of(path: &Path) -> anyhow::Result<u32> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o777)
}

#[tokio::test]
async fn an_agent_is_installed_over_ssh_and_a_second_run_completes_the_first() -> anyhow::Result<()>
{
    let far = Far::new()?;
    let table = far.crontab("crontab")?;
    far.site.put("tools/crontab.table", "0 3 * * * backup\n")?;
    let first = far.install(&["--run-mode", "on-demand"]).await?;
    ensure!(first.code == 0, "{first}");
    let said = first.text();
    for part in [
        "helm install",
        "--set image.repository=REGISTRY/knoc-kubelet",
        "agent.ssh.onDemand=true",
        "serve --stdio",
        "Everybody who can create a pod",
    ] {
        ensure!(said.contains(part), "{part}: {said}");
    }
    let bundle = fs::read_to_string(far.site.path("bundle.yaml"))?;
    ensure!(bundle.contains("kind: Secret"), "no Secret");
    ensure!(
        mode_of(&far.site.path("bundle.yaml"))? == 0o600,
        "others can read the bundle"
    );
    ensure!(
        !said.contains("tls.key") && !first.stderr.contains("tls.key"),
        "the bundle is printed"
    );
    let site_file = fs::read_to_string(far.home().join(".config/knoc/agent.toml"))?;
    ensure!(
        site_file.contains("kubelet = \"none\""),
        "a port is open: {site_file}"
    );
    far.own_ports()?;

    // Again, with another run mode: what is there is kept, and the agent starts.
    let again = far.install(&["--run-mode", "cron"]).await?;
    ensure!(again.code == 0, "{again}\n{}", far.log());
    ensure!(again.text().contains("is kept as it is"), "{again}");
    ensure!(
        fs::read_to_string(far.site.path("bundle.yaml"))? == bundle,
        "another bundle"
    );
    let lines = fs::read_to_string(&table)?;
    ensure!(
        lines.starts_with("0 3 * * * backup\n") && lines.contains("knoc-agent serve --detach"),
        "{lines}"
    );
    let before = far.pid()?;
    let status = far.ok("status", &[]).await?;
    for part in [
        "site hpc",
        "run mode: cron",
        &format!("process {before} on"),
        "0 pods",
    ] {
        ensure!(status.contains(part), "{part}: {status}");
    }
    let left = fs::read_dir(far.home().join(".local/lib/knoc"))?.count();
    ensure!(left == 1, "uploads are left: {left}");

    cron_leaves_a_running_agent_alone(&far, &lines, before).await?;
    another_program_restarts_the_agent(&far, before).await
}

/// The same program again leaves the agent alone; another one of the same version does not.
async fn another_program_restarts_the_agent(far: &Far, before: i64) -> anyhow::Result<()> {
    let same = far.install(&["--run-mode", "cron"]).await?;
    ensure!(
        same.code == 0 && far.pid()? == before,
        "{same}\n{}",
        far.log()
    );
    let path = far.site.path("other-agent");
    fs::copy(binary("knoc-agent")?, &path)?;
    let mut file = fs::File::options().append(true).open(&path)?;
    std::io::Write::write_all(&mut file, b"another build")?;
    drop(file);
    let path = path.display().to_string();
    let other = far
        .install(&["--run-mode", "cron", "--binary", &path])
        .await?;
    ensure!(
        other.code == 0 && far.pid()? != before,
        "{other}\n{}",
        far.log()
    );
    let status = far.ok("status", &[]).await?;
    let version = format!("knoc-agent {} is process", env!("CARGO_PKG_VERSION"));
    ensure!(status.contains(&version), "{status}");
    Ok(())
}

/// The line of the crontab does nothing while the agent runs.
async fn cron_leaves_a_running_agent_alone(
    far: &Far,
    table: &str,
    process: i64,
) -> anyhow::Result<()> {
    let line = table
        .lines()
        .find_map(|line| line.strip_prefix("*/5 * * * * "));
    let words: Vec<&str> = line.context("no line")?.split(' ').collect();
    let cron = far.there(words[0]).args(&words[1..]).ok().await?;
    ensure!(cron.text().is_empty() && far.pid()? == process, "{cron}");
    Ok(())
}

/// The same, in short: an agent that runs and is kept running by cron.
async fn with_agent(far: &Far) -> anyhow::Result<PathBuf> {
    let table = far.crontab("crontab")?;
    far.site.put("tools/crontab.table", "0 3 * * * backup\n")?;
    let first = far.install(&["--run-mode", "on-demand"]).await?;
    ensure!(first.code == 0, "{first}");
    far.own_ports()?;
    let again = far.install(&["--run-mode", "cron"]).await?;
    ensure!(again.code == 0, "{again}\n{}", far.log());
    Ok(table)
}

/// Waits until the login node's own `knocctl` shows that the pod runs.
async fn pod_runs(far: &Far, what: &str) -> anyhow::Result<()> {
    wait_for(what, SOON, async || {
        let pods = far.there(binary("knocctl")?).arg("pods");
        let pods = pods.ok().await?.text();
        ensure!(pods.contains("Running"), "{pods:?}");
        Ok(())
    })
    .await
    .with_context(|| format!("the agent's log: {}", far.log()))
}

#[tokio::test]
async fn an_upgrade_is_not_noticed_by_pods_and_a_removal_waits_for_them() -> anyhow::Result<()> {
    let far = Far::new()?;
    let table = with_agent(&far).await?;
    let before = far.pid()?;
    // A pod runs; the upgrade restarts the agent, and the pod does not notice.
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: one, namespace: default}\nspec:\n  containers:\n  - name: main\n    \
               image: process\n    command: [/bin/sleep, '600']\n";
    far.site.put("pod.yaml", pod)?;
    let knocctl = || anyhow::Ok(far.there(binary("knocctl")?));
    knocctl()?
        .args(["run", "--file"])
        .arg(far.site.path("pod.yaml"))
        .ok()
        .await?;
    pod_runs(&far, "the pod runs").await?;
    let upgraded = far.ok("upgrade", &[]).await?;
    ensure!(
        upgraded.contains("is process") && far.pid()? != before,
        "{upgraded}"
    );
    // The agent answers before it has published the pods that it restored.
    pod_runs(&far, "the pod runs after the upgrade").await?;

    let refused = far.ctl("uninstall", &[]).await?;
    ensure!(
        refused.code == 1
            && refused.text().contains("1 of 1 pods")
            && refused.text().contains("--force"),
        "{refused}"
    );
    ensure!(far.installed().exists(), "it was removed all the same");
    knocctl()?.args(["delete", "one", "--now"]).ok().await?;
    let removed = wait_for("it can be removed", SOON, async || {
        far.ok("uninstall", &[]).await
    })
    .await?;
    ensure!(
        removed.contains("has ended") && removed.contains("CA's key"),
        "{removed}"
    );
    ensure!(
        fs::read_to_string(&table)? == "0 3 * * * backup\n",
        "the crontab is another one"
    );
    ensure!(
        fs::symlink_metadata(far.installed()).is_err(),
        "the link is left"
    );
    ensure!(
        far.home().join(".config/knoc/tls/ca.key").exists(),
        "the CA's key is gone"
    );
    let gone = far.ctl("status", &[]).await?;
    ensure!(
        gone.code == 1 && gone.stderr.contains("knocctl agent install"),
        "{gone}"
    );
    Ok(())
}

#[tokio::test]
async fn each_failure_of_an_installation_names_its_cause_and_its_cure() -> anyhow::Result<()> {
    let far = Far::new()?;
    let on_demand = ["--run-mode", "on-demand"];
    failures_of_ssh_are_named(&far, &on_demand).await?;
    // The transfer is cut, and what has arrived would run.
    let cut = "case $1 in *cat*) { cat; echo more; } | env HOME=\"$KNOC_FAR\" /bin/sh -c \"$1\"; exit ;; esac";
    far.ssh(&cut.replace("$KNOC_FAR", &far.home().display().to_string()))?;
    let output = far.install(&on_demand).await?;
    ensure!(
        output.code == 1 && output.text().contains("bytes of the program have arrived"),
        "{output}"
    );
    ensure!(
        !far.home().join(".config/knoc").exists() && !far.installed().exists(),
        "it was installed"
    );
    far.ssh("")?;
    // Something else has the name.
    fs::create_dir_all(far.home().join(".local/bin"))?;
    far.site.put("login/.local/bin/knoc-agent", "mine")?;
    let output = far.install(&on_demand).await?;
    ensure!(
        output.code == 1 && output.text().contains("was not installed by KNoC"),
        "{output}"
    );
    ensure!(
        fs::read_to_string(far.installed())? == "mine",
        "it was replaced"
    );
    fs::remove_file(far.installed())?;
    // A partition that a batch script would read differently, and none.
    far.tool("sbatch", "exit 0")?;
    for (partition, cause) in [
        (&["--partition", "a b"][..], "\"a b\""),
        (&[], "--partition"),
    ] {
        let mut all = vec!["--run-mode", "job"];
        all.extend(partition);
        let output = far.install(&all).await?;
        ensure!(
            output.code == 1 && output.text().contains(cause),
            "{output}"
        );
    }
    ensure!(far.asked("sbatch").is_empty(), "it was submitted");
    let mut other = on_demand.to_vec();
    other.extend(["--site", "other"]);
    let output = far.ctl("install", &other).await?;
    ensure!(
        output.code == 1 && output.text().contains("already has the agent of site hpc"),
        "{output}"
    );
    Ok(())
}

/// For each way in which `ssh` fails, the installation names the cause and the cure.
async fn failures_of_ssh_are_named(far: &Far, run_mode: &[&str]) -> anyhow::Result<()> {
    for (first, cause, cure) in [
        (
            "echo 'ann@login: Permission denied (publickey).' >&2; exit 255",
            "the login was refused",
            "ControlMaster",
        ),
        (
            "echo 'No ED25519 host key is known for login and you have requested strict checking.' >&2\n\
             echo 'Host key verification failed.' >&2; exit 255",
            "known_hosts has no key",
            "ssh-keyscan",
        ),
        (
            "echo 'sh: cannot create upload.1: No space left on device' >&2; exit 1",
            "No space left",
            "make room",
        ),
        (
            "cat >/dev/null; exit 0",
            "has not answered",
            "forced command",
        ),
    ] {
        far.ssh(first)?;
        let output = far.install(run_mode).await?;
        ensure!(
            output.code == 1 && output.stderr.contains(cause) && output.stderr.contains(cure),
            "{first}: {output}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_real_sshd_takes_the_same_words() -> anyhow::Result<()> {
    let far = Far::new()?;
    // sshd gives the words to the login shell, which is csh here.
    let csh = "/usr/bin/tcsh -c \"$SSH_ORIGINAL_COMMAND\"";
    let sshd = Sshd::start(&far.site, "sshd", Some(csh)).await?;
    let folder = far.site.path("sshd");
    let (folder, port) = (folder.display(), sshd.address().port());
    // The user's own configuration of ssh, as far as a test can give one.
    far.program(
        "near/ssh",
        &format!(
            "#!/bin/sh\nexec /usr/bin/ssh -F none -o UserKnownHostsFile={folder}/secret/known_hosts \
             -o HostName=127.0.0.1 -o Port={port} \
             -o IdentityFile={folder}/login -o IdentitiesOnly=yes -o User={user} \"$@\"\n",
            user = fs::read_to_string(far.site.path("sshd/secret/remote_user"))?,
        ),
    )?;
    let path = format!("{}:/usr/bin:/bin", far.site.path("near").display());
    let ctl = |verb: &str| {
        let run = Run::new(binary("knocctl")?)
            .env("PATH", &path)
            .env("HOME", far.site.path("near"))
            .deadline(LIMIT);
        anyhow::Ok(run.args(["agent", verb, "--ssh", "login"]))
    };
    let bundle = far.site.path("bundle.yaml");
    let install = ctl("install")?.args(["--site", "hpc", "--run-mode", "on-demand", "--bundle"]);
    let said = install.arg(&bundle).ok().await?.text();
    ensure!(
        said.contains("is installed in") && bundle.exists(),
        "{said}"
    );
    let status = ctl("status")?.ok().await?.text();
    ensure!(
        status.contains("site hpc") && status.contains("no agent runs now"),
        "{status}"
    );
    let removed = ctl("uninstall")?.ok().await?.text();
    ensure!(removed.contains("no pod has a job"), "{removed}");
    Ok(())
}
