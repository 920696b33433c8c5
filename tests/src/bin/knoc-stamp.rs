//! The container's program in the benchmarks: `knoc-stamp [MILLISECONDS [TIMES]]` prints the real-time clock
//! in nanoseconds at once, sleeps TIMES times (once by default), and prints the clock again after each sleep. It uses only the
//! standard library: the benchmark compiles this file for musl and puts it into an image.

use std::io::Write;
use std::time::{Duration, SystemTime};

fn main() -> std::io::Result<()> {
    stamp("start")?;
    let number = |at| {
        std::env::args()
            .nth(at)
            .and_then(|text| text.parse::<u64>().ok())
    };
    let (milliseconds, times) = (number(1).unwrap_or(0), number(2).unwrap_or(1));
    for left in (0..times).rev() {
        #[expect(clippy::disallowed_methods, reason = "a program without a runtime")]
        std::thread::sleep(Duration::from_millis(milliseconds));
        stamp(if left == 0 { "end" } else { "tick" })?;
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "the clock is what this program prints"
)]
fn stamp(word: &str) -> std::io::Result<()> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{word} {}", now.as_nanos())?;
    stdout.flush()
}
