//! Installation and upgrade.

use knoc_proto::{
    error::chain,
    manage::{Install, Installed, RunMode},
};

use super::{
    Account, Ended, Failed, Steps,
    running::{Running, modes, stop, wait_for_newer},
};
use crate::{
    config::Config,
    init,
    run_mode::{Possible, choose, cli, detect, restart_by_mode, start_detached, text},
};

/// The option in error messages is that of `knocctl agent install`.
fn option<T, E: std::fmt::Display>(name: &str, read: Result<T, E>) -> Result<T, Failed> {
    read.map_err(|error| Failed::new(format!("--{name}: {error}"), "fix that option"))
}

/// PURE: the options of `init`, which are those of the request.
fn options(wanted: &Install, no_port: bool) -> Result<init::Options, Failed> {
    let namespaces = wanted.namespaces.iter().map(|name| init::namespace(name));
    let scheduler = wanted.scheduler.as_deref().map(init::scheduler).transpose();
    let runtime = wanted.runtime.as_deref().map(init::runtime).transpose();
    Ok(init::Options {
        site: option("site", init::site_name(&wanted.site))?,
        address: wanted.addresses.clone(),
        namespaces: option("allow-namespace", namespaces.collect())?,
        dir: None,
        scheduler: option("scheduler", scheduler)?,
        runtime: option("runtime", runtime)?,
        no_port,
        run_mode: None,
        partition: None,
    })
}

/// The mode that was asked for, or the best.
fn mode(wanted: &Install, found: &[Possible]) -> RunMode {
    wanted.run_mode.unwrap_or_else(|| choose(found))
}

impl Account {
    /// Installs the program, configures the agent and starts it.
    pub(super) async fn install(
        &self,
        wanted: &Install,
        steps: &mut Steps,
    ) -> Result<Installed, Ended> {
        let found = detect(&self.login).await;
        let mode = mode(wanted, &found);
        // An agent in a job changes its host; `connect` on the login node relays to its port.
        let no_port = wanted.addresses.is_empty() && !mode.is_in_job();
        let checked = options(wanted, no_port).and_then(|options| {
            self.same_site(&options.site)?;
            Ok(options)
        });
        let options = checked.map_err(|failed| steps.bad("options", failed))?;
        steps.add("program", self.put_program(wanted.length))?;
        let config = self.configure(&options, steps)?;
        let bundle = self
            .bundle()
            .map_err(|failed| steps.bad("bundle", failed))?;
        steps.add(
            "run mode",
            self.keep_running(mode, wanted, &config, &found).await,
        )?;
        if matches!(mode, RunMode::Systemd | RunMode::Cron) {
            steps.add("agent", wait_for_newer(0, &config).await)?;
        }
        Ok(Installed {
            bundle,
            run_mode: Some(mode),
            program: self.link().display().to_string(),
            listens: config.listen.kubelet.is_some(),
            namespaces: config.policy.namespaces,
        })
    }

    /// One account runs the agent of one site.
    fn same_site(&self, site: &str) -> Result<(), Failed> {
        if !self.site_file().exists() {
            return Ok(());
        }
        let config = self.config().map_err(Failed::of("fix the site file"))?;
        if config.site == site {
            return Ok(());
        }
        Err(Failed::new(
            format!(
                "--site: this account already has the agent of site {}",
                config.site
            ),
            "use that name, or another account",
        ))
    }

    fn configure(&self, options: &init::Options, steps: &mut Steps) -> Result<Config, Ended> {
        let there = self.site_file().exists();
        let found = init::Found::look(init::Environment::own());
        let done = init::run(options, &self.home.home, &found)
            .map_err(Failed::of("look at ~/.config/knoc on the login node"))
            .and_then(|_| {
                self.config()
                    .map_err(Failed::of("fix the site file on the login node"))
            });
        let config = done.map_err(|failed| steps.bad("configuration", failed))?;
        let path = self.site_file();
        let text = if there {
            let other =
                !options.namespaces.is_empty() && options.namespaces != config.policy.namespaces;
            let note = if other {
                "; its namespaces are others than those of --allow-namespace: change [policy] there"
            } else {
                ""
            };
            format!("{} is kept as it is{note}", path.display())
        } else {
            format!(
                "{} and the certificates beside it are written",
                path.display()
            )
        };
        steps.good("configuration", text);
        Ok(config)
    }

