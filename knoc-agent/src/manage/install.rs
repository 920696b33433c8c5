//! Installation and upgrade.

use knoc_proto::{
    error::chain,
    manage::{Install, Installed, RunMode},
};

use super::{
    Account, Ended, Failed, Steps,
    programs::Put,
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

/// What is to be done about the agent after an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Something else starts it later, or it runs the program that is installed.
    Nothing,
    /// It has been started, and holds the lease or soon will.
    Wait,
    /// It runs another program than the one that is installed.
    Restart,
}

/// PURE: what is to be done about the agent, which was looked at before and after its run mode was set up. `renewed`: whether
/// the program that is installed is another one than before.
fn next(mode: RunMode, (before, now): (&Running, &Running), renewed: bool) -> Next {
    let starts = matches!(mode, RunMode::Systemd | RunMode::Cron);
    let is_old = match now {
        // What has been started since runs the program that is installed.
        Running::No => false,
        Running::Here { .. } | Running::Elsewhere(_) if now.epoch() > before.epoch() => false,
        Running::Here { lease, .. } | Running::Elsewhere(lease) => {
            renewed || lease.version.as_deref() != Some(env!("CARGO_PKG_VERSION"))
        }
    };
    if is_old {
        Next::Restart
    } else if starts {
        Next::Wait
    } else {
        Next::Nothing
    }
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
        let put = self.put(wanted.length, steps)?;
        let config = self.configure(&options, steps)?;
        let bundle = self
            .bundle()
            .map_err(|failed| steps.bad("bundle", failed))?;
        let before = Running::look(&config.state_dir);
        let before = before.map_err(|failed| steps.bad("agent", failed))?;
        steps.add(
            "run mode",
            self.keep_running(mode, wanted, &config, &found).await,
        )?;
        let now = Running::look(&config.state_dir);
        let now = now.map_err(|failed| steps.bad("agent", failed))?;
        match next(mode, (&before, &now), put.renewed) {
            Next::Nothing => {}
            Next::Wait => steps.add("agent", wait_for_newer(0, &config).await)?,
            Next::Restart => steps.add("agent", self.restart(&config, &now).await)?,
        }
        Ok(Installed {
            bundle,
            run_mode: Some(mode),
            program: self.link().display().to_string(),
            listens: config.listen.kubelet.is_some(),
            namespaces: config.policy.namespaces,
        })
    }

    /// Installs the program.
    fn put(&self, length: u64, steps: &mut Steps) -> Result<Put, Ended> {
        let put = self.put_program(length);
        let put = put.map_err(|failed| steps.bad("program", failed))?;
        steps.good("program", put.done.as_str());
        Ok(put)
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
        self.put(length, steps)?;
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
        if let Running::Elsewhere(lease) = before
            && !modes.iter().any(|mode| mode.is_in_job())
        {
            return Err(Failed::new(
                before.describe(),
                &format!(
                    "log in to that host to restart it: knocctl agent upgrade --ssh {}",
                    lease.host
                ),
            ));
        }
        for mode in &modes {
            let restarted = restart_by_mode(*mode, &self.login).await;
            if !restarted.map_err(Failed::of(cure))? {
                continue;
            }
            // It may have been started otherwise, and the new one waits for its end.
            if Running::look(&config.state_dir)?.is(before) {
                stop(before, &config.state_dir).await?;
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
            Running::No | Running::Elsewhere(_) => {
                Ok("no agent runs; the next start uses the new version".to_owned())
            }
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
    use knoc_contract::jobdir::schema::Lease;

    use super::*;

    #[test]
    fn an_agent_of_another_program_is_restarted() {
        use RunMode::{Cron, Job, OnDemand, Systemd};
        let lease = |version: Option<&str>, epoch| Lease {
            host: "login".into(),
            boot_id: String::new(),
            pid: 7,
            epoch,
            heartbeat: 1,
            version: version.map(str::to_owned),
        };
        let here = |version, epoch| Running::Here {
            pid: 7,
            lease: lease(version, epoch),
        };
        let own = Some(env!("CARGO_PKG_VERSION"));
        let after = |mode, now: &Running, renewed| next(mode, (now, now), renewed);
        for (running, renewed, wanted) in [
            (here(own, 5), false, Next::Wait),
            (here(own, 5), true, Next::Restart),
            (here(Some("0.0.1"), 5), false, Next::Restart),
            (here(None, 5), false, Next::Restart),
            (Running::Elsewhere(lease(None, 5)), false, Next::Restart),
            (Running::No, true, Next::Wait),
        ] {
            assert_eq!(after(Systemd, &running, renewed), wanted, "{running:?}");
        }
        assert_eq!(after(Job, &here(own, 5), true), Next::Restart);
        assert_eq!(after(OnDemand, &Running::No, true), Next::Nothing);
        assert_eq!(after(OnDemand, &here(own, 5), false), Next::Nothing);
        // The run mode has started it just now.
        let started = next(Cron, (&Running::No, &here(own, 5)), true);
        assert_eq!(started, Next::Wait);
    }

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
