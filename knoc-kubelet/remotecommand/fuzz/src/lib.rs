//! The agent's decoders, from their own files, and the harnesses on them.

#![allow(
    dead_code,
    unused_imports,
    missing_docs,
    reason = "parts of larger crates"
)]

#[cfg(feature = "files")]
#[path = "../../../../knoc-agent/contract/src/jobdir"]
pub mod jobdir {
    pub mod decode;
    pub mod fuzzed;
}

#[cfg(feature = "logs")]
#[path = "../../../../knoc-agent/contract/src/logs"]
pub mod logs {
    pub mod cri;
    pub mod filter;
    pub mod fuzzed;
}

#[cfg(feature = "images")]
#[path = "../../../../knoc-agent/src/image"]
pub mod image {
    mod auth;
    mod digest;
    mod file;
    pub mod fuzzed;
    mod guard;
    mod manifest;
    mod unpacked;
}

/// What `image::guard` reads of the site file.
#[cfg(feature = "images")]
pub mod config {
    pub struct Registry {
        pub prefix: String,
        pub mirror: Option<String>,
        pub insecure: bool,
    }
}
