//! Removal.

use knoc_proto::manage::RunMode;

use super::{
    Account, Ended, Failed, Steps,
    running::{Running, pods, stop},
};
use crate::{config::Config, run_mode::tear_down};

impl Account {
    /// Stops the agent and removes its programs. Configuration, state and jobs are left.
    pub(super) async fn uninstall(&self, force: bool, steps: &mut Steps) -> Result<(), Ended> {
        let mut left = vec![
            "the authorized_keys of this account, which may have a key of the kubelet".to_owned(),
        ];
        if self.site_file().exists() {
            let config = self.config().map_err(Failed::of("fix the site file"));
            let config = config.map_err(|failed| steps.bad("configuration", failed))?;
            steps.add("jobs", no_pods(&config, force))?;
            steps.add("run mode", self.take_away(&config).await)?;
            steps.add("agent", halt(&config).await)?;
            let folder = self.home.home.join(".config/knoc");
            left.push(format!(
                "{} with the site file and the CA's key",
                folder.display()
            ));
            let state = config.state_dir.display();
            left.push(format!("{state} with records, logs and images"));
        }
        let gone = self.remove_programs();
        steps.add("programs", gone.map_err(Failed::of("remove them yourself")))?;
        steps.good("left", left.join("; "));
        Ok(())
    }

    async fn take_away(&self, config: &Config) -> Result<String, Failed> {
        let agent = self.agent(config);
        let mut notes = Vec::new();
        for mode in RunMode::ALL {
            let taken = tear_down(mode, &agent, &self.login).await;
            notes.extend(taken.map_err(Failed::of("remove what starts the agent yourself"))?);
        }
        Ok(if notes.is_empty() {
            "nothing starts the agent any more".to_owned()
        } else {
            notes.join("; ")
        })
    }
}

fn no_pods(config: &Config, force: bool) -> Result<String, Failed> {
    let (all, live) = pods(&config.state_dir)?;
    if live > 0 && !force {
        return Err(Failed::new(
            format!("{live} of {all} pods may have a job, which nobody would watch any more"),
            "delete the pods first (kubectl, or `knocctl delete`), or use --force: their jobs then go on until they end",
        ));
    }
    Ok(if live > 0 {
        format!("{live} pods may have a job; their jobs go on until they end")
    } else {
        format!("no pod has a job ({all} records)")
    })
}

async fn halt(config: &Config) -> Result<String, Failed> {
    let running = Running::look(&config.state_dir)?;
    if let Running::Elsewhere(lease) = &running {
        let host = &lease.host;
        return Err(Failed::new(
            running.describe(),
            &format!("stop it there: knocctl agent uninstall --ssh {host}"),
        ));
    }
    stop(&running, &config.state_dir).await
}
