//! How far a pull has come, for those who wait for it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// What a pull does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Waits until fewer images are being pulled.
    Waits,
    Downloads,
    /// Checks the layers, or waits until fewer images are being converted.
    Checks,
    Converts,
}

/// One pull. All who wait for it share this.
#[derive(Debug)]
pub(super) struct Progress {
    /// The size of the image by its manifest.
    bytes: u64,
    received: AtomicU64,
    step: Mutex<(Step, Instant)>,
    /// How long it waited before it began.
    waited: OnceLock<Duration>,
    /// The name of the Slurm job that converts it.
    job: OnceLock<String>,
}

impl Progress {
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            bytes,
            received: AtomicU64::new(0),
            step: Mutex::new((Step::Waits, Instant::now())),
            waited: OnceLock::new(),
            job: OnceLock::new(),
        }
    }

    /// A Slurm job of this name is to convert it.
    pub(super) fn by_job(&self, name: &str) {
        self.job.get_or_init(|| name.to_owned());
    }

    pub(super) fn enter(&self, step: Step) {
        let mut current = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 == Step::Waits {
            // Only the first change of the step ends the wait.
            self.waited.get_or_init(|| current.1.elapsed());
        }
        if step == Step::Downloads {
            self.received.store(0, Ordering::Relaxed);
        }
        *current = (step, Instant::now());
    }

    pub(super) fn receive(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many bytes of its layers have been received.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (step, since) = *self.step.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = since.elapsed().as_secs();
        let received = self.received.load(Ordering::Relaxed);
        match step {
            Step::Waits => write!(
                f,
                "waiting for {seconds} s until fewer images are being pulled"
            ),
            Step::Downloads => write!(
                f,
                "{} of {} downloaded in {seconds} s",
                size(received),
                size(self.bytes)
            ),
            Step::Checks => write!(f, "checking its layers for {seconds} s"),
            Step::Converts => match self.job.get() {
                None => write!(f, "converting it for {seconds} s"),
                Some(job) => write!(
                    f,
                    "waiting for {seconds} s for the Slurm job {job} to convert it"
                ),
            },
        }
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let unit = units.into_iter().find(|(_, unit)| bytes >= *unit);
    match unit {
        None => format!("{bytes} B"),
        Some((name, unit)) => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
    }
}

/// The view of one caller on the pull that it waits for.
#[derive(Debug, Default)]
pub struct PullWatch(Mutex<Option<Arc<Progress>>>);

impl PullWatch {
    pub(super) fn follow(&self, progress: Arc<Progress>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
    }

    /// How far the pull has come, in words; `None` if the image was not pulled.
    #[must_use]
    pub fn progress(&self) -> Option<String> {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map(ToString::to_string)
    }

    /// For the pull that brought the image: how long it waited before it began, and the size of the image.
    #[must_use]
    pub fn pulled(&self) -> Option<(Duration, u64)> {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let progress = current.as_ref()?;
        let waited = progress.waited.get().copied().unwrap_or_default();
        Some((waited, progress.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_step_says_how_far_it_is() {
        let (watch, progress) = (PullWatch::default(), Arc::new(Progress::new(5 << 30)));
        assert_eq!(watch.progress(), None);
        assert_eq!(watch.pulled(), None);
        watch.follow(Arc::clone(&progress));
        tokio::time::advance(Duration::from_secs(3)).await;
        let said = || watch.progress().unwrap();
        assert_eq!(
            said(),
            "waiting for 3 s until fewer images are being pulled"
        );
        progress.enter(Step::Downloads);
        progress.receive((1 << 30) + (1 << 29));
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(said(), "1.5 GiB of 5.0 GiB downloaded in 60 s");
        progress.enter(Step::Checks);
        assert_eq!(said(), "checking its layers for 0 s");
        progress.enter(Step::Converts);
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(said(), "converting it for 7 s");
        progress.by_job("knoc_image_7");
        assert_eq!(
            said(),
            "waiting for 7 s for the Slurm job knoc_image_7 to convert it"
        );
        assert_eq!(watch.pulled(), Some((Duration::from_secs(3), 5 << 30)));
    }

    #[test]
    fn sizes_for_people() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_600_000, "1.5 MiB"),
        ];
        for (bytes, expected) in cases {
            assert_eq!(size(bytes), expected);
        }
    }
}
