//! The network of a pod on the real stack: one of its own, and that of the compute node.

use std::time::Duration;

use anyhow::ensure;
use knoc_tests::{PodBuilder, World, wait_for, world::SOON};
use serde_json::json;

/// Serves `text` on port 80 of the loopback interface, for one connection after the other.
fn web(text: &str) -> String {
    format!("while true; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\n{text}' | nc -l -p 80 -s 127.0.0.1; done")
}

fn private(name: &str) -> PodBuilder {
    PodBuilder::new(name).annotation("knoc.io/network", "private")
}
