//! The container's program in the benchmarks: `knoc-stamp [MILLISECONDS]` prints the real-time clock
//! in nanoseconds as its first act, sleeps, and prints it again as its last line. Standard library
//! only: the benchmark compiles this one file for musl and puts it into an image.

use std::io::Write;
use std::time::{Duration, SystemTime};

fn main() -> std::io::Result<()> {
    stamp("start")?;
    let milliseconds = std::env::args().nth(1).and_then(|text| text.parse().ok());
    #[expect(clippy::disallowed_methods, reason = "a program without a runtime")]
    std::thread::sleep(Duration::from_millis(milliseconds.unwrap_or(0)));
    stamp("end")
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
