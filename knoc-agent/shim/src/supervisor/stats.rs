//! What the pod and its containers use, computed from a measurement of processes and from the job's cgroup.

use jiff::Timestamp;
use knoc_proto::pb;

use super::{
    super::{
        report::nanos,
        usage::{self, Counters, Resident, Sample},
    },
    Supervisor,
};

impl Supervisor {
    /// What the containers and the pod use, given a measurement.
    pub(super) fn stats(&mut self, samples: &[Sample]) -> pb::PodStats {
        let time = nanos(Timestamp::now());
        let mut containers = Vec::new();
        for slot in self.slots.iter_mut() {
            let (Some(program), Some(started_at)) = (&slot.program, slot.history.started_at) else {
                continue;
            };
            let members = usage::members(samples, program.identity, program.isolated);
            if members.is_empty() {
                // It has ended since; its last counters come with its end.
                continue;
            }
            let counters = slot.account.take(&members);
            containers.push(pb::ContainerStats {
                name: slot.spec.name().to_owned(),
                started_at: nanos(started_at),
                usage: Some(of_processes(time, counters, &members)),
            });
        }
        let spec = self.pod.spec();
        pb::PodStats {
            uid: spec.uid.clone(),
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            started_at: self.publisher.started_at(),
            containers,
            usage: Some(self.usage(samples)),
        }
    }

    /// What the whole pod uses: from the job's cgroup, or else the sum over the containers.
    pub(super) fn usage(&mut self, samples: &[Sample]) -> pb::Usage {
        let time = nanos(Timestamp::now());
        let attempts = self.slots.iter();
        let mut counters: Counters = attempts
            .map(|slot| slot.used_before + slot.account.shown())
            .sum();
        let running = self.slots.iter().filter_map(|slot| slot.program.as_ref());
        let members: Vec<Sample> = running
            .flat_map(|program| usage::members(samples, program.identity, program.isolated))
            .collect();
        let cgroup = &self.pod.cgroup;
        if let Some(cpu) = cgroup.cpu() {
            counters.cpu = cpu;
        }
        let memory = cgroup.memory();
        if let Some((_, faults)) = memory {
            counters = Counters {
                cpu: counters.cpu,
                ..faults
            };
        }
        // The source may change between two calls, but counters must not decrease.
        self.shown = self.shown.max(counters);
        let mut usage = of_processes(time, self.shown, &members);
        if let Some((memory, _)) = memory {
            usage.working_set_bytes = memory.working_set;
            usage.usage_bytes = memory.usage;
            usage.rss_bytes = memory.rss;
            usage.swap_bytes = memory.swap;
        }
        usage
    }
}

/// PURE: the usage as far as processes show it, which is without the file cache.
fn of_processes(time: i64, counters: Counters, members: &[Sample]) -> pb::Usage {
    let Resident {
        working_set,
        anonymous,
        swapped,
    } = usage::resident(members);
    pb::Usage {
        time,
        cpu_nanoseconds: counters.cpu,
        working_set_bytes: working_set,
        usage_bytes: working_set,
        rss_bytes: anonymous,
        page_faults: counters.faults,
        major_page_faults: counters.major,
        swap_bytes: swapped,
        process_count: u32::try_from(members.len()).unwrap_or(u32::MAX),
    }
}
