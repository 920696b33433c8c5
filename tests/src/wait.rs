//! Waiting on levels: until something is so, at most so long, and then with its last state in the error.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use anyhow::bail;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks until `look` answers `Ok(value)`. Its `Err` is the state as it is, and stands in the error of a time-out.
pub async fn wait_for<T, E: Display>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let began = Instant::now();
    loop {
        match look().await {
            Ok(value) => return Ok(value),
            Err(state) if began.elapsed() > limit => {
                bail!("{what}: not so after {limit:?}; the last state: {state:#}")
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
