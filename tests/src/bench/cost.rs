//! What pods cost the API server: requests, and its processor time.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Event;
use kube::api::{Api, ListParams};

use super::bed::Bed;
use super::machine::{Clock, Spent};

/// The place of the API server in [`Spent`].
const API_SERVER: usize = 3;

/// The requests for which KNoC pays: status patches of pods, and Events of its own, in the form of the API server's
/// metrics.
const PATCHES: &[(&str, &str)] = &[
    ("verb", "PATCH"),
    ("resource", "pods"),
    ("subresource", "status"),
];
const EVENTS: &[(&str, &str)] = &[("group", ""), ("resource", "events")];
const EVENT_WRITES: [&str; 2] = ["POST", "PATCH"];

/// Events are written after the statuses, so the count is complete once it did not change for this long.
const QUIET: Duration = Duration::from_secs(2);
/// How often the count may change.
const CHANGES: usize = 60;

/// The API server's counters at one moment.
#[derive(Debug)]
pub(super) struct Counters {
    patches: f64,
    events: f64,
    clock: Clock,
}

/// What was spent on some pods.
#[derive(Debug, Default)]
pub(super) struct Cost {
    pub(super) pods: f64,
    pub(super) patches: f64,
    pub(super) events: f64,
    /// Processor time of the parts, in seconds.
    pub(super) spent: Spent,
}

impl Counters {
    /// Reads the counters of the API server.
    pub(super) async fn read(bed: &Bed) -> anyhow::Result<Self> {
        let answer = bed.world.kubectl(["get", "--raw", "/metrics"]).ok().await?;
        let text = answer.text();
        let events = EVENT_WRITES.iter().map(|verb| {
            let labels = [EVENTS, &[("verb", verb)]].concat();
            requests(&text, &labels)
        });
        Ok(Self {
            patches: requests(&text, PATCHES)?,
            events: events.sum::<anyhow::Result<f64>>()?,
            clock: Clock::read(),
        })
    }
}

impl Cost {
    /// Adds what was spent on `pods` pods since `before`.
    #[expect(clippy::cast_precision_loss, reason = "hundreds of pods")]
    pub(super) async fn add(
        &mut self,
        bed: &Bed,
        pods: usize,
        before: &Counters,
    ) -> anyhow::Result<()> {
        quiet(bed).await?;
        // The metrics themselves cost the API server time, so its clock is read before them.
        Clock::read().add_since(&before.clock, &mut self.spent);
        let now = Counters::read(bed).await?;
        self.pods += pods as f64;
        self.patches += now.patches - before.patches;
        self.events += now.events - before.events;
        Ok(())
    }

    /// For each pod: status patches, Events, and milliseconds of the API server's processor time.
    pub(super) fn for_each(&self) -> [f64; 3] {
        let server = self.spent[API_SERVER] * 1000.0;
        [self.patches, self.events, server].map(|sum| sum / self.pods.max(1.0))
    }
}

/// Waits until no more Events are written in the namespace of the pods.
async fn quiet(bed: &Bed) -> anyhow::Result<()> {
    let events: Api<Event> = bed.world.api();
    let one = ListParams::default().limit(1);
    let mut count = None;
    for _ in 0..CHANGES {
        let list = events.list(&one).await?;
        let left = list.metadata.remaining_item_count.unwrap_or_default();
        let now = Some((list.items.len(), left));
        if now == count {
            return Ok(());
        }
        count = now;
        // This sleep is the time for which nothing must change.
        tokio::time::sleep(QUIET).await;
    }
    anyhow::bail!("Events are still being written: {count:?}")
}

/// PURE: how many requests with these labels the API server has answered.
fn requests(metrics: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
    let mut sum = 0.0;
    for line in metrics.lines() {
        let Some((found, value)) = line
            .strip_prefix("apiserver_request_total{")
            .and_then(|rest| rest.rsplit_once("} "))
        else {
            continue;
        };
        let has = |(name, value): &(&str, &str)| {
            let label = format!("{name}=\"{value}\"");
            found.split(',').any(|one| one == label)
        };
        if labels.iter().all(has) {
            let value: f64 = value.parse().with_context(|| line.to_owned())?;
            sum += value;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_summed_over_all_codes() {
        let metrics = r#"# HELP apiserver_request_total Counter of apiserver requests
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 40
apiserver_request_total{code="409",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="status",verb="PATCH",version="v1"} 2
apiserver_request_total{code="200",component="apiserver",dry_run="",group="",resource="pods",scope="resource",subresource="",verb="PATCH",version="v1"} 7
apiserver_request_total{code="201",component="apiserver",dry_run="",group="events.k8s.io",resource="events",scope="resource",subresource="",verb="POST",version="v1"} 9
apiserver_request_total{code="201",component="apiserver",dry_run="",group="",resource="events",scope="resource",subresource="",verb="POST",version="v1"} 1.5e+02
"#;
        let close =
            |found: anyhow::Result<f64>, wanted: f64| (found.unwrap() - wanted).abs() < 1e-9;
        assert!(close(requests(metrics, PATCHES), 42.0));
        let posts = [EVENTS, &[("verb", "POST")]].concat();
        assert!(close(requests(metrics, &posts), 150.0));
    }
}