    /// The kubelet's bundle.
    fn bundle(&self) -> Result<String, Failed> {
        let path = self.home.home.join(".config/knoc/kubelet-bundle.yaml");
        let cure = "move the file away on the login node and run the command again";
        let bytes = knoc_contract::jobdir::atomic::read(&path).map_err(Failed::of(cure))?;
        String::from_utf8(bytes).map_err(Failed::of(cure))
    }

    async fn keep_running(
        &self,
        mode: RunMode,
        wanted: &Install,
        config: &Config,
        found: &[Possible],
    ) -> Result<String, Failed> {
        let agent = self.agent(config);
        let cure = "choose another one by --run-mode; `knoc-agent run-mode` on the login node lists what the site allows";
        if mode == RunMode::Systemd {
            let unit = text::unit(&agent).map_err(Failed::of(cure))?;
            self.keep_unit(&unit).map_err(Failed::of(cure))?;
        }
        let partition = wanted.partition.as_deref();
        let set_up = cli::change(cli::Wanted::Mode(mode), &agent, partition, &self.login).await;
        let (_, done) = set_up.map_err(|error| {
            let why = found.iter().find(|it| it.mode == mode && !it.allowed);
            let why = why.map_or_else(String::new, |it| format!(" ({})", it.why));
            Failed::new(format!("{}{why}", chain(&error)), cure)
        })?;
        Ok(format!("{mode}: {done}"))
    }

    /// Installs the program beside the old one and restarts the agent.
    pub(super) async fn upgrade(&self, length: u64, steps: &mut Steps) -> Result<(), Ended> {
        let config = self
            .config()
            .map_err(Failed::of("run `knocctl agent install` first"));
        let config = config.map_err(|failed| steps.bad("configuration", failed))?;
        let before = Running::look(&config.state_dir);
        let before = before.map_err(|failed| steps.bad("agent", failed))?;
        steps.add("program", self.put_program(length))?;
        let done = self.restart(&config, &before).await;
        steps.add("agent", done)
    }

    async fn restart(&self, config: &Config, before: &Running) -> Result<String, Failed> {
        let agent = self.agent(config);
        let cure = "restart the agent yourself: jobs do not notice";
        let modes = modes(self, &agent).await;
        if modes.contains(&RunMode::Systemd) {
            self.renew_unit(&agent).map_err(Failed::of(cure))?;
        }
        for mode in &modes {
            let restarted = restart_by_mode(*mode, &self.login).await;
            if !restarted.map_err(Failed::of(cure))? {
                continue;
            }
            return if mode.is_in_job() {
                Ok(
                    "the job with the old version ends, and the next one starts the new version"
                        .to_owned(),
                )
            } else {
                wait_for_newer(before.epoch(), config).await
            };
        }
        match before {
            Running::No => Ok("no agent runs; the next start uses the new version".to_owned()),
            Running::Elsewhere(lease) => Err(Failed::new(
                before.describe(),
                &format!(
                    "log in to that host to restart it: knocctl agent upgrade --ssh {}",
                    lease.host
                ),
            )),
            Running::Here { .. } => {
                stop(before, &config.state_dir).await?;
                let started = start_detached(&agent, &self.login).await;
                started.map_err(Failed::of(cure))?;
                wait_for_newer(before.epoch(), config).await
            }
        }
    }

    /// Replaces the unit by that of this version, unless the user has changed it.
    fn renew_unit(
        &self,
        agent: &crate::run_mode::Agent,
    ) -> Result<(), crate::run_mode::RunModeError> {
        self.keep_unit(&text::unit(agent)?)?;
        crate::run_mode::write_unit(agent).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_option_is_named_as_it_was_given() {
        let wanted = |change: fn(&mut Install)| {
            let mut wanted = Install {
                site: "hpc".into(),
                ..Install::default()
            };
            change(&mut wanted);
            options(&wanted, true)
        };
        assert!(wanted(|_| ()).unwrap().no_port);
        for (change, name) in [
            (
                (|it: &mut Install| it.site = "Not a label".into()) as fn(&mut Install),
                "--site",
            ),
            (|it| it.namespaces = vec!["A/b".into()], "--allow-namespace"),
            (|it| it.scheduler = Some("pbs".into()), "--scheduler"),
            (|it| it.runtime = Some("docker".into()), "--runtime"),
        ] {
            let failed = wanted(change).unwrap_err();
            assert!(failed.detail.starts_with(name), "{failed:?}");
        }
    }
}
