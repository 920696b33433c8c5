//! The supervisor's part in probes and hooks: starts their tasks, and takes what they tell.

use std::sync::Arc;

use knoc_proto::pb;

use super::{
    super::{
        container::{News, Program, Told},
        health::{Change, Kind},
        plan::Liveness,
        probes::Probed,
        role::{RestartRule, SlotId},
    },
    Supervisor,
    slot::Slot,
};

impl Supervisor {
    /// The postStart hook and the probes of a program that has just started.
    pub(super) fn watch_health(&mut self, id: SlotId) {
        if self.stop.is_some() {
            return;
        }
        let Some((slot, probed)) = self.probed(id) else {
            return;
        };
        if Probed::needs(&slot.spec.container) {
            let (stop, end) = slot.begin_probing();
            self.helpers.spawn(async move {
                Box::pin(end.run_until_cancelled(probed.run(stop))).await;
            });
        }
    }

    /// The preStop hook of a program that is to be stopped.
    pub(super) fn run_pre_stop(&mut self, id: SlotId) {
        if let Some((slot, probed)) = self.probed(id) {
            let token = slot.begin_pre_stop();
            self.helpers.spawn(async move {
                token.run_until_cancelled(probed.pre_stop()).await;
            });
        }
    }

    /// A running program as its hooks and probes see it.
    fn probed(&mut self, id: SlotId) -> Option<(&mut Slot, Probed)> {
        let (pod, events) = (Arc::clone(&self.pod), self.events.0.clone());
        let values = self.values.clone().unwrap_or_default();
        let slot = self.slots.get_mut(id)?;
        let program: Arc<Program> = slot.program.clone()?;
        let probed = Probed {
            pod,
            spec: Arc::clone(&slot.spec),
            program,
            attempt: slot.history.attempt,
            values,
            events,
        };
        Some((slot, probed))
    }

    /// What the tasks of the running attempt tell.
    pub(super) fn health_news(&mut self, id: SlotId, news: News) {
        match news {
            News::Probed(change) => self.health_changed(id, change),
            News::PostStarted { succeeded } => self.post_started(id, succeeded),
            News::PreStopped { succeeded } => {
                if let Some(slot) = self.slots.get_mut(id) {
                    slot.pre_stopped();
                }
                if !succeeded {
                    self.tell(id, "FailedPreStopHook", "PreStopHook failed".to_owned());
                }
            }
            News::Told(told) => self.tell_counted(id, told),
            // The supervisor itself takes these.
            News::Running { .. } | News::Lost(_) | News::Unmounted(_) => {}
        }
    }

    fn health_changed(&mut self, id: SlotId, change: Change) {
        let grace = self.pod.spec().grace();
        let now = self.now();
        let Some(slot) = self.slots.get_mut(id) else {
            return;
        };
        let own = match change {
            Change::Failed(kind) => kind.of(&slot.spec.container).and_then(pb::Probe::grace),
            Change::Started | Change::Ready(_) => None,
        };
        let kill_at = now + own.unwrap_or(grace);
        if slot.probed(change, Liveness::Failed { kill_at })
            && let Change::Failed(kind) = change
        {
            let message = killing(slot.spec.name(), kind, slot.spec.restart);
            self.tell_killing(id, message);
        }
    }

    fn post_started(&mut self, id: SlotId, succeeded: bool) {
        let kill_at = self.now() + self.pod.spec().grace();
        let Some(slot) = self.slots.get_mut(id) else {
            return;
        };
        if slot.post_started(succeeded, Liveness::Failed { kill_at }) && !succeeded {
            self.tell(id, "FailedPostStartHook", "PostStartHook failed".to_owned());
            self.tell_killing(id, "FailedPostStartHook".to_owned());
        }
    }

    fn tell(&mut self, id: SlotId, reason: &str, message: String) {
        if let Some(slot) = self.slots.get_mut(id) {
            self.publisher.note(reason, message, slot.spec.name());
        }
    }

    /// The pod is about to be ended because of its deadline.
    pub(super) fn tell_deadline(&mut self, message: &str) {
        self.publisher.add_note(pb::PodNote {
            reason: "DeadlineExceeded".to_owned(),
            message: message.to_owned(),
            ..pb::PodNote::default()
        });
    }

    fn tell_killing(&mut self, id: SlotId, message: String) {
        if let Some(slot) = self.slots.get_mut(id) {
            self.publisher.add_note(pb::PodNote {
                reason: "Killing".to_owned(),
                message,
                container: slot.spec.name().to_owned(),
                ..pb::PodNote::default()
            });
        }
    }

    fn tell_counted(&mut self, id: SlotId, told: Told) {
        if let Some(slot) = self.slots.get_mut(id) {
            self.publisher.add_note(pb::PodNote {
                warning: told.warning,
                reason: told.reason.to_owned(),
                message: told.message,
                container: slot.spec.name().to_owned(),
                count: told.count,
                ..pb::PodNote::default()
            });
        }
    }
}

/// PURE: why a container is stopped, in Kubernetes' own words.
fn killing(name: &str, kind: Kind, restart: RestartRule) -> String {
    let kind = kind.word();
    let after = match restart {
        RestartRule::Always | RestartRule::All | RestartRule::OnFailure => ", will be restarted",
        RestartRule::Never => "",
    };
    format!("Container {name} failed {kind} probe{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_container_is_stopped_is_said_as_a_kubelet_says_it() {
        assert_eq!(
            killing("main", Kind::Liveness, RestartRule::Always),
            "Container main failed liveness probe, will be restarted"
        );
        assert_eq!(
            killing("main", Kind::Startup, RestartRule::Never),
            "Container main failed startup probe"
        );
    }
}
