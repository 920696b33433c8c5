//! Series of milliseconds and their percentiles.

/// Measured times in milliseconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Series(Vec<f64>);

impl Series {
    pub(super) fn push(&mut self, milliseconds: f64) {
        self.0.push(milliseconds);
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn median(&self) -> f64 {
        self.at(50)
    }

    /// The smallest sample that `percent` percent of the samples do not exceed; 0 if there are no samples.
    pub(super) fn at(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0.0)
    }

    pub(super) fn max(&self) -> f64 {
        self.at(100)
    }
}

/// Nanoseconds between two moments, in milliseconds.
#[expect(
    clippy::cast_precision_loss,
    reason = "spans of minutes, shown with one digit"
)]
pub(super) fn span(from: i64, to: i64) -> f64 {
    (to - from) as f64 / 1e6
}

/// The current time in Unix nanoseconds.
pub(super) fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Parses bash's `$EPOCHREALTIME`, such as `1700000000.123456`, to Unix nanoseconds.
pub(super) fn bash_time(text: &str) -> Option<i64> {
    let (seconds, micros) = text.split_once(['.', ','])?;
    let micros: i64 = format!("{micros:0<6}").get(..6)?.parse().ok()?;
    Some(seconds.parse::<i64>().ok()? * 1_000_000_000 + micros * 1000)
}

#[cfg(test)]
mod tests {
    use super::{Series, bash_time};

    #[test]
    fn percentiles_are_samples() {
        let mut series = Series::default();
        for number in [5.0, 1.0, 4.0, 2.0, 3.0] {
            series.push(number);
        }
        let close = |left: f64, right: f64| (left - right).abs() < 1e-9;
        assert!(close(series.median(), 3.0));
        assert!(close(series.at(99), 5.0));
        assert!(close(Series::default().median(), 0.0));
    }

    #[test]
    fn bash_prints_microseconds() {
        assert_eq!(
            bash_time("1700000000.123456"),
            Some(1_700_000_000_123_456_000)
        );
        assert_eq!(bash_time("nonsense"), None);
    }
}
