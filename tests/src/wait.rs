//! Waiting for a state, and checking that a state lasts. Errors contain the last state that was seen.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

use anyhow::bail;

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Calls `look` until it returns `Ok(value)`. Its `Err` describes the current state and is part of the error of a time-out.
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

/// Checks for the whole `span` that a state does not change: `look` returns `Ok(())` as long as it holds. Its `Err` describes
/// the other state, and fails at once.
pub async fn stays<E: Display>(
    what: &str,
    span: Duration,
    mut look: impl AsyncFnMut() -> Result<(), E>,
) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        if let Err(state) = look().await {
            let held = began.elapsed();
            bail!("{what}: no longer so after {held:?} of {span:?}; the state now: {state:#}");
        }
        if began.elapsed() >= span {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPAN: Duration = Duration::from_millis(250);

    #[tokio::test]
    async fn a_state_that_lasts_is_looked_at_for_the_whole_span() {
        let began = Instant::now();
        let mut looks = 0;
        stays("it holds", SPAN, async || {
            looks += 1;
            Ok::<(), String>(())
        })
        .await
        .unwrap();
        assert!(
            began.elapsed() >= SPAN && looks >= 3,
            "{looks} looks in {:?}",
            began.elapsed()
        );
    }

    #[tokio::test]
    async fn a_state_that_changes_fails_at_once_and_is_shown() {
        let mut looks = 0;
        let error = stays("it holds", Duration::from_hours(1), async || {
            looks += 1;
            if looks < 3 { Ok(()) } else { Err("it is over") }
        })
        .await
        .unwrap_err();
        let shown = error.to_string();
        assert!(
            shown.starts_with("it holds: no longer so after") && shown.ends_with("it is over"),
            "{shown}"
        );
    }
}
