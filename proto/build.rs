//! Generates the gRPC code from `knoc/v1/*.proto` with protox, which replaces `protoc`.
use std::{env, fs, path::PathBuf};

use prost::Message as _;

#[expect(
    clippy::disallowed_methods,
    reason = "OUT_DIR belongs to this build alone"
)]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "knoc/v1/pod.proto",
        "knoc/v1/stats.proto",
        "knoc/v1/link.proto",
        "knoc/v1/egress.proto",
        "knoc/v1/mesh.proto",
        "knoc/v1/agent.proto",
        "knoc/v1/shim.proto",
        "knoc/v1/rank.proto",
    ];
    println!("cargo:rerun-if-changed=knoc/v1");
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("knoc.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        // Its own implementation hides the password.
        .skip_debug(["knoc.v1.RegistryLogin"])
        .compile_fds(descriptors)?;
    Ok(())
}
